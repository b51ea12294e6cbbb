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

/* The size of the blocks that a long k is cut into, by k only: panels of one block stay in the caches near the core. */
static inline int gemm_k_block(int k) {
    enum { LONGEST = 384 };
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
    gemm_packed *shared; /* all of B, packed once for all tasks: blocks of k, then panels; NULL: each task packs the columns it reads */
    atomic_int failed;
} gemm_product;

enum { GEMM_TASK_SLOT = 2, GEMM_SHARED_SLOT = 3, GEMM_SHARED_RUN = 4 * GEMM_NR, GEMM_SHARED_MOST = 1 << 24 };

static inline int64_t gemm_tasks(const gemm_product *p) { return (int64_t)p->n_m * p->n_n; }

static inline int gemm_between(int x, int low, int high) { return x > high ? (high > low ? high : low) : x < low ? low : x; }

/* Cuts the product, by its shape only, into tasks of up to a third of a millisecond, but at least eight, so that two threads end together. Small
 * products make fewer: waking the pool would cost as much as it saves. Rows are cut first, for B is packed once for all tasks, A by each task. */
static void gemm_plan(gemm_product *p) {
    enum {
        TALLEST = 16 * GEMM_MR, /* rows of A that stay in the level-2 cache while B goes by */
        WIDEST = 16 * GEMM_NR,  /* columns of C that stay there too while blocks of k are added */
        LOW = 4 * GEMM_MR,      /* below these a task packs too much */
        NARROW = 6 * GEMM_NR
    };
    double flops = 2.0 * p->M * p->N * p->K;
    int want = flops < 4e6 ? 1 : flops < 16e6 ? 2 : flops < 32e6 ? 4 : flops < 8 * 64e6 ? 8 : (int)(flops / 64e6);
    int n_m = gemm_between(want, (p->M + TALLEST - 1) / TALLEST, p->M / LOW);
    int n_n = gemm_between((want + n_m - 1) / n_m, p->K > gemm_k_block(p->K) ? (p->N + WIDEST - 1) / WIDEST : 1, p->N / NARROW);
    if (want > 1 && n_m * n_n == 1) n_n = 2;
    p->n_m = gemm_between(n_m, 1, (p->M + GEMM_MR - 1) / GEMM_MR);
    p->n_n = gemm_between(n_n, 1, (p->N + GEMM_NR - 1) / GEMM_NR);
    atomic_init(&p->failed, 0);
}

/* Where tile i of `tiles` begins among `count` rows or columns that stand in panels. */
static inline int gemm_cut(int count, int panel, int tiles, int i) {
    int panels = (count + panel - 1) / panel, at = (int)((int64_t)panels * i / tiles) * panel;
    return at < count ? at : count;
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
    /* Panels of B packed at a time: one where its columns lie along k, else some, which are read together, row by row. */
    const int run = p->b_step == 1 ? GEMM_NR : 4 * GEMM_NR;
    const size_t a_size = (gemm_a_size(m, block) + 31) / 32 * 32;
    gemm_packed *a = ladd_scratch(GEMM_TASK_SLOT, (a_size + gemm_b_size(block, run)) * sizeof(gemm_packed)), *own = a + a_size;
    if (!a) {
        atomic_store(&p->failed, 1);
        return;
    }
    for (int k0 = 0; k0 == 0 || k0 < p->K; k0 += block) {
        const int k = p->K - k0 < block ? p->K - k0 : block, add = p->add || k0;
        gemm_pack_a(a, p->a + m0 * p->a_row + k0 * p->a_step, p->a_row, p->a_step, m, k);
        for (int j = 0; j < n; j += GEMM_NR) { /* a strip of C as wide as a panel of B, which stays in the level-1 cache */
            const int width = n - j < GEMM_NR ? n - j : GEMM_NR;
            float *c = p->c + m0 * p->c_row + n0 + j;
            const gemm_packed *b = p->shared ? p->shared + gemm_b_size(k0, p->N) + (size_t)(n0 + j) * gemm_even(k) : own + j % run * gemm_even(k);
            if (!p->shared && j % run == 0)
                gemm_pack_b(own, p->b + k0 * p->b_step + (n0 + j) * p->b_column, p->b_step, p->b_column, k, n - j < run ? n - j : run);
            gemm_packed_strip(c, p->c_row, a, b, m, width, k, p->bias && !k0 ? p->bias + n0 + j : NULL, add);
            if (p->gelu && k0 + k >= p->K) {
                float *y = p->gelu + m0 * p->c_row + n0 + j;
                for (int r = 0; r < m; r++)
#pragma GCC ivdep
                    for (int l = 0; l < width; l++) y[r * p->c_row + l] = ladd_gelu(c[r * p->c_row + l]);
            }
        }
    }
}

/* Where several tasks read the same columns of B, packs them once, in tasks of their own. Where there is no memory for it, each task packs its own.
 */
static void gemm_share_task(void *argument, int64_t i) {
    gemm_product *p = argument;
    int block = gemm_k_block(p->K), runs = (p->N + GEMM_SHARED_RUN - 1) / GEMM_SHARED_RUN;
    int j = (int)(i % runs) * GEMM_SHARED_RUN, k0 = (int)(i / runs) * block, k = p->K - k0 < block ? p->K - k0 : block;
    gemm_pack_b(p->shared + gemm_b_size(k0, p->N) + (size_t)j * gemm_even(k), p->b + k0 * p->b_step + j * p->b_column, p->b_step, p->b_column, k,
                p->N - j < GEMM_SHARED_RUN ? p->N - j : GEMM_SHARED_RUN);
}

static void gemm_share(gemm_product *p, gemm_product *q) { /* q: a second product of the same job, or NULL */
    gemm_product *both[2] = {p, q};
    size_t size[2] = {0};
    for (int i = 0; i < 2; i++)
        if (both[i] && both[i]->n_m > 1 && (int64_t)both[i]->N * both[i]->K <= GEMM_SHARED_MOST)
            size[i] = (gemm_b_size(both[i]->K, both[i]->N) + 31) / 32 * 32;
    gemm_packed *place = size[0] + size[1] ? ladd_scratch(GEMM_SHARED_SLOT, (size[0] + size[1]) * sizeof(gemm_packed)) : NULL;
    for (int i = 0; i < 2 && place; i++) {
        if (!size[i]) continue;
        both[i]->shared = place + (i ? size[0] : 0);
        int64_t blocks = (both[i]->K + gemm_k_block(both[i]->K) - 1) / gemm_k_block(both[i]->K);
        ladd_parallel_work((both[i]->N + GEMM_SHARED_RUN - 1) / GEMM_SHARED_RUN * blocks, (int64_t)both[i]->N * both[i]->K, gemm_share_task, both[i]);
    }
}

#endif
