/* Nearest-neighbour upsampling by two and its gradient. */
#include "cpu.h"

enum { RESAMPLE_ROWS = 8192 }; /* input elements of one task */

typedef struct resample_job {
    float *out;
    const float *in;
    int64_t rows; /* input rows of all planes; in the backward pass the rows of dx */
    int64_t rows_per_task;
    int W;
} resample_job;

static void resample_up_task(void *argument, int64_t task) {
    const resample_job *j = argument;
    int64_t end = (task + 1) * j->rows_per_task < j->rows ? (task + 1) * j->rows_per_task : j->rows;
    for (int64_t r = task * j->rows_per_task; r < end; r++) {
        const float *x = j->in + r * j->W;
        float *y0 = j->out + r * 4 * j->W, *y1 = y0 + 2 * (int64_t)j->W; /* rows 2r and 2r+1: planes follow each other without a gap */
        for (int i = 0; i < j->W; i++) {
            y0[2 * i] = y0[2 * i + 1] = x[i];
            y1[2 * i] = y1[2 * i + 1] = x[i];
        }
    }
}

static void resample_down_task(void *argument, int64_t task) {
    const resample_job *j = argument;
    int64_t end = (task + 1) * j->rows_per_task < j->rows ? (task + 1) * j->rows_per_task : j->rows;
    for (int64_t r = task * j->rows_per_task; r < end; r++) {
        const float *y0 = j->in + r * 4 * j->W, *y1 = y0 + 2 * (int64_t)j->W;
        float *x = j->out + r * j->W;
        for (int i = 0; i < j->W; i++) x[i] = (y0[2 * i] + y0[2 * i + 1]) + (y1[2 * i] + y1[2 * i + 1]);
    }
}

static void resample_run(void (*task)(void *, int64_t), float *out, const float *in, int BC, int H, int W) {
    resample_job j = {.out = out, .in = in, .rows = (int64_t)BC * H, .rows_per_task = W < RESAMPLE_ROWS ? RESAMPLE_ROWS / W : 1, .W = W};
    ladd_parallel((j.rows + j.rows_per_task - 1) / j.rows_per_task, task, &j);
}

ladd_status LADD_CPU(upsample2x_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int BC, int H, int W) {
    (void)ctx;
    resample_run(resample_up_task, y, x, BC, H, W);
    return LADD_OK;
}

ladd_status LADD_CPU(upsample2x_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, int BC, int H, int W) {
    (void)ctx;
    resample_run(resample_down_task, dx, dy, BC, H, W);
    return LADD_OK;
}
