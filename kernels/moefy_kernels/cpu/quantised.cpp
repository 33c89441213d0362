// MLPs and linear maps whose weights are codes of few bits (moefy_kernels/cpu/quantised.py lays them out).
//
// A weight is scale * code - offset, with a scale and an offset for every 32 inputs; inputs are rounded to 8 bits
// with one scale for every 32, so that all products are whole numbers until a group is added up. Of an MLP there
// are up to three phases with one barrier between them:
//   rough   every neuron's gate and up from the top bits of their codes, a score of both, and who is above the
//           threshold. Rows lie in tiles of LANES rows, a row a lane: nothing is added up across lanes.
//   exact   the neurons that run: what the other bits add to both, the activation, and their rows of down in
//           groups of 32 neurons, whose activations are rounded to 8 bits together. All that is read of a neuron
//           lies in one record. Sums are made in SPLITS parts.
//   sum     the parts are added up in their order.
// Nothing depends on the number of threads, and nothing is allocated once the buffers have grown.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "integers.h"

// The twin of `_CALL` and `_LAYER` in quantised.py.
struct QuantisedArguments {
    // Of a call:
    int64_t tokens, threads, is_bf16;
    const void* x;           // [tokens, width]
    void* y;                 // [tokens, width], or null where scores are all that is wanted
    uint8_t* runs;           // [tokens, padded neurons] or null: who runs; written with a threshold, read without
    float* scores;           // [tokens, padded neurons] or null
    const float* threshold;  // [tokens]; null: `runs` says who runs, or else all do
    // Of a layer:
    int64_t width, groups, neurons;      // groups of 32 inputs; neurons in whole groups of 32
    int64_t top, under, tile_is_half;    // bits of a code in tiles, bits of it below them; 16-bit scales
    int64_t nested, rest, bits, is_half; // records go on where tiles end; bits of a code in them; of down; scales
    int64_t activation, tile, record;    // bytes of a tile, of a record
    int64_t scales_at, down_at, columns; // where they are in a record; width in whole vectors
    const uint8_t* gate;                 // tiles, or null without a gate
    const uint8_t* up;                   // tiles, or null if `top` is 0
    const uint8_t* records;
    const uint8_t* down;                 // for every 32 neurons scales [columns], then offsets [columns]
    const float* gate_rough_units;       // [2, neurons]: of scales, of offsets, in tiles
    const float* up_rough_units;
    const float* gate_units;             // the same in records
    const float* up_units;
    const float* down_units;             // [2, columns]: of scales; of offsets, over those of scales
    const float* gate_bias;              // [neurons] or null
    const float* up_bias;
    const float* down_bias;              // [columns] or null
    const float* size;                   // [neurons]: what makes a score of a rough activation
    const float* gate_mean;              // [neurons] or null: what the rough gate and up leave out, mean and variance
    const float* up_mean;
    const float* gate_variance;
    const float* up_variance;
};

// The twin of `_MAP` in quantised.py.
struct QuantisedMap {
    int64_t tokens, threads, is_bf16;
    const void* x;  // [tokens, width]
    void* y;        // [tokens, rows]
    int64_t width, groups, rows, bits, is_half, tile;
    const uint8_t* w;    // tiles
    const float* units;  // [2, rows in whole tiles]
    const float* bias;   // the same or null
};

namespace {

constexpr int GROUP = 32;

inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

template <class Work>
void in_threads(int64_t threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
    work(omp_get_thread_num(), omp_get_num_threads());
#else
    work(0, 1);
#endif
}

inline Vector exponential(Vector v) {
    // Cephes: 2**n times a polynomial of what is left.
    for (int i = 0; i < LANES; ++i) v[i] = std::min(std::max(v[i], -87.0f), 88.0f);
    const Vector n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Vector r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vector)((__builtin_convertvector(n, Sums) + 127) << 23);
}

inline Vector activated(Vector v, int64_t kind) {
    if (kind == SILU) return v / (1.0f + exponential(-v));
    for (int i = 0; i < LANES; ++i) v[i] = activate(v[i], static_cast<int>(kind));
    return v;
}

// Slopes over the distance that the router measures them over (moefy.methods.routers.bit_planes): of activations
// that are flat below zero that of the error.
inline Vector slope(Vector v, int64_t kind, Vector variance) {
    Vector step = Vector{} + 1e-2f;
    if (kind == RELU || kind == RELU2)
        for (int i = 0; i < LANES; ++i) step[i] = std::sqrt(std::max(variance[i], 1e-12f));
    return (activated(v + step, kind) - activated(v - step, kind)) / (2 * step);
}

// The inputs of a token in 8 bits.
struct Token {
    const int8_t* q;     // [32 groups]
    const float* scale;  // [groups] and LANES more
    const float* sum;    // scale * (sum of q), the same
};

// Rounds one group to 8 bits; gives its scale, which is NaN where a number is not finite.
inline float rounded_group(const float* x, int8_t* q, int32_t& sum) {
    float most = 0, none = 0;
    for (int i = 0; i < GROUP; ++i) most = std::max(most, std::fabs(x[i])), none += x[i] * 0.0f;
    sum = 0;
    // Below that 127 over the largest would overflow.
    if (!(most > 1e-36f) || none != 0.0f) {
        std::fill(q, q + GROUP, 0);
        return none;
    }
    const float by = 127.0f / most;
    for (int i = 0; i < GROUP; ++i) {
        const int32_t code = static_cast<int32_t>(std::rint(x[i] * by));
        q[i] = static_cast<int8_t>(code);
        sum += code;
    }
    return most / 127.0f;
}

class Inputs {
   public:
    void grow(int64_t places, int64_t all_groups) {
        groups = all_groups;
        stride = groups + LANES;
        if (static_cast<int64_t>(q.size()) < places * groups * GROUP) q.resize(places * groups * GROUP);
        if (static_cast<int64_t>(scale.size()) < places * stride) scale.resize(places * stride), sum.resize(places * stride);
    }

    template <class W>
    void set(int64_t place, const W* x, int64_t width) {
        float wide[GROUP];
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t n = std::max<int64_t>(0, std::min<int64_t>(GROUP, width - g * GROUP));
            for (int64_t i = 0; i < n; ++i) wide[i] = widened(x[g * GROUP + i]);
            std::fill(wide + n, wide + GROUP, 0.0f);
            int32_t total;
            scale[place * stride + g] = rounded_group(wide, &q[(place * groups + g) * GROUP], total);
            sum[place * stride + g] = scale[place * stride + g] * static_cast<float>(total);
        }
        // Vectors of groups end behind the last one.
        std::fill_n(&scale[place * stride + groups], LANES, 0.0f);
        std::fill_n(&sum[place * stride + groups], LANES, 0.0f);
    }

    void set(int64_t place, const void* x, int64_t at, int64_t width, bool is_bf16) {
        if (is_bf16) set(place, static_cast<const bf16*>(x) + at, width);
        else set(place, static_cast<const float*>(x) + at, width);
    }

    Token at(int64_t place) const { return {&q[place * groups * GROUP], &scale[place * stride], &sum[place * stride]}; }

   private:
    int64_t groups = 0, stride = 0;
    std::vector<int8_t> q;
    std::vector<float> scale, sum;
};

// What a tile gives a token, a row in every lane, before units.
struct Tile {
    Vector codes, scales, offsets;  // scale * code, scale, offset: each times the inputs
};

constexpr int AHEAD = 2048;  // bytes ahead that are fetched

template <int BITS, class S, int C>
void tile(const uint8_t* at, const Token* token, int64_t groups, Tile* out) {
    constexpr int STRIDE = LANES * sizeof(S), STEP_BYTES = BYTES * BITS / 8;
    Tile part[C] = {};
    for (int64_t g = 0; g < groups; ++g) {
        Sums even[C] = {}, odd[C] = {};
        for (int b = 0; b < 8 * STEP_BYTES + 2 * STRIDE; b += 64) fetch(at + AHEAD + b);
        for (int k = 0; k < 8; k += 2, at += 2 * STEP_BYTES) {
            const Codes one = unpack<BITS>(at), two = unpack<BITS>(at + STEP_BYTES);
            for (int c = 0; c < C; ++c) {
                const int8_t* q = token[c].q + g * GROUP + 4 * k;
                even[c] = dot<BITS>(even[c], one, four(q));
                odd[c] = dot<BITS>(odd[c], two, four(q + 4));
            }
        }
        const Vector scale = scales(at, S{}), offset = scales(at + STRIDE, S{});
        at += 2 * STRIDE;
        for (int c = 0; c < C; ++c) {
            part[c].codes += real(even[c] + odd[c]) * (scale * token[c].scale[g]);
            part[c].scales += scale * token[c].sum[g];
            part[c].offsets += offset * token[c].sum[g];
        }
    }
    std::copy(part, part + C, out);
}

template <int BITS, class S>
void tiles(const uint8_t* at, const Token* token, int64_t tokens, int64_t groups, Tile* out) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) tile<BITS, S, 4>(at, token + t, groups, out + t);
    for (; t < tokens; ++t) tile<BITS, S, 1>(at, token + t, groups, out + t);
}

typedef void (*Tiles)(const uint8_t*, const Token*, int64_t, int64_t, Tile*);

// What `made` gives for so many bits as a constant, one of BITS.
template <int... BITS, class Made>
auto of_bits(int64_t bits, Made made) {
    decltype(made(std::integral_constant<int, 8>{})) result = nullptr;
    ((bits == BITS ? void(result = made(std::integral_constant<int, BITS>{})) : void()), ...);
    return result;
}

template <class S>
Tiles tiles_of(int64_t bits) {
    return of_bits<1, 2, 3, 4, 8>(bits, [](auto constant) -> Tiles { return tiles<decltype(constant)::value, S>; });
}

// Of a neuron that runs: what the lower bits of its codes add to each of its rows, and its offsets where no top
// bits were read before. `factors` has room for 2 (groups + LANES).
template <int BITS, class S, bool TOP, int ROWS>
void record(const uint8_t* at, const QuantisedArguments& a, const Token& token, const uint8_t* next, float* factors,
            float* sum) {
    const int64_t groups = a.groups, bytes = groups * sizeof(S), steps = groups * GROUP / BYTES;
    const int64_t codes = steps * BYTES * BITS / 8, room = groups + LANES, lines = a.record / 64;
    const uint8_t *scale = at + a.scales_at, *offset = scale + ROWS * bytes;
    Vector part[ROWS][2] = {}, minus[ROWS] = {};
    for (int64_t g = 0; g < groups; g += LANES)
        for (int r = 0; r < ROWS; ++r) {
            const int64_t from = r * bytes + g * sizeof(S);
            store(factors + r * room + g, scales(scale + from, S{}) * load(token.scale + g));
            // What lies behind the last group is no offset, and need not be a number.
            if (!TOP) minus[r] += first(scales(offset + from, S{}), groups - g) * load(token.sum + g);
        }
    if constexpr (BITS > 0) {
        const auto step = [&](int64_t i, int half) {
            for (int64_t line = i; line < lines; line += steps) fetch(next + 64 * line);
            const Codes input = *reinterpret_cast<const Codes*>(token.q + i * BYTES);
            for (int r = 0; r < ROWS; ++r) {
                const Codes code = unpack<BITS>(at + r * codes + i * (BYTES * BITS / 8));
                part[r][half] += real(dot<BITS>(Sums{}, code, input)) * spread(factors + r * room, i);
            }
        };
        int64_t i = 0;
        for (; i + 2 <= steps; i += 2) step(i, 0), step(i + 1, 1);
        if (i < steps) step(i, 0);
    }
    for (int r = 0; r < ROWS; ++r) {
        sum[2 * r] = added(part[r][0] + part[r][1]);
        sum[2 * r + 1] = TOP ? 0.0f : added(minus[r]);
    }
}

typedef void (*Record)(const uint8_t*, const QuantisedArguments&, const Token&, const uint8_t*, float*, float*);

template <class S, bool TOP, int ROWS>
Record record_of(int64_t bits) {
    return of_bits<0, 1, 2, 3, 4, 5, 6, 7, 8>(
        bits, [](auto constant) -> Record { return record<decltype(constant)::value, S, TOP, ROWS>; });
}

template <class S>
Record record_of(const QuantisedArguments& a) {
    if (a.gate_units) return a.nested ? record_of<S, true, 2>(a.rest) : record_of<S, false, 2>(a.rest);
    return a.nested ? record_of<S, true, 1>(a.rest) : record_of<S, false, 1>(a.rest);
}

// Adds what some neurons of one group give: `row` are their rows of down, a multiple of four, `h` their numbers in
// 8 bits (0 for rows that are there to fill up), `scale` that of all of them.
template <int BITS, class S>
void add_down(const uint8_t* const* row, const int8_t* h, int64_t count, float scale, const uint8_t* of_group,
              const QuantisedArguments& a, float* y) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += h[i];
    const float all = scale * static_cast<float>(sum);
    for (int64_t block = 0; block * BYTES < a.columns; ++block) {
        Sums part[4] = {};
        const int64_t byte = block * (BYTES * BITS / 8);
        for (int64_t i = 0; i < count; i += 4) {
            Codes code[4], side[4];
            for (int r = 0; r < 4; ++r) code[r] = unpack<BITS>(row[i + r] + byte);
            transpose(code, side);
            const Codes numbers = four(h + i);
            for (int r = 0; r < 4; ++r) part[r] = dot<BITS>(part[r], side[r], numbers);
        }
        for (int r = 0; r < 4; ++r) {
            const int64_t d = block * BYTES + r * LANES;
            const Vector of_codes = scales(of_group + d * sizeof(S), S{});
            const Vector offset = scales(of_group + (a.columns + d) * sizeof(S), S{}) * load(a.down_units + a.columns + d);
            store(y + d, load(y + d) + real(part[r]) * scale * of_codes - offset * all);
        }
    }
}

typedef void (*AddDown)(const uint8_t* const*, const int8_t*, int64_t, float, const uint8_t*, const QuantisedArguments&,
                        float*);

template <class S>
AddDown down_of(int64_t bits) {
    return of_bits<2, 3, 4, 8>(bits, [](auto constant) -> AddDown { return add_down<decltype(constant)::value, S>; });
}

class QuantisedMlp {
   public:
    // A chunk of tokens at a time, so that memory does not grow with the batch.
    void run(const QuantisedArguments& arguments) {
        constexpr int64_t CHUNK = 16;
        a = arguments;
        rough_tiles = a.tile_is_half ? tiles_of<half>(a.top) : tiles_of<uint8_t>(a.top);
        exact_record = a.is_half ? record_of<half>(a) : record_of<uint8_t>(a);
        add = a.is_half ? down_of<half>(a.bits) : down_of<uint8_t>(a.bits);
        for (first = 0; first < a.tokens; first += CHUNK) {
            tokens = std::min(CHUNK, a.tokens - first);
            grow();
            in_threads(a.threads, [this](int thread, int threads) { work(thread, threads); });
        }
    }

   private:
    static constexpr int MOST_SPLITS = 32;
    static constexpr int64_t EACH = 4;  // what a group costs beside its neurons, in neurons

    QuantisedArguments a;
    Tiles rough_tiles;
    Record exact_record;
    AddDown add;
    int64_t first = 0, tokens = 0, splits = 1;
    Inputs inputs;
    std::vector<float> known, y;     // [tokens, 2, neurons]; [splits, tokens, columns]
    std::vector<float> factors;      // of every thread
    std::vector<uint8_t> own_runs;   // where the caller wants none
    std::vector<int64_t> costs;      // of every group of neurons; 0: none runs
    std::vector<int32_t> chosen;     // [neurons]: those that any token runs, in the places of their groups

    template <class T>
    static void at_least(std::vector<T>& held, int64_t size) {
        if (static_cast<int64_t>(held.size()) < size) held.resize(size);
    }

    void grow() {
        const int64_t units = a.neurons / GROUP;
        // Of the shape alone, so that sums do not depend on anything else.
        splits = std::max<int64_t>(1, std::min<int64_t>(tokens == 1 ? MOST_SPLITS : MOST_SPLITS / 2, units / 3));
        at_least(factors, a.threads * 2 * (a.groups + LANES));
        inputs.grow(tokens == 1 ? a.threads : tokens, a.groups);
        if (a.top) at_least(known, tokens * 2 * a.neurons);
        at_least(y, splits * tokens * a.columns);
        at_least(costs, units);
        at_least(chosen, a.neurons);
        if (!a.runs) at_least(own_runs, tokens * a.neurons);
    }

    uint8_t* runs(int64_t t) { return a.runs ? a.runs + (first + t) * a.neurons : &own_runs[t * a.neurons]; }

    void work(int thread, int threads) {
        // One token is rounded by every thread for itself, which costs less than to wait for another.
        Token token[16];
        for (int64_t t = tokens == 1 ? 0 : thread; t < tokens; t += tokens == 1 ? 1 : threads)
            inputs.set(tokens == 1 ? thread : t, a.x, (first + t) * a.width, a.width, a.is_bf16);
        if (tokens > 1) barrier();
        for (int64_t t = 0; t < tokens; ++t) token[t] = inputs.at(tokens == 1 ? thread : t);
        const int64_t units = a.neurons / GROUP;
        for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) decide(unit, token);
        barrier();
        if (!a.y) return;
        exact(splits * thread / threads, splits * (thread + 1) / threads, token, &factors[thread * 2 * (a.groups + LANES)]);
        barrier();
        sum(thread, threads);
    }

    // Who runs of 32 neurons.
    void decide(int64_t unit, const Token* token) {
        if (!a.threshold && !a.runs)
            for (int64_t t = 0; t < tokens; ++t) std::memset(runs(t) + unit * GROUP, 1, GROUP);
        // Where nobody wants scores, tiles matter as far as records go on from them.
        const bool read = a.top && (scored() || (a.nested && any(unit)));
        for (int64_t n = unit * GROUP; n < (unit + 1) * GROUP && read; n += LANES) {
            Tile gate[16], up[16];
            if (a.gate) rough_tiles(a.gate + n / LANES * a.tile, token, tokens, a.groups, gate);
            rough_tiles(a.up + n / LANES * a.tile, token, tokens, a.groups, up);
            for (int64_t t = 0; t < tokens; ++t) judge(n, t, gate[t], up[t]);
        }
        int32_t* list = &chosen[unit * GROUP];
        int64_t count = 0, cost = 0;
        for (int64_t n = unit * GROUP; n < (unit + 1) * GROUP; ++n) {
            int64_t times = 0;
            for (int64_t t = 0; t < tokens; ++t) times += runs(t)[n] != 0;
            if (times) list[count++] = static_cast<int32_t>(n);
            cost += times;
        }
        if (count < GROUP) list[count] = -1;
        costs[unit] = count ? cost + EACH : 0;
    }

    bool scored() const { return a.threshold || a.scores; }

    bool any(int64_t unit) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t n = unit * GROUP; n < (unit + 1) * GROUP; ++n)
                if (runs(t)[n]) return true;
        return false;
    }

    // What the tile of a matrix says of LANES neurons from n on: its rough outputs, and what is known of the exact ones.
    Vector rough(int64_t n, const Tile& tile, const float* units, const float* bias, const float* mean,
                 float* to) const {
        const Vector scale = load(units + n), offset = load(units + a.neurons + n) * tile.offsets;
        const float step = static_cast<float>(1 << a.under);
        Vector value = scale * tile.codes * step - offset;
        if (bias) value += load(bias + n);
        store(to + n, value);
        value += scale * tile.scales * ((step - 1.0f) / 2.0f);
        return mean ? value + load(mean + n) : value;
    }

    void judge(int64_t n, int64_t t, const Tile& gate, const Tile& up) {
        float* to = &known[t * 2 * a.neurons];
        Vector value = rough(n, up, a.up_rough_units, a.up_bias, a.up_mean, to + a.neurons), other{};
        if (a.gate) other = rough(n, gate, a.gate_rough_units, a.gate_bias, a.gate_mean, to);
        if (!scored()) return;
        const Vector decided = a.gate ? other : value, value_of = activated(decided, a.activation);
        const Vector variance = load((a.gate ? a.gate_variance : a.up_variance) + n);
        const Vector steep = slope(decided, a.activation, variance);
        Vector square = value_of * value_of + steep * steep * variance;
        if (a.gate) square *= value * value + load(a.up_variance + n);
        float score[LANES];
        for (int i = 0; i < LANES; ++i) score[i] = std::sqrt(square[i]) * a.size[n + i];
        if (a.scores) std::memcpy(a.scores + (first + t) * a.neurons + n, score, sizeof score);
        if (a.threshold)
            for (int i = 0; i < LANES; ++i) runs(t)[n + i] = score[i] > a.threshold[first + t];
    }

    // The parts of the output from one to another; which part a group belongs to follows from what runs alone.
    void exact(int64_t from, int64_t to, const Token* token, float* scratch) {
        std::fill(y.begin() + from * tokens * a.columns, y.begin() + to * tokens * a.columns, 0.0f);
        const int64_t units = a.neurons / GROUP;
        int64_t all = 0, before = 0;
        for (int64_t unit = 0; unit < units; ++unit) all += costs[unit];
        for (int64_t unit = 0; unit < units; before += costs[unit++]) {
            if (!costs[unit]) continue;
            const int64_t split = before * splits / all;
            if (split < from || split >= to) continue;
            const int32_t* list = &chosen[unit * GROUP];
            const int32_t* after = &chosen[std::min(unit + 1, units - 1) * GROUP];
            int64_t count = 0;
            while (count < GROUP && list[count] >= 0) ++count;
            for (int64_t t = 0; t < tokens; ++t)
                one_group(unit, list, count, t, token[t], after, scratch, &y[(split * tokens + t) * a.columns]);
        }
    }

    // The neurons of one group that a token runs; those of `after` are next.
    void one_group(int64_t unit, const int32_t* list, int64_t count, int64_t t, const Token& token, const int32_t* after,
                   float* scratch, float* out) {
        alignas(64) float gate[GROUP] = {}, up[GROUP] = {}, h[GROUP] = {};
        int8_t q[GROUP] = {};
        const uint8_t* row[GROUP];
        const uint8_t* flags = runs(t);
        const int64_t ahead = std::max<int64_t>(1, 4096 / a.record);
        int64_t n = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (!flags[list[i]]) continue;
            const uint8_t* at = a.records + list[i] * a.record;
            // Of a later token they are in the cache already.
            const int64_t later = i + ahead < count ? list[i + ahead] : after[std::min<int64_t>(i + ahead - count, GROUP - 1)];
            numbers(list[i], t, token, at, t || later < 0 ? at : a.records + later * a.record, scratch, gate[n], up[n]);
            row[n++] = at + a.down_at;
        }
        if (!n) return;
        for (int64_t i = 0; i < n; i += LANES) {
            const Vector value = activated(load((a.gate_units ? gate : up) + i), a.activation);
            store(h + i, a.gate_units ? value * load(up + i) : value);
        }
        std::fill(h + n, h + GROUP, 0.0f);
        for (int64_t i = n; i % 4; ++i) row[i] = row[0];
        int32_t sum;
        const float scale = rounded_group(h, q, sum);
        const int64_t bytes = 2 * a.columns * (a.is_half ? 2 : 1);
        add(row, q, (n + 3) / 4 * 4, scale, a.down + unit * bytes, a, out);
    }

    // The exact gate and up of a neuron.
    void numbers(int64_t n, int64_t t, const Token& token, const uint8_t* at, const uint8_t* next, float* scratch, float& gate,
                 float& up) {
        float sum[4];
        exact_record(at, a, token, next, scratch, sum);
        const auto whole = [&](const float* part, const float* units, const float* bias, const float* before) {
            const float more = units[n] * part[0];
            if (a.nested) return before[n] + more;
            return more - units[a.neurons + n] * part[1] + (bias ? bias[n] : 0.0f);
        };
        const float* held = a.nested ? &known[t * 2 * a.neurons] : nullptr;
        if (a.gate_units) gate = whole(sum, a.gate_units, a.gate_bias, held);
        up = whole(sum + (a.gate_units ? 2 : 0), a.up_units, a.up_bias, a.nested ? held + a.neurons : nullptr);
    }

    void sum(int thread, int threads) {
        const int64_t steps = (a.width + STEP - 1) / STEP;
        const int64_t from = steps * thread / threads * STEP, to = std::min(a.width, steps * (thread + 1) / threads * STEP);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t d = from; d < to; d += LANES) {
                Vector all{};
                for (int64_t split = 0; split < splits; ++split) all += load(&y[(split * tokens + t) * a.columns + d]);
                all *= load(a.down_units + d);
                if (a.down_bias) all += load(a.down_bias + d);
                put(all, t, d, std::min<int64_t>(LANES, to - d));
            }
    }

    void put(Vector value, int64_t t, int64_t d, int64_t n) const {
        const int64_t at = (first + t) * a.width + d;
        for (int64_t i = 0; i < n; ++i)
            if (a.is_bf16) static_cast<bf16*>(a.y)[at + i].bits = rounded(value[i]);
            else static_cast<float*>(a.y)[at + i] = value[i];
    }
};

void map(const QuantisedMap& a, Inputs& inputs) {
    constexpr int64_t CHUNK = 16;
    const Tiles tiles = a.is_half ? tiles_of<half>(a.bits) : tiles_of<uint8_t>(a.bits);
    const int64_t all = (a.rows + LANES - 1) / LANES, padded = (a.rows + GROUP - 1) / GROUP * GROUP;
    inputs.grow(CHUNK, a.groups);
    for (int64_t first = 0; first < a.tokens; first += CHUNK) {
        const int64_t tokens = std::min(CHUNK, a.tokens - first);
        Token token[CHUNK];
        for (int64_t t = 0; t < tokens; ++t) {
            inputs.set(t, a.x, (first + t) * a.width, a.width, a.is_bf16);
            token[t] = inputs.at(t);
        }
        in_threads(a.threads, [&](int thread, int threads) {
            for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; ++i) {
                Tile out[CHUNK];
                tiles(a.w + i * a.tile, token, tokens, a.groups, out);
                const int64_t n = i * LANES;
                for (int64_t t = 0; t < tokens; ++t) {
                    Vector value = load(a.units + n) * out[t].codes - load(a.units + padded + n) * out[t].offsets;
                    if (a.bias) value += load(a.bias + n);
                    for (int64_t r = 0; r < LANES && n + r < a.rows; ++r) {
                        const int64_t at = (first + t) * a.rows + n + r;
                        if (a.is_bf16) static_cast<bf16*>(a.y)[at].bits = rounded(value[r]);
                        else static_cast<float*>(a.y)[at] = value[r];
                    }
                }
            }
        });
    }
}

}  // namespace

extern "C" void moefy_quantised_mlp(const QuantisedArguments* a) {
    static thread_local QuantisedMlp mlp;
    mlp.run(*a);
}

extern "C" void moefy_quantised_map(const QuantisedMap* a) {
    static thread_local Inputs inputs;
    map(*a, inputs);
}

// Bytes of a vector, which decide how weights are laid out.
extern "C" int moefy_vector_bytes() { return BYTES; }
