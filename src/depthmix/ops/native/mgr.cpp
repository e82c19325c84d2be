// The MGR step on a CPU (equations: ops/reference.py, gradients: ops/eager.py), one pass over memory each way.
//
// Everything about one token is done before the next one is looked at, so that its n x D streams S come from memory
// once and all further passes over them find them in the cache:
//
//   window    S = the anchor, with the k earlier outputs lerped in; kept in a tile of the stream dtype
//   gate      per stream |s|^2 and w1 . s                                            -> beta
//   lerp      s' = round(fma(beta, y, (1 - beta) s)); per stream |s'|^2 and w2 . s'  -> alpha
//   pool      s' again, from s: cheaper than a tile that holds it; written out, and h = sum_i alpha_i s'_i
//
// Backwards beta is given and the first three give alpha as before. Then, G being the gradient of the new streams,
//
//   pool      T = G + alpha grad_h + gradient of the score of s' -> a tile; d_beta = (y - s) . T; d_y = sum_i beta_i T_i
//   gate      d_s = (1 - beta) T + gradient of the score of s
//
// which reads S, G, y, grad_h and writes d_s, d_y: the floor. Gradients of parameters are summed per chunk of tokens,
// and the chunks in order; chunks depend on N alone, and so no result depends on the number of threads.
//
// N tokens, n streams of `width` = D numbers, all arrays contiguous. A mean square that overflows gives a reciprocal
// and a score of 0.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "storage.h"

namespace {

struct Step {
    int64_t n, width;
    const float *gate_weight, *gate_bias, *pool_weight, *update_weight, *norm_weight;
    bool competitive;
    float scale, eps, norm_eps;

    float reciprocal(float square, float epsilon) const { return 1.0f / std::sqrt(square / width + epsilon); }
    float score(float dot, float r) const { return r == 0.0f ? 0.0f : dot * r * scale; }
};

// k earlier steps: outputs [N, width] and gates [N, n].
struct Window {
    int64_t k;
    const void* const* outputs;
    const int64_t* dtypes;
    const float* const* gates;
};

template <class T>
inline Lanes lerp(Lanes y, Lanes s, float beta) {
    return rounded(fused(all(beta), y, (1.0f - beta) * s), static_cast<const T*>(nullptr));
}

// The streams that enter this step, made from the token's `anchor`: rows[j] is output j.
template <class T>
void replay(const Step& step, const Window& window, int64_t t, const T* anchor, const float* const* rows, T* streams) {
    for (int64_t i = 0; i < step.n; ++i) {
        const int64_t at = i * step.width;
        sweep<4>(0, step.width, [&](int64_t d, auto block) __attribute__((always_inline)) {
            constexpr int count = decltype(block)::count;
            Lanes s[count];
            for (int l = 0; l < count; ++l) s[l] = load(anchor + at + d, block, l);
            for (int64_t j = 0; j < window.k; ++j)
                for (int l = 0; l < count; ++l)
                    s[l] = lerp<T>(load(rows[j] + d, block, l), s[l], window.gates[j][t * step.n + i]);
            for (int l = 0; l < count; ++l) store(streams + at + d, s[l], block, l);
        });
    }
}

struct Sums {
    float square = 0.0f, dot = 0.0f, read = 0.0f;
};

// Sums over a row are sums of the sums over its pieces, or those of a long row would lose digits.
constexpr int64_t piece = 1024;

// |x|^2 and weight . x. Meanwhile the memory at `ahead`, a row that is read next, is fetched.
template <class T>
inline Sums gate_sums(const T* x, const float* weight, int64_t width, const T* ahead) {
    Sums found;
    for (int64_t begin = 0; begin < width; begin += piece) {
        Lanes square[4] = {}, dot[4] = {};
        sweep<4>(begin, std::min(width, begin + piece), [&](int64_t d, auto block) __attribute__((always_inline)) {
            for (int l = 0; l < block.count; ++l) {
                const Lanes a = load(x + d, block, l);
                prefetch(ahead + d, l);
                square[l] += a * a;
                dot[l] += a * load(weight + d, block, l);
            }
        });
        found.square += sum((square[0] + square[1]) + (square[2] + square[3]));
        found.dot += sum((dot[0] + dot[1]) + (dot[2] + dot[3]));
    }
    return found;
}

// The same of x' = lerp(y, x, beta), and its product with grad_h, if there is one.
template <class T, bool backward>
inline Sums pool_sums(const T* x, const float* y, float beta, const float* weight, const float* grad_h, int64_t width) {
    Sums found;
    for (int64_t begin = 0; begin < width; begin += piece) {
        Lanes square[2] = {}, dot[2] = {}, read[2] = {};
        sweep<2>(begin, std::min(width, begin + piece), [&](int64_t d, auto block) __attribute__((always_inline)) {
            for (int l = 0; l < block.count; ++l) {
                const Lanes a = lerp<T>(load(y + d, block, l), load(x + d, block, l), beta);
                square[l] += a * a;
                dot[l] += a * load(weight + d, block, l);
                if (backward) read[l] += a * load(grad_h + d, block, l);
            }
        });
        found.square += sum(square[0] + square[1]);
        found.dot += sum(dot[0] + dot[1]);
        found.read += sum(read[0] + read[1]);
    }
    return found;
}

// logits [n] -> weights [n] of the softmax over them and, if given, one entry more.
inline void softmax(float* weights, const float* logits, int64_t n, const float* keep) {
    float largest = keep ? *keep : logits[0], total = 0.0f;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, logits[i]);
    if (keep) total = std::exp(*keep - largest);
    for (int64_t i = 0; i < n; ++i) total += weights[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < n; ++i) weights[i] /= total;
}

// What a token's passes leave for the next one: n numbers each.
struct Scores {
    float *r, *g, *logits, *beta, *alpha, *r_new, *a, *d_alpha;
    static constexpr int64_t arrays = 8;
    Scores(float* from, int64_t n) {
        for (float** x : {&r, &g, &logits, &beta, &alpha, &r_new, &a, &d_alpha}) *x = from, from += n;
    }
};

// Scores of the streams, and that of y.
template <class T>
inline void score_streams(const Step& step, const T* s, const float* y, const T* ahead, Scores& of, float& r_y,
                          float& g_y) {
    for (int64_t i = 0; i < step.n; ++i) {
        const Sums found = gate_sums(s + i * step.width, step.gate_weight, step.width, ahead + i * step.width);
        of.r[i] = step.reciprocal(found.square, step.eps);
        of.g[i] = step.score(found.dot, of.r[i]);
    }
    r_y = g_y = 0.0f;
    if (!step.update_weight) return;
    const Sums found = gate_sums(y, step.update_weight, step.width, y);
    r_y = step.reciprocal(found.square, step.eps);
    g_y = step.score(found.dot, r_y);
}

template <class T, bool backward>
inline void score_new_streams(const Step& step, const T* s, const float* y, const float* grad_h, Scores& of) {
    for (int64_t i = 0; i < step.n; ++i) {
        const Sums found =
            pool_sums<T, backward>(s + i * step.width, y, of.beta[i], step.pool_weight, grad_h, step.width);
        of.r_new[i] = step.reciprocal(found.square, step.eps);
        of.a[i] = step.score(found.dot, of.r_new[i]);
        of.d_alpha[i] = found.read;
    }
    softmax(of.alpha, of.a, step.n, nullptr);
}

// sink(d, block, l, sum_i alpha_i s'_i), unrounded; the new streams are written on the way, if asked for.
template <class T, class Sink>
inline void pool(const Step& step, const T* s, const float* y, const Scores& of, T* new_streams, bool past,
                 int64_t begin, int64_t end, Sink sink) {
    sweep<2>(begin, end, [&](int64_t d, auto block) __attribute__((always_inline)) {
        constexpr int count = decltype(block)::count;
        Lanes update[count], total[count] = {};
        for (int l = 0; l < count; ++l) update[l] = load(y + d, block, l);
        for (int64_t i = 0; i < step.n; ++i) {
            const int64_t at = i * step.width + d;
            for (int l = 0; l < count; ++l) {
                const Lanes made = lerp<T>(update[l], load(s + at, block, l), of.beta[i]);
                total[l] = fused(all(of.alpha[i]), made, total[l]);
                if (new_streams && past) store_past(new_streams + at, made, block, l);
                if (new_streams && !past) store(new_streams + at, made, block, l);
            }
        }
        for (int l = 0; l < count; ++l) sink(d, block, l, total[l]);
    });
}

// One token, given the streams that enter. Not inlined: a window and separate steps run the very same code.
template <class T>
__attribute__((noinline)) void forward_token(const Step& step, const T* s, const float* y, const T* ahead, Scores& of,
                                             T* new_streams, bool past, T* h, float* h_row) {
    float r_y, g_y;
    score_streams(step, s, y, ahead, of, r_y, g_y);
    for (int64_t i = 0; i < step.n; ++i) of.logits[i] = of.g[i] + g_y + step.gate_bias[i + step.competitive];
    if (step.competitive)
        softmax(of.beta, of.logits, step.n, step.gate_bias);
    else
        for (int64_t i = 0; i < step.n; ++i) of.beta[i] = 1.0f / (1.0f + std::exp(-of.logits[i]));
    if (step.pool_weight)
        score_new_streams<T, false>(step, s, y, nullptr, of);
    else
        std::fill_n(of.alpha, step.n, 1.0f / step.n);
    if (!step.norm_weight) {
        pool(step, s, y, of, new_streams, past, 0, step.width, [&](int64_t d, auto block, int l, Lanes total) {
            store(h + d, rounded(total, h), block, l);
        });
        return;
    }
    float squares = 0.0f;
    for (int64_t begin = 0; begin < step.width; begin += piece) {
        const int64_t end = std::min(step.width, begin + piece);
        Lanes square = {};
        pool(step, s, y, of, new_streams, past, begin, end, [&](int64_t d, auto block, int l, Lanes total) {
            total = rounded(total, h);
            square += total * total;
            store(h_row + d, total, block, l);
        });
        squares += sum(square);
    }
    const float r = step.reciprocal(squares, step.norm_eps);
    sweep<2>(0, step.width, [&](int64_t d, auto block) {
        for (int l = 0; l < block.count; ++l)
            store(h + d, rounded(load(h_row + d, block, l) * r * load(step.norm_weight + d, block, l), h), block, l);
    });
}

// Sums over a chunk of tokens; an array is absent where its parameter is.
struct Gradients {
    float *gate_weight, *pool_weight, *update_weight, *norm_weight, *gate_bias;
    static int64_t size(const Step& step) { return 4 * step.width + step.n + 1; }
    Gradients(float* from, int64_t width)
        : gate_weight(from), pool_weight(from + width), update_weight(from + 2 * width),
          norm_weight(from + 3 * width), gate_bias(from + 4 * width) {}
};

// The gradient of the read before its norm, into `out`; adds to the gradient of norm_weight.
template <class T>
inline void norm_backward(const Step& step, const T* s, const float* y, const Scores& of, const float* grad_h,
                          float* h_row, float* out, float* d_weight) {
    T* const unwritten = nullptr;
    float squares = 0.0f, product = 0.0f;
    for (int64_t begin = 0; begin < step.width; begin += piece) {
        const int64_t end = std::min(step.width, begin + piece);
        Lanes square = {}, along = {};
        pool(step, s, y, of, unwritten, false, begin, end, [&](int64_t d, auto block, int l, Lanes total) {
            total = rounded(total, s);
            square += total * total;
            along += load(grad_h + d, block, l) * load(step.norm_weight + d, block, l) * total;
            store(h_row + d, total, block, l);
        });
        squares += sum(square);
        product += sum(along);
    }
    const float r = step.reciprocal(squares, step.norm_eps);
    const float along_h = r == 0.0f ? 0.0f : product * r * r * r / -step.width;
    sweep<1>(0, step.width, [&](int64_t d, auto block) {
        const Lanes grad = load(grad_h + d, block, 0), h = load(h_row + d, block, 0);
        store(d_weight + d, load(d_weight + d, block, 0) + grad * h * r, block, 0);
        store(out + d, grad * load(step.norm_weight + d, block, 0) * r + h * along_h, block, 0);
    });
}

// into += gradient of the score of x; d_weight += that of its weight. along_weight = d_score c r, along_x = -d_score g r^2 / D
inline void add_score_gradient(float* into, float* d_weight, const float* x, const float* weight, float along_weight,
                               float along_x, int64_t width) {
    sweep<1>(0, width, [&](int64_t d, auto block) {
        const Lanes a = load(x + d, block, 0);
        store(into + d, load(into + d, block, 0) + along_weight * load(weight + d, block, 0) + along_x * a, block, 0);
        store(d_weight + d, load(d_weight + d, block, 0) + along_weight * a, block, 0);
    });
}

// 1 - sum_i beta_i of a competitive gate, to full precision also where that is little.
inline float kept(const Step& step, const Scores& of, float g_y) {
    const float given = std::accumulate(of.beta, of.beta + step.n, 0.0f);
    if (given < 0.5f) return 1.0f - given;
    const int64_t i = std::max_element(of.beta, of.beta + step.n) - of.beta;
    return of.beta[i] * std::exp(step.gate_bias[0] - (of.g[i] + g_y + step.gate_bias[i + 1]));
}

struct Scratch {
    float *total, *h_row, *grad_row, *along_weight, *along_x;  // [n, width], [width], [width], [n], [n]
    Lanes* d_beta;                                             // [n]
};

// One token; grad_h and grad_streams may be absent. of.beta is given.
template <class T>
__attribute__((noinline)) void backward_token(const Step& step, const T* s, const float* y, const float* grad_h,
                                              const T* grad_streams, const T* ahead, Scores& of, const Scratch& at_hand,
                                              T* d_streams, bool past, float* d_y, const Gradients& sums) {
    const int64_t n = step.n, width = step.width;
    float *along_weight = at_hand.along_weight, *along_x = at_hand.along_x;
    float r_y, g_y;
    score_streams(step, s, y, grad_streams ? grad_streams : s, of, r_y, g_y);

    // Pool. Without a grad_h, T is G; without a weight, alpha is constant.
    const bool scored = grad_h && step.pool_weight;
    if (grad_h && !step.pool_weight) std::fill_n(of.alpha, n, 1.0f / n);
    if (scored && step.norm_weight) score_new_streams<T, false>(step, s, y, nullptr, of);
    if (grad_h && step.norm_weight) {
        norm_backward(step, s, y, of, grad_h, at_hand.h_row, at_hand.grad_row, sums.norm_weight);
        grad_h = at_hand.grad_row;
    }
    if (scored) {
        score_new_streams<T, true>(step, s, y, grad_h, of);
        float mean = 0.0f;
        for (int64_t i = 0; i < n; ++i) mean += of.alpha[i] * of.d_alpha[i];
        for (int64_t i = 0; i < n; ++i) {
            const float d_a = of.alpha[i] * (of.d_alpha[i] - mean);
            along_weight[i] = d_a * of.r_new[i] * step.scale;
            along_x[i] = d_a * of.a[i] * of.r_new[i] * of.r_new[i] / -width;
        }
    }
    float* const d_beta = of.logits;
    std::fill_n(d_beta, n, 0.0f);
    for (int64_t begin = 0; begin < width; begin += piece) {
        for (int64_t i = 0; i < n; ++i) at_hand.d_beta[i] = Lanes{};
        sweep<2>(begin, std::min(width, begin + piece), [&](int64_t d, auto block) __attribute__((always_inline)) {
            constexpr int count = decltype(block)::count;
            Lanes update[count], read[count] = {}, weight[count] = {}, d_weight[count] = {}, d_update[count] = {};
            for (int l = 0; l < count; ++l) {
                update[l] = load(y + d, block, l);
                if (grad_h) read[l] = load(grad_h + d, block, l);
                if (scored) weight[l] = load(step.pool_weight + d, block, l);
            }
            for (int64_t i = 0; i < n; ++i) {
                const int64_t at = i * width + d;
                Lanes along_update = at_hand.d_beta[i];
                for (int l = 0; l < count; ++l) {
                    const Lanes x = load(s + at, block, l);
                    Lanes total = grad_streams ? load(grad_streams + at, block, l) : Lanes{};
                    prefetch(ahead + at, l);
                    if (grad_h) total += of.alpha[i] * read[l];
                    if (scored) {
                        const Lanes made = lerp<T>(update[l], x, of.beta[i]);
                        total += along_weight[i] * weight[l] + along_x[i] * made;
                        d_weight[l] += along_weight[i] * made;
                    }
                    along_update += (update[l] - x) * total;
                    d_update[l] += of.beta[i] * total;
                    store(at_hand.total + at, total, block, l);
                }
                at_hand.d_beta[i] = along_update;
            }
            for (int l = 0; l < count; ++l) {
                store(d_y + d, d_update[l], block, l);
                if (scored) store(sums.pool_weight + d, load(sums.pool_weight + d, block, l) + d_weight[l], block, l);
            }
        });
        for (int64_t i = 0; i < n; ++i) d_beta[i] += sum(at_hand.d_beta[i]);
    }

    // Gate.
    float mean = 0.0f, d_score_y = 0.0f;
    if (step.competitive) {
        for (int64_t i = 0; i < n; ++i) mean += of.beta[i] * d_beta[i];
        d_score_y = kept(step, of, g_y) * mean;  // what the sum of d_logit comes to, without its cancellation
        sums.gate_bias[0] -= d_score_y;
    }
    for (int64_t i = 0; i < n; ++i) {
        const float d_logit = of.beta[i] * (step.competitive ? d_beta[i] - mean : (1.0f - of.beta[i]) * d_beta[i]);
        sums.gate_bias[i + step.competitive] += d_logit;
        if (!step.competitive) d_score_y += d_logit;
        along_weight[i] = d_logit * of.r[i] * step.scale;
        along_x[i] = d_logit * of.g[i] * of.r[i] * of.r[i] / -width;
    }
    if (step.update_weight)
        add_score_gradient(d_y, sums.update_weight, y, step.update_weight, d_score_y * r_y * step.scale,
                           d_score_y * g_y * r_y * r_y / -width, width);
    sweep<2>(0, width, [&](int64_t d, auto block) __attribute__((always_inline)) {
        constexpr int count = decltype(block)::count;
        Lanes weight[count], d_weight[count] = {};
        for (int l = 0; l < count; ++l) weight[l] = load(step.gate_weight + d, block, l);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = i * width + d;
            for (int l = 0; l < count; ++l) {
                const Lanes x = load(s + at, block, l);
                Lanes grad = (1.0f - of.beta[i]) * load(at_hand.total + at, block, l);
                grad = rounded(grad + along_weight[i] * weight[l] + along_x[i] * x, s);
                d_weight[l] += along_weight[i] * x;
                if (past) store_past(d_streams + at, grad, block, l);
                if (!past) store(d_streams + at, grad, block, l);
            }
        }
        for (int l = 0; l < count; ++l)
            store(sums.gate_weight + d, load(sums.gate_weight + d, block, l) + d_weight[l], block, l);
    });
}

// A thread's scratch, aligned for Lanes: what is asked for, in order.
class Arena {
  public:
    explicit Arena(int64_t bytes) : memory(new char[bytes + 64 * slots]), at(memory.get()) {}
    template <class T>
    T* take(int64_t count) {
        at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t{63});
        T* taken = reinterpret_cast<T*>(at);
        at += count * sizeof(T);
        return taken;
    }

  private:
    static constexpr int64_t slots = 16;
    std::unique_ptr<char[]> memory;
    char* at;
};

// Streams as they enter this step, and y and the earlier outputs as fp32.
template <class T>
class Entering {
  public:
    static int64_t bytes(const Step& step, const Window& window) {
        return (window.k ? step.n * step.width * sizeof(T) : 0) + (window.k + 1) * step.width * sizeof(float);
    }
    Entering(const Step& step, const Window& window, const T* streams, Arena& arena)
        : step(step), window(window), streams(streams),
          tile(window.k ? arena.take<T>(step.n * step.width) : nullptr),
          rows(arena.take<float>((window.k + 1) * step.width)), pointers(window.k) {}
    const T* token(int64_t t) {
        const T* anchor = streams + t * step.n * step.width;
        if (!window.k) return anchor;
        for (int64_t j = 0; j < window.k; ++j)
            pointers[j] = row(window.outputs[j], window.dtypes[j], t * step.width, step.width,
                              rows + (j + 1) * step.width);
        replay(step, window, t, anchor, pointers.data(), tile);
        return tile;
    }
    const float* output(const void* y, int64_t dtype, int64_t t) {
        return row(y, dtype, t * step.width, step.width, rows);
    }

  private:
    const Step& step;
    const Window& window;
    const T* streams;
    T* tile;
    float* rows;
    std::vector<const float*> pointers;
};

// Results larger than a cache is likely to keep until they are read go past it.
constexpr int64_t past_caches = 16 << 20;

template <class T>
void forward(const Step& step, const Window& window, int64_t N, int64_t threads, const void* y, int64_t y_dtype,
             const T* streams, T* h, T* new_streams, float* beta) {
    const int64_t n = step.n, width = step.width, size = n * width;
    const bool past = N * size * static_cast<int64_t>(sizeof(T)) > past_caches;
    ask_for_large_pages(new_streams, N * size * sizeof(T));
    ask_for_large_pages(h, N * width * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
        Arena arena(Entering<T>::bytes(step, window) + (width + Scores::arrays * n) * sizeof(float));
        Entering<T> entering(step, window, streams, arena);
        Scores of(arena.take<float>(Scores::arrays * n), n);
        float* h_row = arena.take<float>(width);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; ++t) {
            const T* s = entering.token(t);
            const float* update = entering.output(y, y_dtype, t);
            of.beta = beta + t * n;
            forward_token(step, s, update, streams + std::min(t + 1, N - 1) * size, of,
                          new_streams ? new_streams + t * size : nullptr, past, h + t * width, h_row);
        }
        finish_past();
    }
}

template <class T>
void backward(const Step& step, const Window& window, int64_t N, int64_t threads, const void* grad_h,
              int64_t grad_h_dtype, const T* grad_streams, const void* y, int64_t y_dtype, const T* streams,
              const float* beta, void* d_y, T* d_streams, float* d_gate_weight, float* d_pool_weight,
              float* d_update_weight, float* d_norm_weight, float* d_gate_bias) {
    const int64_t n = step.n, width = step.width, size = n * width;
    const int64_t chunk = std::max<int64_t>(64, (N + 63) / 64), chunks = (N + chunk - 1) / chunk;
    const int64_t length = Gradients::size(step);
    const std::unique_ptr<float[]> partial(new float[chunks * length]);
    const bool past = N * size * static_cast<int64_t>(sizeof(T)) > past_caches;
    ask_for_large_pages(d_streams, N * size * sizeof(T));
    ask_for_large_pages(d_y, y_dtype, N, width);
#pragma omp parallel num_threads(threads)
    {
        Arena arena(Entering<T>::bytes(step, window) +
                    (size + 4 * width + (Scores::arrays + 2 + lanes) * n) * sizeof(float));
        Entering<T> entering(step, window, streams, arena);
        Scores of(arena.take<float>(Scores::arrays * n), n);
        Scratch at_hand;
        at_hand.total = arena.take<float>(size);
        at_hand.h_row = arena.take<float>(width);
        at_hand.grad_row = arena.take<float>(width);
        at_hand.along_weight = arena.take<float>(n);
        at_hand.along_x = arena.take<float>(n);
        at_hand.d_beta = arena.take<Lanes>(n);
        float* read_row = arena.take<float>(width);
        float* d_y_row = arena.take<float>(width);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            const Gradients sums(partial.get() + c * length, width);
            std::fill_n(partial.get() + c * length, length, 0.0f);
            for (int64_t t = c * chunk; t < std::min(N, (c + 1) * chunk); ++t) {
                const T* s = entering.token(t);
                const float* update = entering.output(y, y_dtype, t);
                const float* read = grad_h ? row(grad_h, grad_h_dtype, t * width, width, read_row) : nullptr;
                float* to = row_to_put(d_y, y_dtype, t * width, d_y_row);
                std::copy_n(beta + t * n, n, of.beta);
                backward_token(step, s, update, read, grad_streams ? grad_streams + t * size : nullptr,
                               streams + std::min(t + 1, N - 1) * size, of, at_hand, d_streams + t * size, past, to,
                               sums);
                put_row(d_y, y_dtype, t * width, width, to);
            }
        }
        finish_past();
        float* const totals[] = {d_gate_weight, d_pool_weight, d_update_weight, d_norm_weight};
#pragma omp for schedule(static)
        for (int64_t e = 0; e < length; ++e) {
            double total = 0.0;
            for (int64_t c = 0; c < chunks; ++c) total += partial[c * length + e];
            const int64_t which = e / width;
            if (which >= 4) {
                if (e - 4 * width < n + step.competitive) d_gate_bias[e - 4 * width] = total;
            } else if (totals[which]) {
                totals[which][e % width] = total;
            }
        }
    }
}

}  // namespace

extern "C" {

void mgr_forward(int64_t N, int64_t n, int64_t width, int64_t threads, int64_t dtype, const void* y, int64_t y_dtype,
                 const void* streams, int64_t k, const void* const* outputs, const int64_t* output_dtypes,
                 const float* const* gates, const float* gate_weight, const float* gate_bias, const float* pool_weight,
                 const float* update_weight, const float* norm_weight, int64_t competitive, double scale, double eps,
                 double norm_eps, void* h, void* new_streams, float* beta) {
    const Step step = {n, width, gate_weight, gate_bias, pool_weight, update_weight, norm_weight, competitive != 0,
                       static_cast<float>(scale), static_cast<float>(eps), static_cast<float>(norm_eps)};
    const Window window = {k, outputs, output_dtypes, gates};
#define CALL(T)                                                                                                       \
    forward<T>(step, window, N, threads, y, y_dtype, static_cast<const T*>(streams), static_cast<T*>(h),              \
               static_cast<T*>(new_streams), beta)
    if (dtype == float32) CALL(float);
    if (dtype == bfloat16) CALL(BFloat16);
#if HAS_HALF
    if (dtype == float16) CALL(Half);
#endif
#undef CALL
}

void mgr_backward(int64_t N, int64_t n, int64_t width, int64_t threads, int64_t dtype, const void* grad_h,
                  int64_t grad_h_dtype, const void* grad_streams, const void* y, int64_t y_dtype, const void* streams,
                  int64_t k, const void* const* outputs, const int64_t* output_dtypes, const float* const* gates,
                  const float* beta, const float* gate_weight, const float* gate_bias, const float* pool_weight,
                  const float* update_weight, const float* norm_weight, int64_t competitive, double scale, double eps,
                  double norm_eps, void* d_y, void* d_streams, float* d_gate_weight, float* d_gate_bias,
                  float* d_pool_weight, float* d_update_weight, float* d_norm_weight) {
    const Step step = {n, width, gate_weight, gate_bias, pool_weight, update_weight, norm_weight, competitive != 0,
                       static_cast<float>(scale), static_cast<float>(eps), static_cast<float>(norm_eps)};
    const Window window = {k, outputs, output_dtypes, gates};
#define CALL(T)                                                                                                       \
    backward<T>(step, window, N, threads, grad_h, grad_h_dtype, static_cast<const T*>(grad_streams), y, y_dtype,      \
                static_cast<const T*>(streams), beta, d_y, static_cast<T*>(d_streams), d_gate_weight, d_pool_weight,  \
                d_update_weight, d_norm_weight, d_gate_bias)
    if (dtype == float32) CALL(float);
    if (dtype == bfloat16) CALL(BFloat16);
#if HAS_HALF
    if (dtype == float16) CALL(Half);
#endif
#undef CALL
}
}
