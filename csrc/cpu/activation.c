/* Elementwise activations. NaN gives NaN; at plus and minus infinity the limits of the functions. */
#include "cpu.h"

enum { ACTIVATION_CHUNK = 16384 };

/* The slopes are taken for any x and replaced by their limits where |x| is so large that they are 0 or 1 to the last bit: 0 * inf could arise. */
static inline float activation_gelu_slope(float x) {
    float s = 1.0f / (1.0f + ladd_expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
    float slope = s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
    return ladd_select(x > 10.0f, 1.0f, ladd_select(x < -10.0f, 0.0f, slope));
}
static inline float activation_silu(float x) {
    float y = x / (1.0f + ladd_expf(-x));
    return ladd_select(x < -86.0f, 0.0f, y);
}
static inline float activation_silu_slope(float x) {
    float s = 1.0f / (1.0f + ladd_expf(-x));
    float slope = s * (1.0f + x * (1.0f - s));
    return ladd_select(x > 86.0f, 1.0f, ladd_select(x < -86.0f, 0.0f, slope));
}

typedef struct activation_job {
    float *y;
    const float *x, *dy;
    float slope;
    int64_t n;
} activation_job;

/* Defines the task `name` that sets y[i] to `value` for its chunk; in it: j the job, x and dy its inputs. y may be x or dy. */
#define ACTIVATION_TASK(name, value)                                          \
    static void name(void *argument, int64_t chunk) {                         \
        const activation_job *j = argument;                                   \
        int64_t from = chunk * ACTIVATION_CHUNK, left = j->n - from;          \
        int count = (int)(left < ACTIVATION_CHUNK ? left : ACTIVATION_CHUNK); \
        float *y = j->y + from;                                               \
        const float *x = j->x + from, *dy = j->dy ? j->dy + from : NULL;      \
        float slope = j->slope;                                               \
        (void)dy, (void)slope;                                                \
        _Pragma("GCC ivdep") for (int i = 0; i < count; i++) y[i] = (value);  \
    }
ACTIVATION_TASK(activation_gelu_task, ladd_gelu(x[i]))
ACTIVATION_TASK(activation_gelu_grad_task, dy[i] * activation_gelu_slope(x[i]))
ACTIVATION_TASK(activation_silu_task, activation_silu(x[i]))
ACTIVATION_TASK(activation_silu_grad_task, dy[i] * activation_silu_slope(x[i]))
ACTIVATION_TASK(activation_leaky_relu_task, x[i] > 0.0f ? x[i] : slope * x[i])
ACTIVATION_TASK(activation_leaky_relu_grad_task, x[i] > 0.0f ? dy[i] : slope * dy[i])
#undef ACTIVATION_TASK

static ladd_status activation_run(void (*task)(void *, int64_t), activation_job job) {
    ladd_parallel_work((job.n + ACTIVATION_CHUNK - 1) / ACTIVATION_CHUNK, job.n, task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(gelu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) {
    (void)ctx;
    return activation_run(activation_gelu_task, (activation_job){.y = y, .x = x, .n = n});
}

ladd_status LADD_CPU(gelu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n) {
    (void)ctx;
    return activation_run(activation_gelu_grad_task, (activation_job){.y = dx, .x = x, .dy = dy, .n = n});
}

ladd_status LADD_CPU(silu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) {
    (void)ctx;
    return activation_run(activation_silu_task, (activation_job){.y = y, .x = x, .n = n});
}

ladd_status LADD_CPU(silu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n) {
    (void)ctx;
    return activation_run(activation_silu_grad_task, (activation_job){.y = dx, .x = x, .dy = dy, .n = n});
}

ladd_status LADD_CPU(leaky_relu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, float slope, int64_t n) {
    (void)ctx;
    return activation_run(activation_leaky_relu_task, (activation_job){.y = y, .x = x, .slope = slope, .n = n});
}

ladd_status LADD_CPU(leaky_relu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, float slope, int64_t n) {
    (void)ctx;
    return activation_run(activation_leaky_relu_grad_task, (activation_job){.y = dx, .x = x, .dy = dy, .slope = slope, .n = n});
}
