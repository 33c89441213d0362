// What the kernels of experts.cpp and quantised.cpp are made of: vectors, and products of some rows with some tokens.
//
// Vectors are the compiler's own, so that one source serves AVX-512, AVX2, NEON and machines without.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

struct bf16 {
    uint16_t bits;
};

constexpr int STEP = 2 * LANES;  // numbers that are read at once

// STEP numbers as two vectors. Of bf16 the first holds the even ones and the second the odd ones, which is
// what a shift and a mask give of whole words; every buffer in fp32 keeps that order, and `narrow` undoes it.
struct Pair {
    Vector one, two;
};
inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline Pair pair(const float* at) { return {load(at), load(at + LANES)}; }
inline Pair pair(const bf16* at) {
    const Bits words = *reinterpret_cast<const Bits*>(at);
    return {(Vector)(words << 16), (Vector)(words & 0xffff0000u)};
}
inline void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }

inline float widened(float value) { return value; }
inline float widened(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
// Rounded to the nearest, ties to even; a NaN stays one.
inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class W>
inline void widen(const W* from, int64_t n, float* to) {
    int64_t d = 0;
    for (; d + STEP <= n; d += STEP) {
        const Pair both = pair(from + d);
        store(to + d, both.one);
        store(to + d + LANES, both.two);
    }
    for (; d < n; ++d) to[d] = widened(from[d]);
}
inline void narrow(const float* from, int64_t n, float* to) { std::copy(from, from + n, to); }
inline void narrow(const float* from, int64_t n, bf16* to) {
    int64_t d = 0;
    for (; d + STEP <= n; d += STEP)
        for (int i = 0; i < LANES; ++i) {
            to[d + 2 * i].bits = rounded(from[d + i]);
            to[d + 2 * i + 1].bits = rounded(from[d + LANES + i]);
        }
    for (; d < n; ++d) to[d].bits = rounded(from[d]);
}

inline float total(Vector value) {
    float lane[LANES];
    std::memcpy(lane, &value, sizeof lane);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

constexpr int BLOCK_ROWS = 32;    // rows of one piece of work
constexpr int BLOCK_TOKENS = 48;  // tokens whose inputs stay in the second-level cache
constexpr int BLOCK_WIDTH = 1024; // columns of them

constexpr int BLOCK = (BLOCK_ROWS + 8) * BLOCK_TOKENS;  // and room for rows that do not exist

// Rows that one pass works on. For one token they are streams that the memory serves side by side; for
// several, R rows by C tokens are sums that fit into registers.
constexpr int ALONE = 8, TILE = 4;

// The rows at `w`; those that do not exist are the last one once more.
template <int R, class W>
struct Rows {
    const W* at[R];
    Rows(const W* w, int64_t stride, int64_t rows) {
        for (int r = 0; r < R; ++r) at[r] = w + std::min<int64_t>(r, rows - 1) * stride;
    }
    Rows(const W* w, int64_t stride, const int64_t* row, int64_t rows) {
        for (int r = 0; r < R; ++r) at[r] = w + row[std::min<int64_t>(r, rows - 1)] * stride;
    }
};

// Into the second-level cache, from where the next pass reads it. Hardware looks ahead within a page alone,
// which a row of a model hardly exceeds: asked for, bf16 comes a tenth to a quarter faster.
inline void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// sum[r] = w[r] . x for one token; the rows `next` are fetched meanwhile.
template <class W>
inline void dots_alone(const Rows<ALONE, W>& w, const Rows<ALONE, W>& next, const float* x, int64_t n,
                       float* sum) {
    constexpr int LINE = std::max<int>(64 / sizeof(W), STEP);  // a row is taken a cache line at a time
    Vector part[ALONE] = {};
    int64_t d = 0;
    for (; d + LINE <= n; d += LINE)
        for (int r = 0; r < ALONE; ++r) {
            fetch(next.at[r] + d);
            for (int i = 0; i < LINE; i += STEP) {
                const Pair weight = pair(w.at[r] + d + i), value = pair(x + d + i);
                part[r] += weight.one * value.one;
                part[r] += weight.two * value.two;
            }
        }
    for (int r = 0; r < ALONE; ++r) {
        int64_t i = d;
        for (; i + STEP <= n; i += STEP) {
            const Pair weight = pair(w.at[r] + i), value = pair(x + i);
            part[r] += weight.one * value.one + weight.two * value.two;
        }
        sum[r] = total(part[r]);
        for (; i < n; ++i) sum[r] += widened(w.at[r][i]) * x[i];
    }
}

// sum[r][c] += w[r] . x[c] for C tokens; rows of `sum` are BLOCK_TOKENS apart.
template <int C>
inline void dots(const Rows<TILE, float>& w, const float* const* x, int64_t n, float* sum) {
    Vector part[TILE][C] = {};
    int64_t d = 0;
    for (; d + LANES <= n; d += LANES) {
        Vector value[C];
        for (int c = 0; c < C; ++c) value[c] = load(x[c] + d);
        for (int r = 0; r < TILE; ++r) {
            const Vector weight = load(w.at[r] + d);
            for (int c = 0; c < C; ++c) part[r][c] += weight * value[c];
        }
    }
    for (int r = 0; r < TILE; ++r)
        for (int c = 0; c < C; ++c) {
            float rest = total(part[r][c]);
            for (int64_t i = d; i < n; ++i) rest += w.at[r][i] * x[c][i];
            sum[r * BLOCK_TOKENS + c] += rest;
        }
}

// y[c] += sum_r h[c][r] w[r], over n columns; for one token the rows `after` are fetched meanwhile.
template <int R, int C, class W>
inline void add_rows(const Rows<R, W>& rows, const Rows<R, W>& after, const float (*h)[R], int64_t n,
                     float* const* out) {
    const Rows<R, W> w = rows, next = after;
    float* y[C];
    float number[C][R];
    std::copy(out, out + C, y);
    std::memcpy(number, h, sizeof number);
    int64_t d = 0;
    for (; d + STEP <= n; d += STEP) {
        Pair sum[C];
        for (int c = 0; c < C; ++c) sum[c] = pair(y[c] + d);
        for (int r = 0; r < R; ++r) {
            if (C == 1) fetch(next.at[r] + d);
            const Pair weight = pair(w.at[r] + d);
            for (int c = 0; c < C; ++c) {
                sum[c].one += weight.one * number[c][r];
                sum[c].two += weight.two * number[c][r];
            }
        }
        for (int c = 0; c < C; ++c) {
            store(y[c] + d, sum[c].one);
            store(y[c] + d + LANES, sum[c].two);
        }
    }
    for (; d < n; ++d)
        for (int c = 0; c < C; ++c)
            for (int r = 0; r < R; ++r) y[c][d] += widened(w.at[r][d]) * number[c][r];
}

// Up to TILE rows of up to BLOCK_WIDTH columns in fp32: where they are, or widened into `wide`.
inline Rows<TILE, float> in_fp32(const float* w, int64_t stride, int64_t rows, int64_t, float*) {
    return {w, stride, rows};
}
inline Rows<TILE, float> in_fp32(const bf16* w, int64_t stride, int64_t rows, int64_t columns, float* wide) {
    for (int64_t r = 0; r < rows; ++r) widen(w + r * stride, columns, wide + r * BLOCK_WIDTH);
    return {wide, BLOCK_WIDTH, rows};
}

// sum[r][c] = w[r] . x[c] for up to BLOCK_ROWS rows and BLOCK_TOKENS tokens; `sum` has room for BLOCK numbers.
template <class W>
void products(const W* w, int64_t stride, int64_t rows, const float* const* x, int64_t n, int64_t width,
              float* sum) {
    if (n == 1) {
        for (int64_t r = 0; r < rows; r += ALONE) {
            float row[ALONE];
            const int64_t next = std::min(r + ALONE, rows - 1);
            dots_alone(Rows<ALONE, W>(w + r * stride, stride, rows - r),
                       Rows<ALONE, W>(w + next * stride, stride, rows - next), x[0], width, row);
            for (int i = 0; i < ALONE; ++i) sum[(r + i) * BLOCK_TOKENS] = row[i];
        }
        return;
    }
    std::fill(sum, sum + rows * BLOCK_TOKENS, 0.0f);
    float wide[TILE * BLOCK_WIDTH];
    for (int64_t d = 0; d < width; d += BLOCK_WIDTH) {
        const int64_t columns = std::min<int64_t>(BLOCK_WIDTH, width - d);
        const float* block[BLOCK_TOKENS];
        for (int64_t c = 0; c < n; ++c) block[c] = x[c] + d;
        for (int64_t r = 0; r < rows; r += TILE) {
            const auto held = in_fp32(w + r * stride + d, stride, std::min<int64_t>(TILE, rows - r), columns, wide);
            float* out = sum + r * BLOCK_TOKENS;
            int64_t c = 0;
            for (; c + 3 <= n; c += 3) dots<3>(held, block + c, columns, out + c);
            if (n - c == 2) dots<2>(held, block + c, columns, out + c);
            if (n - c == 1) dots<1>(held, block + c, columns, out + c);
        }
    }
}

enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, LINEAR };

inline float activate(float v, int kind) {
    switch (kind) {
        case SILU: return v / (1.0f + std::exp(-v));
        case GELU: return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
        case GELU_TANH: {
            const float inner = 0.79788456080286536f * (v + 0.044715f * v * v * v);
            return 0.5f * v * (1.0f + std::tanh(inner));
        }
        case RELU: return v > 0 || v != v ? v : 0.0f;
        case RELU2: return v > 0 || v != v ? v * v : 0.0f;
        default: return v;
    }
}

}  // namespace
