// Sinkhorn-Knopp on a CPU, in fp32: what ops/sinkhorn.py computes with torch, 16 matrices at once.

#include <vector>

#include "lanes.h"

namespace {

// Matrices at once: sums and reciprocals wait for each other, and those of others fill the time.
constexpr int together = 16;

// Sinkhorn on so many: entry (i, j) of token t at [(i * n + j) * N + t].
template <int n>
struct Block {
    float entry[n][n][together];

    void load(const float* from, int64_t N, int64_t at, int64_t count) {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < together; ++l) entry[i][j][l] = from[(i * n + j) * N + at + (l < count ? l : 0)];
    }
    void store(float* to, int64_t N, int64_t at, int64_t count) const {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j)
                for (int l = 0; l < count; ++l) to[(i * n + j) * N + at + l] = entry[i][j][l];
    }
    // Multiplies column j (or row i) by 1 / its sum; keeps the factors.
    template <bool columns>
    void divide(float (*factor)[together]) {
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < together; ++l) {
                float total = columns ? entry[0][k][l] : entry[k][0][l];
                for (int m = 1; m < n; ++m) total += columns ? entry[m][k][l] : entry[k][m][l];
                const float f = 1.0f / total;
                factor[k][l] = f;
                for (int m = 0; m < n; ++m) (columns ? entry[m][k][l] : entry[k][m][l]) *= f;
            }
    }
    // G -> G - M colsum(G) (or rowsum), the gradient of a division, in logarithms; then M as it was before it.
    template <bool columns>
    void undo(Block& grad, const float (*factor)[together]) {
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < together; ++l) {
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
    for (int64_t at = 0; at < N; at += together) {
        const int64_t count = N - at < together ? N - at : together;
        Block<n> block;
        float factor[n][together];
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
        std::vector<float> kept(2 * n * together * (further > 0 ? further : 1));
        auto factors = reinterpret_cast<float(*)[n][together]>(kept.data());
#pragma omp for schedule(static)
        for (int64_t at = 0; at < N; at += together) {
            const int64_t count = N - at < together ? N - at : together;
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
                    for (int l = 0; l < together; ++l) g.entry[i][j][l] *= block.entry[i][j][l];
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

extern "C" {

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
