/* 2-D convolution, forward and backward, without im2col: a tile of the image is copied once into a zero-padded patch, in which the inputs of
 * one kernel tap for all output pixels of the tile are one contiguous run (output pixels are numbered along the patch's rows; the few pixels
 * between two rows are computed and thrown away). So the inner loops are those of a matrix product, reading shifted runs of the patch.
 *
 * A stride s splits the patch into s*s phases (every s-th row and column), which makes the runs contiguous again. The gradient of the input
 * is the same forward routine over dy with flipped weights, once for each of the s*s phases of dx. Tiles depend on shapes only.
 */
#include "../conv.h"
#include "cpu.h"

#include <stdatomic.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Register tile: CONV_MR output channels by CONV_NV vectors. */
#if defined(__AVX512F__)
enum { CONV_LANES = 16, CONV_NV = 4 };
#elif defined(__AVX2__)
enum { CONV_LANES = 8, CONV_NV = 2 };
#else
enum { CONV_LANES = 4, CONV_NV = 2 };
#endif
enum {
    CONV_MR = 6,
    CONV_TILE = 1024,       /* output pixels of a tile: patch and outputs stay in the level-2 cache */
    CONV_COLUMNS = 512,     /* widest tile */
    CONV_CHUNK = 32,        /* input channels of one pass over a patch */
    CONV_TASKS = 32,        /* wanted number of tasks */
    CONV_PARTIALS = 1 << 22 /* most elements of all partial weight gradients together */
};
/* Scratch slots: the caller's shared block and folded weights; inside tasks the patch and the tile of y or dy. */
enum { CONV_SHARED = 3, CONV_PATCH = 0, CONV_OUT = 1, CONV_FOLDED = 2 };

typedef float conv_vec __attribute__((vector_size(4 * CONV_LANES)));
typedef float conv_vec_any __attribute__((vector_size(4 * CONV_LANES), aligned(4), may_alias));

static inline conv_vec conv_load(const float *p) { return *(const conv_vec_any *)p; }
static inline void conv_store(float *p, conv_vec v) { *(conv_vec_any *)p = v; }
static inline conv_vec conv_fma(conv_vec a, conv_vec b, conv_vec c) {
#if defined(__AVX512F__)
    return (conv_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (conv_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline int64_t conv_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t conv_round(int64_t n) { return conv_ceil(n, CONV_LANES) * CONV_LANES; }
static inline int64_t conv_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t conv_max(int64_t a, int64_t b) { return a > b ? a : b; }
/* First element of part i when n elements are dealt evenly to `parts`. */
static inline int conv_cut(int64_t n, int64_t parts, int64_t i) { return (int)(n * i / parts); }

/* ---- register tiles ---------------------------------------------------------------------------------------------------- */

/* y[MR, NV*LANES] at row stride ldy (+)= sum over k of a[k][MR] patch[koff[k] + pixel]. */
static inline __attribute__((always_inline)) void conv_tile(const int MR, const int NV, float *y, ptrdiff_t ldy, const float *a, const float *patch,
                                                            const int32_t *koff, int K, int add) {
    conv_vec acc[CONV_MR][CONV_NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = add ? conv_load(y + m * ldy + v * CONV_LANES) : (conv_vec){0};
    for (int k = 0; k < K; k++, a += MR) {
        const float *p = patch + koff[k];
        conv_vec b[CONV_NV];
        for (int v = 0; v < NV; v++) b[v] = conv_load(p + v * CONV_LANES);
        for (int m = 0; m < MR; m++) {
            conv_vec w = (conv_vec){0} + a[m];
            for (int v = 0; v < NV; v++) acc[m][v] = conv_fma(w, b[v], acc[m][v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) conv_store(y + m * ldy + v * CONV_LANES, acc[m][v]);
}

#if defined(__AVX2__)
typedef int32_t conv_index __attribute__((vector_size(4 * CONV_LANES)));
#endif
#if defined(__AVX512F__)
static const conv_index conv_even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#elif defined(__AVX2__)
static const conv_index conv_even = {0, 2, 4, 6, 8, 10, 12, 14};
#endif

/* Sums of the lanes of v[i], i < LANES; v is overwritten. Adding even to odd lanes of two vectors halves the number of vectors. */
static inline __attribute__((always_inline)) conv_vec conv_lane_sums(conv_vec *v) {
#if defined(__AVX2__)
    for (int width = CONV_LANES; width > 1; width /= 2)
        for (int i = 0; i < width / 2; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], conv_even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], conv_even + 1);
    return v[0];
#else
    return (conv_vec){(v[0][0] + v[0][1]) + (v[0][2] + v[0][3]), (v[1][0] + v[1][1]) + (v[1][2] + v[1][3]), (v[2][0] + v[2][1]) + (v[2][2] + v[2][3]),
                      (v[3][0] + v[3][1]) + (v[3][2] + v[3][3])};
#endif
}

/* dw[MR, NV] at row stride ldw += sum over L pixels of dy[m*L + pixel] patch[koff[k] + pixel]; L is a multiple of LANES. */
static inline __attribute__((always_inline)) void conv_dot(const int MR, const int NV, float *dw, ptrdiff_t ldw, const float *dy, const float *patch,
                                                           const int32_t *koff, int64_t L) {
    enum { GROUPS = (CONV_MR * CONV_NV + CONV_LANES - 1) / CONV_LANES };
    conv_vec acc[CONV_MR][CONV_NV], flat[GROUPS * CONV_LANES];
    for (int m = 0; m < MR; m++)
        for (int k = 0; k < NV; k++) acc[m][k] = (conv_vec){0};
    const float *x[CONV_NV];
    for (int k = 0; k < NV; k++) x[k] = patch + koff[k];
    for (int64_t i = 0; i < L; i += CONV_LANES) {
        conv_vec b[CONV_NV];
        for (int k = 0; k < NV; k++) b[k] = conv_load(x[k] + i);
        for (int m = 0; m < MR; m++) {
            conv_vec d = conv_load(dy + m * L + i);
            for (int k = 0; k < NV; k++) acc[m][k] = conv_fma(d, b[k], acc[m][k]);
        }
    }
    for (int i = 0; i < GROUPS * CONV_LANES; i++) flat[i] = i < MR * NV ? acc[i / NV][i % NV] : (conv_vec){0};
    float sums[GROUPS * CONV_LANES];
    for (int g = 0; g * CONV_LANES < MR * NV; g++) conv_store(sums + g * CONV_LANES, conv_lane_sums(flat + g * CONV_LANES));
    for (int m = 0; m < MR; m++)
        for (int k = 0; k < NV; k++) dw[m * ldw + k] += sums[m * NV + k];
}

/* One function for each size of tile, so that its accumulators are registers. */
#define CONV_VARIANT(m, v)                                                                                                              \
    static void conv_tile_##m##_##v(float *y, ptrdiff_t ldy, const float *a, const float *patch, const int32_t *koff, int K, int add) { \
        conv_tile(m, v, y, ldy, a, patch, koff, K, add);                                                                                \
    }                                                                                                                                   \
    static void conv_dot_##m##_##v(float *dw, ptrdiff_t ldw, const float *dy, const float *patch, const int32_t *koff, int64_t L) {     \
        conv_dot(m, v, dw, ldw, dy, patch, koff, L);                                                                                    \
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
static void (*const conv_tiles[CONV_MR][CONV_NV])(float *, ptrdiff_t, const float *, const float *, const int32_t *, int, int) = {
    CONV_NAMES(conv_tile, 1), CONV_NAMES(conv_tile, 2), CONV_NAMES(conv_tile, 3),
    CONV_NAMES(conv_tile, 4), CONV_NAMES(conv_tile, 5), CONV_NAMES(conv_tile, 6)};
static void (*const conv_dots[CONV_MR][CONV_NV])(float *, ptrdiff_t, const float *, const float *, const int32_t *, int64_t) = {
    CONV_NAMES(conv_dot, 1), CONV_NAMES(conv_dot, 2), CONV_NAMES(conv_dot, 3),
    CONV_NAMES(conv_dot, 4), CONV_NAMES(conv_dot, 5), CONV_NAMES(conv_dot, 6)};
#undef CONV_VARIANT
#undef CONV_ROW
#undef CONV_NAMES

/* ---- patches ------------------------------------------------------------------------------------------------------------- */

/* A window of kh by kw taps slid over x[B,C,H,W]: output (r,c) of the grid gh by gw reads row r*step + r0 + tap, column c*step + c0 + tap; what lies
 * outside x is zero. A patch holds, for each of its channels, [phases][n samples][Hq][Wq]. */
typedef struct conv_window {
    const float *x;
    int B, C, H, W, kh, kw, step, r0, c0, gh, gw;
    int phase_rows, phase_cols, n, th, tw, Hq, Wq; /* n samples, th by tw outputs at most in a tile */
    int tile_rows, tile_cols;                      /* tiles down and across a grid */
    int chunks;                                    /* passes over the channels */
    int64_t plane, patch;                          /* elements of a channel, of all */
} conv_window;

static void conv_window_plan(conv_window *s, int group_samples) {
    s->phase_rows = (int)conv_min(s->step, s->kh);
    s->phase_cols = (int)conv_min(s->step, s->kw);
    int halo_r = s->kh ? (s->kh - 1) / s->step : 0, halo_c = s->kw ? (s->kw - 1) / s->step : 0;
    s->tile_cols = (int)conv_ceil(s->gw, CONV_COLUMNS);
    s->tw = (int)conv_ceil(s->gw, s->tile_cols);
    s->Wq = s->tw + halo_c;
    s->tile_rows = (int)conv_ceil(s->gh, conv_max(1, CONV_TILE / s->Wq));
    s->th = (int)conv_ceil(s->gh, s->tile_rows);
    s->Hq = s->th + halo_r;
    s->n = 1;
    if (group_samples && s->tile_rows == 1 && s->tile_cols == 1) s->n = (int)conv_max(1, conv_min(s->B, CONV_TILE / ((int64_t)s->Hq * s->Wq)));
    s->plane = (int64_t)s->phase_rows * s->phase_cols * s->n * s->Hq * s->Wq;
    s->chunks = (int)conv_ceil(s->C, CONV_CHUNK);
    s->patch = conv_ceil(s->C, s->chunks) * s->plane + halo_c + 2 * CONV_LANES; /* the last vector of a run may reach over the end */
}

/* koff[(channel of the chunk, tap row, tap column)]: where a tap's run starts in the patch. */
static void conv_offsets(int32_t *koff, const conv_window *s) {
    int channels = (int)conv_ceil(s->C, s->chunks);
    int64_t phase = (int64_t)s->n * s->Hq * s->Wq;
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < s->kh; i++)
            for (int j = 0; j < s->kw; j++)
                *koff++ = (int32_t)(c * s->plane + ((i % s->step) * s->phase_cols + j % s->step) * phase + i / s->step * s->Wq + j / s->step);
}

/* Fills the patch of channels [c0, c1), samples [b0, b1) and the tile that starts at output (r, c). */
static void conv_fill(float *patch, const conv_window *s, int c0, int c1, int b0, int b1, int r, int c) {
    float *out = patch;
    for (int ch = c0; ch < c1; ch++)
        for (int pr = 0; pr < s->phase_rows; pr++)
            for (int pc = 0; pc < s->phase_cols; pc++) {
                int64_t left = (int64_t)c * s->step + s->c0 + pc;
                /* columns [from, to) of the patch lie inside x */
                int from = (int)conv_min(s->Wq, left >= 0 ? 0 : conv_ceil(-left, s->step));
                int to = (int)conv_min(s->Wq, left >= s->W ? 0 : conv_ceil(s->W - left, s->step));
                if (to < from) to = from;
                for (int b = b0; b < b1; b++)
                    for (int q = 0; q < s->Hq; q++, out += s->Wq) {
                        int64_t row = (int64_t)(r + q) * s->step + s->r0 + pr;
                        if (row < 0 || row >= s->H || from == to) {
                            memset(out, 0, (size_t)s->Wq * sizeof(float));
                            continue;
                        }
                        const float *x = s->x + (((int64_t)b * s->C + ch) * s->H + row) * s->W + left;
                        for (int i = 0; i < from; i++) out[i] = 0.0f;
                        if (s->step == 1)
                            memcpy(out + from, x + from, (size_t)(to - from) * sizeof(float));
                        else
                            for (int i = from; i < to; i++) out[i] = x[(ptrdiff_t)i * s->step];
                        for (int i = to; i < s->Wq; i++) out[i] = 0.0f;
                    }
                int64_t absent = (int64_t)(s->n - (b1 - b0)) * s->Hq * s->Wq; /* the last group may hold fewer samples */
                memset(out, 0, (size_t)absent * sizeof(float));
                out += absent;
            }
    memset(out, 0, (size_t)(patch + s->patch - out) * sizeof(float));
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
    float *packed; /* [panel][channel][tap][channels of the panel] */
    int32_t *koff;
    int panels, splits; /* panels of at most CONV_MR output channels; tasks that share one tile, each with its own panels */
    atomic_int failed;
} conv_job;

static void conv_pack_weights(void *argument, int64_t panel) {
    conv_job *j = argument;
    const conv_window *s = &j->s;
    int m0 = conv_cut(j->M, j->panels, panel), m1 = conv_cut(j->M, j->panels, panel + 1);
    float *out = j->packed + (int64_t)m0 * s->C * s->kh * s->kw;
    for (int c = 0; c < s->C; c++)
        for (int r = 0; r < s->kh; r++)
            for (int k = 0; k < s->kw; k++)
                for (int m = m0; m < m1; m++) *out++ = j->w[m * j->wm + c * j->wc + r * j->wi + k * j->wj];
}

static void conv_forward_task(void *argument, int64_t task) {
    conv_job *j = argument;
    const conv_window *s = &j->s;
    int split = (int)(task % j->splits), tile = (int)(task / j->splits % (s->tile_rows * s->tile_cols));
    int b = (int)(task / j->splits / (s->tile_rows * s->tile_cols));
    int tr = tile / s->tile_cols, tc = tile % s->tile_cols;
    int r0 = conv_cut(s->gh, s->tile_rows, tr), r1 = conv_cut(s->gh, s->tile_rows, tr + 1);
    int c0 = conv_cut(s->gw, s->tile_cols, tc), c1 = conv_cut(s->gw, s->tile_cols, tc + 1);
    int p0 = conv_cut(j->panels, j->splits, split), p1 = conv_cut(j->panels, j->splits, split + 1);
    int first = conv_cut(j->M, j->panels, p0), last = conv_cut(j->M, j->panels, p1);
    int64_t L = conv_round((int64_t)(r1 - r0) * s->Wq), taps = (int64_t)s->kh * s->kw;
    float *patch = ladd_scratch(CONV_PATCH, (size_t)s->patch * sizeof(float));
    float *out = ladd_scratch(CONV_OUT, (size_t)((last - first) * L) * sizeof(float));
    if (!patch || !out) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (int chunk = 0; chunk < s->chunks; chunk++) {
        int ch0 = conv_cut(s->C, s->chunks, chunk), ch1 = conv_cut(s->C, s->chunks, chunk + 1);
        conv_fill(patch, s, ch0, ch1, b, b + 1, r0, c0);
        for (int64_t at = 0; at < L; at += CONV_NV * CONV_LANES) {
            int vectors = (int)conv_min(CONV_NV, (L - at) / CONV_LANES);
            for (int p = p0; p < p1; p++) {
                int m0 = conv_cut(j->M, j->panels, p), m1 = conv_cut(j->M, j->panels, p + 1);
                conv_tiles[m1 - m0 - 1][vectors - 1](out + (m0 - first) * L + at, L,
                                                     j->packed + (m0 * (int64_t)s->C + (m1 - m0) * (int64_t)ch0) * taps, patch + at, j->koff,
                                                     (int)((ch1 - ch0) * taps), chunk > 0);
            }
        }
    }
    for (int m = first; m < last; m++) {
        float bias = j->bias ? j->bias[m] : 0.0f;
        for (int r = r0; r < r1; r++) {
            const float *in = out + (m - first) * L + (int64_t)(r - r0) * s->Wq;
            float *y = j->y + (((int64_t)b * j->M + m) * j->YH + (int64_t)r * j->y_step + j->y_r) * j->YW + (int64_t)c0 * j->y_step + j->y_c;
            if (j->y_step == 1)
                for (int c = 0; c < c1 - c0; c++) y[c] = in[c] + bias;
            else
                for (int c = 0; c < c1 - c0; c++) y[(ptrdiff_t)c * j->y_step] = in[c] + bias;
        }
    }
}

static ladd_status conv_memory(void) { return ladd_fail(LADD_ERR_MEMORY, "out of memory for the work space of a convolution"); }

static ladd_status conv_run(conv_job *j) {
    conv_window *s = &j->s;
    if (s->gh <= 0 || s->gw <= 0) return LADD_OK;
    conv_window_plan(s, 0);
    j->panels = (int)conv_ceil(j->M, CONV_MR);
    int64_t tiles = (int64_t)s->B * s->tile_rows * s->tile_cols, taps = (int64_t)s->kh * s->kw;
    j->splits = (int)conv_max(1, conv_min(j->panels / 2, CONV_TASKS / 2 / tiles)); /* few tiles: share the output channels out as well */
    size_t weights = (size_t)conv_round(j->M * s->C * taps), offsets = (size_t)(conv_ceil(s->C, s->chunks) * taps);
    char *shared = ladd_scratch(CONV_SHARED, weights * sizeof(float) + offsets * sizeof(int32_t) + 64);
    if (!shared) return conv_memory();
    j->packed = (float *)shared;
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
    j.s = (conv_window){.x = x,
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
    float *dw, *dbias, *partial; /* partial[parts][M*K + M], or with one part straight into dw and dbias */
    int M, panels, parts, units;
    int64_t K, L;
    const int32_t *koff;
    atomic_int failed;
} conv_grad_job;

/* out[M][L]: dy of the unit in the numbering of the patch, zero between the rows. */
static void conv_fill_dy(float *out, const conv_grad_job *j, int64_t L, int b0, int b1, int r0, int r1, int c0, int c1) {
    const conv_window *s = &j->s;
    memset(out, 0, (size_t)(j->M * L) * sizeof(float));
    for (int m = 0; m < j->M; m++)
        for (int b = b0; b < b1; b++)
            for (int r = r0; r < r1; r++)
                memcpy(out + m * L + ((int64_t)(b - b0) * s->Hq + r - r0) * s->Wq, j->dy + (((int64_t)b * j->M + m) * s->gh + r) * s->gw + c0,
                       (size_t)(c1 - c0) * sizeof(float));
}

static void conv_grad_task(void *argument, int64_t task) {
    conv_grad_job *j = argument;
    const conv_window *s = &j->s;
    int chunk = (int)(task % s->chunks), part = (int)(task / s->chunks), tiles = s->tile_rows * s->tile_cols;
    int ch0 = conv_cut(s->C, s->chunks, chunk), ch1 = conv_cut(s->C, s->chunks, chunk + 1), taps = s->kh * s->kw, K = (ch1 - ch0) * taps;
    float *dw = j->dw, *dbias = j->dbias;
    if (j->partial) {
        dw = j->partial + part * (j->M * j->K + j->M);
        dbias = dw + j->M * j->K;
        for (int m = 0; m < j->M; m++) memset(dw + m * j->K + (int64_t)ch0 * taps, 0, (size_t)K * sizeof(float));
        if (chunk == 0) memset(dbias, 0, (size_t)j->M * sizeof(float));
    }
    float *patch = ladd_scratch(CONV_PATCH, (size_t)s->patch * sizeof(float));
    float *dy = ladd_scratch(CONV_OUT, (size_t)(j->M * j->L) * sizeof(float));
    if (!patch || !dy) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (int unit = conv_cut(j->units, j->parts, part); unit < conv_cut(j->units, j->parts, part + 1); unit++) {
        int tile = unit % tiles, group = unit / tiles, tr = tile / s->tile_cols, tc = tile % s->tile_cols;
        int r0 = conv_cut(s->gh, s->tile_rows, tr), r1 = conv_cut(s->gh, s->tile_rows, tr + 1);
        int c0 = conv_cut(s->gw, s->tile_cols, tc), c1 = conv_cut(s->gw, s->tile_cols, tc + 1);
        int b0 = group * s->n, b1 = (int)conv_min(s->B, (int64_t)b0 + s->n);
        int64_t L = conv_round(((int64_t)(b1 - b0 - 1) * s->Hq + r1 - r0) * s->Wq);
        conv_fill(patch, s, ch0, ch1, b0, b1, r0, c0);
        conv_fill_dy(dy, j, L, b0, b1, r0, r1, c0, c1);
        for (int p = 0; p < j->panels; p++) {
            int m0 = conv_cut(j->M, j->panels, p), m1 = conv_cut(j->M, j->panels, p + 1);
            if (j->dw)
                for (int k = 0; k < K; k += CONV_NV)
                    conv_dots[m1 - m0 - 1][conv_min(CONV_NV, K - k) - 1](dw + m0 * j->K + (int64_t)ch0 * taps + k, j->K, dy + m0 * L, patch,
                                                                         j->koff + k, L);
            if (!j->dbias || chunk) continue;
            for (int m = m0; m < m1; m++) {
                conv_vec sum[CONV_LANES] = {0};
                for (int64_t i = 0; i < L; i += CONV_LANES) sum[0] += conv_load(dy + m * L + i);
                dbias[m] += conv_lane_sums(sum)[0];
            }
        }
    }
}

static void conv_grad_reduce(void *argument, int64_t m) {
    conv_grad_job *j = argument;
    for (int part = 0; part < j->parts; part++) {
        const float *from = j->partial + part * (j->M * j->K + j->M);
        if (j->dw)
            for (int64_t k = 0; k < j->K; k++) j->dw[m * j->K + k] += from[m * j->K + k];
        if (j->dbias) j->dbias[m] += from[j->M * j->K + m];
    }
}

static ladd_status conv_backward_weights(float *dw, float *dbias, const float *dy, const float *x, const ladd_conv *conv) {
    conv_grad_job j = {.dy = dy, .dw = dw, .dbias = dbias, .M = conv->Cout, .K = (int64_t)conv->Cin * conv->kh * conv->kw};
    conv_window *s = &j.s;
    *s = (conv_window){.x = x,
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
    conv_window_plan(s, 1);
    j.panels = (int)conv_ceil(j.M, CONV_MR);
    j.units = (int)conv_ceil(s->B, s->n) * s->tile_rows * s->tile_cols;
    j.L = conv_round(((int64_t)(s->n - 1) * s->Hq + s->th) * s->Wq);
    j.parts = (int)conv_max(1, conv_min(j.units, conv_min(CONV_TASKS / s->chunks, CONV_PARTIALS / (j.M * j.K))));
    size_t partials = j.parts > 1 ? (size_t)(j.parts * (j.M * j.K + j.M)) : 0;
    size_t offsets = (size_t)(conv_ceil(s->C, s->chunks) * s->kh * s->kw);
    char *shared = ladd_scratch(CONV_SHARED, partials * sizeof(float) + offsets * sizeof(int32_t));
    if (!shared) return conv_memory();
    if (partials) j.partial = (float *)shared;
    int32_t *koff = (int32_t *)(shared + partials * sizeof(float));
    conv_offsets(koff, s);
    j.koff = koff;
    atomic_init(&j.failed, 0);
    ladd_parallel((int64_t)j.parts * s->chunks, conv_grad_task, &j);
    if (atomic_load(&j.failed)) return conv_memory();
    if (partials) ladd_parallel(j.M, conv_grad_reduce, &j);
    return LADD_OK;
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

static ladd_status conv_upsample_backward(float *dx, float *dw, float *dbias, const float *dy, const float *x, const float *w,
                                          const ladd_conv *conv) {
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
        LADD_TRY(conv_backward_weights(folded, NULL, x, dy, &back));
        for (int64_t i = 0; i < pairs; i++) {
            const float *from = folded + 16 * (i % conv->Cin * conv->Cout + i / conv->Cin);
            for (int k = 0; k < 9; k++)
                for (int r = 2 - k / 3; r < 4 - k / 3; r++)
                    for (int c = 2 - k % 3; c < 4 - k % 3; c++) dw[9 * i + k] += from[4 * r + c];
        }
    }
    if (dbias) {
        conv_bias_job j = {.dbias = dbias, .dy = dy, .B = conv->B, .C = conv->Cout, .L = (int64_t)conv->Ho * conv->Wo};
        ladd_parallel(conv->Cout, conv_bias_task, &j);
    }
    return LADD_OK;
}

/* ---- the table's rows ------------------------------------------------------------------------------------------------------ */

ladd_status LADD_CPU(conv2d_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, const ladd_conv *conv) {
    (void)ctx;
    LADD_TRY(ladd_conv_check(conv));
    return conv->upsample ? conv_upsample_forward(y, x, w, bias, conv) : conv_forward(y, x, w, bias, conv);
}

ladd_status LADD_CPU(conv2d_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                      const ladd_conv *conv) {
    (void)ctx;
    LADD_TRY(ladd_conv_check(conv));
    if (conv->upsample) return conv_upsample_backward(dx, dw, dbias, dy, x, w, conv);
    if (dx) LADD_TRY(conv_backward_input(dx, dy, w, conv));
    return dw || dbias ? conv_backward_weights(dw, dbias, dy, x, conv) : LADD_OK;
}
