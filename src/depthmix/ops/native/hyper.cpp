// The Hyper-Connections family on a CPU, in fp32: what ops/hyper.py computes with torch, one pass over each token.
//
// Arrays are contiguous unless a stride is given. N tokens, n streams of D features, C [N, n + 2, n] as in
// ops/hyper.py: n rows of A_r (from stream i to stream j), then B, then A_m. Tokens are shared out among threads in
// equal parts; no sum runs over tokens, so that a result does not depend on their number.

#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

// out = sum_i weights[i * stride] rows[i], rows [n, width].
template <int n>
inline void mix(float* out, const float* weights, int64_t stride, const float* rows, int64_t width) {
    float w[n];
    for (int i = 0; i < n; ++i) w[i] = weights[i * stride];
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
        float total = w[0] * rows[d];
        for (int i = 1; i < n; ++i) total += w[i] * rows[i * width + d];
        out[d] = total;
    }
}

// out += sum_k weights[k] rows[k], rows [count, width].
inline void add_mix(float* out, const float* weights, const float* rows, int64_t count, int64_t width) {
    int64_t d = 0;
    for (; d + 4 * lanes <= width; d += 4 * lanes) {
        Lanes total[4];
        for (int l = 0; l < 4; ++l) total[l] = load(out + d + l * lanes);
        for (int64_t k = 0; k < count; ++k)
            for (int l = 0; l < 4; ++l) total[l] += weights[k] * load(rows + k * width + d + l * lanes);
        std::memcpy(out + d, total, sizeof total);
    }
    if (d == width) return;
    for (int64_t k = 0; k < count; ++k) {
#pragma omp simd
        for (int64_t e = d; e < width; ++e) out[e] += weights[k] * rows[k * width + e];
    }
}

template <int n>
void write(int64_t N, int64_t width, int per_token, int threads, const float* y, const float* streams,
           const float* coefficients, float* new_streams, float* norms) {
    ask_for_large_pages(new_streams, N * n * width * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < N; ++t) {
        const float* c = coefficients + t * (n + 2) * n;
        const float* update = y + t * width;
        float* tile = new_streams + t * n * width;
        for (int j = 0; j < n; ++j) {
            float* out = tile + j * width;
            mix<n>(out, c + j, n, streams + t * n * width, width);
            const float depth = c[n * n + j];
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) out[d] += depth * update[d];
        }
        if (norms) {
            const int64_t length = n * width / per_token;
            for (int r = 0; r < per_token; ++r) {
                const float* row = tile + r * length;
                float square;
                dots<1>(&square, row, row, length);
                norms[t * per_token + r] = std::sqrt(square);
            }
        }
    }
}

// The gradient G of one token's new streams, and from it those of y, H and C. G is the sum of what f gives, of the
// read (weight times grad_h) and of the steps behind. f sees the streams as per_token rows, multiplies each with weight
// (given transposed, [K, row length]) and takes its norm: a row's gradient is weight d_raw + along row. Where the weight
// is too large to be read again for every token, K is 0 and d_raw holds weight d_raw itself.
template <int n>
void backward(int64_t N, int64_t width, int per_token, int threads, int64_t K, const float* d_raw,
              const float* weight, const float* along, const float* made, const float* new_streams, const float* grad_h, const float* grad_new,
              int64_t grad_new_stride, const float* y, const float* streams, const float* coefficients, float* d_y,
              float* d_streams, float* d_coefficients) {
    ask_for_large_pages(d_streams, N * n * width * sizeof(float));
    ask_for_large_pages(d_y, N * width * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        const float one = 1.0f;
        std::vector<float> scratch(n * width);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            // Where nothing was written, G is the gradient of the streams itself.
            float* grad = y ? scratch.data() : d_streams + t * n * width;
            const float* tile = new_streams + t * n * width;
            for (int64_t d = 0; d < n * width; ++d) grad[d] = 0.0f;
            if (d_raw) {
                const int64_t length = n * width / per_token;
                for (int r = 0; r < per_token; ++r) {
                    const int64_t row = t * per_token + r;
                    add_mix(grad + r * length, along + row, tile + r * length, 1, length);
                    if (K > 0)
                        add_mix(grad + r * length, d_raw + row * K, weight, K, length);
                    else
                        add_mix(grad + r * length, &one, d_raw + row * length, 1, length);
                }
            }
            if (grad_h)
                for (int j = 0; j < n; ++j)
                    add_mix(grad + j * width, made + (t * (n + 2) + n + 1) * n + j, grad_h + t * width, 1, width);
            if (grad_new) {
                const float* behind = grad_new + t * grad_new_stride;
#pragma omp simd
                for (int64_t d = 0; d < n * width; ++d) grad[d] += behind[d];
            }
            if (!y) continue;
            const float* c = coefficients + t * (n + 2) * n;
            const float* s = streams + t * n * width;
            float* d_c = d_coefficients + t * (n + 2) * n;
            for (int i = 0; i < n; ++i) dots<n>(d_c + i * n, s + i * width, grad, width);
            dots<n>(d_c + n * n, y + t * width, grad, width);
            for (int j = 0; j < n; ++j) d_c[n * n + n + j] = 0.0f;
            for (int i = 0; i < n; ++i) mix<n>(d_streams + (t * n + i) * width, c + i * n, 1, grad, width);
            mix<n>(d_y + t * width, c + n * n, 1, grad, width);
        }
    }
}

// out[i, t] += <streams[t, i], x[t]>
template <int n>
void add_dots(int64_t N, int64_t width, int threads, const float* streams, const float* x, float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < N; ++t) {
        float found[n];
        dots<n>(found, x + t * width, streams + t * n * width, width);
        for (int i = 0; i < n; ++i) out[i * N + t] += found[i];
    }
}

template <int n>
void read(int64_t N, int64_t width, int threads, const float* streams, const float* weights, int64_t stride,
          float* out) {
    ask_for_large_pages(out, N * width * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < N; ++t) mix<n>(out + t * width, weights + t * stride, 1, streams + t * n * width, width);
}

}  // namespace

extern "C" {

void hyper_write(int64_t N, int64_t n, int64_t width, int64_t per_token, int64_t threads, const float* y,
                 const float* streams, const float* coefficients, float* new_streams, float* norms) {
#define CALL(k) write<k>(N, width, per_token, threads, y, streams, coefficients, new_streams, norms)
    FOR_N(CALL)
#undef CALL
}

void hyper_backward(int64_t N, int64_t n, int64_t width, int64_t per_token, int64_t threads, int64_t K,
                    const float* d_raw, const float* weight, const float* along, const float* made, const float* new_streams, const float* grad_h,
                    const float* grad_new, int64_t grad_new_stride, const float* y, const float* streams,
                    const float* coefficients, float* d_y, float* d_streams, float* d_coefficients) {
#define CALL(k)                                                                                                       \
    backward<k>(N, width, per_token, threads, K, d_raw, weight, along, made, new_streams, grad_h, grad_new,            \
                grad_new_stride, y, streams, coefficients, d_y, d_streams, d_coefficients)
    FOR_N(CALL)
#undef CALL
}

void hyper_add_dots(int64_t N, int64_t n, int64_t width, int64_t threads, const float* streams, const float* x,
                    float* out) {
#define CALL(k) add_dots<k>(N, width, threads, streams, x, out)
    FOR_N(CALL)
#undef CALL
}

void hyper_read(int64_t N, int64_t n, int64_t width, int64_t threads, const float* streams, const float* weights,
                int64_t stride, float* out) {
#define CALL(k) read<k>(N, width, threads, streams, weights, stride, out)
    FOR_N(CALL)
#undef CALL
}
}
