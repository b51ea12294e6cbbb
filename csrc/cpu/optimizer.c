/* AdamW, squared norm and moving average over flat buffers. */
#include "../adamw.h"
#include "../philox.h"
#include "cpu.h"

/* As in random.c: no contraction, so that a training run does not depend on the instruction set here. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

enum { OPTIMIZER_CHUNK = 32768, OPTIMIZER_LANES = 16 };

static int64_t optimizer_chunks(int64_t n) { return (n + OPTIMIZER_CHUNK - 1) / OPTIMIZER_CHUNK; }
static int64_t optimizer_end(int64_t start, int64_t n) { return start + OPTIMIZER_CHUNK < n ? start + OPTIMIZER_CHUNK : n; }

typedef struct optimizer_adamw_job {
    float *p, *m, *v;
    const float *g;
    int64_t n;
    float beta1, rest1, beta2, rest2, eps, keep, step_size, root_correction, grad_scale;
    int rounded;
    uint32_t key[2];
} optimizer_adamw_job;

static void optimizer_adamw_task(void *argument, int64_t i) {
    const optimizer_adamw_job job = *(const optimizer_adamw_job *)argument; /* a copy: the stores below cannot alias it */
    int64_t start = i * OPTIMIZER_CHUNK, count = optimizer_end(start, job.n) - start;
    float *restrict p = job.p + start, *restrict v = job.v + start;
    const float *restrict g = job.g + start;
    float *restrict m = job.m ? job.m + start : NULL; /* job.m may be NULL: then beta1 is 0 and d itself is the first moment */
    for (int64_t j = 0; job.m && j < count; j++) {
        float d = g[j] * job.grad_scale;
        m[j] = job.beta1 * m[j] + job.rest1 * d;
        v[j] = job.beta2 * v[j] + job.rest2 * (d * d);
        p[j] = job.keep * p[j] - job.step_size * (m[j] / (sqrtf(v[j]) * job.root_correction + job.eps));
    }
    for (int64_t j = 0; !job.m && j < count; j++) {
        float d = g[j] * job.grad_scale;
        v[j] = job.beta2 * v[j] + job.rest2 * (d * d);
        p[j] = job.keep * p[j] - job.step_size * (d / (sqrtf(v[j]) * job.root_correction + job.eps));
    }
    for (int64_t j = 0; job.rounded && j < count; j += 4) { /* start is a multiple of 4 */
        uint64_t block = (uint64_t)(start + j) / 4;
        ladd_philox_words w = ladd_philox((uint32_t)block, (uint32_t)(block >> 32), 0, 0, job.key[0], job.key[1]);
        for (int l = 0; l < 4 && j + l < count; l++) p[j + l] = ladd_round_bfloat16(p[j + l], w.x[l]);
    }
}

ladd_status LADD_CPU(adamw)(LADD_CTX, float *p, float *m, float *v, const float *g, int64_t n, float lr, float beta1, float beta2, float eps,
                            float weight_decay, int64_t step, float grad_scale, const float *control, const ladd_rng_key *rounding) {
    (void)ctx;
    if (step < 1) return ladd_fail(LADD_ERR_VALUE, "adamw: a step of at least 1 expected, got %lld", (long long)step);
    if (!(beta1 >= 0.0f && beta1 < 1.0f && beta2 >= 0.0f && beta2 < 1.0f))
        return ladd_fail(LADD_ERR_VALUE, "adamw: betas in [0, 1) expected, got %g and %g", (double)beta1, (double)beta2);
    if (!m && beta1 > 0.0f) return ladd_fail(LADD_ERR_VALUE, "adamw: a first moment m expected, for beta1 is %g and not 0, got none", (double)beta1);
    if (!(eps > 0.0f)) return ladd_fail(LADD_ERR_VALUE, "adamw: a positive eps expected, got %g", (double)eps);
    if (!isfinite(lr) || !isfinite(weight_decay) || !isfinite(grad_scale))
        return ladd_fail(LADD_ERR_VALUE, "adamw: finite lr, weight_decay and grad_scale expected, got %g, %g and %g", (double)lr,
                         (double)weight_decay, (double)grad_scale);
    /* m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps), its constants folded in double */
    float given[4];
    ladd_adamw_control(given, (double)lr, (double)weight_decay, (double)beta1, (double)beta2, (double)step);
    given[3] = grad_scale;
    if (!control) control = given;
    if (!isfinite(control[3])) return LADD_OK;
    optimizer_adamw_job job = {p,
                               m,
                               v,
                               g,
                               n,
                               beta1,
                               (float)(1.0 - (double)beta1),
                               beta2,
                               (float)(1.0 - (double)beta2),
                               eps,
                               control[0],
                               control[1],
                               control[2],
                               control[3],
                               rounding != NULL,
                               {0, 0}};
    if (rounding) ladd_philox_key(job.key, *rounding);
    ladd_parallel(optimizer_chunks(n), optimizer_adamw_task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(clip_factor)(LADD_CTX, float *factor, double *norm, double *failed, double *done, const double *squares, int n,
                                  const double *checked, int m, double max_norm, int who) {
    (void)ctx;
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += squares[i];
    *norm = sqrt(sum);
    int finite = isfinite(*norm);
    for (int i = 0; i < m; i++) finite &= isfinite(checked[i]) != 0;
    if (!finite && failed[0] == 0.0) failed[0] = who, failed[1] = *norm;
    *factor = failed[0] != 0.0 ? NAN : (max_norm > 0.0 && *norm > max_norm ? (float)(max_norm / *norm) : 1.0f);
    *done += failed[0] == 0.0;
    return LADD_OK;
}

ladd_status LADD_CPU(r1_factors)(LADD_CTX, float *factors, double *penalty, const double *sums, float weight, float epsilon, float scale) {
    (void)ctx;
    double h = sums[0] != 0.0 ? (double)epsilon * sqrt(sums[1] / sums[0]) : 0.0;
    factors[0] = (float)h;
    factors[1] = -factors[0];
    factors[2] = h != 0.0 ? (float)((double)weight / h) : 0.0f;
    factors[3] = -factors[2];
    *penalty += (double)scale * sums[0];
    return LADD_OK;
}

typedef struct optimizer_sum_job {
    double *partial; /* [chunks] */
    const float *x;
    int64_t n;
} optimizer_sum_job;

static void optimizer_sum_task(void *argument, int64_t i) {
    const optimizer_sum_job *job = argument;
    int64_t j = i * OPTIMIZER_CHUNK, end = optimizer_end(j, job->n);
    const float *x = job->x;
    double lane[OPTIMIZER_LANES] = {0}, sum = 0.0; /* a fixed number of lanes, whatever the vector width */
    for (; j + OPTIMIZER_LANES <= end; j += OPTIMIZER_LANES)
        for (int l = 0; l < OPTIMIZER_LANES; l++) lane[l] += (double)x[j + l] * (double)x[j + l];
    for (int l = 0; j < end; j++, l++) lane[l] += (double)x[j] * (double)x[j];
    for (int l = 0; l < OPTIMIZER_LANES; l++) sum += lane[l];
    job->partial[i] = sum;
}

ladd_status LADD_CPU(sum_squares)(LADD_CTX, double *sum, const float *x, int64_t n) {
    (void)ctx;
    int64_t chunks = optimizer_chunks(n);
    *sum = 0.0;
    if (n <= 0) return LADD_OK;
    optimizer_sum_job job = {ladd_scratch(3, (size_t)chunks * sizeof(double)), x, n};
    if (!job.partial) return ladd_fail(LADD_ERR_MEMORY, "out of memory for %lld partial sums", (long long)chunks);
    ladd_parallel(chunks, optimizer_sum_task, &job);
    for (int64_t i = 0; i < chunks; i++) *sum += job.partial[i];
    return LADD_OK;
}

typedef struct optimizer_ema_job {
    float *e;
    const float *p;
    int64_t n;
    float decay, rest;
} optimizer_ema_job;

static void optimizer_ema_task(void *argument, int64_t i) {
    const optimizer_ema_job job = *(const optimizer_ema_job *)argument;
    int64_t start = i * OPTIMIZER_CHUNK, count = optimizer_end(start, job.n) - start;
    float *restrict e = job.e + start;
    const float *restrict p = job.p + start;
    for (int64_t j = 0; j < count; j++) e[j] = job.decay * e[j] + job.rest * p[j];
}

ladd_status LADD_CPU(ema)(LADD_CTX, float *e, const float *p, float decay, int64_t n, const float *control) {
    (void)ctx;
    if (control && !isfinite(control[1])) return LADD_OK;
    if (control) decay = control[0];
    if (!(decay >= 0.0f && decay <= 1.0f)) return ladd_fail(LADD_ERR_VALUE, "ema: a decay in [0, 1] expected, got %g", (double)decay);
    optimizer_ema_job job = {e, p, n, decay, (float)(1.0 - (double)decay)};
    ladd_parallel(optimizer_chunks(n), optimizer_ema_task, &job);
    return LADD_OK;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
