// RMSNorm of x, or of the sum of x and an update, on a CPU: see ops/norm.py for the equations.
//
// A row is read once, in fp32, bf16 or fp16, and is still in the first cache when it is scaled.

#include <cmath>
#include <vector>

#include "storage.h"

extern "C" {

// update and total may be null: x is normed as it is. total [N, D] has the dtype of x, and so has out.
void rms_norm_forward(
    int64_t N, int64_t D, double eps, int64_t threads, const void* x, int64_t dtype, const void* update,
    int64_t update_dtype, const float* weight, void* total, void* out, float* r) {
    ask_for_large_pages(total, dtype, N, D);
    ask_for_large_pages(out, dtype, N, D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(4 * D);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            const float* a = row(x, dtype, t * D, D, buffers.data());
            if (update) {
                const float* b = row(update, update_dtype, t * D, D, buffers.data() + D);
                float* to = row_to_put(total, dtype, t * D, buffers.data() + 2 * D);
                sweep<1>(0, D, [&](int64_t d, auto block) {
                    store(to + d, load(a + d, block, 0) + load(b + d, block, 0), block, 0);
                });
                round_row(to, dtype, D);
                put_row(total, dtype, t * D, D, to);
                a = to;
            }
            Lanes squares[2] = {};
            sweep<2>(0, D, [&](int64_t d, auto block) {
                for (int l = 0; l < block.count; ++l) {
                    const Lanes v = load(a + d, block, l);
                    squares[l] += v * v;
                }
            });
            // 0 where the mean square overflows.
            const float s = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / static_cast<float>(D) + static_cast<float>(eps));
            r[t] = s;
            float* to = row_to_put(out, dtype, t * D, buffers.data() + 3 * D);
            sweep<1>(0, D, [&](int64_t d, auto block) {
                store(to + d, load(a + d, block, 0) * s * load(weight + d, block, 0), block, 0);
            });
            put_row(out, dtype, t * D, D, to);
        }
    }
}

// x: what was normed. grad_total may be null: the sum went nowhere else. parts [chunks, D] of the weight's gradient.
void rms_norm_backward(
    int64_t N, int64_t D, int64_t threads, const void* grad, int64_t grad_dtype, const void* grad_total,
    int64_t grad_total_dtype, const void* x, int64_t dtype, const float* weight, const float* r, void* d_x,
    float* parts) {
    const int64_t chunks = (N + chunk - 1) / chunk;
    ask_for_large_pages(d_x, dtype, N, D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffers(4 * D);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            float* part = parts + c * D;
            for (int64_t d = 0; d < D; ++d) part[d] = 0;
            const int64_t end = (c + 1) * chunk < N ? (c + 1) * chunk : N;
            for (int64_t t = c * chunk; t < end; ++t) {
                const float* a = row(x, dtype, t * D, D, buffers.data());
                const float* g = row(grad, grad_dtype, t * D, D, buffers.data() + D);
                const float* g_total =
                    grad_total ? row(grad_total, grad_total_dtype, t * D, D, buffers.data() + 2 * D) : nullptr;
                float* to = row_to_put(d_x, dtype, t * D, buffers.data() + 3 * D);
                const float s = r[t];
                Lanes dots[2] = {};
                sweep<2>(0, D, [&](int64_t d, auto block) {
                    for (int l = 0; l < block.count; ++l) {
                        const Lanes product = load(a + d, block, l) * load(g + d, block, l);
                        dots[l] += product * load(weight + d, block, l);
                        store(part + d, load(part + d, block, l) + product * s, block, l);
                    }
                });
                // r^3 times the dot product could leave fp32 where the steps on the way do not.
                const float along = sum(dots[0] + dots[1]) * s * s / -static_cast<float>(D) * s;
                sweep<1>(0, D, [&](int64_t d, auto block) {
                    Lanes total = load(g + d, block, 0) * load(weight + d, block, 0) * s + along * load(a + d, block, 0);
                    if (g_total) total += load(g_total + d, block, 0);
                    store(to + d, total, block, 0);
                });
                put_row(d_x, dtype, t * D, D, to);
            }
        }
    }
}
}
