/* Spectral normalisation (Miyato et al. 2018): w_hat = w / sigma with sigma = |w^T u|, u the running estimate of w's first left singular vector.
 * With v = w^T u / |w^T u|, sigma = u^T w v, and its gradient for fixed u is exactly u v^T. */
#include <math.h>

#include "cpu.h"

enum { SPECTRAL_COLUMNS = 256, SPECTRAL_ROWS = 16, SPECTRAL_LANES = 16 };

typedef struct spectral_job {
    float *out, *u, *v;
    double *partial;
    const float *w, *dw_hat;
    float scale, along; /* 1/sigma; sum dw_hat w_hat */
    int R, K;
} spectral_job;

/* v[columns of this task] = w^T u */
static void spectral_columns_task(void *argument, int64_t i) {
    const spectral_job *job = argument;
    int start = (int)i * SPECTRAL_COLUMNS, count = job->K - start < SPECTRAL_COLUMNS ? job->K - start : SPECTRAL_COLUMNS;
    float sum[SPECTRAL_COLUMNS] = {0};
    for (int r = 0; r < job->R; r++) {
        const float *w = job->w + (int64_t)r * job->K + start;
        float u = job->u[r];
        for (int k = 0; k < count; k++) sum[k] += u * w[k];
    }
    for (int k = 0; k < count; k++) job->v[start + k] = sum[k];
}

static float spectral_dot(const float *a, const float *b, int n) {
    float lane[SPECTRAL_LANES] = {0}, sum = 0.0f;
    int k = 0;
    for (; k + SPECTRAL_LANES <= n; k += SPECTRAL_LANES)
        for (int l = 0; l < SPECTRAL_LANES; l++) lane[l] += a[k + l] * b[k + l];
    for (int l = 0; k < n; k++, l++) lane[l] += a[k] * b[k];
    for (int l = 0; l < SPECTRAL_LANES; l++) sum += lane[l];
    return sum;
}

/* u[rows of this task] = w v */
static void spectral_rows_task(void *argument, int64_t i) {
    const spectral_job *job = argument;
    int start = (int)i * SPECTRAL_ROWS, end = start + SPECTRAL_ROWS < job->R ? start + SPECTRAL_ROWS : job->R;
    for (int r = start; r < end; r++) job->u[r] = spectral_dot(job->w + (int64_t)r * job->K, job->v, job->K);
}

static void spectral_scale_task(void *argument, int64_t i) {
    const spectral_job *job = argument;
    int64_t start = i * SPECTRAL_ROWS * job->K, all = (int64_t)job->R * job->K;
    int64_t end = start + (int64_t)SPECTRAL_ROWS * job->K < all ? start + (int64_t)SPECTRAL_ROWS * job->K : all;
    for (int64_t j = start; j < end; j++) job->out[j] = job->w[j] * job->scale;
}

static void spectral_along_task(void *argument, int64_t i) {
    const spectral_job *job = argument;
    int start = (int)i * SPECTRAL_ROWS, end = start + SPECTRAL_ROWS < job->R ? start + SPECTRAL_ROWS : job->R;
    double sum = 0.0;
    for (int r = start; r < end; r++) sum += spectral_dot(job->dw_hat + (int64_t)r * job->K, job->w + (int64_t)r * job->K, job->K);
    job->partial[i] = sum;
}

static void spectral_gradient_task(void *argument, int64_t i) {
    const spectral_job *job = argument;
    int start = (int)i * SPECTRAL_ROWS, end = start + SPECTRAL_ROWS < job->R ? start + SPECTRAL_ROWS : job->R;
    for (int r = start; r < end; r++) {
        const float *d = job->dw_hat + (int64_t)r * job->K;
        float *out = job->out + (int64_t)r * job->K, row = job->along * job->u[r];
        for (int k = 0; k < job->K; k++) out[k] += (d[k] - row * job->v[k]) * job->scale;
    }
}

/* x /= |x|; returns |x| */
static double spectral_normalize(float *x, int n) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double norm = sqrt(sum);
    float inverse = norm > 0.0 ? (float)(1.0 / norm) : 0.0f;
    for (int i = 0; i < n; i++) x[i] *= inverse;
    return norm;
}

ladd_status LADD_CPU(spectral_norm_forward)(LADD_CTX, ladd_act *w_hat, float *u, float *v, float *sigma, const float *w, int R, int K_,
                                            int iterations) {
    (void)ctx;
    if (R < 1 || K_ < 1 || iterations < 0)
        return ladd_fail(LADD_ERR_VALUE, "spectral_norm: a matrix of at least 1 x 1 and iterations of at least 0 expected, got %d x %d and %d", R, K_,
                         iterations);
    spectral_job job = {.out = w_hat, .u = u, .v = v, .w = w, .R = R, .K = K_};
    int64_t columns = ((int64_t)K_ + SPECTRAL_COLUMNS - 1) / SPECTRAL_COLUMNS, rows = ((int64_t)R + SPECTRAL_ROWS - 1) / SPECTRAL_ROWS;
    double norm = 0.0;
    for (int i = 0; i <= iterations; i++) {
        ladd_parallel_work(columns, (int64_t)R * K_, spectral_columns_task, &job);
        norm = spectral_normalize(v, K_);
        if (!(norm > 0.0 && norm < 3e38))
            return ladd_fail(LADD_ERR_VALUE, "spectral_norm: a finite weight[%d, %d] that is not zero along u expected, got |w^T u| = %g", R, K_,
                             norm);
        if (i == iterations) break;
        ladd_parallel_work(rows, (int64_t)R * K_, spectral_rows_task, &job);
        spectral_normalize(u, R);
    }
    *sigma = (float)norm;
    job.scale = (float)(1.0 / norm);
    ladd_parallel_work(rows, (int64_t)R * K_, spectral_scale_task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(spectral_norm_backward)(LADD_CTX, float *dw, const float *dw_hat, const ladd_act *w_hat, const float *u, const float *v,
                                             const float *sigma, int R, int K_) {
    (void)ctx;
    int64_t rows = ((int64_t)R + SPECTRAL_ROWS - 1) / SPECTRAL_ROWS;
    spectral_job job = {.out = dw, .w = w_hat, .dw_hat = dw_hat, .scale = 1.0f / *sigma, .R = R, .K = K_};
    job.u = (float *)(uintptr_t)u; /* only read here */
    job.v = (float *)(uintptr_t)v;
    job.partial = ladd_scratch(3, (size_t)rows * sizeof(double));
    if (!job.partial) return ladd_fail(LADD_ERR_MEMORY, "out of memory for %lld partial sums", (long long)rows);
    ladd_parallel_work(rows, (int64_t)R * K_, spectral_along_task, &job);
    double along = 0.0;
    for (int64_t i = 0; i < rows; i++) along += job.partial[i];
    job.along = (float)along;
    ladd_parallel_work(rows, (int64_t)R * K_, spectral_gradient_task, &job);
    return LADD_OK;
}
