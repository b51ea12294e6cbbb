/* Adversarial losses on logits.
 *
 *   loss       real                 fake              generator
 *   hinge      max(0, 1 - l)        max(0, 1 + l)     -l
 *   logistic   softplus(-l)         softplus(l)       softplus(-l)      (Goodfellow et al. 2014, non-saturating)
 *   bce        the same function as logistic: binary cross entropy of sigmoid(l) with target 1 for real and generator, 0 for fake
 *   lsgan      (l - 1)^2 / 2        l^2 / 2           (l - 1)^2 / 2     (Mao et al. 2017, equation 9)
 */
#include <math.h>

#include "cpu.h"

enum { LOSS_CHUNK = 2048 };

typedef struct loss_job {
    double *partial; /* [chunks, 3]: losses, logits, logits beyond the margin */
    float *d;
    const float *l;
    int64_t n;
    double factor; /* weight / n */
    ladd_loss loss;
    ladd_role role;
} loss_job;

/* A margin of NaN stays NaN in value and gradient: `x <= 0` is false for it. */
static inline double loss_hinge(double *slope, double l, double sign) {
    double margin = 1.0 - sign * l;
    *slope = margin <= 0.0 ? 0.0 : (margin == margin ? -sign : margin);
    return margin <= 0.0 ? 0.0 : margin;
}

/* softplus(-sign l) = log(1 + exp(-sign l)), without overflow for any l. */
static inline double loss_softplus(double *slope, double l, double sign) {
    double x = -sign * l, e = exp(-fabs(x)); /* e in (0, 1] */
    *slope = -sign * (x > 0.0 ? 1.0 : e) / (1.0 + e);
    return (x > 0.0 ? x : 0.0) + log1p(e);
}

static inline double loss_square(double *slope, double l, double target) {
    *slope = l - target;
    return 0.5 * *slope * *slope;
}

static void loss_task(void *argument, int64_t i) {
    const loss_job *job = argument;
    int64_t start = i * LOSS_CHUNK, end = start + LOSS_CHUNK < job->n ? start + LOSS_CHUNK : job->n;
    double sum = 0.0, logits = 0.0, sign = job->role == LADD_ROLE_FAKE ? -1.0 : 1.0;
    int64_t beyond = 0;
    for (int64_t j = start; j < end; j++) {
        double l = job->l[j], slope = -1.0, value = -l;
        if (job->loss == LADD_LOSS_LSGAN)
            value = loss_square(&slope, l, job->role == LADD_ROLE_FAKE ? 0.0 : 1.0);
        else if (job->loss != LADD_LOSS_HINGE)
            value = loss_softplus(&slope, l, sign);
        else if (job->role != LADD_ROLE_GENERATOR)
            value = loss_hinge(&slope, l, sign);
        sum += value;
        logits += l;
        beyond += sign * l > 1.0;
        if (job->d) job->d[j] = (float)(job->factor * slope);
    }
    job->partial[3 * i] = sum;
    job->partial[3 * i + 1] = logits;
    job->partial[3 * i + 2] = (double)beyond;
}

ladd_status LADD_CPU(adversarial_loss)(LADD_CTX, double *values, ladd_act *dlogits, const ladd_act *logits, ladd_loss loss, ladd_role role,
                                       float weight, int64_t n) {
    (void)ctx;
    if (n < 1) return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: at least 1 logit expected, got %lld", (long long)n);
    if ((int)loss < LADD_LOSS_HINGE || (int)loss > LADD_LOSS_BCE || (int)role < LADD_ROLE_REAL || (int)role > LADD_ROLE_GENERATOR)
        return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: loss 0..3 and role 0..2 expected, got %d and %d", (int)loss, (int)role);
    int64_t chunks = (n + LOSS_CHUNK - 1) / LOSS_CHUNK;
    loss_job job = {ladd_scratch(3, 3 * (size_t)chunks * sizeof(double)), dlogits, logits, n, (double)weight / (double)n, loss, role};
    if (!job.partial) return ladd_fail(LADD_ERR_MEMORY, "out of memory for %lld partial sums", (long long)chunks);
    ladd_parallel(chunks, loss_task, &job);
    for (int k = 0; k < 3; k++) {
        double sum = 0.0;
        for (int64_t i = 0; i < chunks; i++) sum += job.partial[3 * i + k];
        values[k] = sum / (double)n;
    }
    return LADD_OK;
}
