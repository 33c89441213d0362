// Expert MLPs, and linear maps of few tokens, on CPUs. Reads every weight where it is and copies none.
//
// One token reads the rows of all neurons that run, gate, up and down, in one pass (`alone`). Several tokens
// are computed in two phases with one barrier between them:
//   rows     h[t][f] = act(s_f x[t]) * (u_f x[t]) of every expert and the tokens that chose it;
//            threads share the rows of the experts that run.
//   columns  y[t] = sum_f h[t][f] d_f; every thread owns a range of columns and walks over all rows.
// Where tokens share an expert, rows in bf16 are widened once into the first-level cache, and tiles of 4 rows
// by 3 tokens (rows) or of 6 tokens by 2 vectors (columns) keep the arithmetic busy. Everything is added up
// in fp32, in an order that does not depend on how many threads there are.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "rows.h"

// The twin of `_CALL` and `_LAYER` in experts.py. Matrices have rows of `width` numbers, `*_stride` apart.
struct Arguments {
    // Of a call:
    int64_t tokens, threads;
    const void* x;        // [tokens, width]
    const float* weight;  // [tokens, experts]; 0: the token does not run the expert
    const void* active;   // [tokens, experts * size], the activation where a router has computed it
    void* y;              // [tokens, width]
    // Of a layer:
    int64_t width, experts, size, activation, is_bf16;
    const void* selecting;  // [experts * size, width], or null where `active` is given
    const void* up;         // the same, or null without a gate
    const void* down;       // rows of the transposed down projection
    int64_t selecting_stride, up_stride, down_stride;
    const void* selecting_bias;
    const void* up_bias;
    const void* centre;
    const void* down_bias;  // [width]
};

// The twin of `_ARGUMENTS` in linear.py.
struct LinearArguments {
    int64_t tokens, width, rows, stride, is_bf16, threads;
    const void* x;     // [tokens, width]
    const void* w;     // [rows, width]
    const void* bias;  // [rows] or null
    void* y;           // [tokens, rows]
};

namespace {

struct Piece {
    int64_t expert, from, to;
};

// Of `of` pieces of the given costs, the first of thread `index`.
int64_t share(const std::vector<int64_t>& cost_before, int index, int of) {
    const int64_t target = cost_before.back() * index / of;
    return std::lower_bound(cost_before.begin(), cost_before.end(), target) - cost_before.begin();
}

template <class W>
class Experts {
   public:
    // A chunk of tokens at a time, so that memory does not grow with the batch.
    void run(const Arguments& arguments) {
        constexpr int64_t CHUNK = 512;
        a = arguments;
        for (int64_t from = 0; from < a.tokens; from += CHUNK) {
            first = from;
            tokens = std::min(CHUNK, a.tokens - from);
            list();
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(a.threads))
            work(omp_get_thread_num(), omp_get_num_threads());
#else
            work(0, 1);
#endif
        }
    }

   private:
    Arguments a;
    int64_t first = 0, tokens = 0;         // those of the chunk
    std::vector<int64_t> chosen;           // experts that run
    std::vector<std::vector<int32_t>> of;  // tokens of each expert
    std::vector<int64_t> begins;           // where the activations of an expert begin
    std::vector<int64_t> neuron;           // of one token: all that run
    std::vector<float> h, x, y;            // these only ever grow

    const W* matrix(const void* base) const { return static_cast<const W*>(base); }

    void list() {
        const float* weight = a.weight + first * a.experts;
        int64_t numbers = 0;
        chosen.clear();
        neuron.clear();
        of.resize(a.experts);
        begins.resize(a.experts);
        for (int64_t e = 0; e < a.experts; ++e) {
            if (tokens == 1) {
                if (weight[e] != 0)
                    for (int64_t r = 0; r < a.size; ++r) neuron.push_back(e * a.size + r);
                continue;
            }
            of[e].clear();
            for (int64_t t = 0; t < tokens; ++t)
                if (weight[t * a.experts + e] != 0) of[e].push_back(static_cast<int32_t>(t));
            if (of[e].empty()) continue;
            chosen.push_back(e);
            begins[e] = numbers;
            numbers += static_cast<int64_t>(of[e].size()) * a.size;
        }
        if (tokens == 1) numbers = SPLITS * a.width;
        for (auto [held, size] : {std::pair{&h, numbers}, {&x, tokens * a.width}, {&y, tokens * a.width}})
            if (static_cast<int64_t>(held->size()) < size) held->resize(size);
    }

    void work(int thread, int threads) {
        for (int64_t t = thread; t < tokens; t += threads)
            widen(matrix(a.x) + (first + t) * a.width, a.width, &x[t * a.width]);
        barrier();
        if (tokens == 1) {
            alone(thread, threads);
            return;
        }
        rows(thread, threads);
        barrier();
        const auto [from, to] = own_columns(thread, threads);
        if (from < to) columns(from, to);
    }

    static void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }

    void rows(int thread, int threads) {
        const int64_t all = static_cast<int64_t>(chosen.size()) * a.size;
        int64_t step = (all / (threads * 8) + ALONE - 1) / ALONE * ALONE;
        step = std::max<int64_t>(ALONE, std::min<int64_t>(BLOCK_ROWS, step));
        std::vector<Piece> pieces;
        std::vector<int64_t> cost{0};
        for (int64_t e : chosen)
            for (int64_t r = 0; r < a.size; r += step) {
                const int64_t to = std::min(a.size, r + step);
                pieces.push_back({e, r, to});
                // A row is read once and multiplied once for every token.
                cost.push_back(cost.back() + (to - r) * (4 + static_cast<int64_t>(of[e].size())));
            }
        const int64_t end = share(cost, thread + 1, threads);
        for (int64_t i = share(cost, thread, threads); i < end; ++i) piece(pieces[i]);
    }

    void piece(const Piece& p) {
        const auto& list = of[p.expert];
        const int64_t count = static_cast<int64_t>(list.size());
        float s[BLOCK], u[BLOCK];
        for (int64_t c0 = 0; c0 < count; c0 += BLOCK_TOKENS) {
            const int64_t n = std::min<int64_t>(BLOCK_TOKENS, count - c0);
            const int32_t* token = list.data() + c0;
            const float* input[BLOCK_TOKENS];
            for (int64_t c = 0; c < n; ++c) input[c] = &x[token[c] * a.width];
            if (a.selecting) multiplied(a.selecting, a.selecting_stride, p, input, n, s);
            if (a.up) multiplied(a.up, a.up_stride, p, input, n, u);
            for (int64_t r = p.from; r < p.to; ++r)
                for (int64_t c = 0; c < n; ++c) {
                    const int64_t at = (r - p.from) * BLOCK_TOKENS + c;
                    h[begins[p.expert] + (c0 + c) * a.size + r] =
                        number(p.expert, p.expert * a.size + r, token[c], s[at], u[at]);
                }
        }
    }

    void multiplied(const void* w, int64_t stride, const Piece& p, const float* const* input, int64_t n,
                    float* sum) {
        const W* row = matrix(w) + (p.expert * a.size + p.from) * stride;
        products(row, stride, p.to - p.from, input, n, a.width, sum);
    }

    // What a neuron gives a token: `s` and `u` are its two products.
    float number(int64_t expert, int64_t neuron, int64_t token, float s, float u) const {
        if (a.active)
            s = widened(matrix(a.active)[(first + token) * a.experts * a.size + neuron]);
        else {
            if (a.selecting_bias) s += widened(matrix(a.selecting_bias)[neuron]);
            s = activate(s, static_cast<int>(a.activation));
        }
        if (a.up) s *= a.up_bias ? u + widened(matrix(a.up_bias)[neuron]) : u;
        if (a.centre) s -= widened(matrix(a.centre)[neuron]);
        return s * a.weight[(first + token) * a.experts + expert];
    }

    // One token: every row is read once from end to end, gate, up and down side by side. Rows may belong to
    // whatever experts, so that single neurons fill a pass as well as large experts do. Sums are made in
    // SPLITS parts, whichever thread makes them, and added up in their order.
    static constexpr int SPLITS = 32;

    void alone(int thread, int threads) {
        const int64_t all = static_cast<int64_t>(neuron.size()), steps = (all + ALONE - 1) / ALONE;
        for (int64_t split = SPLITS * thread / threads; split < SPLITS * (thread + 1) / threads; ++split) {
            float* out = &h[split * a.width];
            std::fill(out, out + a.width, 0.0f);
            for (int64_t i = steps * split / SPLITS; i < steps * (split + 1) / SPLITS; ++i)
                add_alone(i * ALONE, std::min(i + 1, steps - 1) * ALONE, out);
        }
        barrier();
        const auto [from, to] = own_columns(thread, threads);
        begin(from, to);
        for (int64_t split = 0; split < SPLITS; ++split)
            for (int64_t d = from; d < to; ++d) y[d] += h[split * a.width + d];
        end(from, to);
    }

    // The neurons of a step; those of the step at `next` are fetched meanwhile.
    void add_alone(int64_t from, int64_t next, float* out) {
        const int64_t n = std::min<int64_t>(ALONE, static_cast<int64_t>(neuron.size()) - from);
        const auto gate = taken(a.selecting, a.selecting_stride, from), up = taken(a.up, a.up_stride, from),
                   down = taken(a.down, a.down_stride, from);
        const auto then = a.selecting ? taken(a.selecting, a.selecting_stride, next)
                          : a.up      ? taken(a.up, a.up_stride, next)
                                      : taken(a.down, a.down_stride, next);
        float s[ALONE], u[ALONE], numbers[1][ALONE] = {};
        if (a.selecting) dots_alone(gate, a.up ? up : down, &x[0], a.width, s);
        if (a.up) dots_alone(up, down, &x[0], a.width, u);
        for (int64_t r = 0; r < n; ++r) {
            const int64_t row = neuron[from + r];
            numbers[0][r] = number(row / a.size, row, 0, s[r], u[r]);
        }
        add_rows<ALONE, 1>(down, then, numbers, a.width, &out);
    }

    // Rows of the neurons that run, from one of them on.
    Rows<ALONE, W> taken(const void* w, int64_t stride, int64_t from) const {
        return {matrix(w), stride, &neuron[from], static_cast<int64_t>(neuron.size()) - from};
    }

    void columns(int64_t from, int64_t to) {
        begin(from, to);
        constexpr size_t MANY = 6;  // tokens from which packing the rows pays
        for (int64_t e : chosen) of[e].size() < MANY ? by_rows(e, from, to) : packed(e, from, to);
        end(from, to);
    }

    // The columns of a thread: whole STEPs.
    std::pair<int64_t, int64_t> own_columns(int thread, int threads) const {
        const int64_t steps = (a.width + STEP - 1) / STEP;
        return {steps * thread / threads * STEP, std::min(a.width, steps * (thread + 1) / threads * STEP)};
    }

    void begin(int64_t from, int64_t to) {
        for (int64_t t = 0; t < tokens && from < to; ++t) {
            float* out = &y[t * a.width] + from;
            if (a.down_bias)
                widen(matrix(a.down_bias) + from, to - from, out);
            else
                std::fill(out, out + to - from, 0.0f);
        }
    }

    void end(int64_t from, int64_t to) {
        for (int64_t t = 0; t < tokens && from < to; ++t)
            narrow(&y[t * a.width] + from, to - from, static_cast<W*>(a.y) + (first + t) * a.width + from);
    }

    // Rows of few tokens, as they lie.
    void by_rows(int64_t expert, int64_t from, int64_t to) {
        const auto& list = of[expert];
        const int64_t n = static_cast<int64_t>(list.size()), stride = a.down_stride;
        const W* w = matrix(a.down) + expert * a.size * stride;
        const int64_t step = n == 1 ? ALONE : TILE;
        float wide[TILE * BLOCK_WIDTH];
        for (int64_t r = 0; r < a.size; r += step)
            for (int64_t d = from; d < to; d += BLOCK_WIDTH) {
                const int64_t rows = std::min(step, a.size - r), width = std::min<int64_t>(BLOCK_WIDTH, to - d);
                const W* at = w + r * stride + d;
                if (n == 1) {
                    const int64_t next = std::min(r + step, a.size - 1);
                    const Rows<ALONE, W> then(w + next * stride + d, stride, a.size - next);
                    add<1>(Rows<ALONE, W>(at, stride, rows), then, expert, 0, r, rows, d, width);
                } else {
                    const auto held = in_fp32(at, stride, rows, width, wide);
                    int64_t c = 0;
                    for (; c + 2 <= n; c += 2) add<2>(held, held, expert, c, r, rows, d, width);
                    if (c < n) add<1>(held, held, expert, c, r, rows, d, width);
                }
            }
    }

    // Some rows of an expert, to the outputs of C of its tokens.
    template <int C, int R, class V>
    void add(const Rows<R, V>& w, const Rows<R, V>& next, int64_t expert, int64_t c, int64_t r, int64_t rows,
             int64_t d, int64_t width) {
        float number[C][R] = {};
        float* out[C];
        for (int i = 0; i < C; ++i) {
            std::memcpy(number[i], &h[begins[expert] + (c + i) * a.size + r], rows * sizeof(float));
            out[i] = &y[of[expert][c + i] * a.width + d];
        }
        add_rows<R, C>(w, next, number, width, out);
    }

    static constexpr int PANEL = 4 * STEP;  // columns that are packed together
    static constexpr int DEEP = 128;        // rows that are packed together
    static constexpr int TALL = 6;          // tokens of a tile

    // Rows of several tokens: a panel is laid out tile by tile, then multiplied from the cache.
    void packed(int64_t expert, int64_t from, int64_t to) {
        const auto& list = of[expert];
        const int64_t n = static_cast<int64_t>(list.size());
        const W* w = matrix(a.down) + expert * a.size * a.down_stride;
        static thread_local std::vector<float> held(PANEL * DEEP);
        for (int64_t d = from; d < to; d += PANEL)
            for (int64_t r = 0; r < a.size; r += DEEP) {
                const int64_t deep = std::min<int64_t>(DEEP, a.size - r);
                const int64_t width = std::min<int64_t>(PANEL, to - d);
                for (int64_t i = 0; i < deep; ++i)
                    for (int64_t k = 0; k * STEP < width; ++k)
                        widen(w + (r + i) * a.down_stride + d + k * STEP,
                              std::min<int64_t>(STEP, width - k * STEP), &held[(k * DEEP + i) * STEP]);
                for (int64_t k = 0; k * STEP < width; ++k)
                    for (int64_t c = 0; c < n; c += TALL)
                        multiply(&held[k * DEEP * STEP], deep, &h[begins[expert] + c * a.size + r],
                                 list.data() + c, std::min<int64_t>(TALL, n - c), d + k * STEP,
                                 std::min<int64_t>(STEP, width - k * STEP));
            }
    }

    void multiply(const float* w, int64_t deep, const float* numbers, const int32_t* token, int64_t n,
                  int64_t d, int64_t width) {
        Vector part[TALL][2] = {};
        const float* number[TALL];
        for (int c = 0; c < TALL; ++c) number[c] = numbers + std::min<int64_t>(c, n - 1) * a.size;
        for (int64_t i = 0; i < deep; ++i) {
            const Pair weight = pair(w + i * STEP);
            for (int c = 0; c < TALL; ++c) {
                part[c][0] += weight.one * number[c][i];
                part[c][1] += weight.two * number[c][i];
            }
        }
        for (int64_t c = 0; c < n; ++c) {
            float* out = &y[token[c] * a.width + d];
            if (width == STEP)
                for (int v = 0; v < 2; ++v) store(out + v * LANES, load(out + v * LANES) + part[c][v]);
            else {
                float lane[STEP];
                std::memcpy(lane, part[c], sizeof lane);
                for (int64_t i = 0; i < width; ++i) out[i] += lane[i];
            }
        }
    }
};

template <class W>
inline void put(const LinearArguments& a, int64_t token, int64_t row, float value) {
    if (a.bias) value += widened(static_cast<const W*>(a.bias)[row]);
    narrow(&value, 1, static_cast<W*>(a.y) + token * a.rows + row);
}

// One token: every thread reads its rows from end to end.
template <class W>
void linear_alone(const LinearArguments& a, const float* x) {
    const int64_t steps = (a.rows + ALONE - 1) / ALONE;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(static)
    for (int64_t i = 0; i < steps; ++i) {
        const int64_t from = i * ALONE, next = std::min(i + 1, steps - 1) * ALONE;
        const W* w = static_cast<const W*>(a.w);
        float sum[ALONE];
        dots_alone(Rows<ALONE, W>(w + from * a.stride, a.stride, a.rows - from),
                   Rows<ALONE, W>(w + next * a.stride, a.stride, a.rows - next), x, a.width, sum);
        for (int64_t r = from; r < std::min(from + ALONE, a.rows); ++r) put<W>(a, 0, r, sum[r - from]);
    }
}

template <class W>
void linear(const LinearArguments& a) {
    static thread_local std::vector<float> wide;
    wide.resize(a.tokens * a.width);
    for (int64_t t = 0; t < a.tokens; ++t)
        widen(static_cast<const W*>(a.x) + t * a.width, a.width, wide.data() + t * a.width);
    const float* const x = wide.data();
    if (a.tokens == 1) return linear_alone<W>(a, x);
    const int64_t pieces = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for num_threads(static_cast<int>(a.threads)) schedule(static)
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t from = i * BLOCK_ROWS, rows = std::min<int64_t>(BLOCK_ROWS, a.rows - from);
        float sum[BLOCK];
        for (int64_t c0 = 0; c0 < a.tokens; c0 += BLOCK_TOKENS) {
            const int64_t n = std::min<int64_t>(BLOCK_TOKENS, a.tokens - c0);
            const float* input[BLOCK_TOKENS];
            for (int64_t c = 0; c < n; ++c) input[c] = x + (c0 + c) * a.width;
            products(static_cast<const W*>(a.w) + from * a.stride, a.stride, rows, input, n, a.width, sum);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < n; ++c) put<W>(a, c0 + c, from + r, sum[r * BLOCK_TOKENS + c]);
        }
    }
}

}  // namespace

extern "C" void moefy_experts(const Arguments* a) {
    static thread_local Experts<bf16> narrow;
    static thread_local Experts<float> wide;
    if (a->is_bf16)
        narrow.run(*a);
    else
        wide.run(*a);
}

extern "C" void moefy_linear(const LinearArguments* a) {
    if (a->is_bf16)
        linear<bf16>(*a);
    else
        linear<float>(*a);
}
