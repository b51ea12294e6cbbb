/* AdamW, squared norm and moving average over flat buffers of floats. Every product and sum is rounded by itself (the _rn functions are not
 * contracted), as on the CPU: so a step gives the CPU's bits. */
#include "common.cuh"

#include <cmath>

/* ---- AdamW ----------------------------------------------------------------------------------------------------------- */

typedef struct adamw_numbers {
    float beta1, rest1, beta2, rest2, eps, keep, step_size, root_correction, grad_scale;
} adamw_numbers;

__device__ __forceinline__ void adamw_element(float &p, float &m, float &v, float g, const adamw_numbers &a) {
    const float d = __fmul_rn(g, a.grad_scale);
    m = __fadd_rn(__fmul_rn(a.beta1, m), __fmul_rn(a.rest1, d)); /* d itself where beta1 and m are 0 */
    v = __fadd_rn(__fmul_rn(a.beta2, v), __fmul_rn(a.rest2, __fmul_rn(d, d)));
    const float below = __fadd_rn(__fmul_rn(__fsqrt_rn(v), a.root_correction), a.eps);
    p = __fsub_rn(__fmul_rn(a.keep, p), __fmul_rn(a.step_size, __fdiv_rn(m, below)));
}

/* m may be NULL where beta1 is 0. */
template <int V>
__global__ void __launch_bounds__(LADD_BLOCK) adamw_kernel(float *p, float *m, float *v, const float *g, int64_t n, adamw_numbers a) {
    const int64_t i = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V;
    if (i + V <= n) {
        float vp[V], vm[V] = {}, vv[V], vg[V];
        ladd_load<float, V>(vp, p + i);
        if (m) ladd_load<float, V>(vm, m + i);
        ladd_load<float, V>(vv, v + i);
        ladd_load<float, V>(vg, g + i);
#pragma unroll
        for (int j = 0; j < V; j++) adamw_element(vp[j], vm[j], vv[j], vg[j], a);
        ladd_store<float, V>(p + i, vp);
        if (m) ladd_store<float, V>(m + i, vm);
        ladd_store<float, V>(v + i, vv);
    } else {
#pragma unroll 1
        for (int64_t j = i; j < n; j++) {
            float first = m ? m[j] : 0.0f;
            adamw_element(p[j], first, v[j], g[j], a);
            if (m) m[j] = first;
        }
    }
}

ladd_status LADD_CUDA(adamw)(LADD_CTX, float *p, float *m, float *v, const float *g, int64_t n, float lr, float beta1, float beta2, float eps,
                             float weight_decay, int64_t step, float grad_scale) {
    if (step < 1) return ladd_fail(LADD_ERR_VALUE, "adamw: a step of at least 1 expected, got %lld", (long long)step);
    if (!(beta1 >= 0.0f && beta1 < 1.0f && beta2 >= 0.0f && beta2 < 1.0f))
        return ladd_fail(LADD_ERR_VALUE, "adamw: betas in [0, 1) expected, got %g and %g", (double)beta1, (double)beta2);
    if (!m && beta1 > 0.0f) return ladd_fail(LADD_ERR_VALUE, "adamw: a first moment m expected, for beta1 is %g and not 0, got none", (double)beta1);
    if (!(eps > 0.0f)) return ladd_fail(LADD_ERR_VALUE, "adamw: a positive eps expected, got %g", (double)eps);
    if (!std::isfinite(lr) || !std::isfinite(weight_decay) || !std::isfinite(grad_scale))
        return ladd_fail(LADD_ERR_VALUE, "adamw: finite lr, weight_decay and grad_scale expected, got %g, %g and %g", (double)lr,
                         (double)weight_decay, (double)grad_scale);
    if (n <= 0) return LADD_OK;
    /* m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps), its constants folded in double */
    const double correction1 = 1.0 - pow(beta1, (double)step), correction2 = 1.0 - pow(beta2, (double)step);
    const adamw_numbers a = {beta1,
                             (float)(1.0 - (double)beta1),
                             beta2,
                             (float)(1.0 - (double)beta2),
                             eps,
                             (float)(1.0 - (double)lr * (double)weight_decay),
                             (float)((double)lr / correction1),
                             (float)(1.0 / sqrt(correction2)),
                             grad_scale};
    if (ladd_aligned16(p, m, v, g))
        return LADD_LAUNCH(ctx, adamw_kernel<4>, (unsigned)ladd_ceil_div(n, LADD_BLOCK * 4), LADD_BLOCK, 0, p, m, v, g, n, a);
    return LADD_LAUNCH(ctx, adamw_kernel<1>, (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, p, m, v, g, n, a);
}

/* ---- squared norm ---------------------------------------------------------------------------------------------------- */

enum { SUM_ROUNDS = 16 };

/* A block adds SUM_ROUNDS runs of LADD_BLOCK * V elements in double. */
template <int V>
__global__ void __launch_bounds__(LADD_BLOCK) sum_squares_kernel(double *parts, const float *x, int64_t n) {
    __shared__ double shared[LADD_WARP];
    const int64_t first = ((int64_t)blockIdx.x * SUM_ROUNDS * LADD_BLOCK + threadIdx.x) * V;
    double sum[1] = {0.0};
#pragma unroll 4
    for (int round = 0; round < SUM_ROUNDS; round++) {
        const int64_t i = first + (int64_t)round * LADD_BLOCK * V;
        if (i + V <= n) {
            float v[V];
            ladd_load<float, V>(v, x + i);
#pragma unroll
            for (int j = 0; j < V; j++) sum[0] += (double)v[j] * (double)v[j];
        } else {
#pragma unroll 1
            for (int64_t j = i; j < n; j++) sum[0] += (double)x[j] * (double)x[j];
        }
    }
    ladd_block_sum<1>(sum, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(LADD_BLOCK) sum_doubles_kernel(double *total, const double *parts, int64_t n) {
    __shared__ double shared[LADD_WARP];
    double sum[1] = {0.0};
    for (int64_t i = threadIdx.x; i < n; i += LADD_BLOCK) sum[0] += parts[i];
    ladd_block_sum<1>(sum, shared);
    if (threadIdx.x == 0) *total = sum[0];
}

template <int V>
static ladd_status sum_squares(LADD_CTX, double *sum, const float *x, int64_t n) {
    const int64_t blocks = ladd_ceil_div(n, (int64_t)SUM_ROUNDS * LADD_BLOCK * V);
    void *scratch;
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, 0, sizeof(double) * (size_t)(blocks + 1)));
    double *total = (double *)scratch, *parts = total + 1;
    LADD_TRY(LADD_LAUNCH(ctx, sum_squares_kernel<V>, (unsigned)blocks, LADD_BLOCK, 0, parts, x, n));
    LADD_TRY(LADD_LAUNCH(ctx, sum_doubles_kernel, 1, LADD_BLOCK, 0, total, parts, blocks));
    return ladd_cuda_result(ctx, sum, total, 1);
}

ladd_status LADD_CUDA(sum_squares)(LADD_CTX, double *sum, const float *x, int64_t n) {
    *sum = 0.0;
    if (n <= 0) return LADD_OK;
    return ladd_aligned16(x) ? sum_squares<4>(ctx, sum, x, n) : sum_squares<1>(ctx, sum, x, n);
}

/* ---- moving average -------------------------------------------------------------------------------------------------- */

struct ema_op {
    static constexpr bool READS_Y = true;
    float decay, rest;
    __device__ float operator()(float p, float, float e) const { return __fadd_rn(__fmul_rn(decay, e), __fmul_rn(rest, p)); }
};

ladd_status LADD_CUDA(ema)(LADD_CTX, float *e, const float *p, float decay, int64_t n) {
    if (!(decay >= 0.0f && decay <= 1.0f)) return ladd_fail(LADD_ERR_VALUE, "ema: a decay in [0, 1] expected, got %g", (double)decay);
    return ladd_map(ctx, e, p, (const float *)nullptr, n, ema_op{decay, (float)(1.0 - (double)decay)});
}
