/* Linear layers: matrix products cut into tiles by shape, with bias and activation applied to a tile while it is in cache. */
#include "gemm.h"

static void linear_task(void *argument, int64_t i) { gemm_task(argument, i); }

static ladd_status linear_memory(void) { return ladd_fail(LADD_ERR_MEMORY, "out of memory for the work space of a linear layer"); }

static ladd_status linear_run(float *y, float *h, const float *x, const float *w, const float *bias, int M, int N, int K) {
    if (M <= 0 || N <= 0) return LADD_OK;
    gemm_product p = {.c = h ? h : y,
                      .c_row = N,
                      .a = x,
                      .a_row = K,
                      .a_step = 1,
                      .b = w,
                      .b_step = 1,
                      .b_column = K,
                      .bias = bias,
                      .gelu = h ? y : NULL,
                      .M = M,
                      .N = N,
                      .K = K};
    gemm_plan(&p);
    gemm_share(&p, NULL);
    ladd_parallel(gemm_tasks(&p), linear_task, &p);
    return atomic_load(&p.failed) ? linear_memory() : LADD_OK;
}

ladd_status LADD_CPU(linear_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M, int N, int K_) {
    (void)ctx;
    return linear_run(y, NULL, x, w, bias, M, N, K_);
}

ladd_status LADD_CPU(linear_gelu_forward)(LADD_CTX, ladd_act *y, ladd_act *h, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M,
                                          int N, int K_) {
    (void)ctx;
    return linear_run(y, h, x, w, bias, M, N, K_);
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

enum { LINEAR_BIAS_COLUMNS = 64, LINEAR_BIAS_ROWS = 64 };

typedef struct linear_grad_job {
    gemm_product dx, dw;
    float *dbias;
    const float *dy;
    int M, N;
    int64_t dw_tasks, dx_tasks;
} linear_grad_job;

/* dbias[n0:n0+n] += column sums of dy, in runs of LINEAR_BIAS_ROWS rows so that thousands of rows do not lose digits. */
static void linear_bias_columns(const linear_grad_job *j, int n0, int n) {
    float total[LINEAR_BIAS_COLUMNS] = {0};
    for (int m0 = 0; m0 < j->M; m0 += LINEAR_BIAS_ROWS) {
        int m1 = j->M - m0 < LINEAR_BIAS_ROWS ? j->M : m0 + LINEAR_BIAS_ROWS;
        if (n == LINEAR_BIAS_COLUMNS) {
            ladd_v16 a = {0}, b = {0}, c = {0}, d = {0};
            for (int m = m0; m < m1; m++) {
                const float *row = j->dy + (ptrdiff_t)m * j->N + n0;
                a += LADD_V16(row);
                b += LADD_V16(row + 16);
                c += LADD_V16(row + 32);
                d += LADD_V16(row + 48);
            }
            for (int l = 0; l < 16; l++) {
                total[l] += a[l];
                total[16 + l] += b[l];
                total[32 + l] += c[l];
                total[48 + l] += d[l];
            }
        } else {
            float run[LINEAR_BIAS_COLUMNS] = {0};
            for (int m = m0; m < m1; m++) {
                const float *row = j->dy + (ptrdiff_t)m * j->N + n0;
                for (int l = 0; l < n; l++) run[l] += row[l];
            }
            for (int l = 0; l < n; l++) total[l] += run[l];
        }
    }
    for (int l = 0; l < n; l++) j->dbias[n0 + l] += total[l];
}

static void linear_grad_task(void *argument, int64_t i) {
    linear_grad_job *j = argument;
    if (i < j->dw_tasks) {
        gemm_task(&j->dw, i);
        return;
    }
    i -= j->dw_tasks;
    if (i < j->dx_tasks) {
        gemm_task(&j->dx, i);
        return;
    }
    int n0 = (int)(i - j->dx_tasks) * LINEAR_BIAS_COLUMNS;
    linear_bias_columns(j, n0, j->N - n0 < LINEAR_BIAS_COLUMNS ? j->N - n0 : LINEAR_BIAS_COLUMNS);
}

/* The three results are independent, so their tasks share one job: no thread idles between them. */
ladd_status LADD_CPU(linear_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                      int M, int N, int K_) {
    (void)ctx;
    if (M <= 0 || N <= 0) return LADD_OK;
    linear_grad_job job = {.dbias = dbias, .dy = dy, .M = M, .N = N};
    if (dw) { /* dw[N,K] += dy[M,N]^T x[M,K] */
        job.dw = (gemm_product){
            .c = dw, .c_row = K_, .a = dy, .a_row = 1, .a_step = N, .b = x, .b_step = K_, .b_column = 1, .M = N, .N = K_, .K = M, .add = 1};
        gemm_plan(&job.dw);
        job.dw_tasks = gemm_tasks(&job.dw);
    }
    if (dx) { /* dx[M,K] = dy[M,N] w[N,K] */
        job.dx = (gemm_product){.c = dx, .c_row = K_, .a = dy, .a_row = N, .a_step = 1, .b = w, .b_step = K_, .b_column = 1, .M = M, .N = K_, .K = N};
        gemm_plan(&job.dx);
        job.dx_tasks = gemm_tasks(&job.dx);
    }
    gemm_share(dx ? &job.dx : NULL, dw ? &job.dw : NULL);
    int64_t bias_tasks = dbias ? (N + LINEAR_BIAS_COLUMNS - 1) / LINEAR_BIAS_COLUMNS : 0;
    ladd_parallel_work(job.dw_tasks + job.dx_tasks + bias_tasks, (int64_t)M * N + (int64_t)M * K_ + (int64_t)N * K_, linear_grad_task, &job);
    return (dw && atomic_load(&job.dw.failed)) || (dx && atomic_load(&job.dx.failed)) ? linear_memory() : LADD_OK;
}
