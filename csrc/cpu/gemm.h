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

#include <stdatomic.h>
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

/* The size of the blocks that a long k is cut into, by k only: what tasks keep packed of one block stays in the level-2 cache. */
static inline int gemm_k_block(int k) {
#if defined(__AVX512F__)
    enum { LONGEST = 768 * GEMM_PAIR };
#else
    enum { LONGEST = 384 };
#endif
    int blocks = (k + LONGEST - 1) / LONGEST;
    return blocks > 1 ? (int)((k + blocks - 1) / blocks + 1) / 2 * 2 : k;
}

/* ---- packing ------------------------------------------------------------------------------------------------------------- */

/* Both packings are one: `count` rows of A or columns of B, here called lanes, are laid into groups of a vector, `width` of its places filled;
 * `per` groups make a panel (A: GEMM_MR, 1; B: GEMM_LANES, GEMM_NV). Lane i of step t stands at src[i*lane + t*step]. What is in places that no lane
 * fills goes to rows and columns that nobody stores. */

static inline gemm_packed *gemm_group(gemm_packed *out, int group, int per, int k) {
    return out + (ptrdiff_t)(group / per) * per * GEMM_LANES * gemm_even(k) + group % per * GEMM_LANES * GEMM_PAIR;
}

/* The plain form, for steps [from, k) of a group of n lanes. */
static inline void gemm_pack_plain(gemm_packed *out, const float *src, ptrdiff_t lane, ptrdiff_t step, int n, int per, int from, int k) {
    for (int t = from; t < gemm_even(k); t++)
        for (int i = 0; i < n; i++) {
            float x = t < k ? src[i * lane + t * step] : 0.0f;
            gemm_packed *place = out + ((ptrdiff_t)(t / GEMM_PAIR) * per * GEMM_LANES + i) * GEMM_PAIR + t % GEMM_PAIR;
#if defined(LADD_BF16_PRODUCTS)
            *place = (gemm_packed)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
#else
            *place = x;
#endif
        }
}

#if defined(__AVX512F__)
#define GEMM_UNPACK(half, type, a, b) (gemm_vec) _mm512_unpack##half##_##type((__m512)(a), (__m512)(b))
#define GEMM_UNPACK_PAIRS(half, a, b) (gemm_vec) _mm512_unpack##half##_pd((__m512d)(a), (__m512d)(b))
#elif defined(__AVX2__)
#define GEMM_UNPACK(half, type, a, b) (gemm_vec) _mm256_unpack##half##_##type((__m256)(a), (__m256)(b))
#define GEMM_UNPACK_PAIRS(half, a, b) (gemm_vec) _mm256_unpack##half##_pd((__m256d)(a), (__m256d)(b))
#endif

#if defined(__AVX2__)
/* Turns the squares of 4 by 4 that stand side by side in four vectors and stores the four at `to`, `next` vectors apart. */
static inline void gemm_store_turned(gemm_vec *to, int next, gemm_vec a, gemm_vec b, gemm_vec c, gemm_vec d) {
    gemm_vec ab = GEMM_UNPACK(lo, ps, a, b), cd = GEMM_UNPACK(lo, ps, c, d), ef = GEMM_UNPACK(hi, ps, a, b), gh = GEMM_UNPACK(hi, ps, c, d);
    to[0] = GEMM_UNPACK_PAIRS(lo, ab, cd);
    to[next] = GEMM_UNPACK_PAIRS(hi, ab, cd);
    to[2 * next] = GEMM_UNPACK_PAIRS(lo, ef, gh);
    to[3 * next] = GEMM_UNPACK_PAIRS(hi, ef, gh);
}
#undef GEMM_UNPACK
#undef GEMM_UNPACK_PAIRS

#if defined(LADD_BF16_PRODUCTS)
/* Two vectors of f32 rounded to bf16: low's values in the lower half. */
static inline __m512 gemm_round(gemm_vec low, gemm_vec high) { return (__m512)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
#endif

/* Four steps of lanes 0, 4, 8, 12 (n of them there; else another's again), whose steps lie together. */
static inline gemm_vec gemm_load_quads(const float *p, ptrdiff_t lane, int n) {
#if defined(__AVX512F__)
    __m512 x = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(n > 4 ? p + 4 * lane : p));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(n > 8 ? p + 8 * lane : p));
    return (gemm_vec)_mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(n > 12 ? p + 12 * lane : p));
#else
    return (gemm_vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(n > 4 ? p + 4 * lane : p), 1);
#endif
}

/* A group of n lanes, each with its steps together: turned square by square. */
static inline __attribute__((always_inline)) void gemm_pack_along(gemm_packed *out, const float *src, ptrdiff_t lane, int n, int per, int k) {
    gemm_vec *to = (gemm_vec *)out;
    int t = 0;
#if defined(LADD_BF16_PRODUCTS)
    for (; t + 32 <= k; t += 32, to += 16 * per) {
        __m512 v[16];
        for (int i = 0; i < 16; i++) {
            const float *p = src + (i < n ? i * lane : 0) + t;
            v[i] = gemm_round(gemm_load(p), gemm_load(p + 16));
        }
        gemm_vec quads[4][4];
        for (int i = 0; i < 4; i++) {
            __m512 a = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
            __m512 c = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88), d = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
            quads[0][i] = (gemm_vec)_mm512_shuffle_f32x4(a, c, 0x88);
            quads[1][i] = (gemm_vec)_mm512_shuffle_f32x4(b, d, 0x88);
            quads[2][i] = (gemm_vec)_mm512_shuffle_f32x4(a, c, 0xdd);
            quads[3][i] = (gemm_vec)_mm512_shuffle_f32x4(b, d, 0xdd);
        }
        for (int q = 0; q < 4; q++) gemm_store_turned(to + 4 * q * per, per, quads[q][0], quads[q][1], quads[q][2], quads[q][3]);
    }
#else
    const float *row[4];
    for (int i = 0; i < 4; i++) row[i] = src + (i < n ? i * lane : 0);
    for (; t + 4 <= k; t += 4, to += 4 * per)
        gemm_store_turned(to, per, gemm_load_quads(row[0] + t, lane, n), gemm_load_quads(row[1] + t, lane, n - 1),
                          gemm_load_quads(row[2] + t, lane, n - 2), gemm_load_quads(row[3] + t, lane, n - 3));
#endif
    gemm_pack_plain(out, src, lane, 1, n, per, t, k);
}

/* n values, the lanes beyond are zero and not read. */
static inline gemm_vec gemm_load_some(const float *p, int n) {
#if defined(__AVX512F__)
    return (gemm_vec)_mm512_maskz_loadu_ps(n < GEMM_LANES ? (__mmask16)((1u << n) - 1) : (__mmask16)-1, p);
#else
    return (gemm_vec)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
#endif
}

/* Groups whose lanes lie together in each step: read in the order of memory. */
static inline __attribute__((always_inline)) void gemm_pack_across(gemm_packed *out, const float *src, ptrdiff_t step, int count, const int width,
                                                                   const int per, int k) {
    for (int t = 0; t < k; t += GEMM_PAIR, src += GEMM_PAIR * step) {
        gemm_vec *to = (gemm_vec *)out + t / GEMM_PAIR * per;
        for (int i = 0, group = 0; i < count; i += width) {
            int n = count - i < width ? count - i : width;
            gemm_vec x = n == GEMM_LANES ? gemm_load(src + i) : gemm_load_some(src + i, n);
#if defined(LADD_BF16_PRODUCTS)
            const __m512i pairs = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                                                    0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
            gemm_vec next = t + 1 == k ? (gemm_vec){0} : n == GEMM_LANES ? gemm_load(src + step + i) : gemm_load_some(src + step + i, n);
            x = (gemm_vec)_mm512_permutexvar_epi16(pairs, (__m512i)gemm_round(x, next));
#endif
            *to = x;
            if (++group % per)
                to++;
            else
                to += (ptrdiff_t)per * (gemm_even(k) / GEMM_PAIR) - (per - 1);
        }
    }
}
#endif

static inline __attribute__((always_inline)) void gemm_pack(gemm_packed *out, const float *src, ptrdiff_t lane, ptrdiff_t step, int count,
                                                            const int width, const int per, int k) {
#if defined(__AVX2__)
    if (lane == 1) { /* eight groups at a time: places of one step in more of them may share a set of the level-1 cache */
        for (int i = 0; i < count; i += 8 * width)
            gemm_pack_across(gemm_group(out, i / width, per, k), src + i, step, count - i < 8 * width ? count - i : 8 * width, width, per, k);
        return;
    }
    if (step == 1) {
        for (int i = 0; i < count; i += width) {
            if (count - i >= width)
                gemm_pack_along(gemm_group(out, i / width, per, k), src + i * lane, lane, width, per, k);
            else
                gemm_pack_along(gemm_group(out, i / width, per, k), src + i * lane, lane, count - i, per, k);
        }
        return;
    }
#endif
    for (int i = 0; i < count; i += width)
        gemm_pack_plain(gemm_group(out, i / width, per, k), src + i * lane, lane, step, count - i < width ? count - i : width, per, 0, k);
}

/* A[m,k]: element (i,t) at a[i*row + t*step]. Fast where row or step is 1. `out` starts at a multiple of 64 bytes. */
static inline void gemm_pack_a(gemm_packed *out, const float *a, ptrdiff_t row, ptrdiff_t step, int m, int k) {
    gemm_pack(out, a, row, step, m, GEMM_MR, 1, k);
}

/* B[k,n]: element (t,j) at b[t*step + j*column]. Fast where step or column is 1. `out` starts at a multiple of 64 bytes. */
static inline void gemm_pack_b(gemm_packed *out, const float *b, ptrdiff_t step, ptrdiff_t column, int k, int n) {
    gemm_pack(out, b, column, step, n, GEMM_LANES, GEMM_NV, k);
}

/* ---- the inner kernel ---------------------------------------------------------------------------------------------------- */

/* c[MR, NV vectors] at row stride c_row = start (one value a column) or c + sum over k of a b; one panel of each. Meanwhile what lies at `ahead` is
 * fetched, a cache line a step. */
static inline __attribute__((always_inline)) void gemm_tile(const int MR, const int NV, float *c, ptrdiff_t c_row, const gemm_packed *a,
                                                            const gemm_packed *b, int k, const float *start, int add, const char *ahead) {
    gemm_vec acc[GEMM_MR][GEMM_NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = gemm_load(start + v * GEMM_LANES);
    for (int t = 0; t < k; t += GEMM_PAIR, a += GEMM_AS * GEMM_PAIR, b += GEMM_NR * GEMM_PAIR, ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
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
typedef void (*gemm_kernel)(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int k, const float *start, int add,
                            const char *ahead);
#define GEMM_VARIANT_OF(m, v)                                                                                                                  \
    static void gemm_tile_##m##_##v(float *c, ptrdiff_t c_row, const gemm_packed *a, const gemm_packed *b, int k, const float *start, int add, \
                                    const char *ahead) {                                                                                       \
        gemm_tile(m, v, c, c_row, a, b, k, start, add, ahead);                                                                                 \
    }
#define GEMM_VARIANT(m) GEMM_VARIANT_OF(m, 1) GEMM_VARIANT_OF(m, 2)
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
#undef GEMM_VARIANT_OF
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
        /* One of the operands passes by, of which this strip reads one panel: the next one is fetched, B's, which is twice as long, in two parts.
         * (Where none comes next, these are addresses that nobody reads.) */
        const gemm_packed *ahead = m > GEMM_MR ? b + (GEMM_NR + i / GEMM_MR % 2 * (GEMM_NR / 2)) * gemm_even(k) : a + GEMM_AS * gemm_even(k);
        if (n % GEMM_LANES == 0) {
            kernel(c, c_row, a, b, k, first, add, (const char *)ahead);
            continue;
        }
        kernel(rest, GEMM_NR, a, b, k, first, 0, (const char *)ahead);
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

/* ---- products cut into tasks --------------------------------------------------------------------------------------------- */

/* C[M,N] (=, or += with add) A[M,K] B[K,N] + bias[N]; and gelu[M,N] = GELU(C) where wanted. */
typedef struct gemm_product {
    float *c;
    ptrdiff_t c_row;
    const float *a; /* element (i,t) at a[i*a_row + t*a_step]; one of the two is 1 */
    ptrdiff_t a_row, a_step;
    const float *b; /* element (t,j) at b[t*b_step + j*b_column]; likewise */
    ptrdiff_t b_step, b_column;
    const float *bias; /* or NULL */
    float *gelu;       /* at row stride c_row; or NULL */
    int M, N, K, add;
    /* set by gemm_plan and gemm_share; at first zero */
    int n_m, n_n;        /* tiles of whole panels, n_m down and n_n across, as equal as can be: a task each */
    int passing;         /* the operand that passes by, panel after panel, while a task keeps its part of the other, the larger one */
    gemm_packed *shared; /* all of the passing operand, packed once for all tasks: blocks of k, then panels; NULL: each task packs what it reads */
    atomic_int failed;
} gemm_product;

enum { GEMM_TASK_SLOT = 2, GEMM_SHARED_SLOT = 3, GEMM_SHARED_MOST = 1 << 24 };
enum { GEMM_A, GEMM_B }; /* the operands: rows of A and columns of B are their lanes */
static const int gemm_panel[] = {GEMM_MR, GEMM_NR};

static inline int64_t gemm_tasks(const gemm_product *p) { return (int64_t)p->n_m * p->n_n; }

static inline int gemm_between(int x, int low, int high) { return x > high ? (high > low ? high : low) : x < low ? low : x; }

static inline size_t gemm_size(int operand, int lanes, int k) { return operand == GEMM_A ? gemm_a_size(lanes, k) : gemm_b_size(k, lanes); }

/* Packs `lanes` rows of A or columns of B from `first` on, steps [k0, k0 + k). */
static void gemm_pack_operand(gemm_packed *out, const gemm_product *p, int operand, int first, int lanes, int k0, int k) {
    if (operand == GEMM_A)
        gemm_pack_a(out, p->a + first * p->a_row + k0 * p->a_step, p->a_row, p->a_step, lanes, k);
    else
        gemm_pack_b(out, p->b + k0 * p->b_step + first * p->b_column, p->b_step, p->b_column, k, lanes);
}

/* Cuts the product, by its shape only, into tasks: at least eight, so that threads end together, but fewer where it is small, for waking the pool
 * would cost as much as it saves. The operand with more lanes is cut, and each task packs and keeps its part, so that large weights are read from
 * memory once and never written back as a packed copy. The other is packed once for all tasks and passes by. */
static void gemm_plan(gemm_product *p) {
#if defined(__AVX512F__)
    enum { KEPT = 600 << 10 }; /* bytes of packed lanes that stay in the level-2 cache: these processors have at least one megabyte of it */
#else
    enum { KEPT = 200 << 10 };
#endif
    enum { LOW = 4 * GEMM_MR, NARROW = 2 * GEMM_NR };
    static const int least[] = {LOW, NARROW}; /* with fewer lanes in a task the other operand passes by too often */
    double flops = 2.0 * p->M * p->N * p->K;
    int want = flops < 4e6 ? 1 : flops < 16e6 ? 2 : flops < 32e6 ? 4 : gemm_between((int)(flops < 2e9 ? flops / 128e6 : 16), 8, 16);
    int kept = p->M < p->N ? GEMM_B : GEMM_A, lanes[] = {p->M, p->N}, *tiles[] = {&p->n_m, &p->n_n};
    p->passing = !kept;
    int most = (int)(KEPT / sizeof(gemm_packed)) / gemm_even(gemm_k_block(p->K) + 1);
    int n = gemm_between(want, (lanes[kept] + most - 1) / most, lanes[kept] / least[kept]);
    int n_passing = gemm_between((want + n - 1) / n, 1, lanes[!kept] / least[!kept]);
    if (want > 1 && n * n_passing == 1) n_passing = 2;
    *tiles[kept] = gemm_between(n, 1, (lanes[kept] + gemm_panel[kept] - 1) / gemm_panel[kept]);
    *tiles[!kept] = gemm_between(n_passing, 1, (lanes[!kept] + gemm_panel[!kept] - 1) / gemm_panel[!kept]);
    atomic_init(&p->failed, 0);
}

/* Where tile i of `tiles` begins among `count` rows or columns that stand in panels. */
static inline int gemm_cut(int count, int panel, int tiles, int i) {
    int panels = (count + panel - 1) / panel, at = (int)((int64_t)panels * i / tiles) * panel;
    return at < count ? at : count;
}

static inline void gemm_gelu(float *y, const float *c, ptrdiff_t row, int m, int n) {
    for (int i = 0; i < m; i++, y += row, c += row)
#pragma GCC ivdep
        for (int j = 0; j < n; j++) y[j] = ladd_gelu(c[j]);
}

/* Task i of a product. */
static void gemm_task(gemm_product *p, int64_t i) {
    const int down = (int)(i / p->n_n), across = (int)(i % p->n_n), block = gemm_k_block(p->K);
    const int m0 = gemm_cut(p->M, GEMM_MR, p->n_m, down), m = gemm_cut(p->M, GEMM_MR, p->n_m, down + 1) - m0;
    const int n0 = gemm_cut(p->N, GEMM_NR, p->n_n, across), n = gemm_cut(p->N, GEMM_NR, p->n_n, across + 1) - n0;
#if !defined(__AVX2__)
    if (p->a_step != 1) { /* a weight's gradient, which sums over all samples: OpenBLAS is faster here, but a row's bits depend on its place there */
        ladd_sgemm(1, 0, m, n, p->K, 1.0f, p->a + m0, p->a_step, p->b + n0, p->b_step, p->add ? 1.0f : 0.0f, p->c + m0 * p->c_row + n0, p->c_row);
        return;
    }
#endif
    const int passing = p->passing, kept = !passing, all[] = {p->M, p->N}, first[] = {m0, n0}, lanes[] = {m, n}, panel = gemm_panel[passing];
    /* Panels packed at a time where they are not shared: one where lanes lie along k, else some, which are read together, step by step. */
    const int run = (passing == GEMM_A ? p->a_step : p->b_step) == 1 ? panel : 4 * panel;
    const size_t size = (gemm_size(kept, lanes[kept], block) + 31) / 32 * 32;
    gemm_packed *own = ladd_scratch(GEMM_TASK_SLOT, (size + gemm_size(passing, run, block)) * sizeof(gemm_packed)), *rest = own + size;
    if (!own) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int k0 = 0; k0 == 0 || k0 < p->K; k0 += block) {
        const int k = p->K - k0 < block ? p->K - k0 : block;
        gemm_pack_operand(own, p, kept, first[kept], lanes[kept], k0, k);
        for (int at = 0; at < lanes[passing]; at += panel) { /* all of the kept lanes by a panel, which stays in the level-1 cache */
            const int left = lanes[passing] - at, width = left < panel ? left : panel;
            if (!p->shared && at % run == 0) gemm_pack_operand(rest, p, passing, first[passing] + at, left < run ? left : run, k0, k);
            const gemm_packed *other = p->shared ? p->shared + gemm_size(passing, all[passing], k0) + gemm_size(passing, first[passing] + at, k)
                                                 : rest + gemm_size(passing, at % run, k);
            const int by_row = passing == GEMM_A, rows = by_row ? width : m, columns = by_row ? n : width, j0 = by_row ? n0 : n0 + at;
            const ptrdiff_t corner = (by_row ? m0 + at : m0) * p->c_row + j0;
            gemm_packed_product(p->c + corner, p->c_row, by_row ? other : own, by_row ? own : other, rows, columns, k,
                                p->bias && !k0 ? p->bias + j0 : NULL, p->add || k0);
            if (p->gelu && k0 + k >= p->K) gemm_gelu(p->gelu + corner, p->c + corner, p->c_row, rows, columns);
        }
    }
}

/* Where several tasks read the same lanes of the passing operand, packs them once, in tasks of their own. Where there is no memory for it, each task
 * packs its own. */
static inline int gemm_shared_runs(const gemm_product *p) {
    const int lanes = p->passing == GEMM_A ? p->M : p->N, run = 4 * gemm_panel[p->passing];
    return (lanes + run - 1) / run;
}

static void gemm_share_task(void *argument, int64_t i) {
    gemm_product *p = argument;
    const int block = gemm_k_block(p->K), runs = gemm_shared_runs(p), run = 4 * gemm_panel[p->passing], lanes = p->passing == GEMM_A ? p->M : p->N;
    const int first = (int)(i % runs) * run, k0 = (int)(i / runs) * block, k = p->K - k0 < block ? p->K - k0 : block;
    gemm_pack_operand(p->shared + gemm_size(p->passing, lanes, k0) + gemm_size(p->passing, first, k), p, p->passing, first,
                      lanes - first < run ? lanes - first : run, k0, k);
}

static void gemm_share(gemm_product *p, gemm_product *q) { /* q: a second product of the same job, or NULL */
    gemm_product *both[2] = {p, q};
    size_t size[2] = {0};
    int64_t elements[2] = {0};
    for (int i = 0; i < 2; i++) {
        if (!both[i] || (both[i]->passing == GEMM_A ? both[i]->n_n : both[i]->n_m) < 2) continue;
        const int lanes = both[i]->passing == GEMM_A ? both[i]->M : both[i]->N;
        elements[i] = (int64_t)lanes * both[i]->K;
        if (elements[i] <= GEMM_SHARED_MOST) size[i] = (gemm_size(both[i]->passing, lanes, both[i]->K) + 31) / 32 * 32;
    }
    gemm_packed *place = size[0] + size[1] ? ladd_scratch(GEMM_SHARED_SLOT, (size[0] + size[1]) * sizeof(gemm_packed)) : NULL;
    for (int i = 0; i < 2 && place; i++) {
        if (!size[i]) continue;
        both[i]->shared = place + (i ? size[0] : 0);
        int64_t blocks = (both[i]->K + gemm_k_block(both[i]->K) - 1) / gemm_k_block(both[i]->K);
        ladd_parallel_work(gemm_shared_runs(both[i]) * blocks, elements[i], gemm_share_task, both[i]);
    }
}

#endif
