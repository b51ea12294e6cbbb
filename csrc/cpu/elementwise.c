/* Memory-bound helpers and the sampler's steps. Everything is cut into chunks of ELEMENTWISE_CHUNK elements of a row. */
#include <string.h>

#include "cpu.h"

enum { ELEMENTWISE_CHUNK = 16384, ELEMENTWISE_BLOCK = 32 };

/* Rows of n elements, each with its own factor t (NULL: one row, `alpha` for all). */
typedef struct elementwise_job {
    float *y;
    const float *a, *b, *t;
    float alpha;
    int64_t n, chunks; /* elements and chunks a row */
} elementwise_job;

/* Defines the task `name`: `body` is the statement for element i; in it y, a, b are the chunk's arrays and f the row's factor. y may be a or b. */
#define ELEMENTWISE_TASK(name, body)                                                                     \
    static void name(void *argument, int64_t task) {                                                     \
        const elementwise_job *j = argument;                                                             \
        int64_t row = task / j->chunks, from = task % j->chunks * ELEMENTWISE_CHUNK, left = j->n - from; \
        int count = (int)(left < ELEMENTWISE_CHUNK ? left : ELEMENTWISE_CHUNK);                          \
        float *y = j->y + row * j->n + from;                                                             \
        const float *a = j->a + row * j->n + from, *b = j->b ? j->b + row * j->n + from : NULL;          \
        float f = j->t ? j->t[row] : j->alpha;                                                           \
        (void)b, (void)f;                                                                                \
        _Pragma("GCC ivdep") for (int i = 0; i < count; i++) body;                                       \
    }
ELEMENTWISE_TASK(elementwise_add_task, y[i] = a[i] + b[i])
ELEMENTWISE_TASK(elementwise_axpy_task, y[i] += f * a[i])
ELEMENTWISE_TASK(elementwise_scale_task, y[i] = f * a[i])
ELEMENTWISE_TASK(elementwise_interpolate_task, y[i] = (1.0f - f) * a[i] + f * b[i])
ELEMENTWISE_TASK(elementwise_predict_x0_task, y[i] = a[i] - f * b[i])
ELEMENTWISE_TASK(elementwise_add_scaled_task, y[i] = a[i] + f * b[i])
#undef ELEMENTWISE_TASK

static void elementwise_zero_task(void *argument, int64_t task) {
    const elementwise_job *j = argument;
    int64_t from = task * ELEMENTWISE_CHUNK, left = j->n - from;
    memset(j->y + from, 0, (size_t)(left < ELEMENTWISE_CHUNK ? left : ELEMENTWISE_CHUNK) * sizeof(float));
}

static void elementwise_copy_task(void *argument, int64_t task) {
    const elementwise_job *j = argument;
    int64_t from = task * ELEMENTWISE_CHUNK, left = j->n - from;
    memcpy(j->y + from, j->a + from, (size_t)(left < ELEMENTWISE_CHUNK ? left : ELEMENTWISE_CHUNK) * sizeof(float));
}

static ladd_status elementwise_run(void (*task)(void *, int64_t), int64_t rows, elementwise_job job) {
    if (rows <= 0 || job.n <= 0) return LADD_OK;
    job.chunks = (job.n + ELEMENTWISE_CHUNK - 1) / ELEMENTWISE_CHUNK;
    ladd_parallel_work(rows * job.chunks, rows * job.n / 2, task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(zero)(LADD_CTX, ladd_act *y, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_zero_task, 1, (elementwise_job){.y = y, .n = n});
}

ladd_status LADD_CPU(copy)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) {
    (void)ctx;
    if (y == x) return LADD_OK;
    return elementwise_run(elementwise_copy_task, 1, (elementwise_job){.y = y, .a = x, .n = n});
}

ladd_status LADD_CPU(add)(LADD_CTX, ladd_act *y, const ladd_act *a, const ladd_act *b, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_add_task, 1, (elementwise_job){.y = y, .a = a, .b = b, .n = n});
}

ladd_status LADD_CPU(axpy)(LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_axpy_task, 1, (elementwise_job){.y = y, .a = x, .alpha = alpha, .n = n});
}

ladd_status LADD_CPU(scale)(LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_scale_task, 1, (elementwise_job){.y = y, .a = x, .alpha = alpha, .n = n});
}

ladd_status LADD_CPU(row_scale)(LADD_CTX, ladd_act *y, const ladd_act *x, const float *factor, int B, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_scale_task, B, (elementwise_job){.y = y, .a = x, .t = factor, .n = n});
}

ladd_status LADD_CPU(interpolate)(LADD_CTX, ladd_act *out, const ladd_act *x0, const ladd_act *noise, const float *t, int B, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_interpolate_task, B, (elementwise_job){.y = out, .a = x0, .b = noise, .t = t, .n = n});
}

ladd_status LADD_CPU(predict_x0)(LADD_CTX, ladd_act *x0, const ladd_act *x, const ladd_act *v, const float *t, int B, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_predict_x0_task, B, (elementwise_job){.y = x0, .a = x, .b = v, .t = t, .n = n});
}

ladd_status LADD_CPU(euler_step)(LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *v, float sigma, float sigma_next, int64_t n) {
    (void)ctx;
    return elementwise_run(elementwise_add_scaled_task, 1, (elementwise_job){.y = out, .a = x, .b = v, .alpha = sigma_next - sigma, .n = n});
}

/* ---- transpose ------------------------------------------------------------------------------------------------------- */

typedef struct elementwise_transpose_job {
    float *y;
    const float *x;
    int R, Q, bands; /* bands of ELEMENTWISE_BLOCK rows of x */
} elementwise_transpose_job;

static void elementwise_transpose_task(void *argument, int64_t task) {
    const elementwise_transpose_job *j = argument;
    ptrdiff_t sample = (ptrdiff_t)(task / j->bands) * j->R * j->Q;
    const float *x = j->x + sample;
    float *y = j->y + sample;
    int r0 = (int)(task % j->bands) * ELEMENTWISE_BLOCK, r1 = j->R - r0 < ELEMENTWISE_BLOCK ? j->R : r0 + ELEMENTWISE_BLOCK;
    for (int q0 = 0; q0 < j->Q; q0 += ELEMENTWISE_BLOCK) { /* a block of x and of y stay in the first-level cache */
        int q1 = j->Q - q0 < ELEMENTWISE_BLOCK ? j->Q : q0 + ELEMENTWISE_BLOCK;
        for (int q = q0; q < q1; q++)
            for (int r = r0; r < r1; r++) y[(ptrdiff_t)q * j->R + r] = x[(ptrdiff_t)r * j->Q + q];
    }
}

ladd_status LADD_CPU(transpose)(LADD_CTX, ladd_act *y, const ladd_act *x, int B, int R, int Q) {
    (void)ctx;
    if (B <= 0 || R <= 0 || Q <= 0) return LADD_OK;
    elementwise_transpose_job job = {y, x, R, Q, (R + ELEMENTWISE_BLOCK - 1) / ELEMENTWISE_BLOCK};
    ladd_parallel_work((int64_t)B * job.bands, (int64_t)B * R * Q, elementwise_transpose_task, &job);
    return LADD_OK;
}
