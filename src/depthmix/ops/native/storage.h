// Rows of fp32, bf16 or fp16 numbers read and written as fp32 lanes, and sweeps over rows of any length.

#pragma once

#include <memory>
#include <type_traits>

#include "lanes.h"

#if LANES > 4
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

typedef uint16_t HalfWords __attribute__((vector_size(2 * lanes)));

struct BFloat16 {
    uint16_t bits;
};
#if defined(__aarch64__)
typedef __fp16 Half;
typedef float16x4_t HalfLanes;
#define HAS_HALF 1
#elif defined(__FLT16_MANT_DIG__)
typedef _Float16 Half;
typedef _Float16 HalfLanes __attribute__((vector_size(2 * lanes)));
#define HAS_HALF 1
#else
#define HAS_HALF 0
#endif

// Numbers of a row that are handled at a time: `count` times `lanes`, or the `size` < `lanes` that are left at its end.
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

// Between storage and fp32. By the processor's own instructions, where compilers make pieces of the portable form.
inline Lanes widen(Lanes x) { return x; }
#if defined(__AVX512F__)
inline Lanes widen(HalfWords x) { return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16); }
inline HalfWords upper_halves(Words x) { return (HalfWords)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)); }
#elif defined(__AVX2__)
inline Lanes widen(HalfWords x) { return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16); }
inline HalfWords upper_halves(Words x) {
    const __m256i halves = _mm256_srli_epi32((__m256i)x, 16);
    return (HalfWords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 8));
}
#else
inline Lanes widen(HalfWords x) { return (Lanes)(__builtin_convertvector(x, Words) << 16); }
inline HalfWords upper_halves(Words x) { return __builtin_convertvector(x >> 16, HalfWords); }
#endif
#if HAS_HALF && defined(__AVX512F__)
inline Lanes widen(HalfLanes x) { return (Lanes)_mm512_cvtph_ps((__m256i)x); }
inline HalfLanes nearest_half(Lanes x) { return (HalfLanes)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif HAS_HALF && defined(__F16C__) && LANES == 8
inline Lanes widen(HalfLanes x) { return (Lanes)_mm256_cvtph_ps((__m128i)x); }
inline HalfLanes nearest_half(Lanes x) { return (HalfLanes)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
inline Lanes widen(HalfLanes x) { return (Lanes)vcvt_f32_f16(x); }
inline HalfLanes nearest_half(Lanes x) { return vcvt_f16_f32((float32x4_t)x); }
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
#if LANES > 4
    if (!(reinterpret_cast<uintptr_t>(to) & 63) && !std::is_same<Block, Part>::value) {
        const auto bits = narrow(x, to);
#if LANES == 16
        if constexpr (sizeof bits == 64)
            return _mm512_stream_si512(reinterpret_cast<__m512i*>(to + l * lanes), (__m512i)bits);
#endif
        if constexpr (sizeof bits == 32)
            return _mm256_stream_si256(reinterpret_cast<__m256i*>(to + l * lanes), (__m256i)bits);
        if constexpr (sizeof bits == 16)
            return _mm_stream_si128(reinterpret_cast<__m128i*>(to + l * lanes), (__m128i)bits);
    }
#endif
    store(to, x, block, l);
}
inline void finish_past() {
#if LANES > 4
    _mm_sfence();
#endif
}

// One rounding, whatever the compiler would make of a * b + c.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int l = 0; l < lanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return c;
#endif
}
inline Lanes all(float x) { return x - Lanes{}; }

constexpr int64_t chunk = 64;  // rows whose part of a parameter's gradient is summed first, whatever the threads

// dtypes as the callers number them
enum : int64_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// For N rows of `width` numbers that are about to be written, one behind the other or `stride` apart.
inline void ask_for_large_pages(void* into, int64_t dtype, int64_t N, int64_t width, int64_t stride) {
    ask_for_large_pages(into, N ? ((N - 1) * stride + width) * (dtype == float32 ? 4 : 2) : 0);
}
inline void ask_for_large_pages(void* into, int64_t dtype, int64_t N, int64_t width) {
    ask_for_large_pages(into, dtype, N, width, width);
}

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
