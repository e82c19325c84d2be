// The channel gate behind its matrix product, on a CPU: see ops/channel_gate.py for the equations.
//
// Storage is fp32, bf16 or fp16 for each tensor by itself, arithmetic fp32. A row is widened into a buffer, worked on
// there and narrowed again: rows are short, the buffers stay in the first cache.

#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

enum Storage : int64_t { fp32 = 0, bf16 = 1, fp16 = 2 };

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
    } else {
        // 2^112 moves the exponent from a bias of 15 to one of 127, of subnormal numbers too.
        float x;
        bits = rest << 13;
        std::memcpy(&x, &bits, 4);
        x *= 0x1p112f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (bits < 0x38800000) {                       // subnormal: adding .5 leaves what is rounded in the low bits
        float y;
        std::memcpy(&y, &bits, 4);
        y += 0.5f;
        std::memcpy(&bits, &y, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | uint16_t((bits >> 13) - 0x1c000);
}

// Row `row` of a matrix as fp32; a view where it is that already.
inline const float* widened(const void* from, int64_t storage, int64_t row, int64_t width, float* buffer) {
    if (storage == fp32) return static_cast<const float*>(from) + row * width;
    const uint16_t* bits = static_cast<const uint16_t*>(from) + row * width;
    if (storage == bf16) {
        for (int64_t d = 0; d < width; ++d) {
            const uint32_t wide = uint32_t(bits[d]) << 16;
            std::memcpy(buffer + d, &wide, 4);
        }
    } else {
        for (int64_t d = 0; d < width; ++d) buffer[d] = half_to_float(bits[d]);
    }
    return buffer;
}

// Where to write a row of fp32 that narrowed() then stores.
inline float* target(void* to, int64_t storage, int64_t row, int64_t width, float* buffer) {
    return storage == fp32 ? static_cast<float*>(to) + row * width : buffer;
}

inline void narrowed(void* to, int64_t storage, int64_t row, int64_t width, const float* buffer) {
    if (storage == fp32) return;
    uint16_t* bits = static_cast<uint16_t*>(to) + row * width;
    if (storage == bf16) {
        for (int64_t d = 0; d < width; ++d) {
            uint32_t wide;
            std::memcpy(&wide, buffer + d, 4);
            // To the nearest, ties to even; a NaN keeps a bit of its own.
            bits[d] = (wide & 0x7fffffff) > 0x7f800000 ? wide >> 16 | 0x40 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
        }
    } else {
        for (int64_t d = 0; d < width; ++d) bits[d] = float_to_half(buffer[d]);
    }
}

// exp by 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]: 1 to 2 units in the last place, and no call in a loop.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float k = std::nearbyint(x * 1.44269504f);
    const float t = std::fma(k, 2.12194440e-4f, std::fma(k, -0.693359375f, x));
    float p = std::fma(t, 1.9875691500e-4f, 1.3981999507e-3f);
    p = std::fma(p, t, 8.3334519073e-3f);
    p = std::fma(p, t, 4.1665795894e-2f);
    p = std::fma(p, t, 1.6666665459e-1f);
    p = std::fma(p, t, 5.0000001201e-1f);
    p = std::fma(p, t * t, t) + 1.0f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// From the side of small exponentials, so that a gate near 0 keeps its digits. NaN stays NaN.
inline float sigmoid(float z) {
    const float e = exponential(-std::fabs(z));
    const float g = (z < 0 ? e : 1.0f) / (1.0f + e);
    return z == z ? g : z;
}

inline float dot(const float* a, const float* b, int64_t width) {
    float out;
    dots<1>(&out, a, b, width);
    return out;
}

// 0 where the mean square overflows.
inline float reciprocal_rms(const float* x, int64_t width, float eps) {
    return 1.0f / std::sqrt(dot(x, x, width) / static_cast<float>(width) + eps);
}

constexpr int64_t chunk = 64;  // rows whose part of the bias's gradient is summed first, whatever the threads

}  // namespace

extern "C" {

// product_x [N, D] becomes the logit; r_x, r_u [N] may be null (no norm), product_u too (the update is not seen).
void channel_gate_forward(
    int64_t N, int64_t D, int64_t convex, double eps, int64_t threads, float* product_x, const float* product_u,
    const float* bias, const void* x, int64_t x_storage, const void* u, int64_t u_storage, void* out, float* r_x,
    float* r_u) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(3 * D);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N; ++row) {
            const float* a = widened(x, x_storage, row, D, buffers.data());
            const float* b = widened(u, u_storage, row, D, buffers.data() + D);
            float* to = target(out, x_storage, row, D, buffers.data() + 2 * D);
            float* z = product_x + row * D;
            if (r_x) {
                // Where r = 0 the product may be infinite.
                const float r = r_x[row] = reciprocal_rms(a, D, eps);
                if (r == 0)
                    for (int64_t d = 0; d < D; ++d) z[d] = bias[d];
                else
                    for (int64_t d = 0; d < D; ++d) z[d] = std::fma(r, z[d], bias[d]);
            } else {
                for (int64_t d = 0; d < D; ++d) z[d] += bias[d];
            }
            if (product_u) {
                const float* p = product_u + row * D;
                const float r = r_u ? r_u[row] = reciprocal_rms(b, D, eps) : 1.0f;
                if (r != 0)
                    for (int64_t d = 0; d < D; ++d) z[d] = std::fma(r, p[d], z[d]);
            }
            if (convex)
                for (int64_t d = 0; d < D; ++d) {
                    const float g = sigmoid(z[d]);
                    to[d] = std::fma(g, b[d], (1.0f - g) * a[d]);
                }
            else
                for (int64_t d = 0; d < D; ++d) to[d] = std::fma(sigmoid(z[d]), b[d], a[d]);
            narrowed(out, x_storage, row, D, to);
        }
    }
}

// scaled_x = r_x d_logit, scaled_u = r_u d_logit (null: not wanted), parts [chunks, D] of the bias's gradient.
void channel_gate_logits(
    int64_t N, int64_t D, int64_t convex, int64_t threads, const void* grad, int64_t grad_storage, const float* logit,
    const void* x, int64_t x_storage, const void* u, int64_t u_storage, const float* r_x, const float* r_u,
    float* scaled_x, float* scaled_u, float* parts) {
    const int64_t chunks = (N + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(4 * D);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            float* part = parts + c * D;
            for (int64_t d = 0; d < D; ++d) part[d] = 0;
            const int64_t end = (c + 1) * chunk < N ? (c + 1) * chunk : N;
            for (int64_t row = c * chunk; row < end; ++row) {
                const float* a = widened(x, x_storage, row, D, buffers.data());
                const float* b = widened(u, u_storage, row, D, buffers.data() + D);
                const float* g_out = widened(grad, grad_storage, row, D, buffers.data() + 2 * D);
                const float* z = logit + row * D;
                float* d_logit = buffers.data() + 3 * D;
                for (int64_t d = 0; d < D; ++d) {
                    const float g = sigmoid(z[d]);
                    const float difference = convex ? b[d] - a[d] : b[d];
                    d_logit[d] = difference * g_out[d] * (1.0f - g) * g;
                    part[d] += d_logit[d];
                }
                const float rx = r_x ? r_x[row] : 1.0f;
                for (int64_t d = 0; d < D; ++d) scaled_x[row * D + d] = d_logit[d] * rx;
                if (scaled_u)
                    for (int64_t d = 0; d < D; ++d) scaled_u[row * D + d] = d_logit[d] * r_u[row];
            }
        }
    }
}

// d_x and d_u from the direct paths and `through` = scaled W (through_u null: the update is not seen).
void channel_gate_inputs(
    int64_t N, int64_t D, int64_t convex, int64_t threads, const void* grad, int64_t grad_storage, const float* logit,
    const void* x, int64_t x_storage, const void* u, int64_t u_storage, const float* r_x, const float* r_u,
    const float* through_x, const float* through_u, void* d_x, void* d_u) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(5 * D);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N; ++row) {
            const float* a = widened(x, x_storage, row, D, buffers.data());
            const float* b = widened(u, u_storage, row, D, buffers.data() + D);
            const float* g_out = widened(grad, grad_storage, row, D, buffers.data() + 2 * D);
            float* to_x = target(d_x, x_storage, row, D, buffers.data() + 3 * D);
            float* to_u = target(d_u, u_storage, row, D, buffers.data() + 4 * D);
            const float* z = logit + row * D;
            const float* from_x = through_x + row * D;
            // r^2 times the dot product could leave fp32 where each of r and r times the dot does not.
            const float along = r_x ? dot(from_x, a, D) * r_x[row] * r_x[row] / -static_cast<float>(D) : 0.0f;
            for (int64_t d = 0; d < D; ++d) {
                const float by_gate = sigmoid(z[d]) * g_out[d];
                const float direct = convex ? g_out[d] - by_gate : g_out[d];
                to_u[d] = by_gate;
                to_x[d] = std::fma(along, a[d], from_x[d] + direct);
            }
            if (through_u) {
                const float* from_u = through_u + row * D;
                const float along_u = r_u ? dot(from_u, b, D) * r_u[row] * r_u[row] / -static_cast<float>(D) : 0.0f;
                for (int64_t d = 0; d < D; ++d) to_u[d] = std::fma(along_u, b[d], from_u[d] + to_u[d]);
            }
            narrowed(d_x, x_storage, row, D, to_x);
            narrowed(d_u, u_storage, row, D, to_u);
        }
    }
}
}
