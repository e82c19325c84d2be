// Rows of fp32, bf16 or fp16 numbers read and written as fp32 lanes, and sweeps over rows of any length.

#pragma once

#include <memory>
#include <type_traits>

#include <sys/mman.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

typedef uint16_t HalfWords __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};
#if defined(__FLT16_MANT_DIG__)
typedef _Float16 Half;
typedef _Float16 HalfLanes __attribute__((vector_size(32)));
#define HAS_HALF 1
#else
#define HAS_HALF 0
#endif

// Numbers of a row that are handled at a time: `count` times 16 of them, or the `size` < 16 that are left at its end.
template <int count_>
struct Whole {
    static constexpr int count = count_;
};
struct Part {
    static constexpr int count = 1;
    int size;
};

// body(d, Whole or Part) for d from begin to end, `count` lanes at a time as long as they fit.
template <int count, class Body>
inline __attribute__((always_inline)) void sweep(int64_t begin, int64_t end, Body body) {
    int64_t d = begin;
    for (; d + count * lanes <= end; d += count * lanes) body(d, Whole<count>{});
    for (; d + lanes <= end; d += lanes) body(d, Whole<1>{});
    if (d < end) body(d, Part{static_cast<int>(end - d)});
}

// Between storage and fp32. With AVX-512 by its own instructions, where compilers make pieces of the portable form.
inline Lanes widen(Lanes x) { return x; }
#if defined(__AVX512F__)
inline Lanes widen(HalfWords x) { return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16); }
inline HalfWords upper_halves(Words x) { return (HalfWords)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)); }
#else
inline Lanes widen(HalfWords x) { return (Lanes)(__builtin_convertvector(x, Words) << 16); }
inline HalfWords upper_halves(Words x) { return __builtin_convertvector(x >> 16, HalfWords); }
#endif
#if HAS_HALF && defined(__AVX512F__)
inline Lanes widen(HalfLanes x) { return (Lanes)_mm512_cvtph_ps((__m256i)x); }
inline HalfLanes nearest_half(Lanes x) { return (HalfLanes)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif HAS_HALF
inline Lanes widen(HalfLanes x) { return __builtin_convertvector(x, Lanes); }
inline HalfLanes nearest_half(Lanes x) { return __builtin_convertvector(x, HalfLanes); }
#endif

// To the nearest number of the storage type, ties to even, still held as fp32.
inline Lanes rounded(Lanes x, const float*) { return x; }
inline Lanes rounded(Lanes x, const BFloat16*) {
    const Words bits = (Words)x;
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (Lanes)((x == x ? nearest : (bits | 0x400000u)) & 0xffff0000u);
}
#if HAS_HALF
inline Lanes rounded(Lanes x, const Half*) { return widen(nearest_half(x)); }
#endif

// The bits to store of a number that is rounded already.
inline Lanes narrow(Lanes x, const float*) { return x; }
inline HalfWords narrow(Lanes x, const BFloat16*) { return upper_halves((Words)x); }
#if HAS_HALF
inline HalfLanes narrow(Lanes x, const Half*) { return nearest_half(x); }
#endif

// Lanes number l of the block at `from`; what a Part lacks is 0.
template <class T, int count>
inline Lanes load(const T* from, Whole<count>, int l) {
    decltype(narrow(Lanes{}, from)) x;
    std::memcpy(&x, from + l * lanes, sizeof x);
    return widen(x);
}
template <class T>
inline Lanes load(const T* from, Part part, int) {
    decltype(narrow(Lanes{}, from)) x = {};
    std::memcpy(&x, from, part.size * sizeof(T));
    return widen(x);
}

// x must be rounded to T.
template <class T, int count>
inline void store(T* to, Lanes x, Whole<count>, int l) {
    const auto bits = narrow(x, to);
    std::memcpy(to + l * lanes, &bits, sizeof bits);
}
template <class T>
inline void store(T* to, Lanes x, Part part, int) {
    const auto bits = narrow(x, to);
    std::memcpy(to, &bits, part.size * sizeof(T));
}

// Fetch what load(from, ., l) would.
template <class T>
inline void prefetch(const T* from, int l) {
    if (l * lanes * sizeof(T) % 64 == 0) __builtin_prefetch(from + l * lanes, 0, 2);
}

// Past the caches, for what is not read again soon: a cache would first read the line that is overwritten.
template <class T, class Block>
inline void store_past(T* to, Lanes x, Block block, int l) {
#if defined(__AVX512F__)
    if (!(reinterpret_cast<uintptr_t>(to) & 63) && !std::is_same<Block, Part>::value) {
        const auto bits = narrow(x, to);
        if constexpr (sizeof bits == 64)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + l * lanes), (__m512i)bits);
        else
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + l * lanes), (__m256i)bits);
        return;
    }
#endif
    store(to, x, block, l);
}
inline void finish_past() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// One rounding, whatever the compiler would make of a * b + c.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    for (int l = 0; l < lanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#endif
}
inline Lanes all(float x) { return x - Lanes{}; }

// A large result comes from the system page by page, each a fault as costly as the work on it: ask for 2 MiB pages.
inline void ask_for_large_pages(void* from, int64_t bytes) {
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(from) + page - 1) & -page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) & -page;
    if (from && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

constexpr int64_t chunk = 64;  // rows whose part of a parameter's gradient is summed first, whatever the threads

// dtypes as the callers number them
enum : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

template <class T>
inline void copy_row(T* to, const float* from, int64_t width) {
    sweep<1>(0, width, [&](int64_t d, auto block) { store(to + d, rounded(load(from + d, block, 0), to), block, 0); });
}
template <class T>
inline void copy_row(float* to, const T* from, int64_t width) {
    sweep<1>(0, width, [&](int64_t d, auto block) { store(to + d, load(from + d, block, 0), block, 0); });
}

// `width` numbers from `offset` on as fp32: where they lie, or in `scratch`.
inline const float* row(const void* rows, int64_t dtype, int64_t offset, int64_t width, float* scratch) {
    if (dtype == float32) return static_cast<const float*>(rows) + offset;
    if (dtype == bfloat16) copy_row(scratch, static_cast<const BFloat16*>(rows) + offset, width);
#if HAS_HALF
    if (dtype == float16) copy_row(scratch, static_cast<const Half*>(rows) + offset, width);
#endif
    return scratch;
}

// Where to compute what put_row then stores: in place, or in `scratch`.
inline float* row_to_put(void* rows, int64_t dtype, int64_t offset, float* scratch) {
    return dtype == float32 ? static_cast<float*>(rows) + offset : scratch;
}
inline void put_row(void* rows, int64_t dtype, int64_t offset, int64_t width, const float* from) {
    if (dtype == bfloat16) copy_row(static_cast<BFloat16*>(rows) + offset, from, width);
#if HAS_HALF
    if (dtype == float16) copy_row(static_cast<Half*>(rows) + offset, from, width);
#endif
}

// As it would be read again once it is stored.
template <class T>
inline void round_row(float* x, int64_t width) {
    constexpr const T* as = nullptr;
    sweep<1>(0, width, [&](int64_t d, auto block) { store(x + d, rounded(load(x + d, block, 0), as), block, 0); });
}
inline void round_row(float* x, int64_t dtype, int64_t width) {
    if (dtype == bfloat16) round_row<BFloat16>(x, width);
#if HAS_HALF
    if (dtype == float16) round_row<Half>(x, width);
#endif
}

}  // namespace
