/* Linear layers. The product is cut into tiles by shape, and bias and activation are applied to a tile while it is still in cache. */
#include "cpu.h"

typedef struct linear_job {
    float *y, *h; /* h: the product before GELU, or NULL for a plain linear layer */
    const float *x, *w, *bias;
    int M, N, K;
    ladd_cut cut;
} linear_job;

static void linear_task(void *argument, int64_t i) {
    const linear_job *j = argument;
    int m0, n0, m, n;
    ladd_cut_tile(&j->cut, i, j->M, j->N, &m0, &n0, &m, &n);
    ptrdiff_t at = (ptrdiff_t)m0 * j->N + n0;
    float *product = (j->h ? j->h : j->y) + at;
    ladd_sgemm(0, 1, m, n, j->K, 1.0f, j->x + (ptrdiff_t)m0 * j->K, j->K, j->w + (ptrdiff_t)n0 * j->K, j->K, 0.0f, product, j->N);
    const float *bias = j->bias ? j->bias + n0 : NULL;
    for (int r = 0; r < m; r++) {
        float *p = product + (ptrdiff_t)r * j->N;
        if (bias) {
#pragma GCC ivdep
            for (int c = 0; c < n; c++) p[c] += bias[c];
        }
        if (j->h) {
            float *y = j->y + at + (ptrdiff_t)r * j->N;
#pragma GCC ivdep
            for (int c = 0; c < n; c++) y[c] = ladd_gelu(p[c]);
        }
    }
}

static void linear_run(float *y, float *h, const float *x, const float *w, const float *bias, int M, int N, int K) {
    if (M <= 0 || N <= 0) return;
    linear_job job = {y, h, x, w, bias, M, N, K, ladd_gemm_cut(M, N, K)};
    ladd_parallel((int64_t)job.cut.n_m * job.cut.n_n, linear_task, &job);
}

ladd_status LADD_CPU(linear_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M, int N, int K_) {
    (void)ctx;
    linear_run(y, NULL, x, w, bias, M, N, K_);
    return LADD_OK;
}

ladd_status LADD_CPU(linear_gelu_forward)(LADD_CTX, ladd_act *y, ladd_act *h, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M,
                                          int N, int K_) {
    (void)ctx;
    linear_run(y, h, x, w, bias, M, N, K_);
    return LADD_OK;
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

enum { LINEAR_BIAS_COLUMNS = 64, LINEAR_BIAS_ROWS = 64 };

typedef struct linear_grad_job {
    float *dx, *dw, *dbias;
    const float *dy, *x, *w;
    int M, N, K;
    ladd_cut dx_cut, dw_cut;
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
    const linear_grad_job *j = argument;
    int m0, n0, m, n;
    if (i < j->dw_tasks) { /* dw[N,K] += dy[M,N]^T x[M,K] */
        ladd_cut_tile(&j->dw_cut, i, j->N, j->K, &m0, &n0, &m, &n);
        ladd_sgemm(1, 0, m, n, j->M, 1.0f, j->dy + m0, j->N, j->x + n0, j->K, 1.0f, j->dw + (ptrdiff_t)m0 * j->K + n0, j->K);
        return;
    }
    i -= j->dw_tasks;
    if (i < j->dx_tasks) { /* dx[M,K] = dy[M,N] w[N,K] */
        ladd_cut_tile(&j->dx_cut, i, j->M, j->K, &m0, &n0, &m, &n);
        ladd_sgemm(0, 0, m, n, j->N, 1.0f, j->dy + (ptrdiff_t)m0 * j->N, j->N, j->w + n0, j->K, 0.0f, j->dx + (ptrdiff_t)m0 * j->K + n0, j->K);
        return;
    }
    n0 = (int)(i - j->dx_tasks) * LINEAR_BIAS_COLUMNS;
    linear_bias_columns(j, n0, j->N - n0 < LINEAR_BIAS_COLUMNS ? j->N - n0 : LINEAR_BIAS_COLUMNS);
}

/* The three results are independent, so their tasks share one job: no thread idles between them. */
ladd_status LADD_CPU(linear_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                      int M, int N, int K_) {
    (void)ctx;
    if (M <= 0 || N <= 0) return LADD_OK;
    linear_grad_job job = {.dx = dx, .dw = dw, .dbias = dbias, .dy = dy, .x = x, .w = w, .M = M, .N = N, .K = K_};
    if (dw) {
        job.dw_cut = ladd_gemm_cut(N, K_, M);
        job.dw_tasks = (int64_t)job.dw_cut.n_m * job.dw_cut.n_n;
    }
    if (dx) {
        job.dx_cut = ladd_gemm_cut(M, K_, N);
        job.dx_tasks = (int64_t)job.dx_cut.n_m * job.dx_cut.n_n;
    }
    int64_t bias_tasks = dbias ? (N + LINEAR_BIAS_COLUMNS - 1) / LINEAR_BIAS_COLUMNS : 0;
    ladd_parallel_work(job.dw_tasks + job.dx_tasks + bias_tasks, (int64_t)M * N + (int64_t)M * K_ + (int64_t)N * K_, linear_grad_task, &job);
    return LADD_OK;
}
