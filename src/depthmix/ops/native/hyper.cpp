// The Hyper-Connections family on a CPU, in fp32: what ops/hyper.py computes with torch, one pass over each token.
//
// Arrays are contiguous unless a stride is given. N tokens, n streams of D features, C [N, n + 2, n] as in
// ops/hyper.py: n rows of A_r (from stream i to stream j), then B, then A_m. Tokens are shared out among threads in
// equal parts; no sum runs over tokens, so that a result does not depend on their number.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < N; ++t) mix<n>(out + t * width, weights + t * stride, 1, streams + t * n * width, width);
}

// Sinkhorn on 16 matrices at once: entry (i, j) of token t at [(i * n + j) * N + t].
template <int n>
struct Block {
    float entry[n][n][lanes];

    void load(const float* from, int64_t N, int64_t at, int64_t count) {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < lanes; ++l) entry[i][j][l] = from[(i * n + j) * N + at + (l < count ? l : 0)];
    }
    void store(float* to, int64_t N, int64_t at, int64_t count) const {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < count; ++l) to[(i * n + j) * N + at + l] = entry[i][j][l];
    }
    // Multiplies column j (or row i) by 1 / its sum; keeps the factors.
    template <bool columns>
    void divide(float (*factor)[lanes]) {
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < lanes; ++l) {
                float total = columns ? entry[0][k][l] : entry[k][0][l];
                for (int m = 1; m < n; ++m) total += columns ? entry[m][k][l] : entry[k][m][l];
                const float f = 1.0f / total;
                factor[k][l] = f;
                for (int m = 0; m < n; ++m) (columns ? entry[m][k][l] : entry[k][m][l]) *= f;
            }
    }
    // G -> G - M colsum(G) (or rowsum), the gradient of a division, in logarithms; then M as it was before it.
    template <bool columns>
    void undo(Block& grad, const float (*factor)[lanes]) {
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < lanes; ++l) {
                float total = columns ? grad.entry[0][k][l] : grad.entry[k][0][l];
                for (int m = 1; m < n; ++m) total += columns ? grad.entry[m][k][l] : grad.entry[k][m][l];
                const float back = factor ? 1.0f / factor[k][l] : 1.0f;
                for (int m = 0; m < n; ++m) {
                    float& value = columns ? entry[m][k][l] : entry[k][m][l];
                    (columns ? grad.entry[m][k][l] : grad.entry[k][m][l]) -= value * total;
                    value *= back;
                }
            }
    }
};

template <int n>
void sinkhorn(int64_t N, int further, int threads, float* matrix) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < N; at += lanes) {
        const int64_t count = N - at < lanes ? N - at : lanes;
        Block<n> block;
        float factor[n][lanes];
        block.load(matrix, N, at, count);
        for (int k = 0; k < further; ++k) {
            block.template divide<true>(factor);
            block.template divide<false>(factor);
        }
        block.store(matrix, N, at, count);
    }
}

template <int n>
void sinkhorn_backward(int64_t N, int further, int threads, const float* first, const float* matrix,
                       const float* grad, float* d_log) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(2 * n * lanes * (further > 0 ? further : 1));
        auto factors = reinterpret_cast<float(*)[n][lanes]>(kept.data());
#pragma omp for schedule(static)
        for (int64_t at = 0; at < N; at += lanes) {
            const int64_t count = N - at < lanes ? N - at : lanes;
            Block<n> block, g, begin;
            block.load(matrix, N, at, count);
            g.load(grad, N, at, count);
            begin.load(first, N, at, count);
            for (int k = 0; k < further; ++k) {
                block.template divide<true>(factors[2 * k]);
                block.template divide<false>(factors[2 * k + 1]);
            }
            for (int i = 0; i < n; ++i)
                for (int j = 0; j < n; ++j)
                    for (int l = 0; l < lanes; ++l) g.entry[i][j][l] *= block.entry[i][j][l];
            for (int k = further - 1; k >= 0; --k) {
                block.template undo<false>(g, factors[2 * k + 1]);
                block.template undo<true>(g, factors[2 * k]);
            }
            block.template undo<false>(g, nullptr);
            begin.template undo<true>(g, nullptr);
            g.store(d_log, N, at, count);
        }
    }
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

void sinkhorn_iterate(int64_t N, int64_t n, int64_t further, int64_t threads, float* matrix) {
#define CALL(k) sinkhorn<k>(N, further, threads, matrix)
    FOR_N(CALL)
#undef CALL
}

void sinkhorn_gradient(int64_t N, int64_t n, int64_t further, int64_t threads, const float* first,
                       const float* matrix, const float* grad, float* d_log) {
#define CALL(k) sinkhorn_backward<k>(N, further, threads, first, matrix, grad, d_log)
    FOR_N(CALL)
#undef CALL
}
}
