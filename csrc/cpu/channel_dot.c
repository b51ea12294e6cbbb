/* One vector a sample against the channels of an image: the last layer of a discriminator head, whose weight depends on the condition. */
#include "cpu.h"

enum { CHANNEL_DOT_SPAN = 512, CHANNEL_DOT_GROUP = 16, CHANNEL_DOT_LANES = 16 };

typedef struct channel_dot_job {
    float *y, *dx, *de;
    const float *x, *e, *bias, *dy;
    int C, L;
    int64_t parts; /* tasks of one sample */
} channel_dot_job;

static void channel_dot_forward_task(void *argument, int64_t i) {
    const channel_dot_job *job = argument;
    int64_t b = i / job->parts;
    int start = (int)(i % job->parts) * CHANNEL_DOT_SPAN, count = job->L - start < CHANNEL_DOT_SPAN ? job->L - start : CHANNEL_DOT_SPAN;
    float sum[CHANNEL_DOT_SPAN];
    for (int l = 0; l < count; l++) sum[l] = *job->bias;
    for (int c = 0; c < job->C; c++) {
        const float *x = job->x + (b * job->C + c) * job->L + start;
        float e = job->e[b * job->C + c];
        for (int l = 0; l < count; l++) sum[l] += e * x[l];
    }
    for (int l = 0; l < count; l++) job->y[b * job->L + start + l] = sum[l];
}

static void channel_dot_backward_task(void *argument, int64_t i) {
    const channel_dot_job *job = argument;
    int64_t b = i / job->parts;
    int start = (int)(i % job->parts) * CHANNEL_DOT_GROUP, end = start + CHANNEL_DOT_GROUP < job->C ? start + CHANNEL_DOT_GROUP : job->C;
    const float *dy = job->dy + b * job->L;
    for (int c = start; c < end; c++) {
        int64_t row = b * job->C + c;
        if (job->dx) {
            float *dx = job->dx + row * job->L, e = job->e[row];
            for (int l = 0; l < job->L; l++) dx[l] = e * dy[l];
        }
        if (job->de) {
            const float *x = job->x + row * job->L;
            float lane[CHANNEL_DOT_LANES] = {0}, sum = 0.0f;
            int l = 0;
            for (; l + CHANNEL_DOT_LANES <= job->L; l += CHANNEL_DOT_LANES)
                for (int j = 0; j < CHANNEL_DOT_LANES; j++) lane[j] += x[l + j] * dy[l + j];
            for (int j = 0; l < job->L; l++, j++) lane[j] += x[l] * dy[l];
            for (int j = 0; j < CHANNEL_DOT_LANES; j++) sum += lane[j];
            job->de[row] = sum;
        }
    }
}

ladd_status LADD_CPU(channel_dot_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *e, const ladd_act *bias, int B, int C, int L) {
    (void)ctx;
    channel_dot_job job = {.y = y, .x = x, .e = e, .bias = bias, .C = C, .L = L, .parts = ((int64_t)L + CHANNEL_DOT_SPAN - 1) / CHANNEL_DOT_SPAN};
    ladd_parallel_work(B * job.parts, (int64_t)B * C * L, channel_dot_forward_task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(channel_dot_backward)(LADD_CTX, ladd_act *dx, ladd_act *de, float *dbias, const ladd_act *dy, const ladd_act *x,
                                           const ladd_act *e, int B, int C, int L) {
    (void)ctx;
    channel_dot_job job = {
        .dx = dx, .de = de, .x = x, .e = e, .dy = dy, .C = C, .L = L, .parts = ((int64_t)C + CHANNEL_DOT_GROUP - 1) / CHANNEL_DOT_GROUP};
    ladd_parallel_work(B * job.parts, (int64_t)B * C * L, channel_dot_backward_task, &job);
    if (dbias) {
        double sum = 0.0;
        for (int64_t i = 0; i < (int64_t)B * L; i++) sum += dy[i];
        *dbias += (float)sum;
    }
    return LADD_OK;
}
