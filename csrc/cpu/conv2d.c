/* 2-D convolution, forward and backward, without im2col: a tile of the image is copied once into a zero-padded patch, in which the inputs of
 * one kernel tap for all output pixels of the tile are one contiguous run (output pixels are numbered along the patch's rows; the few pixels
 * between two rows are computed and thrown away). So the inner loops are those of a matrix product, reading shifted runs of the patch.
 *
 * A stride s splits the patch into s*s phases (every s-th row and column), which makes the runs contiguous again; narrow images are copied once for
 * each column of taps instead, without margins. The gradient of the input is the same forward routine over dy with flipped weights, once for each of
 * the s*s phases of dx. Tiles depend on shapes only.
 */
#include "../conv.h"
#include "gemm.h"

/* Register tile: CONV_MR output channels by CONV_NV vectors. */
#if defined(__AVX512F__)
enum { CONV_NV = 4 };
#else
enum { CONV_NV = 2 };
#endif
enum {
    CONV_MR = 6,
    CONV_TILE = 1024,       /* most output pixels of a tile: patch and outputs stay in the level-2 cache */
    CONV_GRAD_TILE = 256,   /* the same of a weight gradient, whose pixels are the length of its sums */
    CONV_COLUMNS = 512,     /* widest tile */
    CONV_NARROW = 16,       /* widest image of which a patch holds a copy for each tap column, so that its rows need no margins */
    CONV_STEPS = 288,       /* products of one pass over a patch: channels of the pass times taps */
    CONV_CELLS = 1 << 15,   /* most cells of a patch, without its margins */
    CONV_TASKS = 32,        /* wanted number of tasks */
    CONV_PART = 1024,       /* pixels that a part of a weight gradient sums at least, where there are enough tasks */
    CONV_REDUCED = 16,      /* rows of a task that adds parts */
    CONV_PARTIALS = 1 << 22 /* most elements of all partial weight gradients together */
};
/* Scratch slots: the caller's shared block and folded weights; inside tasks the patch and the tile of y or dy. */
enum { CONV_SHARED = 3, CONV_PATCH = 0, CONV_OUT = 1, CONV_FOLDED = 2 };

/* A patch is made of cells. Forward's are floats, or in the bf16 table the bf16 values of GEMM_PAIR neighbouring channels at one pixel, so that the
 * loops are the same. The weight gradient sums over pixels, so there the cells are single values, and pairs are two neighbouring pixels. */
typedef float conv_cell;
typedef gemm_packed conv_pixel;
enum { CONV_RUN = GEMM_LANES * GEMM_PAIR }; /* pixels of a vector in the weight gradient */

static inline gemm_vec conv_load_pixels(const conv_pixel *p) { return *(const gemm_vec_any *)p; }
/* A cell, or one of GEMM_PAIR pixels, in all lanes: 32 bits as they are. */
static inline gemm_vec conv_spread(const void *p) {
    float bits;
    memcpy(&bits, p, sizeof bits);
    return bits - (gemm_vec){0};
}
static inline gemm_vec conv_fma(gemm_vec a, gemm_vec b, gemm_vec c) {
#if defined(LADD_BF16_PRODUCTS)
    return (gemm_vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#elif defined(__AVX512F__)
    return (gemm_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (gemm_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline int64_t conv_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t conv_round(int64_t n, int64_t to) { return conv_ceil(n, to) * to; }
static inline int64_t conv_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t conv_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* First element of part i when n elements are dealt evenly to `parts`. */
static inline int conv_cut(int64_t n, int64_t parts, int64_t i) { return (int)(n * i / parts); }

/* ---- register tiles ---------------------------------------------------------------------------------------------------- */

/* y[MR, NV*LANES] at row stride ldy (+)= sum over k of a[k][MR] patch[koff[k] + pixel]. */
static inline __attribute__((always_inline)) void conv_tile(const int MR, const int NV, float *y, ptrdiff_t ldy, const conv_cell *a,
                                                            const conv_cell *patch, const int32_t *koff, int K, int add) {
    gemm_vec acc[CONV_MR][CONV_NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = add ? gemm_load(y + m * ldy + v * GEMM_LANES) : (gemm_vec){0};
    for (int k = 0; k < K; k++, a += MR) {
        const conv_cell *p = patch + koff[k];
        gemm_vec b[CONV_NV];
        for (int v = 0; v < NV; v++) b[v] = gemm_load(p + v * GEMM_LANES);
        for (int m = 0; m < MR; m++) {
            gemm_vec w = conv_spread(a + m);
            for (int v = 0; v < NV; v++) acc[m][v] = conv_fma(w, b[v], acc[m][v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) gemm_store(y + m * ldy + v * GEMM_LANES, acc[m][v]);
}

/* The pixels that a weight gradient sums over: runs of `length` neighbours, one after the other in dy, from start[i] on in the patch. */
typedef struct conv_runs {
    int n, length;
    const int32_t *start;
} conv_runs;

/* dw[MR][NV vectors] at row stride ldw += sum over pixels of patch[koff[k] + pixel] dy[pixel][output channels], which is packed in panels of GEMM_NR
 * channels, `panel` elements apart. */
static inline __attribute__((always_inline)) void conv_outer(const int MR, const int NV, float *dw, ptrdiff_t ldw, const conv_pixel *patch,
                                                             const int32_t *koff, const conv_pixel *dy, ptrdiff_t panel, const conv_runs *runs) {
    gemm_vec acc[CONV_MR][CONV_NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = gemm_load(dw + m * ldw + v * GEMM_LANES);
    for (int i = 0; i < runs->n; i++) {
        const conv_pixel *x[CONV_MR];
        for (int m = 0; m < MR; m++) x[m] = patch + runs->start[i] + koff[m];
        for (int t = 0; t < runs->length; t += GEMM_PAIR, dy += GEMM_NR * GEMM_PAIR) {
            gemm_vec b[CONV_NV];
            for (int v = 0; v < NV; v++) b[v] = conv_load_pixels(dy + v / GEMM_NV * panel + v % GEMM_NV * CONV_RUN);
            for (int m = 0; m < MR; m++) {
                gemm_vec w = conv_spread(x[m] + t);
                for (int v = 0; v < NV; v++) acc[m][v] = conv_fma(w, b[v], acc[m][v]);
            }
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) gemm_store(dw + m * ldw + v * GEMM_LANES, acc[m][v]);
}

/* One function for each size of tile, so that its accumulators are registers. */
typedef void (*conv_tile_kernel)(float *y, ptrdiff_t ldy, const conv_cell *a, const conv_cell *patch, const int32_t *koff, int K, int add);
typedef void (*conv_outer_kernel)(float *dw, ptrdiff_t ldw, const conv_pixel *patch, const int32_t *koff, const conv_pixel *dy, ptrdiff_t panel,
                                  const conv_runs *runs);
#define CONV_VARIANT(m, v)                                                                                                                          \
    static void conv_tile_##m##_##v(float *y, ptrdiff_t ldy, const conv_cell *a, const conv_cell *patch, const int32_t *koff, int K, int add) {     \
        conv_tile(m, v, y, ldy, a, patch, koff, K, add);                                                                                            \
    }                                                                                                                                               \
    static void conv_outer_##m##_##v(float *dw, ptrdiff_t ldw, const conv_pixel *patch, const int32_t *koff, const conv_pixel *dy, ptrdiff_t panel, \
                                     const conv_runs *runs) {                                                                                       \
        conv_outer(m, v, dw, ldw, patch, koff, dy, panel, runs);                                                                                    \
    }
#if defined(__AVX512F__)
#define CONV_ROW(X, m) X(m, 1) X(m, 2) X(m, 3) X(m, 4)
#define CONV_NAMES(f, m) {f##_##m##_1, f##_##m##_2, f##_##m##_3, f##_##m##_4}
#else
#define CONV_ROW(X, m) X(m, 1) X(m, 2)
#define CONV_NAMES(f, m) {f##_##m##_1, f##_##m##_2}
#endif
CONV_ROW(CONV_VARIANT, 1)
CONV_ROW(CONV_VARIANT, 2)
CONV_ROW(CONV_VARIANT, 3)
CONV_ROW(CONV_VARIANT, 4)
CONV_ROW(CONV_VARIANT, 5)
CONV_ROW(CONV_VARIANT, 6)
static const conv_tile_kernel conv_tiles[CONV_MR][CONV_NV] = {CONV_NAMES(conv_tile, 1), CONV_NAMES(conv_tile, 2), CONV_NAMES(conv_tile, 3),
                                                              CONV_NAMES(conv_tile, 4), CONV_NAMES(conv_tile, 5), CONV_NAMES(conv_tile, 6)};
static const conv_outer_kernel conv_outers[CONV_MR][CONV_NV] = {CONV_NAMES(conv_outer, 1), CONV_NAMES(conv_outer, 2), CONV_NAMES(conv_outer, 3),
                                                                CONV_NAMES(conv_outer, 4), CONV_NAMES(conv_outer, 5), CONV_NAMES(conv_outer, 6)};
#undef CONV_VARIANT
#undef CONV_ROW
#undef CONV_NAMES

/* ---- patches ------------------------------------------------------------------------------------------------------------- */

/* A window of kh by kw taps slid over x[B,C,H,W]: output (r,c) of the grid gh by gw reads row r*step + r0 + tap, column c*step + c0 + tap; what lies
 * outside x is zero. A patch holds, for each cell's worth of its channels, [phases][n samples][Hq][Wq]. */
typedef struct conv_window {
    const float *x;
    int B, C, H, W, kh, kw, step, r0, c0, gh, gw;
    int phase_rows, phase_cols, n, th, tw, Hq, Wq; /* n samples, th by tw outputs at most in a tile */
    int tile_rows, tile_cols;                      /* tiles down and across a grid */
    int per_cell, cells, chunks;                   /* channels of a cell, cells over all channels, passes over them */
    int64_t plane, patch;                          /* elements of one cell's channels, of all */
} conv_window;

static conv_window conv_window_of(const float *x, const ladd_conv *conv) {
    return (conv_window){.x = x,
                         .B = conv->B,
                         .C = conv->Cin,
                         .H = conv->H,
                         .W = conv->W,
                         .kh = conv->kh,
                         .kw = conv->kw,
                         .step = conv->stride,
                         .r0 = -conv->pad_top,
                         .c0 = -conv->pad_left,
                         .gh = conv->Ho,
                         .gw = conv->Wo};
}

/* most: outputs of a tile at most; group_samples: small samples share one. */
static void conv_window_plan(conv_window *s, int per_cell, int most, int group_samples) {
    const int64_t taps = conv_max(1, (int64_t)s->kh * s->kw);
    s->per_cell = per_cell;
    s->cells = (int)conv_ceil(s->C, per_cell);
    s->chunks = (int)conv_ceil(s->cells, conv_max(1, CONV_STEPS / taps));
    s->phase_rows = (int)conv_min(s->step, s->kh);
    s->phase_cols = (int)(s->gw <= CONV_NARROW ? s->kw : conv_min(s->step, s->kw));
    const int64_t tile = conv_min(most, CONV_CELLS / conv_ceil(s->cells, s->chunks));
    int halo_r = s->kh ? (s->kh - 1) / s->phase_rows : 0, halo_c = s->kw ? (s->kw - 1) / s->phase_cols : 0;
    s->tile_cols = (int)conv_ceil(s->gw, conv_min(CONV_COLUMNS, tile));
    s->tw = (int)conv_ceil(s->gw, s->tile_cols);
    if (s->tile_cols > 1) { /* whole vectors */
        s->tw = (int)conv_round(s->tw, CONV_RUN);
        s->tile_cols = (int)conv_ceil(s->gw, s->tw);
    }
    s->Wq = s->tw + halo_c;
    s->tile_rows = (int)conv_ceil(s->gh, conv_max(1, tile / s->Wq));
    s->th = (int)conv_ceil(s->gh, s->tile_rows);
    s->Hq = s->th + halo_r;
    s->n = 1;
    if (group_samples && s->tile_rows == 1 && s->tile_cols == 1) s->n = (int)conv_max(1, conv_min(s->B, tile / ((int64_t)s->Hq * s->Wq)));
    s->plane = (int64_t)s->phase_rows * s->phase_cols * s->n * s->Hq * s->Wq;
    s->patch = conv_ceil(s->cells, s->chunks) * s->plane + halo_c + 2 * CONV_RUN; /* the last vector of a run may reach over the end */
}

/* The outputs of tile number i. */
typedef struct conv_area {
    int r0, r1, c0, c1;
} conv_area;

static conv_area conv_tile_area(const conv_window *s, int i) {
    int tr = i / s->tile_cols, tc = i % s->tile_cols;
    return (conv_area){conv_cut(s->gh, s->tile_rows, tr), conv_cut(s->gh, s->tile_rows, tr + 1), tc * s->tw,
                       (int)conv_min(s->gw, (tc + 1) * (int64_t)s->tw)};
}

/* koff[(cell of the chunk, tap row, tap column)]: where a tap's run starts in the patch. */
static void conv_offsets(int32_t *koff, const conv_window *s) {
    int cells = (int)conv_ceil(s->cells, s->chunks);
    int64_t phase = (int64_t)s->n * s->Hq * s->Wq;
    for (int c = 0; c < cells; c++)
        for (int i = 0; i < s->kh; i++)
            for (int j = 0; j < s->kw; j++)
                *koff++ = (int32_t)(c * s->plane + ((i % s->phase_rows) * s->phase_cols + j % s->phase_cols) * phase + i / s->phase_rows * s->Wq +
                                    j / s->phase_cols);
}

#if defined(LADD_BF16_PRODUCTS)
/* Elements i ... i + 15 of a row, as conv_fill_row defines it. */
static inline __m512 conv_row_part(const float *x, int step, int from, int to, int i) {
    const unsigned lanes = _bzhi_u32(0xffff, (unsigned)gemm_between(to - i, 0, 16)) & ~_bzhi_u32(0xffff, (unsigned)gemm_between(from - i, 0, 16));
    x += (ptrdiff_t)i * step;
    if (step == 1 && lanes == 0xffff) return _mm512_loadu_ps(x); /* where a load waits for memory, one under a mask waits longer */
    if (step == 1) return _mm512_maskz_loadu_ps((__mmask16)lanes, x);
    if (step == 2) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)_pdep_u32(lanes & 0xff, 0x5555), x);
        return _mm512_permutex2var_ps(low, even, _mm512_maskz_loadu_ps((__mmask16)_pdep_u32(lanes >> 8, 0x5555), x + 16));
    }
    float part[16];
    for (int l = 0; l < 16; l++) part[l] = lanes >> l & 1 ? x[(ptrdiff_t)l * step] : 0.0f;
    return _mm512_loadu_ps(part);
}
#endif

/* One row of n elements of a patch: zeros, but in [from, to) every step-th element of x, counted from x[0]. What follows it may be overwritten. In a
 * cell of two channels the second is read from `next` (NULL: zeros). */
static inline void conv_fill_row(void *out, const float *x, const float *next, int per_cell, int step, int from, int to, int n) {
#if defined(LADD_BF16_PRODUCTS)
    for (int i = 0; i < n; i += 16) {
        __m256i a = (__m256i)_mm512_cvtneps_pbh(conv_row_part(x, step, from, to, i));
        if (per_cell == 1) {
            _mm256_storeu_si256((__m256i *)((conv_pixel *)out + i), a);
            continue;
        }
        __m256i b = next ? (__m256i)_mm512_cvtneps_pbh(conv_row_part(next, step, from, to, i)) : _mm256_setzero_si256();
        __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
        _mm512_storeu_si512((conv_cell *)out + i, pairs);
    }
#else
    (void)next, (void)per_cell;
    float *y = out;
    for (int i = 0; i < from; i++) y[i] = 0.0f;
    if (step == 1)
        memcpy(y + from, x + from, (size_t)(to - from) * sizeof(float));
    else if (step == 2) /* the loop below, in a form that vectorises */
        for (int i = from; i < to; i++) y[i] = x[(ptrdiff_t)i * 2];
    else
        for (int i = from; i < to; i++) y[i] = x[(ptrdiff_t)i * step];
    for (int i = to; i < n; i++) y[i] = 0.0f;
#endif
}

/* Fills the patch with cells [c0, c1), samples [b0, b1) and the tile that starts at output (r, c). */
static void conv_fill(void *patch, const conv_window *s, int c0, int c1, int b0, int b1, int r, int c) {
    const size_t size = s->per_cell * sizeof(conv_pixel);
    char *out = patch;
    for (int cell = c0; cell < c1; cell++)
        for (int pr = 0; pr < s->phase_rows; pr++)
            for (int pc = 0; pc < s->phase_cols; pc++) {
                int64_t left = (int64_t)c * s->step + s->c0 + pc;
                /* columns [from, to) of the patch lie inside x */
                int from = (int)conv_min(s->Wq, left >= 0 ? 0 : conv_ceil(-left, s->step));
                int to = (int)conv_min(s->Wq, left >= s->W ? 0 : conv_ceil(s->W - left, s->step));
                if (to < from) to = from;
                for (int b = b0; b < b1; b++) {
                    const int ch = cell * s->per_cell, alone = ch + 1 == s->C; /* the last cell of an odd number of channels ends in zeros */
                    const float *plane = s->x + ((int64_t)b * s->C + ch) * s->H * s->W + left, *next = alone ? NULL : plane + (int64_t)s->H * s->W;
                    for (int q = 0; q < s->Hq; q++, out += s->Wq * size) {
                        int64_t row = (int64_t)(r + q) * s->step + s->r0 + pr;
                        if (row < 0 || row >= s->H || from == to)
                            memset(out, 0, s->Wq * size);
                        else
                            conv_fill_row(out, plane + row * s->W, next ? next + row * s->W : NULL, s->per_cell, s->step, from, to, s->Wq);
                    }
                }
                size_t absent = (size_t)(s->n - (b1 - b0)) * s->Hq * s->Wq * size; /* the last group may hold fewer samples */
                memset(out, 0, absent);
                out += absent;
            }
    memset(out, 0, (size_t)((char *)patch + s->patch * size - out));
}

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

/* y at rows r*y_step + y_r, columns c*y_step + y_c of y[B,M,YH,YW] = window times weights + bias. */
typedef struct conv_job {
    conv_window s;
    float *y;
    const float *bias;
    int M, YH, YW, y_step, y_r, y_c;
    /* weight of output channel m, input channel c, tap (i,j): w[m*wm + c*wc + i*wi + j*wj] */
    const float *w;
    ptrdiff_t wm, wc, wi, wj;
    conv_cell *packed; /* [panel][cell][tap][channels of the panel] */
    int32_t *koff;
    int panels, splits; /* panels of at most CONV_MR output channels; tasks that share one tile, each with its own panels */
    atomic_int failed;
} conv_job;

static void conv_pack_weights(void *argument, int64_t panel) {
    conv_job *j = argument;
    const conv_window *s = &j->s;
    int m0 = conv_cut(j->M, j->panels, panel), m1 = conv_cut(j->M, j->panels, panel + 1);
    conv_cell *out = j->packed + (int64_t)m0 * s->cells * s->kh * s->kw;
    for (int c = 0; c < s->C; c += s->per_cell)
        for (int r = 0; r < s->kh; r++)
            for (int k = 0; k < s->kw; k++) {
                const float *w = j->w + c * j->wc + r * j->wi + k * j->wj;
#if defined(LADD_BF16_PRODUCTS)
                for (int m = m0; m < m1; m++) {
                    __m128 pair = _mm_setr_ps(w[m * j->wm], c + 1 < s->C ? w[m * j->wm + j->wc] : 0.0f, 0.0f, 0.0f);
                    *out++ = _mm_cvtss_f32((__m128)_mm_cvtneps_pbh(pair));
                }
#else
                for (int m = m0; m < m1; m++) *out++ = w[m * j->wm];
#endif
            }
}

static void conv_forward_task(void *argument, int64_t task) {
    conv_job *j = argument;
    const conv_window *s = &j->s;
    int split = (int)(task % j->splits), tile = (int)(task / j->splits % (s->tile_rows * s->tile_cols));
    int b = (int)(task / j->splits / (s->tile_rows * s->tile_cols));
    const conv_area at = conv_tile_area(s, tile);
    int p0 = conv_cut(j->panels, j->splits, split), p1 = conv_cut(j->panels, j->splits, split + 1);
    int first = conv_cut(j->M, j->panels, p0), last = conv_cut(j->M, j->panels, p1);
    int64_t L = conv_round((int64_t)(at.r1 - at.r0) * s->Wq, GEMM_LANES), taps = (int64_t)s->kh * s->kw;
    conv_cell *patch = ladd_scratch(CONV_PATCH, (size_t)s->patch * sizeof(conv_cell));
    float *out = ladd_scratch(CONV_OUT, (size_t)((last - first) * L) * sizeof(float));
    if (!patch || !out) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (int chunk = 0; chunk < s->chunks; chunk++) {
        int ch0 = conv_cut(s->cells, s->chunks, chunk), ch1 = conv_cut(s->cells, s->chunks, chunk + 1);
        conv_fill(patch, s, ch0, ch1, b, b + 1, at.r0, at.c0);
        for (int64_t i = 0; i < L; i += CONV_NV * GEMM_LANES) {
            int vectors = (int)conv_min(CONV_NV, (L - i) / GEMM_LANES);
            for (int p = p0; p < p1; p++) {
                int m0 = conv_cut(j->M, j->panels, p), m1 = conv_cut(j->M, j->panels, p + 1);
                conv_tiles[m1 - m0 - 1][vectors - 1](out + (m0 - first) * L + i, L,
                                                     j->packed + (m0 * (int64_t)s->cells + (m1 - m0) * (int64_t)ch0) * taps, patch + i, j->koff,
                                                     (int)((ch1 - ch0) * taps), chunk > 0);
            }
        }
    }
    const int whole = at.c1 - at.c0 == s->Wq && s->Wq == j->YW; /* no margins: rows follow each other in both */
    const int rows = whole ? 1 : at.r1 - at.r0, width = (at.c1 - at.c0) * (whole ? at.r1 - at.r0 : 1);
    for (int m = first; m < last; m++) {
        float bias = j->bias ? j->bias[m] : 0.0f;
        for (int r = 0; r < rows; r++) {
            const float *in = out + (m - first) * L + (int64_t)r * s->Wq;
            float *y =
                j->y + (((int64_t)b * j->M + m) * j->YH + (int64_t)(at.r0 + r) * j->y_step + j->y_r) * j->YW + (int64_t)at.c0 * j->y_step + j->y_c;
            if (j->y_step == 1)
                for (int c = 0; c < width; c++) y[c] = in[c] + bias;
            else
                for (int c = 0; c < width; c++) y[(ptrdiff_t)c * j->y_step] = in[c] + bias;
        }
    }
}

static ladd_status conv_memory(void) { return ladd_fail(LADD_ERR_MEMORY, "out of memory for the work space of a convolution"); }

static ladd_status conv_run(conv_job *j) {
    conv_window *s = &j->s;
    if (s->gh <= 0 || s->gw <= 0) return LADD_OK;
    conv_window_plan(s, GEMM_PAIR, CONV_TILE, 0);
    j->panels = (int)conv_ceil(j->M, CONV_MR);
    int64_t tiles = (int64_t)s->B * s->tile_rows * s->tile_cols, taps = (int64_t)s->kh * s->kw;
    j->splits = (int)conv_max(1, conv_min(j->panels / 2, CONV_TASKS / 2 / tiles)); /* few tiles: share the output channels out as well */
    size_t weights = (size_t)(j->M * s->cells * taps), offsets = (size_t)(conv_ceil(s->cells, s->chunks) * taps);
    char *shared = ladd_scratch(CONV_SHARED, weights * sizeof(conv_cell) + offsets * sizeof(int32_t));
    if (!shared) return conv_memory();
    j->packed = (conv_cell *)shared;
    j->koff = (int32_t *)(j->packed + weights);
    conv_offsets(j->koff, s);
    ladd_parallel(j->panels, conv_pack_weights, j);
    atomic_init(&j->failed, 0);
    ladd_parallel(tiles * j->splits, conv_forward_task, j);
    return atomic_load(&j->failed) ? conv_memory() : LADD_OK;
}

static ladd_status conv_forward(float *y, const float *x, const float *w, const float *bias, const ladd_conv *conv) {
    int taps = conv->kh * conv->kw;
    conv_job j = {.y = y,
                  .bias = bias,
                  .M = conv->Cout,
                  .YH = conv->Ho,
                  .YW = conv->Wo,
                  .y_step = 1,
                  .w = w,
                  .wm = (ptrdiff_t)conv->Cin * taps,
                  .wc = taps,
                  .wi = conv->kw,
                  .wj = 1};
    j.s = conv_window_of(x, conv);
    return conv_run(&j);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

static ladd_status conv_backward_input(float *dx, const float *dy, const float *w, const ladd_conv *conv) {
    int taps = conv->kh * conv->kw, s = conv->stride;
    for (int pr = 0; pr < s; pr++)
        for (int pc = 0; pc < s; pc++) {
            ladd_conv_axis r = ladd_conv_phase(pr, conv->pad_top, conv->kh, s, conv->H),
                           c = ladd_conv_phase(pc, conv->pad_left, conv->kw, s, conv->W);
            if (!r.taps || !c.taps) r = (ladd_conv_axis){.grid = r.grid}, c = (ladd_conv_axis){.grid = c.grid}; /* no tap reaches: zeros */
            conv_job j = {.y = dx,
                          .M = conv->Cin,
                          .YH = conv->H,
                          .YW = conv->W,
                          .y_step = s,
                          .y_r = pr,
                          .y_c = pc,
                          .w = r.taps ? w + (ptrdiff_t)r.last_tap * conv->kw + c.last_tap : w,
                          .wm = taps,
                          .wc = (ptrdiff_t)conv->Cin * taps,
                          .wi = -(ptrdiff_t)s * conv->kw,
                          .wj = -s};
            j.s = (conv_window){.x = dy,
                                .B = conv->B,
                                .C = conv->Cout,
                                .H = conv->Ho,
                                .W = conv->Wo,
                                .kh = r.taps,
                                .kw = c.taps,
                                .step = 1,
                                .r0 = r.origin,
                                .c0 = c.origin,
                                .gh = r.grid,
                                .gw = c.grid};
            LADD_TRY(conv_run(&j));
        }
    return LADD_OK;
}

/* Weight gradient. A unit is a tile of one sample, or several small samples; part p sums its units in order, and the parts are added in order. */
typedef struct conv_grad_job {
    conv_window s;
    const float *dy;
    float *dw, *partial; /* partial[parts][K][columns] */
    int M, columns, parts, units;
    int64_t K;
    const int32_t *koff;
    atomic_int failed;
} conv_grad_job;

/* Pixels of a tile's runs, filled up to whole vectors of any width, so that packing takes its fast way. */
static int64_t conv_grad_pixels(int64_t runs, int length) { return conv_round(runs * gemm_even(length), 32); }

/* out[panel][pixels][GEMM_NR]: dy of the samples from b0 on in the tile, in the order of the runs. rows[GEMM_NR][pixels]: work space. */
static void conv_pack_dy(conv_pixel *out, float *rows, const conv_grad_job *j, const conv_runs *runs, int per_sample, int b0, conv_area at) {
    const conv_window *s = &j->s;
    const int64_t pixels = conv_grad_pixels(runs->n, runs->length);
    for (int m0 = 0; m0 < j->M; m0 += GEMM_NR) {
        const int count = (int)conv_min(GEMM_NR, j->M - m0);
        for (int m = 0; m < count; m++) {
            float *to = rows + m * pixels;
            for (int i = 0; i < runs->n; i++, to += gemm_even(runs->length)) {
                const float *dy = j->dy + ((int64_t)(b0 + i / per_sample) * j->M + m0 + m) * s->gh * s->gw;
                memcpy(to, dy + (int64_t)(at.r0 + i % per_sample) * s->gw + at.c0, (size_t)runs->length * sizeof(float));
                if (runs->length < gemm_even(runs->length)) to[runs->length] = 0.0f;
            }
            memset(to, 0, (size_t)(rows + (m + 1) * pixels - to) * sizeof(float));
        }
        gemm_pack_b(out + m0 * pixels, rows, 1, pixels, (int)pixels, count);
    }
}

static void conv_grad_task(void *argument, int64_t task) {
    conv_grad_job *j = argument;
    const conv_window *s = &j->s;
    const int chunk = (int)(task % s->chunks), part = (int)(task / s->chunks), tiles = s->tile_rows * s->tile_cols, taps = s->kh * s->kw;
    const int ch0 = conv_cut(s->C, s->chunks, chunk), ch1 = conv_cut(s->C, s->chunks, chunk + 1), K = (ch1 - ch0) * taps;
    float *dw = j->partial + (part * j->K + (int64_t)ch0 * taps) * j->columns;
    memset(dw, 0, (size_t)K * j->columns * sizeof(float));
    /* dy of a unit, rows of it, starts of runs */
    const size_t most = (size_t)conv_grad_pixels(s->n * s->th, s->tw), packed = gemm_b_size((int)most, j->M);
    conv_pixel *patch = ladd_scratch(CONV_PATCH, (size_t)s->patch * sizeof(conv_pixel));
    conv_pixel *dy = ladd_scratch(CONV_OUT, packed * sizeof(conv_pixel) + most * GEMM_NR * sizeof(float) + s->n * s->th * sizeof(int32_t));
    if (!patch || !dy) {
        atomic_store(&j->failed, 1);
        return;
    }
    float *rows = (float *)(dy + packed);
    int32_t *start = (int32_t *)(rows + most * GEMM_NR);
    for (int unit = conv_cut(j->units, j->parts, part); unit < conv_cut(j->units, j->parts, part + 1); unit++) {
        const conv_area at = conv_tile_area(s, unit % tiles);
        const int b0 = unit / tiles * s->n, b1 = (int)conv_min(s->B, b0 + s->n), whole = s->Wq == s->gw; /* then rows follow each other */
        const int per_sample = whole ? 1 : at.r1 - at.r0;
        const conv_runs runs = {(b1 - b0) * per_sample, (at.c1 - at.c0) * (whole ? at.r1 - at.r0 : 1), start};
        for (int i = 0; i < runs.n; i++) start[i] = (i / per_sample * s->Hq + i % per_sample) * s->Wq;
        conv_fill(patch, s, ch0, ch1, b0, b1, at.r0, at.c0);
        conv_pack_dy(dy, rows, j, &runs, per_sample, b0, at);
        const int64_t pixels = conv_grad_pixels(runs.n, runs.length), panel = GEMM_NR * pixels;
        for (int m = 0; m < j->columns; m += CONV_NV * GEMM_LANES) {
            const int vectors = (int)conv_min(CONV_NV, (j->columns - m) / GEMM_LANES);
            for (int k = 0; k < K; k += CONV_MR)
                conv_outers[conv_min(CONV_MR, K - k) - 1][vectors - 1](dw + k * j->columns + m, j->columns, patch, j->koff + k, dy + m * pixels,
                                                                       panel, &runs);
        }
    }
}

/* dw[M][K] += the sum of the parts, transposed: CONV_REDUCED rows of it. */
static void conv_grad_reduce(void *argument, int64_t task) {
    conv_grad_job *j = argument;
    const int64_t k0 = task * CONV_REDUCED, k1 = conv_min(j->K, k0 + CONV_REDUCED), n = (k1 - k0) * j->columns;
    float *sum = j->partial + k0 * j->columns;
    for (int part = 1; part < j->parts; part++) {
        const float *from = sum + part * j->K * j->columns;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) sum[i] += from[i];
    }
    for (int m = 0; m < j->M; m++)
        for (int64_t k = k0; k < k1; k++) j->dw[m * j->K + k] += sum[(k - k0) * j->columns + m];
}

static ladd_status conv_backward_weights(float *dw, const float *dy, const float *x, const ladd_conv *conv) {
    conv_grad_job j = {.s = conv_window_of(x, conv), .dy = dy, .dw = dw, .M = conv->Cout, .K = (int64_t)conv->Cin * conv->kh * conv->kw};
    conv_window *s = &j.s;
    conv_window_plan(s, 1, CONV_GRAD_TILE, 1);
    j.columns = (int)conv_round(j.M, GEMM_LANES);
    j.units = (int)conv_ceil(s->B, s->n) * s->tile_rows * s->tile_cols;
    /* A part costs some passes over the weights, so it should sum many pixels; but without enough parts there are too few tasks. */
    const int64_t wanted = conv_max((int64_t)s->B * s->gh * s->gw / CONV_PART, CONV_TASKS / 4 / s->chunks);
    j.parts = (int)conv_max(1, conv_min(conv_min(j.units, wanted), conv_min(CONV_TASKS / s->chunks, CONV_PARTIALS / (j.columns * j.K))));
    size_t partials = (size_t)(j.parts * j.columns * j.K), offsets = (size_t)(conv_ceil(s->cells, s->chunks) * s->kh * s->kw);
    j.partial = ladd_scratch(CONV_SHARED, partials * sizeof(float) + offsets * sizeof(int32_t));
    if (!j.partial) return conv_memory();
    int32_t *koff = (int32_t *)(j.partial + partials);
    conv_offsets(koff, s);
    j.koff = koff;
    atomic_init(&j.failed, 0);
    ladd_parallel((int64_t)j.parts * s->chunks, conv_grad_task, &j);
    if (atomic_load(&j.failed)) return conv_memory();
    ladd_parallel_work(conv_ceil(j.K, CONV_REDUCED), (int64_t)partials, conv_grad_reduce, &j);
    return LADD_OK;
}

typedef struct conv_bias_job {
    float *dbias;
    const float *dy;
    int B, C;
    int64_t L;
} conv_bias_job;

static void conv_bias_task(void *argument, int64_t c) {
    const conv_bias_job *j = argument;
    for (int b = 0; b < j->B; b++) j->dbias[c] += ladd_sum(j->dy + (b * (int64_t)j->C + c) * j->L, j->L);
}

static void conv_backward_bias(float *dbias, const float *dy, const ladd_conv *conv) {
    conv_bias_job j = {.dbias = dbias, .dy = dy, .B = conv->B, .C = conv->Cout, .L = (int64_t)conv->Ho * conv->Wo};
    ladd_parallel_work(conv->Cout, conv->B * conv->Cout * j.L, conv_bias_task, &j);
}

/* ---- convolution of an image enlarged by two ------------------------------------------------------------------------------- */

/* Rows 2r and 2r+1 of the enlarged image are row r of x, so the three taps of an axis meet only two rows of x, and output 2r+p is a kernel of two
 * taps: p = 0: w[0] on row r-1, w[1]+w[2] on row r        p = 1: w[0]+w[1] on row r, w[2] on row r+1 that is 16 products for four outputs instead of
 * 36, and the enlarged image is never made. conv_fold[p][a][k] = 1 where tap a of phase p holds w[k]. Seen from x, row r reaches outputs 2r-1 .. 2r+2
 * through w[2], w[1]+w[2], w[0]+w[1], w[0]: the gradient of x is a convolution of dy with a kernel of four taps and stride 2, and the gradient of
 * those four taps, folded back, is that of w. */
static const float conv_fold[2][2][3] = {{{1, 0, 0}, {0, 1, 1}}, {{1, 1, 0}, {0, 0, 1}}};
static const float conv_fold_back[4][3] = {{0, 0, 1}, {0, 1, 1}, {1, 1, 0}, {1, 0, 0}};

static float conv_folded(const float *w, const float *row, const float *column) {
    float sum = 0.0f;
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) sum += row[i] * column[j] * w[3 * i + j];
    return sum;
}

static ladd_status conv_upsample_forward(float *y, const float *x, const float *w, const float *bias, const ladd_conv *conv) {
    int64_t pairs = (int64_t)conv->Cout * conv->Cin;
    float *folded = ladd_scratch(CONV_FOLDED, (size_t)pairs * 4 * sizeof(float));
    if (!folded) return conv_memory();
    for (int pr = 0; pr < 2; pr++)
        for (int pc = 0; pc < 2; pc++) {
            for (int64_t i = 0; i < pairs; i++)
                for (int t = 0; t < 4; t++) folded[4 * i + t] = conv_folded(w + 9 * i, conv_fold[pr][t / 2], conv_fold[pc][t % 2]);
            conv_job j = {.y = y, .bias = bias, .M = conv->Cout, .YH = conv->Ho, .YW = conv->Wo, .y_step = 2, .y_r = pr, .y_c = pc};
            j.w = folded, j.wm = 4 * (ptrdiff_t)conv->Cin, j.wc = 4, j.wi = 2, j.wj = 1;
            j.s = (conv_window){.x = x, .B = conv->B, .C = conv->Cin, .H = conv->H, .W = conv->W, .kh = 2, .kw = 2, .step = 1};
            j.s.r0 = pr - 1, j.s.c0 = pc - 1, j.s.gh = conv->H, j.s.gw = conv->W;
            LADD_TRY(conv_run(&j));
        }
    return LADD_OK;
}

static ladd_status conv_upsample_backward(float *dx, float *dw, const float *dy, const float *x, const float *w, const ladd_conv *conv) {
    int64_t pairs = (int64_t)conv->Cout * conv->Cin;
    /* from dy to x: the transposed roles, so that channels of dy are inputs */
    const ladd_conv back = {.B = conv->B,
                            .Cin = conv->Cout,
                            .H = conv->Ho,
                            .W = conv->Wo,
                            .Cout = conv->Cin,
                            .kh = 4,
                            .kw = 4,
                            .stride = 2,
                            .pad_top = 1,
                            .pad_left = 1,
                            .pad_bottom = 1,
                            .pad_right = 1,
                            .Ho = conv->H,
                            .Wo = conv->W};
    float *folded = ladd_scratch(CONV_FOLDED, (size_t)pairs * 16 * sizeof(float)); /* [Cin,Cout,4,4] */
    if (!folded) return conv_memory();
    if (dx) {
        for (int64_t i = 0; i < pairs; i++) {
            float *to = folded + 16 * (i % conv->Cin * conv->Cout + i / conv->Cin);
            for (int t = 0; t < 16; t++) to[t] = conv_folded(w + 9 * i, conv_fold_back[t / 4], conv_fold_back[t % 4]);
        }
        LADD_TRY(conv_forward(dx, dy, folded, NULL, &back));
    }
    if (dw) {
        memset(folded, 0, (size_t)pairs * 16 * sizeof(float));
        LADD_TRY(conv_backward_weights(folded, x, dy, &back));
        for (int64_t i = 0; i < pairs; i++) {
            const float *from = folded + 16 * (i % conv->Cin * conv->Cout + i / conv->Cin);
            for (int k = 0; k < 9; k++)
                for (int r = 2 - k / 3; r < 4 - k / 3; r++)
                    for (int c = 2 - k % 3; c < 4 - k % 3; c++) dw[9 * i + k] += from[4 * r + c];
        }
    }
    return LADD_OK;
}

/* ---- the table's rows ------------------------------------------------------------------------------------------------------ */

/* A 1x1 convolution sees an image as one row. */
static ladd_conv conv_flat(const ladd_conv *conv) {
    ladd_conv c = *conv;
    if (c.kh != 1 || c.kw != 1 || c.stride != 1 || c.pad_top + c.pad_left + c.pad_bottom + c.pad_right || c.H > INT32_MAX / c.W) return c;
    c.W = c.Wo = c.H * c.W;
    c.H = c.Ho = 1;
    return c;
}

ladd_status LADD_CPU(conv2d_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, const ladd_conv *conv) {
    (void)ctx;
    LADD_TRY(ladd_conv_check(conv));
    const ladd_conv c = conv_flat(conv);
    return c.upsample ? conv_upsample_forward(y, x, w, bias, &c) : conv_forward(y, x, w, bias, &c);
}

ladd_status LADD_CPU(conv2d_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                      const ladd_conv *conv) {
    (void)ctx;
    LADD_TRY(ladd_conv_check(conv));
    const ladd_conv c = conv_flat(conv);
    if (dbias) conv_backward_bias(dbias, dy, &c);
    if (c.upsample) return conv_upsample_backward(dx, dw, dy, x, w, &c);
    if (dx) LADD_TRY(conv_backward_input(dx, dy, w, &c));
    return dw ? conv_backward_weights(dw, dy, x, &c) : LADD_OK;
}
