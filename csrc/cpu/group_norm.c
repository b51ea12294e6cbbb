/* Group normalisation with optional fused SiLU. A task is one group of one sample; statistics take two passes (mean, then squared deviations), so
 * they keep their digits far from zero. Sums run in 16 lanes over blocks, and blocks are added in double, always in the same order. */
#include "cpu.h"

#include <math.h>

enum { GROUP_LANES = 16, GROUP_BLOCK = 4096, GROUP_SHARED = 3 };

static inline double group_lane_total(const float *lane) {
    float t[GROUP_LANES];
    for (int i = 0; i < GROUP_LANES; i++) t[i] = lane[i];
    for (int width = GROUP_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) t[i] += t[i + width];
    return t[0];
}

static double group_sum(const float *x, int64_t n) {
    double total = 0.0;
    for (int64_t at = 0; at < n; at += GROUP_BLOCK) {
        int64_t end = at + GROUP_BLOCK < n ? at + GROUP_BLOCK : n, i = at;
        float lane[GROUP_LANES] = {0};
        for (; i + GROUP_LANES <= end; i += GROUP_LANES)
            for (int k = 0; k < GROUP_LANES; k++) lane[k] += x[i + k];
        for (int k = 0; i < end; i++, k++) lane[k] += x[i];
        total += group_lane_total(lane);
    }
    return total;
}

static double group_sum_squares(const float *x, float mean, int64_t n) {
    double total = 0.0;
    for (int64_t at = 0; at < n; at += GROUP_BLOCK) {
        int64_t end = at + GROUP_BLOCK < n ? at + GROUP_BLOCK : n, i = at;
        float lane[GROUP_LANES] = {0};
        for (; i + GROUP_LANES <= end; i += GROUP_LANES)
            for (int k = 0; k < GROUP_LANES; k++) lane[k] += (x[i + k] - mean) * (x[i + k] - mean);
        for (int k = 0; i < end; i++, k++) lane[k] += (x[i] - mean) * (x[i] - mean);
        total += group_lane_total(lane);
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

ladd_status LADD_CPU(group_norm_forward)(LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *gamma, const ladd_act *beta,
                                         int B, int C, int L, int G, float eps, int silu) {
    (void)ctx;
    if (G < 1 || C % G) return ladd_fail(LADD_ERR_VALUE, "group norm: a number of channels divisible by its %d groups expected, got %d", G, C);
    group_job j = {.y = y, .mean = mean, .rstd = rstd, .x = x, .gamma = gamma, .beta = beta, .B = B, .C = C, .L = L, .G = G, .silu = silu, .eps = eps};
    ladd_parallel((int64_t)B * G, group_forward_task, &j);
    return LADD_OK;
}

/* One channel: dx = dv, the gradient before the activation; sums of dv and of dv times the normalised input. */
static void group_channel_backward(float *dx, float *sums, const float *dy, const float *x, float mean, float rstd, float gamma, float beta, int L,
                                   int silu) {
    double total = 0.0, total_x = 0.0;
    for (int at = 0; at < L; at += GROUP_BLOCK) {
        int end = L - at > GROUP_BLOCK ? at + GROUP_BLOCK : L, i = at;
        float lane[GROUP_LANES] = {0}, lane_x[GROUP_LANES] = {0};
        if (silu)
            for (i = at; i < end; i++) {
                float v = (x[i] - mean) * rstd * gamma + beta, s = 1.0f / (1.0f + ladd_expf(-v));
                dx[i] = dy[i] * s * (1.0f + v * (1.0f - s));
            }
        else
            for (i = at; i < end; i++) dx[i] = dy[i];
        for (i = at; i + GROUP_LANES <= end; i += GROUP_LANES)
            for (int k = 0; k < GROUP_LANES; k++) {
                lane[k] += dx[i + k];
                lane_x[k] += dx[i + k] * ((x[i + k] - mean) * rstd);
            }
        for (int k = 0; i < end; i++, k++) {
            lane[k] += dx[i];
            lane_x[k] += dx[i] * ((x[i] - mean) * rstd);
        }
        total += group_lane_total(lane);
        total_x += group_lane_total(lane_x);
    }
    sums[0] = (float)total;
    sums[1] = (float)total_x;
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
        group_channel_backward(dx + (int64_t)c * L, sums + 2 * c, dy + (int64_t)c * L, x + (int64_t)c * L, mean, rstd, gamma, j->beta[c0 + c], L, j->silu);
        mean_dv += (double)gamma * sums[2 * c];
        mean_dv_h += (double)gamma * sums[2 * c + 1];
    }
    float a = (float)(mean_dv / (double)n), b = (float)(mean_dv_h / (double)n);
    for (int c = 0; c < per_group; c++, x += L, dx += L) {
        float gamma = j->gamma[c0 + c];
        for (int i = 0; i < L; i++) dx[i] = rstd * (gamma * dx[i] - a - (x[i] - mean) * rstd * b);
    }
}

ladd_status LADD_CPU(group_norm_backward)(LADD_CTX, ladd_act *dx, float *dgamma, float *dbeta, const ladd_act *dy, const ladd_act *x, const float *mean,
                                          const float *rstd, const ladd_act *gamma, const ladd_act *beta, int B, int C, int L, int G, int silu) {
    (void)ctx;
    if (G < 1 || C % G) return ladd_fail(LADD_ERR_VALUE, "group norm: a number of channels divisible by its %d groups expected, got %d", G, C);
    float *sums = ladd_scratch(GROUP_SHARED, (size_t)B * (size_t)C * 2 * sizeof(float));
    if (!sums) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the sums of a group norm over %d samples and %d channels", B, C);
    group_job j = {.dx = dx, .sums = sums, .x = x, .dy = dy, .mean = (float *)(uintptr_t)mean, .rstd = (float *)(uintptr_t)rstd,
                   .gamma = gamma, .beta = beta, .B = B, .C = C, .L = L, .G = G, .silu = silu};
    ladd_parallel((int64_t)B * G, group_backward_task, &j);
    for (int b = 0; b < B; b++)
        for (int c = 0; c < C; c++) {
            const float *s = sums + 2 * ((int64_t)b * C + c);
            if (dbeta) dbeta[c] += s[0];
            if (dgamma) dgamma[c] += s[1];
        }
    return LADD_OK;
}
