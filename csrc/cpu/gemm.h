/* Matrix products on packed operands, for use inside tasks: C[m,n] (= or +=) A[m,k] B[k,n] + bias, on the calling thread.
 *
 * Operands are f32 in memory. Packing copies a block of A into panels of GEMM_MR rows and a block of B into panels of GEMM_NR columns, the order in
 * which the inner kernel reads them; the avx512bf16 table rounds to bf16 on the way and multiplies pairs along k, everything else stays f32.
 *   A panel: [k][GEMM_AS] floats          or  [k/2][GEMM_AS][2] bf16      (GEMM_AS >= GEMM_MR: whole vectors)
 *   B panel: [k][GEMM_NR] floats          or  [k/2][GEMM_NR][2] bf16
 * An odd k is filled up with zeros in bf16.
 *
 * Each element of C is one chain of fused multiply-adds over k in ascending order within a block of k; blocks are added in order, and their sizes
 * depend on k only (gemm_k_block). So an element has the same bits whatever m and n are, and wherever its row or column stands: a sample's result
 * does not depend on its batch. Included by isa_*.c through kernels.inc: every function here is compiled once for each instruction set.
 */
#ifndef LADD_GEMM_H
#define LADD_GEMM_H
#include "cpu.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { GEMM_LANES = 16, GEMM_NV = 2, GEMM_MR = 14, GEMM_AS = 16 };
#elif defined(__AVX2__)
enum { GEMM_LANES = 8, GEMM_NV = 2, GEMM_MR = 6, GEMM_AS = 8 };
#else
enum { GEMM_LANES = 4, GEMM_NV = 2, GEMM_MR = 4, GEMM_AS = 4 };
#endif
enum { GEMM_NR = GEMM_NV * GEMM_LANES };

#if defined(LADD_BF16_PRODUCTS)
typedef uint16_t gemm_packed;
enum { GEMM_PAIR = 2 };
#else
typedef float gemm_packed;
enum { GEMM_PAIR = 1 };
#endif

typedef float gemm_vec __attribute__((vector_size(4 * GEMM_LANES)));
typedef float gemm_vec_any __attribute__((vector_size(4 * GEMM_LANES), aligned(4), may_alias));

static inline gemm_vec gemm_load(const float *p) { return *(const gemm_vec_any *)p; }
static inline void gemm_store(float *p, gemm_vec v) { *(gemm_vec_any *)p = v; }

/* ---- sizes ------------------------------------------------------------------------------------------------------------- */

static inline int gemm_even(int k) { return (k + GEMM_PAIR - 1) / GEMM_PAIR * GEMM_PAIR; }
/* Elements of a packed block. */
static inline size_t gemm_a_size(int m, int k) { return (size_t)((m + GEMM_MR - 1) / GEMM_MR) * GEMM_AS * (size_t)gemm_even(k); }
static inline size_t gemm_b_size(int k, int n) { return (size_t)((n + GEMM_NR - 1) / GEMM_NR) * GEMM_NR * (size_t)gemm_even(k); }

/* The size of the blocks that a long k is cut into, by k only: panels of one block stay in the caches near the core. */
static inline int gemm_k_block(int k) {
    enum { LONGEST = 384 };
    int blocks = (k + LONGEST - 1) / LONGEST;
    return blocks > 1 ? (int)((k + blocks - 1) / blocks + 1) / 2 * 2 : k;
}

/* ---- packing ------------------------------------------------------------------------------------------------------------- */

/* The plain form of both packings: `width` lanes of a panel of `stride` places, lane i of step t at src[i*lane + t*step]. What stands in the places
 * beyond goes to rows and columns that nobody stores. */
static inline void gemm_pack_plain(gemm_packed *out, const float *src, ptrdiff_t lane, ptrdiff_t step, int width, int stride, int k) {
#if defined(LADD_BF16_PRODUCTS)
    for (int t = 0; t < gemm_even(k); t++)
        for (int i = 0; i < width; i++) {
            float x = t < k ? src[i * lane + t * step] : 0.0f;
            __m128i rounded = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
            out[(t / 2 * stride + i) * 2 + t % 2] = (uint16_t)_mm_extract_epi16(rounded, 0);
        }
#else
    for (int t = 0; t < k; t++, out += stride)
        for (int i = 0; i < width; i++) out[i] = src[i * lane + t * step];
#endif
}

#if defined(__AVX2__)
/* n values, the lanes beyond are zero and not read. */
static inline gemm_vec gemm_load_some(const float *p, int n) {
#if defined(__AVX512F__)
    return (gemm_vec)_mm512_maskz_loadu_ps(n < GEMM_LANES ? (__mmask16)((1u << n) - 1) : (__mmask16)-1, p);
#else
    return (gemm_vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
#endif
}

/* v[i][j] becomes v[j][i]: squares of 4 by 4 within each part of 128 bits first, then the parts change places. */
static inline __attribute__((always_inline)) void gemm_transpose(gemm_vec v[GEMM_LANES]) {
    gemm_vec s[GEMM_LANES];
#if defined(__AVX512F__)
#define GEMM_OP(name, type, a, b) (gemm_vec) _mm512_##name##_##type((__m512##type##_)(a), (__m512##type##_)(b))
    typedef __m512 __m512ps_;
    typedef __m512d __m512pd_;
#else
#define GEMM_OP(name, type, a, b) (gemm_vec) _mm256_##name##_##type((__m256##type##_)(a), (__m256##type##_)(b))
    typedef __m256 __m256ps_;
    typedef __m256d __m256pd_;
#endif
    for (int i = 0; i < GEMM_LANES; i += 4) {
        gemm_vec a = GEMM_OP(unpacklo, ps, v[i], v[i + 1]), b = GEMM_OP(unpackhi, ps, v[i], v[i + 1]);
        gemm_vec c = GEMM_OP(unpacklo, ps, v[i + 2], v[i + 3]), d = GEMM_OP(unpackhi, ps, v[i + 2], v[i + 3]);
        s[i] = GEMM_OP(unpacklo, pd, a, c);
        s[i + 1] = GEMM_OP(unpackhi, pd, a, c);
        s[i + 2] = GEMM_OP(unpacklo, pd, b, d);
        s[i + 3] = GEMM_OP(unpackhi, pd, b, d);
    }
#undef GEMM_OP
    for (int j = 0; j < 4; j++) {
#if defined(__AVX512F__)
        __m512 a = _mm512_shuffle_f32x4((__m512)s[j], (__m512)s[j + 4], 0x88), b = _mm512_shuffle_f32x4((__m512)s[j], (__m512)s[j + 4], 0xdd);
        __m512 c = _mm512_shuffle_f32x4((__m512)s[j + 8], (__m512)s[j + 12], 0x88),
               d = _mm512_shuffle_f32x4((__m512)s[j + 8], (__m512)s[j + 12], 0xdd);
        v[j] = (gemm_vec)_mm512_shuffle_f32x4(a, c, 0x88);
        v[j + 4] = (gemm_vec)_mm512_shuffle_f32x4(b, d, 0x88);
        v[j + 8] = (gemm_vec)_mm512_shuffle_f32x4(a, c, 0xdd);
        v[j + 12] = (gemm_vec)_mm512_shuffle_f32x4(b, d, 0xdd);
#else
        v[j] = (gemm_vec)_mm256_permute2f128_ps((__m256)s[j], (__m256)s[j + 4], 0x20);
        v[j + 4] = (gemm_vec)_mm256_permute2f128_ps((__m256)s[j], (__m256)s[j + 4], 0x31);
#endif
    }
}

#if defined(LADD_BF16_PRODUCTS)
/* Two vectors of f32 rounded to bf16: low's values in the lower half. */
static inline gemm_vec gemm_round(gemm_vec low, gemm_vec high) { return (gemm_vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif
#endif

/* The same as gemm_pack_plain for width <= GEMM_LANES, whole vectors at a time where the instruction set has them. */
static inline void gemm_pack_lanes(gemm_packed *out, const float *src, ptrdiff_t lane, ptrdiff_t step, int width, int stride, int k) {
#if defined(__AVX2__)
    gemm_vec *to = (gemm_vec *)out;
    const int next = stride / GEMM_LANES; /* vectors from one step, or pair of steps, to the next */
    if (lane == 1) {                      /* the lanes of a step lie together */
#if defined(LADD_BF16_PRODUCTS)
        const __m512i pairs = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009,
                                                0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
        for (int t = 0; t < k; t += 2, src += 2 * step, to += next) {
            gemm_vec both = gemm_round(gemm_load_some(src, width), t + 1 < k ? gemm_load_some(src + step, width) : (gemm_vec){0});
            *to = (gemm_vec)_mm512_permutexvar_epi16(pairs, (__m512i)both);
        }
#else
        for (int t = 0; t < k; t++, src += step, to += next) *to = gemm_load_some(src, width);
#endif
        return;
    }
    if (step == 1) { /* the steps of a lane lie together: turned square by square */
        for (int t = 0; t < k; t += GEMM_LANES * GEMM_PAIR) {
            gemm_vec v[GEMM_LANES];
            const int whole = k - t >= GEMM_LANES * GEMM_PAIR;
            for (int i = 0; i < GEMM_LANES; i++) {
                const float *p = src + (i < width ? i : 0) * lane + t;
#if defined(LADD_BF16_PRODUCTS)
                gemm_vec high = whole                ? gemm_load(p + GEMM_LANES)
                                : k - t > GEMM_LANES ? gemm_load_some(p + GEMM_LANES, k - t - GEMM_LANES)
                                                     : (gemm_vec){0};
                v[i] = gemm_round(whole ? gemm_load(p) : gemm_load_some(p, k - t), high);
#else
                v[i] = whole ? gemm_load(p) : gemm_load_some(p, k - t);
#endif
            }
            gemm_transpose(v);
            int steps = (gemm_even(k) - t) / GEMM_PAIR < GEMM_LANES ? (gemm_even(k) - t) / GEMM_PAIR : GEMM_LANES;
            for (int i = 0; i < steps; i++, to += next) *to = v[i];
        }
        return;
    }
#endif
    gemm_pack_plain(out, src, lane, step, width, stride, k);
}

/* A[m,k]: element (i,t) at a[i*row + t*step]. Fast where row or step is 1. `out` starts at a multiple of 64 bytes. */
static inline void gemm_pack_a(gemm_packed *out, const float *a, ptrdiff_t row, ptrdiff_t step, int m, int k) {
    for (int i = 0; i < m; i += GEMM_MR, out += GEMM_AS * gemm_even(k))
        gemm_pack_lanes(out, a + i * row, row, step, m - i < GEMM_MR ? m - i : GEMM_MR, GEMM_AS, k);
}

/* B[k,n]: element (t,j) at b[t*step + j*column]. Fast where step or column is 1. `out` starts at a multiple of 64 bytes. */
static inline void gemm_pack_b(gemm_packed *out, const float *b, ptrdiff_t step, ptrdiff_t column, int k, int n) {
    for (int j = 0; j < n; j += GEMM_NR, out += GEMM_NR * gemm_even(k))
        for (int v = 0; v < GEMM_NR && j + v < n; v += GEMM_LANES)
            gemm_pack_lanes(out + v * GEMM_PAIR, b + (j + v) * column, column, step, n - j - v < GEMM_LANES ? n - j - v : GEMM_LANES, GEMM_NR, k);
}

/* ---- the inner kernel ---------------------------------------------------------------------------------------------------- */

/* c[MR, NV vectors] at row stride c_row = start (one value a column) or c + sum over k of a b; one panel of each. */
static inline __attribute__((always_inline)) void gemm_tile(const int MR, const int NV, float *c, ptrdiff_t c_row, const gemm_packed *a,
                                                            const gemm_packed *b, int k, const float *start, int add) {
    gemm_vec acc[GEMM_MR][GEMM_NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = gemm_load(start + v * GEMM_LANES);
    for (int t = 0; t < k; t += GEMM_PAIR, a += GEMM_AS * GEMM_PAIR, b += GEMM_NR * GEMM_PAIR) {
#if defined(LADD_BF16_PRODUCTS)
        __m512i y[GEMM_NV];
        for (int v = 0; v < NV; v++) y[v] = _mm512_load_si512(b + v * 2 * GEMM_LANES);
        for (int m = 0; m < MR; m++) {
            int pair;
            memcpy(&pair, a + 2 * m, sizeof pair);
            __m512i x = _mm512_set1_epi32(pair);
            for (int v = 0; v < NV; v++) acc[m][v] = (gemm_vec)_mm512_dpbf16_ps((__m512)acc[m][v], (__m512bh)x, (__m512bh)y[v]);
        }
#else
        gemm_vec y[GEMM_NV];
        for (int v = 0; v < NV; v++) y[v] = gemm_load(b + v * GEMM_LANES);
        for (int m = 0; m < MR; m++) {
            gemm_vec x = (gemm_vec){0} + a[m];
            for (int v = 0; v < NV; v++) {
#if defined(__AVX512F__)
                acc[m][v] = (gemm_vec)_mm512_fmadd_ps((__m512)x, (__m512)y[v], (__m512)acc[m][v]);
#elif defined(__AVX2__)
                acc[m][v] = (gemm_vec)_mm256_fmadd_ps((__m256)x, (__m256)y[v], (__m256)acc[m][v]);
#else
                acc[m][v] += x * y[v];
#endif
            }
        }
#endif
    }
    for (int m = 0; m < MR; m++, c += c_row)
        for (int v = 0; v < NV; v++) gemm_store(c + v * GEMM_LANES, add ? gemm_load(c + v * GEMM_LANES) + acc[m][v] : acc[m][v]);
}

/* One function for each size of tile, so that its accumulators are registers. */
#define GEMM_VARIANT(m)                                                                                                                        \
    static void gemm_tile_##m##_1(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int k, const float *start, int add) { \
        gemm_tile(m, 1, c, c_row, a, b, k, start, add);                                                                                        \
    }                                                                                                                                          \
    static void gemm_tile_##m##_2(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int k, const float *start, int add) { \
        gemm_tile(m, 2, c, c_row, a, b, k, start, add);                                                                                        \
    }
#define GEMM_NAMES(m) {gemm_tile_##m##_1, gemm_tile_##m##_2}
GEMM_VARIANT(1)
GEMM_VARIANT(2)
GEMM_VARIANT(3)
GEMM_VARIANT(4)
#if defined(__AVX2__)
GEMM_VARIANT(5)
GEMM_VARIANT(6)
#endif
#if defined(__AVX512F__)
GEMM_VARIANT(7)
GEMM_VARIANT(8)
GEMM_VARIANT(9)
GEMM_VARIANT(10)
GEMM_VARIANT(11)
GEMM_VARIANT(12)
GEMM_VARIANT(13)
GEMM_VARIANT(14)
#endif
typedef void (*gemm_kernel)(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int k, const float *start, int add);
static const gemm_kernel gemm_tiles[GEMM_MR][GEMM_NV] = {
    GEMM_NAMES(1), GEMM_NAMES(2), GEMM_NAMES(3), GEMM_NAMES(4),
#if defined(__AVX2__)
    GEMM_NAMES(5), GEMM_NAMES(6),
#endif
#if defined(__AVX512F__)
    GEMM_NAMES(7), GEMM_NAMES(8), GEMM_NAMES(9), GEMM_NAMES(10), GEMM_NAMES(11), GEMM_NAMES(12), GEMM_NAMES(13), GEMM_NAMES(14),
#endif
};
#undef GEMM_VARIANT
#undef GEMM_NAMES

/* c[m,n] at row stride c_row (= bias[n] +, or += with add) A B, both packed with this k; n at most GEMM_NR: one panel of B. bias may be NULL. */
static inline void gemm_packed_strip(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int m, int n, int k, const float *bias,
                                     int add) {
    static const float zeros[GEMM_NR];
    float start[GEMM_NR], rest[GEMM_MR * GEMM_NR];
    const float *first = bias ? bias : zeros;
    if (bias && n < GEMM_NR) {
        for (int j = 0; j < GEMM_NR; j++) start[j] = j < n ? bias[j] : 0.0f;
        first = start;
    }
    int vectors = (n + GEMM_LANES - 1) / GEMM_LANES;
    for (int i = 0; i < m; i += GEMM_MR, a += GEMM_AS * gemm_even(k), c += GEMM_MR * c_row) {
        int rows = m - i < GEMM_MR ? m - i : GEMM_MR;
        gemm_kernel kernel = gemm_tiles[rows - 1][vectors - 1];
        if (n % GEMM_LANES == 0) {
            kernel(c, c_row, a, b, k, first, add);
            continue;
        }
        kernel(rest, GEMM_NR, a, b, k, first, 0);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < n; j++) c[r * c_row + j] = add ? c[r * c_row + j] + rest[r * GEMM_NR + j] : rest[r * GEMM_NR + j];
    }
}

/* c[m,n] (= bias[n] +, or += with add) A B, both packed with this k. */
static inline void gemm_packed_product(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int m, int n, int k, const float *bias,
                                       int add) {
    for (int j = 0; j < n; j += GEMM_NR, b += GEMM_NR * gemm_even(k))
        gemm_packed_strip(c + j, c_row, a, b, m, n - j < GEMM_NR ? n - j : GEMM_NR, k, bias ? bias + j : NULL, add);
}

#endif
