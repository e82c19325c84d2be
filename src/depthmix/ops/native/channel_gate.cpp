// The channel gate behind its matrix product, on a CPU: see ops/channel_gate.py for the equations.
//
// Storage is fp32, bf16 or fp16 for each tensor by itself, arithmetic fp32. A 16-bit row is widened into a buffer,
// worked on there and narrowed again: rows are short, the buffers stay in the first cache. Behind the dot products that
// a row needs, one pass does everything else.

#include <cmath>
#include <vector>

#include "storage.h"

namespace {

// From the side of small exponentials, so that a gate near 0 keeps its digits. NaN stays NaN.
inline Lanes sigmoid(Lanes z) {
    const Lanes e = exponential(z < 0.0f ? z : -z);
    return (z < 0.0f ? e : all(1.0f)) / (1.0f + e);
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

// Of the gradient of x, what lies along x: r^2 times the dot product could leave fp32 where each of r and r times the
// dot does not.
inline float along_source(const float* through, const float* x, float r, int64_t width) {
    return dot(through, x, width) * r * r / -static_cast<float>(width);
}


}  // namespace

extern "C" {

// product_x [N, D] becomes the logit; r_x, r_u [N] may be null (no norm), product_u too (the update is not seen).
void channel_gate_forward(
    int64_t N, int64_t D, int64_t convex, double eps, int64_t threads, float* product_x, const float* product_u,
    const float* bias, const void* x, int64_t x_dtype, const void* u, int64_t u_dtype, void* out, float* r_x,
    float* r_u) {
    ask_for_large_pages(out, x_dtype, N, D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(3 * D);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            const float* a = row(x, x_dtype, t * D, D, buffers.data());
            const float* b = row(u, u_dtype, t * D, D, buffers.data() + D);
            float* to = row_to_put(out, x_dtype, t * D, buffers.data() + 2 * D);
            float* logit = product_x + t * D;
            const float rx = r_x ? r_x[t] = reciprocal_rms(a, D, eps) : 1.0f;
            const float ru = r_u ? r_u[t] = reciprocal_rms(b, D, eps) : 1.0f;
            // Where r = 0 the product may be infinite.
            const float* from_x = rx == 0 ? nullptr : logit;
            const float* from_u = product_u && ru != 0 ? product_u + t * D : nullptr;
            sweep<1>(0, D, [&](int64_t d, auto block) {
                Lanes z = load(bias + d, block, 0);
                if (from_x) z += rx * load(from_x + d, block, 0);
                if (from_u) z += ru * load(from_u + d, block, 0);
                store(logit + d, z, block, 0);
                const Lanes g = sigmoid(z), x = load(a + d, block, 0);
                store(to + d, fused(g, load(b + d, block, 0), convex ? (1.0f - g) * x : x), block, 0);
            });
            put_row(out, x_dtype, t * D, D, to);
        }
    }
}

// scaled_x = r_x d_logit, scaled_u = r_u d_logit (null: not wanted), parts [chunks, D] of the bias's gradient.
void channel_gate_logits(
    int64_t N, int64_t D, int64_t convex, int64_t threads, const void* grad, int64_t grad_dtype, const float* logit,
    const void* x, int64_t x_dtype, const void* u, int64_t u_dtype, const float* r_x, const float* r_u,
    float* scaled_x, float* scaled_u, float* parts) {
    const int64_t chunks = (N + chunk - 1) / chunk;
    ask_for_large_pages(scaled_x, float32, N, D);
    ask_for_large_pages(scaled_u, float32, N, D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(3 * D);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            float* part = parts + c * D;
            for (int64_t d = 0; d < D; ++d) part[d] = 0;
            const int64_t end = (c + 1) * chunk < N ? (c + 1) * chunk : N;
            for (int64_t t = c * chunk; t < end; ++t) {
                const float* a = row(x, x_dtype, t * D, D, buffers.data());
                const float* b = row(u, u_dtype, t * D, D, buffers.data() + D);
                const float* g_out = row(grad, grad_dtype, t * D, D, buffers.data() + 2 * D);
                const float* z = logit + t * D;
                float* to_x = scaled_x + t * D;
                float* to_u = scaled_u ? scaled_u + t * D : nullptr;
                const float rx = r_x ? r_x[t] : 1.0f, ru = to_u ? r_u[t] : 1.0f;
                sweep<1>(0, D, [&](int64_t d, auto block) {
                    const Lanes g = sigmoid(load(z + d, block, 0));
                    Lanes difference = load(b + d, block, 0);
                    if (convex) difference -= load(a + d, block, 0);
                    const Lanes d_logit = difference * load(g_out + d, block, 0) * (1.0f - g) * g;
                    store(part + d, load(part + d, block, 0) + d_logit, block, 0);
                    store(to_x + d, d_logit * rx, block, 0);
                    if (to_u) store(to_u + d, d_logit * ru, block, 0);
                });
            }
        }
    }
}

// d_x and d_u from the direct paths and `through` = scaled W (through_u null: the update is not seen).
void channel_gate_inputs(
    int64_t N, int64_t D, int64_t convex, int64_t threads, const void* grad, int64_t grad_dtype, const float* logit,
    const void* x, int64_t x_dtype, const void* u, int64_t u_dtype, const float* r_x, const float* r_u,
    const float* through_x, const float* through_u, void* d_x, void* d_u) {
    ask_for_large_pages(d_x, x_dtype, N, D);
    ask_for_large_pages(d_u, u_dtype, N, D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(5 * D);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            const float* a = row(x, x_dtype, t * D, D, buffers.data());
            const float* b = row(u, u_dtype, t * D, D, buffers.data() + D);
            const float* g_out = row(grad, grad_dtype, t * D, D, buffers.data() + 2 * D);
            float* to_x = row_to_put(d_x, x_dtype, t * D, buffers.data() + 3 * D);
            float* to_u = row_to_put(d_u, u_dtype, t * D, buffers.data() + 4 * D);
            const float* z = logit + t * D;
            const float* from_x = through_x + t * D;
            const float* from_u = through_u ? through_u + t * D : nullptr;
            const float along_x = r_x ? along_source(from_x, a, r_x[t], D) : 0.0f;
            const float along_u = r_u && from_u ? along_source(from_u, b, r_u[t], D) : 0.0f;
            sweep<1>(0, D, [&](int64_t d, auto block) {
                const Lanes g = load(g_out + d, block, 0), by_gate = sigmoid(load(z + d, block, 0)) * g;
                const Lanes direct = convex ? g - by_gate : g;
                store(to_x + d, along_x * load(a + d, block, 0) + (load(from_x + d, block, 0) + direct), block, 0);
                Lanes to = by_gate;
                if (from_u) to = along_u * load(b + d, block, 0) + (load(from_u + d, block, 0) + by_gate);
                store(to_u + d, to, block, 0);
            });
            put_row(d_x, x_dtype, t * D, D, to_x);
            put_row(d_u, u_dtype, t * D, D, to_u);
        }
    }
}
}
