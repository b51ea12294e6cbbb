/* Patches, position table, timestep features. */
#include <math.h>

#include "cpu.h"

/* One task moves one row of tokens of one sample, either way. */
typedef struct patch_job {
    float *image_out, *tokens_out; /* the one of the two that is written */
    const float *image, *tokens;   /* the one that is read */
    int C, H, W, p, h, w, channel_last;
} patch_job;

static void patch_task(void *argument, int64_t task) {
    const patch_job *j = argument;
    int p = j->p, D = j->C * p * p, r = (int)(task % j->h);
    int64_t b = task / j->h;
    ptrdiff_t first_token = (ptrdiff_t)task * j->w * D;
    int channel_step = j->channel_last ? 1 : p * p, pixel_step = j->channel_last ? j->C : 1;
    for (int c = 0; c < j->C; c++)
        for (int dy = 0; dy < p; dy++) {
            ptrdiff_t pixels = ((b * j->C + c) * j->H + r * p + dy) * j->W, token = first_token + c * channel_step + dy * p * pixel_step;
            if (j->tokens_out)
                for (int q = 0; q < j->w; q++)
                    for (int dx = 0; dx < p; dx++) j->tokens_out[token + (ptrdiff_t)q * D + dx * pixel_step] = j->image[pixels + q * p + dx];
            else {
                for (int q = 0; q < j->w; q++)
                    for (int dx = 0; dx < p; dx++) j->image_out[pixels + q * p + dx] = j->tokens[token + (ptrdiff_t)q * D + dx * pixel_step];
                for (int q = j->w * p; q < j->W; q++) j->image_out[pixels + q] = 0.0f;
            }
        }
    if (j->image_out && r == j->h - 1)
        for (int c = 0; c < j->C; c++)
            for (ptrdiff_t i = (ptrdiff_t)j->h * p * j->W; i < (ptrdiff_t)j->H * j->W; i++)
                j->image_out[(b * j->C + c) * (ptrdiff_t)j->H * j->W + i] = 0.0f;
}

static ladd_status patch_run(patch_job job, int B) {
    if (job.p < 1 || job.p > job.H || job.p > job.W)
        return ladd_fail(LADD_ERR_VALUE, "a patch size between 1 and the image's %d x %d expected, got %d", job.H, job.W, job.p);
    job.h = job.H / job.p;
    job.w = job.W / job.p;
    ladd_parallel_work((int64_t)B * job.h, (int64_t)B * job.C * job.H * job.W, patch_task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(patch_gather)(LADD_CTX, ladd_act *tokens, const ladd_act *image, int B, int C, int H, int W, int p, int channel_last) {
    (void)ctx;
    return patch_run((patch_job){.tokens_out = tokens, .image = image, .C = C, .H = H, .W = W, .p = p, .channel_last = channel_last}, B);
}

ladd_status LADD_CPU(patch_scatter)(LADD_CTX, ladd_act *image, const ladd_act *tokens, int B, int C, int H, int W, int p, int channel_last) {
    (void)ctx;
    return patch_run((patch_job){.image_out = image, .tokens = tokens, .C = C, .H = H, .W = W, .p = p, .channel_last = channel_last}, B);
}

/* ---- position table -------------------------------------------------------------------------------------------------- */

typedef struct patch_position_job {
    float *x;
    const float *table;
    int h, w, max, D;
} patch_position_job;

static void patch_position_task(void *argument, int64_t task) {
    const patch_position_job *j = argument;
    int top = (j->max - j->h) / 2, left = (j->max - j->w) / 2, r = (int)(task % j->h);
    ptrdiff_t n = (ptrdiff_t)j->w * j->D;
    float *x = j->x + (ptrdiff_t)task * n;
    const float *row = j->table + ((ptrdiff_t)(top + r) * j->max + left) * j->D;
#pragma GCC ivdep
    for (ptrdiff_t i = 0; i < n; i++) x[i] += row[i];
}

ladd_status LADD_CPU(add_position)(LADD_CTX, ladd_act *x, const ladd_act *table, int B, int h, int w, int max, int D) {
    (void)ctx;
    if (h < 1 || w < 1 || h > max || w > max)
        return ladd_fail(LADD_ERR_VALUE, "a token grid of at most %d x %d (the position table) expected, got %d x %d", max, max, h, w);
    patch_position_job job = {x, table, h, w, max, D};
    ladd_parallel_work((int64_t)B * h, (int64_t)B * h * w * D, patch_position_task, &job);
    return LADD_OK;
}

/* ---- timestep features ----------------------------------------------------------------------------------------------- */

/* Near t = 1000 one unit in the last place of a frequency moves a feature by 6e-5, so the rounding steps are those that match PyTorch best: exponent
 * in float, exp in double rounded to float, product in float, sine and cosine in double. */
ladd_status LADD_CPU(timestep_features)(LADD_CTX, ladd_act *f, const float *sigma, int B, int dim) {
    (void)ctx;
    if (dim < 2 || dim % 2) return ladd_fail(LADD_ERR_VALUE, "an even number of timestep features expected, got %d", dim);
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float exponent = -9.210340371976184f * (float)i;
        exponent /= (float)half;
        float frequency = (float)exp((double)exponent);
        for (int b = 0; b < B; b++) {
            float t = sigma[b] * 1000.0f, a = t * frequency;
            f[(ptrdiff_t)b * dim + i] = (float)cos((double)a);
            f[(ptrdiff_t)b * dim + half + i] = (float)sin((double)a);
        }
    }
    return LADD_OK;
}
