/* Group normalisation with optional fused SiLU. A task is one group of one sample; statistics take two passes (mean, then squared deviations), so
 * they keep their digits far from zero. Sums run in 16 lanes over blocks, and blocks are added in double, always in the same order. */
#include "cpu.h"

#include <math.h>

enum { GROUP_BLOCK = 4096, GROUP_SHARED = 3 };

static inline int64_t group_block(int64_t n, int64_t at) { return n - at < GROUP_BLOCK ? n - at : GROUP_BLOCK; }

static double group_sum(const float *x, int64_t n) {
    double total = 0.0;
    for (int64_t at = 0; at < n; at += GROUP_BLOCK) total += ladd_sum(x + at, group_block(n, at));
    return total;
}

static double group_sum_squares(const float *x, float mean, int64_t n) {
    double total = 0.0;
    for (int64_t at = 0; at < n; at += GROUP_BLOCK) {
        const float *p = x + at;
        int64_t count = group_block(n, at), i = 0;
        ladd_v16 lanes = {0};
        for (; i + 16 <= count; i += 16) {
            ladd_v16 d = LADD_V16(p + i) - mean;
            lanes += d * d;
        }
        for (int k = 0; i < count; i++, k++) lanes[k] += (p[i] - mean) * (p[i] - mean);
        total += ladd_fold16(&lanes);
    }
    return total;
}

typedef struct group_job {
    float *y, *mean, *rstd, *dx, *sums; /* sums[B,C,2]: of dv and of dv times the normalised input */
    const float *x, *dy, *gamma, *beta;
    int B, C, L, G, silu;
    float eps;
} group_job;

static void group_forward_task(void *argument, int64_t bg) {
    const group_job *j = argument;
    int per_group = j->C / j->G, c0 = (int)(bg % j->G) * per_group;
    int64_t n = (int64_t)per_group * j->L;
    const float *x = j->x + bg * n;
    float *y = j->y + bg * n;
    float mean = (float)(group_sum(x, n) / (double)n);
    float rstd = (float)(1.0 / sqrt(group_sum_squares(x, mean, n) / (double)n + (double)j->eps));
    j->mean[bg] = mean;
    j->rstd[bg] = rstd;
    for (int c = 0; c < per_group; c++, x += j->L, y += j->L) {
        float scale = rstd * j->gamma[c0 + c], shift = j->beta[c0 + c];
        if (j->silu)
            for (int i = 0; i < j->L; i++) {
                float v = (x[i] - mean) * scale + shift;
                y[i] = v / (1.0f + ladd_expf(-v));
            }
        else
            for (int i = 0; i < j->L; i++) y[i] = (x[i] - mean) * scale + shift;
    }
}

ladd_status LADD_CPU(group_norm_forward)(LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *gamma,
                                         const ladd_act *beta, int B, int C, int L, int G, float eps, int silu) {
    (void)ctx;
    if (G < 1 || C % G) return ladd_fail(LADD_ERR_VALUE, "group norm: a number of channels divisible by its %d groups expected, got %d", G, C);
    group_job j = {
        .y = y, .mean = mean, .rstd = rstd, .x = x, .gamma = gamma, .beta = beta, .B = B, .C = C, .L = L, .G = G, .silu = silu, .eps = eps};
    ladd_parallel((int64_t)B * G, group_forward_task, &j);
    return LADD_OK;
}

/* One channel: dx = dv, the gradient before the activation; sums of dv and of dv times the normalised input. */
static void group_channel_backward(float *dx, float *sums, const float *dy, const float *x, float mean, float rstd, float gamma, float beta, int L,
                                   int silu) {
    double total = 0.0, total_x = 0.0;
    for (int64_t at = 0; at < L; at += GROUP_BLOCK) {
        int64_t count = group_block(L, at), i = 0;
        float *d = dx + at;
        const float *p = x + at, *g = dy + at;
        if (silu)
            for (int64_t k = 0; k < count; k++) {
                float v = (p[k] - mean) * rstd * gamma + beta, s = 1.0f / (1.0f + ladd_expf(-v));
                d[k] = g[k] * s * (1.0f + v * (1.0f - s));
            }
        else
            for (int64_t k = 0; k < count; k++) d[k] = g[k];
        ladd_v16 lanes = {0};
        for (; i + 16 <= count; i += 16) lanes += LADD_V16(d + i) * (LADD_V16(p + i) - mean);
        for (int k = 0; i < count; i++, k++) lanes[k] += d[i] * (p[i] - mean);
        total += ladd_sum(d, count);
        total_x += ladd_fold16(&lanes);
    }
    sums[0] = (float)total;
    sums[1] = (float)(total_x * (double)rstd);
}

/* With h = (x - mean) rstd, v = h gamma + beta: dx = rstd (gamma dv - mean(gamma dv) - h mean(gamma dv h)), means over the group. */
static void group_backward_task(void *argument, int64_t bg) {
    const group_job *j = argument;
    int per_group = j->C / j->G, c0 = (int)(bg % j->G) * per_group, L = j->L;
    int64_t n = (int64_t)per_group * L;
    const float *x = j->x + bg * n, *dy = j->dy + bg * n;
    float *dx = j->dx + bg * n, *sums = j->sums + bg * per_group * 2, mean = j->mean[bg], rstd = j->rstd[bg];
    double mean_dv = 0.0, mean_dv_h = 0.0;
    for (int c = 0; c < per_group; c++) {
        float gamma = j->gamma[c0 + c];
        group_channel_backward(dx + (int64_t)c * L, sums + 2 * c, dy + (int64_t)c * L, x + (int64_t)c * L, mean, rstd, gamma, j->beta[c0 + c], L,
                               j->silu);
        mean_dv += (double)gamma * sums[2 * c];
        mean_dv_h += (double)gamma * sums[2 * c + 1];
    }
    float a = (float)(mean_dv / (double)n), b = (float)(mean_dv_h / (double)n);
    for (int c = 0; c < per_group; c++, x += L, dx += L) {
        float gamma = j->gamma[c0 + c];
        for (int i = 0; i < L; i++) dx[i] = rstd * (gamma * dx[i] - a - (x[i] - mean) * rstd * b);
    }
}

ladd_status LADD_CPU(group_norm_backward)(LADD_CTX, ladd_act *dx, float *dgamma, float *dbeta, const ladd_act *dy, const ladd_act *x,
                                          const float *mean, const float *rstd, const ladd_act *gamma, const ladd_act *beta, int B, int C, int L,
                                          int G, int silu) {
    (void)ctx;
    if (G < 1 || C % G) return ladd_fail(LADD_ERR_VALUE, "group norm: a number of channels divisible by its %d groups expected, got %d", G, C);
    float *sums = ladd_scratch(GROUP_SHARED, (size_t)B * (size_t)C * 2 * sizeof(float));
    if (!sums) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the sums of a group norm over %d samples and %d channels", B, C);
    group_job j = {.dx = dx,
                   .sums = sums,
                   .x = x,
                   .dy = dy,
                   .mean = (float *)(uintptr_t)mean,
                   .rstd = (float *)(uintptr_t)rstd,
                   .gamma = gamma,
                   .beta = beta,
                   .B = B,
                   .C = C,
                   .L = L,
                   .G = G,
                   .silu = silu};
    ladd_parallel((int64_t)B * G, group_backward_task, &j);
    for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++) {
            const float *s = sums + 2 * ((int64_t)b * C + c);
            if (dbeta) dbeta[c] += s[0];
            if (dgamma) dgamma[c] += s[1];
        }
    return LADD_OK;
}
