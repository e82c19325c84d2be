// What the kernels share: vectors of fp32 numbers, their exponential, dot products, large pages, the choice of a template
// by n.

#pragma once

#include <cstdint>
#include <cstring>

#include <sys/mman.h>

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

// As many numbers as a register holds, loaded from any address. Of longer vectors compilers make pieces that lie in
// memory between one operation and the next, which takes several times as long.
constexpr int lanes = LANES;
typedef float Lanes __attribute__((vector_size(4 * lanes)));
typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));

inline Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline float sum(Lanes x) {
#if LANES == 16
    x += SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    x += SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    x += SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    x += SHUFFLE(x, x, 2, 3, 0, 1);
    x += SHUFFLE(x, x, 1, 0, 3, 2);
#endif
    return x[0];
}

// e^x for x <= 0 (Cephes' polynomial, 1 to 2 ulp; 0 below -87).
inline Lanes exponential(Lanes x) {
    const Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
    const Lanes whole = __builtin_convertvector(n, Lanes);
    const Lanes r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Lanes value = p * (Lanes)(((Words)n + 127u) << 23);
    return (Lanes)((Words)value & ~(Words)(x < -87.0f));
}

// out[k] = a . rows[k] for rows [count, width]: a is read once, and the sums do not wait for each other.
template <int count>
inline void dots(float* out, const float* a, const float* rows, int64_t width) {
    Lanes total[count] = {};
    int64_t d = 0;
    for (; d + lanes <= width; d += lanes) {
        const Lanes x = load(a + d);
        for (int k = 0; k < count; ++k) total[k] += x * load(rows + k * width + d);
    }
    for (int k = 0; k < count; ++k) out[k] = sum(total[k]);
    for (; d < width; ++d)
        for (int k = 0; k < count; ++k) out[k] += a[d] * rows[k * width + d];
}

// A large result comes from the system page by page, each a fault as costly as the work on it: ask for 2 MiB pages.
inline void ask_for_large_pages(void* from, int64_t bytes) {
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(from) + page - 1) & -page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) & -page;
    if (from && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace

#define FOR_N(call)                                                                                                   \
    switch (n) {                                                                                                      \
        case 1: call(1); break;                                                                                       \
        case 2: call(2); break;                                                                                       \
        case 3: call(3); break;                                                                                       \
        case 4: call(4); break;                                                                                       \
        case 5: call(5); break;                                                                                       \
        case 6: call(6); break;                                                                                       \
        case 7: call(7); break;                                                                                       \
        case 8: call(8); break;                                                                                       \
    }
