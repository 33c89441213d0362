// Whole numbers for quantised.cpp: products of codes with inputs in 8 bits, and codes of few bits out of memory.
//
// What no compiler makes of its own vector types by itself is written here once for every instruction set, and
// nowhere else: the product of four pairs (VNNI, AVX2's multiply-add, NEON's dot product, plain), copies of a
// piece of memory, the transposition of four rows and numbers in 16 bits.

#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int BYTES = 4 * LANES;  // of a vector: codes that are multiplied at once

typedef uint8_t Codes __attribute__((vector_size(BYTES), aligned(1), may_alias));
typedef int32_t Sums __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t Words __attribute__((vector_size(BYTES), aligned(1), may_alias));

struct half {
    uint16_t bits;
};

// sum[i] += code[4 i + k] * input[4 i + k] over k; codes up to 127, so that no pair exceeds 16 bits.
inline Sums dot_small(Sums sum, Codes code, Codes input) {
#if defined(__AVX512VNNI__)
    return (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)code, (__m512i)input);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)code, (__m512i)input);
    return sum + (Sums)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)code, (__m256i)input);
    return sum + (Sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Sums)vdotq_s32((int32x4_t)sum, (int8x16_t)code, (int8x16_t)input);
#else
    typedef int16_t Shorts __attribute__((vector_size(BYTES)));
    const Shorts even = (Shorts)((Words)code & 0xff) * ((Shorts)((Words)input << 8) >> 8);
    const Shorts pairs = even + (Shorts)((Words)code >> 8) * ((Shorts)input >> 8);
    return sum + ((((Sums)pairs) << 16) >> 16) + ((Sums)pairs >> 16);
#endif
}

// The same for codes of so many bits.
template <int BITS>
inline Sums dot(Sums sum, Codes code, Codes input) {
    if constexpr (BITS < 8) return dot_small(sum, code, input);
#if defined(__AVX512VNNI__)
    return dot_small(sum, code, input);
#else
    const Codes low = code & 15, high = (Codes)((Words)code >> 4) & 15;
    return dot_small(sum, low, input) + (dot_small(Sums{}, high, input) << 4);
#endif
}

// Four inputs, for every lane.
inline Codes four(const int8_t* at) {
    int32_t word;
    std::memcpy(&word, at, 4);
    return (Codes)(Sums{} + word);
}

template <class T>
inline Codes copies_of(const uint8_t* at) {
    typedef T Vector_of __attribute__((vector_size(BYTES)));
    T piece;
    std::memcpy(&piece, at, sizeof piece);
    return (Codes)(Vector_of{} + piece);
}

// A vector full of copies of COUNT bytes.
template <int COUNT>
inline Codes copies(const uint8_t* at) {
    if constexpr (COUNT == BYTES) return *reinterpret_cast<const Codes*>(at);
    else if constexpr (COUNT == 2) return copies_of<uint16_t>(at);
    else if constexpr (COUNT == 4) return copies_of<uint32_t>(at);
    else if constexpr (COUNT == 8) return copies_of<uint64_t>(at);
#if defined(__AVX512F__)
    else if constexpr (COUNT == 16)
        return (Codes)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    else
        return (Codes)_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__AVX2__)
    else
        return (Codes)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#endif
}

// Every copy moved down by its own number of bits: WIDTH times its place.
template <class T, int COUNT, int WIDTH>
inline Codes moved(Codes value) {
    typedef T Vector_of __attribute__((vector_size(BYTES)));
    constexpr int EACH = COUNT / sizeof(T);  // lanes of a copy
    Vector_of by;
    for (int i = 0; i < static_cast<int>(BYTES / sizeof(T)); ++i) by[i] = i / EACH * WIDTH;
    return (Codes)((Vector_of)value >> by);
}

// BYTES codes of WIDTH bits (1, 2, 4, 8) in BYTES * WIDTH / 8 bytes: byte i has those of i, i + count, i + 2 count...
template <int WIDTH>
inline Codes field(const uint8_t* at) {
    constexpr int COUNT = BYTES * WIDTH / 8;
    const Codes value = copies<COUNT>(at);
    if constexpr (WIDTH == 8) return value;
    else {
        constexpr uint8_t MASK = (1 << WIDTH) - 1;
        if constexpr (COUNT >= 8) return moved<uint64_t, COUNT, WIDTH>(value) & MASK;
        else if constexpr (COUNT == 4) return moved<uint32_t, COUNT, WIDTH>(value) & MASK;
        else return moved<uint16_t, COUNT, WIDTH>(value) & MASK;
    }
}

// BYTES codes of BITS bits in BYTES * BITS / 8 bytes: fields of 8, 4, 2 and 1 bits, the top bits first.
template <int BITS>
inline Codes unpack(const uint8_t* at) {
    if constexpr (BITS == 8 || BITS == 4 || BITS == 2 || BITS == 1) return field<BITS>(at);
    else {
        constexpr int FIRST = BITS > 4 ? 4 : 2, REST = BITS - FIRST;
        const Codes top = field<FIRST>(at), low = unpack<REST>(at + BYTES * FIRST / 8);
        return (Codes)((Words)top << REST) | low;
    }
}

// Bytes of four rows side by side: byte 4 i + k of out[r] is that of row k at `transposed(r, i)`, the order in
// which moefy_kernels.cpu.quantised lays the columns of down.
inline void transpose(const Codes* row, Codes* out) {
#if defined(__AVX512BW__)
    const __m512i a = (__m512i)row[0], b = (__m512i)row[1], c = (__m512i)row[2], d = (__m512i)row[3];
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    const __m512i AB = _mm512_unpackhi_epi8(a, b), CD = _mm512_unpackhi_epi8(c, d);
    out[0] = (Codes)_mm512_unpacklo_epi16(ab, cd), out[1] = (Codes)_mm512_unpackhi_epi16(ab, cd);
    out[2] = (Codes)_mm512_unpacklo_epi16(AB, CD), out[3] = (Codes)_mm512_unpackhi_epi16(AB, CD);
#elif defined(__AVX2__)
    const __m256i a = (__m256i)row[0], b = (__m256i)row[1], c = (__m256i)row[2], d = (__m256i)row[3];
    const __m256i ab = _mm256_unpacklo_epi8(a, b), cd = _mm256_unpacklo_epi8(c, d);
    const __m256i AB = _mm256_unpackhi_epi8(a, b), CD = _mm256_unpackhi_epi8(c, d);
    out[0] = (Codes)_mm256_unpacklo_epi16(ab, cd), out[1] = (Codes)_mm256_unpackhi_epi16(ab, cd);
    out[2] = (Codes)_mm256_unpacklo_epi16(AB, CD), out[3] = (Codes)_mm256_unpackhi_epi16(AB, CD);
#else
    // Element by element, since GCC and Clang have no shuffle in common; both make one instruction of each list.
    const auto zip = [](Codes a, Codes b, bool upper) {
        const Codes low{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3], a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]};
        const Codes high{a[8],  b[8],  a[9],  b[9],  a[10], b[10], a[11], b[11],
                         a[12], b[12], a[13], b[13], a[14], b[14], a[15], b[15]};
        return (Words)(upper ? high : low);
    };
    const auto first = [](Words a, Words b) { return (Codes)Words{a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]}; };
    const auto last = [](Words a, Words b) { return (Codes)Words{a[4], b[4], a[5], b[5], a[6], b[6], a[7], b[7]}; };
    const Words ab = zip(row[0], row[1], false), cd = zip(row[2], row[3], false);
    const Words AB = zip(row[0], row[1], true), CD = zip(row[2], row[3], true);
    out[0] = first(ab, cd), out[1] = last(ab, cd), out[2] = first(AB, CD), out[3] = last(AB, CD);
#endif
}

// As `total` of rows.h, in the same order, without a way through memory.
inline float added(Vector value) {
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)value),
                                       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)value), 1)));
#elif defined(__AVX2__)
    const __m256 eight = (__m256)value;
#endif
#if defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return total(value);
#endif
}

// The first `count` numbers, and zeros.
inline Vector first(Vector value, int64_t count) {
    Sums lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane < (Sums{} + static_cast<int32_t>(count)) ? value : Vector{};
}

inline Vector real(Sums value) { return __builtin_convertvector(value, Vector); }

// LANES scales or offsets.
inline Vector scales(const uint8_t* at, uint8_t) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
    Vector value;
    for (int i = 0; i < LANES; ++i) value[i] = at[i];
    return value;
#endif
}
inline Vector scales(const uint8_t* at, half) {
#if defined(__AVX512F__)
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__ARM_NEON)
    return (Vector)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
#else
    // Exponent and fraction where those of a float lie, and the difference of the two biases.
    Sums word;
    for (int i = 0; i < LANES; ++i) {
        uint16_t bits;
        std::memcpy(&bits, at + 2 * i, 2);
        word[i] = static_cast<int32_t>(static_cast<uint32_t>(bits & 0x8000) << 16 | (bits & 0x7fff) << 13);
    }
    return (Vector)word * 0x1p112f;
#endif
}

// The factors of the groups that a vector of codes covers, each in its lanes; `at` counts vectors.
inline Vector spread(const float* factor, int64_t at) {
#if defined(__AVX512F__)
    const __m512 first = _mm512_set1_ps(factor[2 * at]);
    return (Vector)_mm512_mask_broadcastss_ps(first, 0xff00, _mm_load_ss(factor + 2 * at + 1));
#else
    return Vector{} + factor[at * BYTES / 32];
#endif
}

}  // namespace
