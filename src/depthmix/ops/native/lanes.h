// What the kernels share: vectors of 16 fp32 numbers, dot products, and the choice of a template by n.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// 16 numbers, in whatever registers the processor has; loaded from any address.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int lanes = 16;

inline Lanes load(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline float sum(Lanes x) {
    float part[lanes];
    std::memcpy(part, &x, sizeof x);
    for (int step = lanes / 2; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) part[l] += part[l + step];
    return part[0];
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
