// Softmax pooling over separate sources on a CPU: what ops/pool_eager.py computes with torch, one pass over each token.
//
// Storage is fp32, bf16 or fp16 and arithmetic fp32. A source is N rows of D numbers, any distance apart; everything else
// is contiguous. A thread takes one token at a time: its k x D tile comes from memory once, for the scores, and from the
// cache for the sum and the gradients. 16-bit rows are widened into a tile of the thread's own, and their gradients
// narrowed from there. Gradients of parameters are summed over fixed chunks of tokens, and the chunks in their order, so
// that no result depends on the number of threads.

#include <cmath>
#include <type_traits>
#include <vector>

#include "storage.h"

namespace {

#define INLINE __attribute__((always_inline))

inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

// The first `count` numbers, zeros behind; where count is the constant `lanes`, a plain load.
INLINE inline Lanes load(const float* from, int64_t count) {
    if (count == lanes) return load(from);
    float part[lanes] = {};
    std::memcpy(part, from, count * sizeof(float));
    return load(part);
}

INLINE inline void store(float* to, Lanes x, int64_t count) {
    if (count == lanes) return store(to, x);
    float part[lanes];
    store(part, x);
    std::memcpy(to, part, count * sizeof(float));
}

// One token's k rows in fp32, and where their gradients are put: into memory, or over the rows.
struct Tile {
    const int64_t dtype;
    const int64_t k, width;
    const void* const* sources;
    const int64_t* strides;
    std::vector<float> scratch;
    std::vector<const float*> rows;
    std::vector<float*> grads;

    Tile(int64_t dtype, int64_t k, int64_t width, const void* const* sources, const int64_t* strides)
        : dtype(dtype), k(k), width(width), sources(sources), strides(strides),
          scratch(dtype == float32 ? 0 : k * width), rows(k), grads(k) {}

    void read(int64_t t) {
        for (int64_t i = 0; i < k; ++i)
            rows[i] = row(sources[i], dtype, t * strides[i], width, scratch.data() + i * width);
    }

    void write_to(void* const* into, const int64_t* into_strides, int64_t t) {
        for (int64_t i = 0; i < k; ++i)
            grads[i] = row_to_put(into[i], dtype, t * into_strides[i], scratch.data() + i * width);
    }

    void written(void* const* into, const int64_t* into_strides, int64_t t) {
        if (dtype == float32) return;
        for (int64_t i = 0; i < k; ++i)
            put_row(into[i], dtype, t * into_strides[i], width, scratch.data() + i * width);
    }
};

// f(number of vectors, offset, numbers in a vector) over [0, width).
template <class F>
INLINE inline void blocks(int64_t width, F f) {
    int64_t d = 0;
    for (; d + 4 * lanes <= width; d += 4 * lanes) f(std::integral_constant<int, 4>(), d, int64_t(lanes));
    for (; d < width; d += lanes) f(std::integral_constant<int, 1>(), d, width - d < lanes ? width - d : lanes);
}

// to[i] += the sum of the i-th vector, of four.
template <int count>
inline void add_sums(float* to, Lanes a, Lanes b, Lanes c, Lanes d) {
#if LANES == 16
    const Lanes ab = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                     SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const Lanes cd = SHUFFLE(c, d, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                     SHUFFLE(c, d, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    Lanes all = SHUFFLE(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                SHUFFLE(ab, cd, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    all += SHUFFLE(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    all = SHUFFLE(all, all, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#elif LANES == 8
    const Lanes ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    const Lanes cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    Lanes all = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    all += SHUFFLE(all, all, 1, 0, 3, 2, 5, 4, 7, 6);
    all = SHUFFLE(all, all, 0, 4, 2, 6, 0, 4, 2, 6);
#else
    const Lanes ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
    const Lanes cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
    const Lanes all = SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
#endif
    for (int i = 0; i < count; ++i) to[i] += all[i];
}

// out[x * k + i] += xs[x] . rows[i] for R rows from i, X vectors; and the rows' own squares.
template <int R, int X, bool square>
void dots_of(const float* const* rows, const float* const* xs, int64_t begin, int64_t end, float* out, int64_t k,
             float* squares) {
    Lanes total[X + 1][4] = {};
    const auto step = [&](int64_t d, int64_t count) INLINE {
        Lanes x[X];
        for (int j = 0; j < X; ++j) x[j] = load(xs[j] + d, count);
        for (int i = 0; i < R; ++i) {
            const Lanes row = load(rows[i] + d, count);
            for (int j = 0; j < X; ++j) total[j][i] += x[j] * row;
            if (square) total[X][i] += row * row;
        }
    };
    int64_t d = begin;
    for (; d + lanes <= end; d += lanes) step(d, int64_t(lanes));
    if (d < end) step(d, end - d);
    for (int j = 0; j < X + square; ++j)
        add_sums<R>(j < X ? out + j * k : squares, total[j][0], total[j][1], total[j][2], total[j][3]);
}

template <int R>
void dots_of_rows(const float* const* rows, const float* const* xs, int64_t m, int64_t begin, int64_t end,
                                float* out, int64_t k, float* squares) {
    int64_t j = 0;
    if (squares && m == 1) dots_of<R, 1, true>(rows, xs, begin, end, out, k, squares), j = 1;
    if (squares && m >= 2) dots_of<R, 2, true>(rows, xs, begin, end, out, k, squares), j = 2;
    // Sixteen sums at once need as many registers.
    for (; lanes == 16 && j + 4 <= m; j += 4) dots_of<R, 4, false>(rows, xs + j, begin, end, out + j * k, k, nullptr);
    for (; j + 2 <= m; j += 2) dots_of<R, 2, false>(rows, xs + j, begin, end, out + j * k, k, nullptr);
    for (; j < m; ++j) dots_of<R, 1, false>(rows, xs + j, begin, end, out + j * k, k, nullptr);
}

// out[j, i] = xs[j] . rows[i], [m, k], and squares[i] = rows[i] . rows[i] where wanted; m >= 1.
inline void dots(const float* const* rows, int64_t k, const float* const* xs, int64_t m, int64_t width, float* out, float* squares) {
    for (int64_t i = 0; i < m * k; ++i) out[i] = 0.0f;
    if (squares)
        for (int64_t i = 0; i < k; ++i) squares[i] = 0.0f;
    constexpr int64_t segment = 128 * lanes;  // the sum of a long row is a sum of sums, or it would lose digits
    for (int64_t begin = 0; begin < width; begin += segment) {
        const int64_t end = begin + segment < width ? begin + segment : width;
        int64_t i = 0;
        for (; i + 4 <= k; i += 4) dots_of_rows<4>(rows + i, xs, m, begin, end, out + i, k, squares ? squares + i : nullptr);
        for (; i + 2 <= k; i += 2) dots_of_rows<2>(rows + i, xs, m, begin, end, out + i, k, squares ? squares + i : nullptr);
        for (; i < k; ++i) dots_of_rows<1>(rows + i, xs, m, begin, end, out + i, k, squares ? squares + i : nullptr);
    }
}

inline float dot(const float* a, const float* b, int64_t width) {
    float found;
    dots(&a, 1, &b, 1, width, &found, nullptr);
    return found;
}

inline int64_t padded(int64_t k) { return (k + lanes - 1) / lanes * lanes; }

// weights = exp(logits - top), their sum returned; both arrays have room for whole vectors.
inline float exponentials(float* weights, const float* logits, int64_t k, float top) {
    Lanes total = {};
    for (int64_t i = 0; i < k; i += lanes) {
        Lanes e = exponential(load(logits + i) - top);
        if (i + lanes > k)
            for (int64_t l = k - i; l < lanes; ++l) e[l] = 0.0f;
        store(weights + i, e);
        total += e;
    }
    return sum(total);
}

// r[i] (the squares on entry) = 1 / sqrt(mean square + eps).
inline void reciprocals(float* r, int64_t k, int64_t width, float eps) {
    const float share = 1.0f / width;
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) r[i] = 1.0f / std::sqrt(r[i] * share + eps);
}

// logits[i] = scale * r[i] * dots[i], and 0 where the mean square overflowed, as the normalised row itself is.
inline void scores(float* logits, const float* dots, const float* r, int64_t k, float scale) {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) logits[i] = r[i] == 0.0f ? 0.0f : scale * r[i] * dots[i];
}

inline float largest(const float* x, int64_t k) {
    float top = x[0];
    for (int64_t i = 1; i < k; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// out = sum_i weights[i] rows[i] + w * with
void mix(float* out, const float* weights, const float* const* rows, int64_t k, float w, const float* with,
         int64_t width) {
    blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
        Lanes total[vectors] = {};
        if (with)
            for (int l = 0; l < vectors; ++l) total[l] = w * load(with + d + l * lanes, count);
        for (int64_t i = 0; i < k; ++i)
            for (int l = 0; l < vectors; ++l) total[l] += weights[i] * load(rows[i] + d + l * lanes, count);
        for (int l = 0; l < vectors; ++l) store(out + d + l * lanes, total[l], count);
    });
}

// The softmax of one token over k sources and, where there is one, a mean of others with its log-sum-exp.
struct Softmax {
    std::vector<float> logits, weights, r;
    float carried = 0.0f;  // weight of that mean

    explicit Softmax(int64_t k) : logits(padded(k)), weights(padded(k)), r(padded(k)) {}

    void of(const float* const* rows, int64_t k, int64_t width, const float* weight, const float* lse, float scale,
            float eps) {
        if (weight) {
            dots(rows, k, &weight, 1, width, logits.data(), r.data());
            reciprocals(r.data(), k, width, eps);
            scores(logits.data(), logits.data(), r.data(), k, scale);
        }
        normalise(k, lse);
    }

    void normalise(int64_t k, const float* lse) {
        float top = largest(logits.data(), k);
        if (lse && *lse > top) top = *lse;
        float total = exponentials(weights.data(), logits.data(), k, top);
        carried = lse ? std::exp(*lse - top) : 0.0f;
        const float share = 1.0f / (total + carried);
        for (int64_t i = 0; i < k; ++i) weights[i] *= share;
        carried *= share;
    }
};

// 1 / sqrt(mean square + eps) of a row.
inline float reciprocal_rms(const float* x, int64_t width, float eps) {
    return 1.0f / std::sqrt(dot(x, x, width) / width + eps);
}

void forward(int64_t dtype, int64_t N, int64_t k, int64_t width, int threads, const void* const* sources,
             const int64_t* strides, const float* weight, const float* carried, const float* carried_lse,
             const float* norm_weight, float scale, float eps, float norm_eps, void* out) {
    ask_for_large_pages(out, dtype, N, width);
#pragma omp parallel num_threads(threads)
    {
        Tile tile(dtype, k, width, sources, strides);
        Softmax softmax(k);
        std::vector<float> scratch(dtype == float32 ? 0 : width);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            tile.read(t);
            softmax.of(tile.rows.data(), k, width, weight, carried_lse ? carried_lse + t : nullptr, scale, eps);
            float* h = row_to_put(out, dtype, t * width, scratch.data());
            mix(h, softmax.weights.data(), tile.rows.data(), k, softmax.carried, carried ? carried + t * width : nullptr,
                width);
            if (norm_weight) {
                round_row(h, dtype, width);  // the norm reads it as it is stored without one
                const float r = reciprocal_rms(h, width, norm_eps);
                blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
                    for (int l = 0; l < vectors; ++l) {
                        const int64_t at = d + l * lanes;
                        store(h + at, load(h + at, count) * r * load(norm_weight + at, count), count);
                    }
                });
            }
            put_row(out, dtype, t * width, width, h);
        }
    }
}

// total[d] = sum over chunks of part[chunk, d], in their order.
inline void add_chunks(float* total, const float* part, int64_t chunks, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t d = 0; d < width; d += lanes) {
        const int64_t count = d + lanes <= width ? lanes : width - d;
        Lanes x = {};
        for (int64_t c = 0; c < chunks; ++c) x += load(part + c * width + d, count);
        store(total + d, x, count);
    }
}

// h, where given, is the output of forward (without a norm), and stands for `carried`: of that, the gradients need
// nothing but its share in h . grad_h.
void backward(int64_t dtype, int64_t N, int64_t k, int64_t width, int threads, int64_t chunks, const void* grad_h,
              const void* const* sources, const int64_t* strides, const float* weight, const float* carried,
              const float* carried_lse, const void* h, const float* norm_weight, float scale, float eps, float norm_eps,
              void* const* into, const int64_t* into_strides, float* d_weight, float* d_carried, float* d_carried_lse,
              float* d_norm, float* part) {
    const int64_t size = (N + chunks - 1) / chunks;
    float* weight_part = part;
    float* norm_part = part + (weight ? chunks * width : 0);
    for (int64_t i = 0; i < k; ++i) ask_for_large_pages(into[i], dtype, N, width, into_strides[i]);
#pragma omp parallel num_threads(threads)
    {
        Tile tile(dtype, k, width, sources, strides);
        Softmax softmax(k);
        std::vector<float> grad(dtype == float32 && !norm_weight ? 0 : width);
        std::vector<float> given(dtype == float32 ? 0 : width), mean_row(dtype == float32 && !norm_weight ? 0 : width);
        std::vector<float> found(2 * k), along_q(k), along_v(k);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            float* weight_sum = weight_part + c * width;
            float* norm_sum = norm_part + c * width;
            if (weight) std::memset(weight_sum, 0, width * sizeof(float));
            if (norm_weight) std::memset(norm_sum, 0, width * sizeof(float));
            for (int64_t t = c * size; t < N && t < (c + 1) * size; ++t) {
                tile.read(t);
                const float* const* rows = tile.rows.data();
                const float* lse = carried_lse ? carried_lse + t : nullptr;
                const float* with = carried ? carried + t * width : nullptr;
                const float* g = row(grad_h, dtype, t * width, width, given.data());
                float* d_alpha = found.data();
                if (norm_weight) {
                    softmax.of(rows, k, width, weight, lse, scale, eps);
                    float* x = mean_row.data();
                    mix(x, softmax.weights.data(), rows, k, softmax.carried, with, width);
                    round_row(x, dtype, width);  // the norm read it as it was rounded
                    Lanes product = {};
                    blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
                        for (int l = 0; l < vectors; ++l) {
                            const int64_t at = d + l * lanes;
                            product += load(x + at, count) * load(g + at, count) * load(norm_weight + at, count);
                        }
                    });
                    const float r = reciprocal_rms(x, width, norm_eps);
                    const float along = r == 0.0f ? 0.0f : -sum(product) * r * r * r / width;
                    blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
                        for (int l = 0; l < vectors; ++l) {
                            const int64_t at = d + l * lanes;
                            const Lanes value = load(x + at, count), y = load(g + at, count);
                            store(grad.data() + at, r * y * load(norm_weight + at, count) + along * value, count);
                            store(norm_sum + at, load(norm_sum + at, count) + y * value * r, count);
                        }
                    });
                    g = grad.data();
                    if (weight) dots(rows, k, &g, 1, width, d_alpha, nullptr);
                } else {
                    if (weight) {
                        const float* both[2] = {g, weight};
                        dots(rows, k, both, 2, width, d_alpha, softmax.r.data());
                        reciprocals(softmax.r.data(), k, width, eps);
                        scores(softmax.logits.data(), d_alpha + k, softmax.r.data(), k, scale);
                    }
                    softmax.normalise(k, lse);
                }
                const float* w = softmax.weights.data();
                if (!weight && lse) dots(rows, k, &g, 1, width, d_alpha, nullptr);
                float mean = 0.0f, d_carried_alpha = 0.0f, d_logits = 0.0f;
                if (weight || lse) {
                    if (h) {
                        mean = dot(row(h, dtype, t * width, width, mean_row.data()), g, width);
                    } else {
                        if (with) d_carried_alpha = dot(with, g, width);
                        mean = softmax.carried * d_carried_alpha;
                        for (int64_t i = 0; i < k; ++i) mean += w[i] * d_alpha[i];
                    }
                }
                for (int64_t i = 0; i < k; ++i) {
                    along_q[i] = along_v[i] = 0.0f;
                    if (!weight && !lse) continue;
                    const float d_logit = w[i] * (d_alpha[i] - mean);
                    d_logits += d_logit;
                    if (!weight) continue;
                    const float r = softmax.r[i];
                    along_q[i] = d_logit * scale * r;
                    along_v[i] = -d_logit * softmax.logits[i] * r * r / width;
                }
                if (lse) d_carried_lse[t] = h ? -d_logits : softmax.carried * (d_carried_alpha - mean);
                tile.write_to(into, into_strides, t);
                blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
                    Lanes grads[vectors], query[vectors] = {}, total[vectors] = {};
                    for (int l = 0; l < vectors; ++l) {
                        grads[l] = load(g + d + l * lanes, count);
                        if (weight) query[l] = load(weight + d + l * lanes, count);
                        if (lse) store(d_carried + t * width + d + l * lanes, softmax.carried * grads[l], count);
                    }
                    for (int64_t i = 0; i < k; ++i) {
                        float* to = tile.grads[i] + d;
                        for (int l = 0; l < vectors; ++l) {
                            Lanes x = w[i] * grads[l];
                            if (weight) {
                                const Lanes row = load(rows[i] + d + l * lanes, count);
                                x += along_q[i] * query[l] + along_v[i] * row;
                                total[l] += along_q[i] * row;
                            }
                            store(to + l * lanes, x, count);
                        }
                    }
                    if (weight)
                        for (int l = 0; l < vectors; ++l) {
                            float* at = weight_sum + d + l * lanes;
                            store(at, load(at, count) + total[l], count);
                        }
                });
                tile.written(into, into_strides, t);
            }
        }
    }
    if (weight) add_chunks(d_weight, weight_part, chunks, width, threads);
    if (norm_weight) add_chunks(d_norm, norm_part, chunks, width, threads);
}

void many_forward(int64_t dtype, int64_t N, int64_t k, int64_t Q, int64_t width, int threads,
                  const void* const* sources, const int64_t* strides, const float* queries, float scale, float eps,
                  float* out, float* lse) {
    ask_for_large_pages(out, float32, Q * N, width);
#pragma omp parallel num_threads(threads)
    {
        Tile tile(dtype, k, width, sources, strides);
        std::vector<const float*> xs(Q);
        for (int64_t j = 0; j < Q; ++j) xs[j] = queries + j * width;
        std::vector<float> found(Q * k), r(k), logits(padded(k)), weights(padded(k));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            tile.read(t);
            const float* const* rows = tile.rows.data();
            dots(rows, k, xs.data(), Q, width, found.data(), r.data());
            reciprocals(r.data(), k, width, eps);
            for (int64_t j = 0; j < Q; ++j) {
                scores(logits.data(), found.data() + j * k, r.data(), k, scale);
                const float top = largest(logits.data(), k);
                const float total = exponentials(weights.data(), logits.data(), k, top);
                lse[j * N + t] = top + std::log(total);
                const float share = 1.0f / total;
                for (int64_t i = 0; i < k; ++i) weights[i] *= share;
                mix(out + (j * N + t) * width, weights.data(), rows, k, 0.0f, nullptr, width);
            }
        }
    }
}

void many_backward(int64_t dtype, int64_t N, int64_t k, int64_t Q, int64_t width, int threads, int64_t chunks,
                   const float* const* grad_out, const float* grad_lse, const void* const* sources,
                   const int64_t* strides, const float* queries, float scale, float eps, void* const* into,
                   const int64_t* into_strides, float* d_queries, float* part) {
    const int64_t size = (N + chunks - 1) / chunks;
    for (int64_t i = 0; i < k; ++i) ask_for_large_pages(into[i], dtype, N, width, into_strides[i]);
#pragma omp parallel num_threads(threads)
    {
        Tile tile(dtype, k, width, sources, strides);
        std::vector<const float*> xs(2 * Q);
        for (int64_t j = 0; j < Q; ++j) xs[j] = queries + j * width;
        // Of a pair of query and source: w, the weight; along_q, the gradient's part along the query.
        std::vector<float> found(2 * Q * k), r(k), along_v(k), logits(padded(k)), weights(padded(k)), w(Q * k),
            along_q(Q * k);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            float* sum_of = part + c * Q * width;
            std::memset(sum_of, 0, Q * width * sizeof(float));
            for (int64_t t = c * size; t < N && t < (c + 1) * size; ++t) {
                tile.read(t);
                const float* const* rows = tile.rows.data();
                for (int64_t j = 0; j < Q; ++j) xs[Q + j] = grad_out[j] + t * width;
                dots(rows, k, xs.data(), 2 * Q, width, found.data(), r.data());
                reciprocals(r.data(), k, width, eps);
                for (int64_t i = 0; i < k; ++i) along_v[i] = 0.0f;
                for (int64_t j = 0; j < Q; ++j) {
                    const float* d_alpha = found.data() + (Q + j) * k;
                    scores(logits.data(), found.data() + j * k, r.data(), k, scale);
                    const float share =
                        1.0f / exponentials(weights.data(), logits.data(), k, largest(logits.data(), k));
                    float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
                    for (int64_t i = 0; i < k; ++i) mean += weights[i] * d_alpha[i];
                    mean *= share;
                    const float d_lse = grad_lse[j * N + t];
#pragma omp simd
                    for (int64_t i = 0; i < k; ++i) {
                        const float weight = weights[i] * share, d_logit = weight * (d_alpha[i] - mean + d_lse);
                        w[j * k + i] = weight;
                        along_q[j * k + i] = d_logit * scale * r[i];
                        along_v[i] -= d_logit * logits[i] * r[i] * r[i] / width;
                    }
                }
                tile.write_to(into, into_strides, t);
                blocks(width, [&](auto vectors, int64_t d, int64_t count) INLINE {
                    for (int64_t j = 0; j < Q; ++j) {
                        float* to = sum_of + j * width + d;
                        Lanes x[vectors] = {};
                        for (int64_t i = 0; i < k; ++i)
                            for (int l = 0; l < vectors; ++l)
                                x[l] += along_q[j * k + i] * load(rows[i] + d + l * lanes, count);
                        for (int l = 0; l < vectors; ++l)
                            store(to + l * lanes, load(to + l * lanes, count) + x[l], count);
                    }
                    for (int64_t i = 0; i < k; ++i) {
                        Lanes x[vectors];
                        for (int l = 0; l < vectors; ++l) x[l] = along_v[i] * load(rows[i] + d + l * lanes, count);
                        for (int64_t j = 0; j < Q; ++j)
                            for (int l = 0; l < vectors; ++l)
                                x[l] += w[j * k + i] * load(xs[Q + j] + d + l * lanes, count) +
                                        along_q[j * k + i] * load(xs[j] + d + l * lanes, count);
                        float* to = tile.grads[i] + d;
                        for (int l = 0; l < vectors; ++l) store(to + l * lanes, x[l], count);
                    }
                });
                tile.written(into, into_strides, t);
            }
        }
    }
    add_chunks(d_queries, part, chunks, Q * width, threads);
}

}  // namespace

extern "C" {

void pool_forward(int64_t dtype, int64_t N, int64_t k, int64_t width, int64_t threads, const void* const* sources,
                  const int64_t* strides, const float* weight, const float* carried, const float* carried_lse,
                  const float* norm_weight, double scale, double eps, double norm_eps, void* out) {
    forward(dtype, N, k, width, threads, sources, strides, weight, carried, carried_lse, norm_weight, scale, eps,
            norm_eps, out);
}

void pool_backward(int64_t dtype, int64_t N, int64_t k, int64_t width, int64_t threads, int64_t chunks,
                   const void* grad_h, const void* const* sources, const int64_t* strides, const float* weight,
                   const float* carried, const float* carried_lse, const void* h, const float* norm_weight, double scale,
                   double eps, double norm_eps, void* const* into, const int64_t* into_strides, float* d_weight,
                   float* d_carried, float* d_carried_lse, float* d_norm, float* part) {
    backward(dtype, N, k, width, threads, chunks, grad_h, sources, strides, weight, carried, carried_lse, h,
             norm_weight, scale, eps, norm_eps, into, into_strides, d_weight, d_carried, d_carried_lse, d_norm, part);
}

void pool_many_forward(int64_t dtype, int64_t N, int64_t k, int64_t Q, int64_t width, int64_t threads,
                       const void* const* sources, const int64_t* strides, const float* queries, double scale,
                       double eps, float* out, float* lse) {
    many_forward(dtype, N, k, Q, width, threads, sources, strides, queries, scale, eps, out, lse);
}

void pool_many_backward(int64_t dtype, int64_t N, int64_t k, int64_t Q, int64_t width, int64_t threads, int64_t chunks,
                        const float* const* grad_out, const float* grad_lse, const void* const* sources,
                        const int64_t* strides, const float* queries, double scale, double eps, void* const* into,
                        const int64_t* into_strides, float* d_queries, float* part) {
    many_backward(dtype, N, k, Q, width, threads, chunks, grad_out, grad_lse, sources, strides, queries, scale, eps,
                  into, into_strides, d_queries, part);
}
}
