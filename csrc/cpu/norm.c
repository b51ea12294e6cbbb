/* Layer norm with modulation, gated residual, RMS norm per head.
 *
 *   y = (x - mean) rstd (1 + scale_b) + shift_b          rstd = 1 / sqrt(mean (x - mean)^2 + eps), variance in two passes
 *   dxhat = dy (1 + scale_b);  dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat));  dscale_b = sum_n dy xhat;  dshift_b = sum_n dy
 *   y = x rstd w per head;  dx = rstd (dy w - x rstd^2 mean(dy w x));  dw = sum dy x rstd
 * Saved for backward: mean and rstd of each row.
 */
#include "cpu.h"

#include <math.h>

enum { NORM_ROWS = 16, NORM_COLUMNS = 64, NORM_HEAD_ROWS = 64 };

typedef struct norm_job {
    float *y, *dshift, *dscale, *save_mean, *save_rstd;
    const float *x, *dy, *mean, *rstd, *shift, *scale;
    int64_t mod_stride, rows;
    int N, D;
    float eps;
} norm_job;

static void norm_forward_task(void *argument, int64_t chunk) {
    const norm_job *j = argument;
    int D = j->D;
    int64_t end = (chunk + 1) * NORM_ROWS < j->rows ? (chunk + 1) * NORM_ROWS : j->rows;
    for (int64_t row = chunk * NORM_ROWS; row < end; row++) {
        const float *x = j->x + row * D;
        float *y = j->y + row * D;
        float mean = ladd_sum(x, D) / (float)D;
        for (int i = 0; i < D; i++) y[i] = x[i] - mean;
        float rstd = 1.0f / sqrtf(ladd_dot(y, y, D) / (float)D + j->eps);
        j->save_mean[row] = mean;
        j->save_rstd[row] = rstd;
        if (j->shift) {
            const float *shift = j->shift + row / j->N * j->mod_stride, *scale = j->scale + row / j->N * j->mod_stride;
            for (int i = 0; i < D; i++) y[i] = y[i] * rstd * (1.0f + scale[i]) + shift[i];
        } else {
            for (int i = 0; i < D; i++) y[i] *= rstd;
        }
    }
}

ladd_status LADD_CPU(layer_norm_modulate_forward)(LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *shift,
                                                  const ladd_act *scale, int64_t mod_stride, int B, int N, int D, float eps) {
    (void)ctx;
    norm_job job = {.y = y,
                    .save_mean = mean,
                    .save_rstd = rstd,
                    .x = x,
                    .shift = shift,
                    .scale = scale,
                    .mod_stride = mod_stride,
                    .rows = (int64_t)B * N,
                    .N = N,
                    .D = D,
                    .eps = eps};
    ladd_parallel_work((job.rows + NORM_ROWS - 1) / NORM_ROWS, job.rows * D, norm_forward_task, &job);
    return LADD_OK;
}

static void norm_backward_task(void *argument, int64_t chunk) {
    const norm_job *j = argument;
    int D = j->D;
    int64_t end = (chunk + 1) * NORM_ROWS < j->rows ? (chunk + 1) * NORM_ROWS : j->rows;
    for (int64_t row = chunk * NORM_ROWS; row < end; row++) {
        const float *x = j->x + row * D, *dy = j->dy + row * D, *scale = j->scale ? j->scale + row / j->N * j->mod_stride : NULL;
        float *dx = j->y + row * D, mean = j->mean[row], rstd = j->rstd[row];
        ladd_v16 sums = {0}, products = {0};
        int i = 0;
        for (; i + 16 <= D; i += 16) {
            ladd_v16 g = LADD_V16(dy + i);
            if (scale) g += g * LADD_V16(scale + i);
            sums += g;
            products += g * (LADD_V16(x + i) - mean);
        }
        float sum = ladd_fold16(&sums), product = ladd_fold16(&products);
        for (; i < D; i++) {
            float g = scale ? dy[i] * (1.0f + scale[i]) : dy[i];
            sum += g;
            product += g * (x[i] - mean);
        }
        float a = sum / (float)D, b = product * rstd * rstd / (float)D;
        if (scale)
            for (i = 0; i < D; i++) dx[i] += rstd * (dy[i] * (1.0f + scale[i]) - a - (x[i] - mean) * b);
        else
            for (i = 0; i < D; i++) dx[i] += rstd * (dy[i] - a - (x[i] - mean) * b);
    }
}

/* dshift and dscale of one sample and NORM_COLUMNS columns: tokens in order. */
static void norm_modulation_grad_task(void *argument, int64_t task) {
    const norm_job *j = argument;
    int D = j->D, blocks = (D + NORM_COLUMNS - 1) / NORM_COLUMNS, first = (int)(task % blocks) * NORM_COLUMNS;
    int64_t b = task / blocks;
    int width = D - first < NORM_COLUMNS ? D - first : NORM_COLUMNS;
    float shift[NORM_COLUMNS] = {0}, scale[NORM_COLUMNS] = {0};
    for (int n = 0; n < j->N; n++) {
        int64_t row = b * j->N + n;
        const float *x = j->x + row * D + first, *dy = j->dy + row * D + first;
        float mean = j->mean[row], rstd = j->rstd[row];
        for (int i = 0; i < width; i++) {
            shift[i] += dy[i];
            scale[i] += dy[i] * ((x[i] - mean) * rstd);
        }
    }
    for (int i = 0; i < width; i++) {
        j->dshift[b * j->mod_stride + first + i] = shift[i];
        j->dscale[b * j->mod_stride + first + i] = scale[i];
    }
}

ladd_status LADD_CPU(layer_norm_modulate_backward)(LADD_CTX, ladd_act *dx, ladd_act *dshift, ladd_act *dscale, const ladd_act *dy, const ladd_act *x,
                                                   const float *mean, const float *rstd, const ladd_act *scale, int64_t mod_stride, int B, int N,
                                                   int D) {
    (void)ctx;
    norm_job job = {.y = dx,
                    .dshift = dshift,
                    .dscale = dscale,
                    .x = x,
                    .dy = dy,
                    .mean = mean,
                    .rstd = rstd,
                    .scale = scale,
                    .mod_stride = mod_stride,
                    .rows = (int64_t)B * N,
                    .N = N,
                    .D = D};
    if (dshift && dscale) ladd_parallel_work((int64_t)B * ((D + NORM_COLUMNS - 1) / NORM_COLUMNS), job.rows * D, norm_modulation_grad_task, &job);
    ladd_parallel_work((job.rows + NORM_ROWS - 1) / NORM_ROWS, job.rows * D, norm_backward_task, &job);
    return LADD_OK;
}

/* ---- gated residual -------------------------------------------------------------------------------------------------- */

typedef struct gate_job {
    float *out, *dgate;
    const float *x, *y, *gate;
    int64_t mod_stride, rows;
    int N, D;
} gate_job;

static void gate_forward_task(void *argument, int64_t chunk) {
    const gate_job *j = argument;
    int D = j->D;
    int64_t end = (chunk + 1) * NORM_ROWS < j->rows ? (chunk + 1) * NORM_ROWS : j->rows;
    for (int64_t row = chunk * NORM_ROWS; row < end; row++) {
        const float *x = j->x + row * D, *y = j->y + row * D, *gate = j->gate + row / j->N * j->mod_stride;
        float *out = j->out + row * D;
#pragma GCC ivdep
        for (int i = 0; i < D; i++) out[i] = x[i] + gate[i] * y[i];
    }
}

ladd_status LADD_CPU(gate_residual_forward)(LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *y, const ladd_act *gate, int64_t mod_stride,
                                            int B, int N, int D) {
    (void)ctx;
    gate_job job = {.out = out, .x = x, .y = y, .gate = gate, .mod_stride = mod_stride, .rows = (int64_t)B * N, .N = N, .D = D};
    ladd_parallel_work((job.rows + NORM_ROWS - 1) / NORM_ROWS, job.rows * D, gate_forward_task, &job);
    return LADD_OK;
}

/* dy = gate dout for one sample and NORM_COLUMNS columns, and dgate on the way. x is dout here. */
static void gate_backward_task(void *argument, int64_t task) {
    const gate_job *j = argument;
    int D = j->D, blocks = (D + NORM_COLUMNS - 1) / NORM_COLUMNS, first = (int)(task % blocks) * NORM_COLUMNS;
    int64_t b = task / blocks;
    int width = D - first < NORM_COLUMNS ? D - first : NORM_COLUMNS;
    const float *gate = j->gate + b * j->mod_stride + first;
    float sum[NORM_COLUMNS] = {0};
    for (int n = 0; n < j->N; n++) {
        int64_t at = (b * j->N + n) * D + first;
        const float *dout = j->x + at, *y = j->y + at;
        float *dy = j->out + at;
        for (int i = 0; i < width; i++) sum[i] += dout[i] * y[i];
#pragma GCC ivdep
        for (int i = 0; i < width; i++) dy[i] = gate[i] * dout[i];
    }
    if (j->dgate)
        for (int i = 0; i < width; i++) j->dgate[b * j->mod_stride + first + i] = sum[i];
}

ladd_status LADD_CPU(gate_residual_backward)(LADD_CTX, ladd_act *dy, ladd_act *dgate, const ladd_act *dout, const ladd_act *y, const ladd_act *gate,
                                             int64_t mod_stride, int B, int N, int D) {
    (void)ctx;
    gate_job job = {.out = dy, .dgate = dgate, .x = dout, .y = y, .gate = gate, .mod_stride = mod_stride, .rows = (int64_t)B * N, .N = N, .D = D};
    ladd_parallel_work((int64_t)B * ((D + NORM_COLUMNS - 1) / NORM_COLUMNS), job.rows * D, gate_backward_task, &job);
    return LADD_OK;
}

/* ---- RMS norm per head ----------------------------------------------------------------------------------------------- */

typedef struct rms_job {
    float *y, *save_rstd, *dw_parts;
    const float *x, *dy, *rstd, *w;
    int64_t rows;
    int heads, dh;
    ptrdiff_t x_row, y_row, dy_row;
    float eps;
} rms_job;

static void rms_forward_task(void *argument, int64_t chunk) {
    const rms_job *j = argument;
    int dh = j->dh;
    int64_t end = (chunk + 1) * NORM_HEAD_ROWS < j->rows ? (chunk + 1) * NORM_HEAD_ROWS : j->rows;
    for (int64_t row = chunk * NORM_HEAD_ROWS; row < end; row++)
        for (int head = 0; head < j->heads; head++) {
            const float *x = j->x + row * j->x_row + (ptrdiff_t)head * dh, *w = j->w;
            float *y = j->y + row * j->y_row + (ptrdiff_t)head * dh;
            float rstd = 1.0f / sqrtf(ladd_dot(x, x, dh) / (float)dh + j->eps);
            j->save_rstd[row * j->heads + head] = rstd;
#pragma GCC ivdep
            for (int i = 0; i < dh; i++) y[i] = x[i] * rstd * w[i];
        }
}

ladd_status LADD_CPU(rms_norm_heads_forward)(LADD_CTX, ladd_act *y, float *rstd, const ladd_act *x, const ladd_act *w, int rows, int heads, int dh,
                                             ptrdiff_t x_row, ptrdiff_t y_row, float eps) {
    (void)ctx;
    rms_job job = {.y = y, .save_rstd = rstd, .x = x, .w = w, .rows = rows, .heads = heads, .dh = dh, .x_row = x_row, .y_row = y_row, .eps = eps};
    ladd_parallel_work((rows + NORM_HEAD_ROWS - 1) / NORM_HEAD_ROWS, (int64_t)rows * heads * dh, rms_forward_task, &job);
    return LADD_OK;
}

/* dx of a chunk of rows; its share of dw goes to dw_parts[chunk], summed in chunk order afterwards. dx may be dy: an element is read before it is
 * written. */
static void rms_backward_task(void *argument, int64_t chunk) {
    const rms_job *j = argument;
    int dh = j->dh;
    float *dw = j->dw_parts ? j->dw_parts + chunk * dh : NULL;
    if (dw)
        for (int i = 0; i < dh; i++) dw[i] = 0.0f;
    int64_t end = (chunk + 1) * NORM_HEAD_ROWS < j->rows ? (chunk + 1) * NORM_HEAD_ROWS : j->rows;
    for (int64_t row = chunk * NORM_HEAD_ROWS; row < end; row++)
        for (int head = 0; head < j->heads; head++) {
            const float *x = j->x + row * j->x_row + (ptrdiff_t)head * dh, *dy = j->dy + row * j->dy_row + (ptrdiff_t)head * dh, *w = j->w;
            float *dx = j->y + row * j->y_row + (ptrdiff_t)head * dh, rstd = j->rstd[row * j->heads + head];
            if (dw)
                for (int i = 0; i < dh; i++) dw[i] += dy[i] * x[i] * rstd;
            ladd_v16 lanes = {0};
            int i = 0;
            for (; i + 16 <= dh; i += 16) lanes += LADD_V16(dy + i) * LADD_V16(w + i) * LADD_V16(x + i);
            float product = ladd_fold16(&lanes);
            for (; i < dh; i++) product += dy[i] * w[i] * x[i];
            float c = product * rstd * rstd / (float)dh;
#pragma GCC ivdep
            for (i = 0; i < dh; i++) dx[i] = rstd * (dy[i] * w[i] - x[i] * c);
        }
}

ladd_status LADD_CPU(rms_norm_heads_backward)(LADD_CTX, ladd_act *dx, float *dw, const ladd_act *dy, const ladd_act *x, const float *rstd,
                                              const ladd_act *w, int rows, int heads, int dh, ptrdiff_t x_row, ptrdiff_t dy_row, ptrdiff_t dx_row) {
    (void)ctx;
    int64_t chunks = (rows + NORM_HEAD_ROWS - 1) / NORM_HEAD_ROWS;
    rms_job job = {
        .y = dx, .x = x, .dy = dy, .rstd = rstd, .w = w, .rows = rows, .heads = heads, .dh = dh, .x_row = x_row, .y_row = dx_row, .dy_row = dy_row};
    if (dw) {
        job.dw_parts = ladd_scratch(3, (size_t)chunks * (size_t)dh * sizeof(float));
        if (!job.dw_parts) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the partial sums of an RMS norm's gradient");
    }
    ladd_parallel_work(chunks, (int64_t)rows * heads * dh, rms_backward_task, &job);
    if (dw)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            for (int i = 0; i < dh; i++) dw[i] += job.dw_parts[chunk * dh + i];
    return LADD_OK;
}
