/* AdamW, squared norm and moving average over flat buffers of floats. Every product and sum is rounded by itself (the _rn functions are not
 * contracted), as on the CPU: so a step gives the CPU's bits. */
#include "common.cuh"

#include <cmath>

#include "../csrc/adamw.h"
#include "../csrc/philox.h"

/* ---- AdamW ----------------------------------------------------------------------------------------------------------- */

typedef struct adamw_numbers {
    float beta1, rest1, beta2, rest2, eps, keep, step_size, root_correction, grad_scale;
} adamw_numbers;

/* Numbers of the step that lie on the device, and how the result is rounded. */
typedef struct adamw_options {
    const float *control; /* [4] or NULL */
    int rounded;
    ladd_rng_key key;
} adamw_options;

__device__ __forceinline__ void adamw_element(float &p, float &m, float &v, float g, const adamw_numbers &a) {
    const float d = __fmul_rn(g, a.grad_scale);
    m = __fadd_rn(__fmul_rn(a.beta1, m), __fmul_rn(a.rest1, d)); /* d itself where beta1 and m are 0 */
    v = __fadd_rn(__fmul_rn(a.beta2, v), __fmul_rn(a.rest2, __fmul_rn(d, d)));
    const float below = __fadd_rn(__fmul_rn(__fsqrt_rn(v), a.root_correction), a.eps);
    p = __fsub_rn(__fmul_rn(a.keep, p), __fmul_rn(a.step_size, __fdiv_rn(m, below)));
}

/* p[V], elements first, first + 1, ... of the buffer, to bfloat16; V is 4 with first a multiple of it, or 1. */
template <int V>
__device__ __forceinline__ void adamw_round(float (&p)[V], int64_t first, const ladd_rng_key &rng) {
    uint32_t key[2];
    ladd_philox_key(key, rng);
    const uint64_t block = (uint64_t)first / 4;
    const ladd_philox_words w = ladd_philox((uint32_t)block, (uint32_t)(block >> 32), 0, 0, key[0], key[1]);
#pragma unroll
    for (int j = 0; j < V; j++) {
        const int word = V == 4 ? j : (int)(first % 4);
        p[j] = ladd_round_bfloat16(p[j], word == 0 ? w.x[0] : (word == 1 ? w.x[1] : (word == 2 ? w.x[2] : w.x[3])));
    }
}

/* m may be NULL where beta1 is 0. */
template <int V>
__global__ void __launch_bounds__(LADD_BLOCK)
    adamw_kernel(float *p, float *m, float *v, const float *g, int64_t n, adamw_numbers a, adamw_options options) {
    const int64_t i = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V;
    if (options.control) {
        a.keep = options.control[0], a.step_size = options.control[1], a.root_correction = options.control[2], a.grad_scale = options.control[3];
        if (!isfinite(a.grad_scale)) return;
    }
    if (i + V <= n) {
        float vp[V], vm[V] = {}, vv[V], vg[V];
        ladd_load<float, V>(vp, p + i);
        if (m) ladd_load<float, V>(vm, m + i);
        ladd_load<float, V>(vv, v + i);
        ladd_load<float, V>(vg, g + i);
#pragma unroll
        for (int j = 0; j < V; j++) adamw_element(vp[j], vm[j], vv[j], vg[j], a);
        if (options.rounded) adamw_round<V>(vp, i, options.key);
        ladd_store<float, V>(p + i, vp);
        if (m) ladd_store<float, V>(m + i, vm);
        ladd_store<float, V>(v + i, vv);
    } else {
#pragma unroll 1
        for (int64_t j = i; j < n; j++) {
            float first = m ? m[j] : 0.0f;
            adamw_element(p[j], first, v[j], g[j], a);
            if (m) m[j] = first;
            if (options.rounded) {
                float one[1] = {p[j]};
                adamw_round<1>(one, j, options.key);
                p[j] = one[0];
            }
        }
    }
}

ladd_status LADD_CUDA(adamw)(LADD_CTX, float *p, float *m, float *v, const float *g, int64_t n, float lr, float beta1, float beta2, float eps,
                             float weight_decay, int64_t step, float grad_scale, const float *control, const ladd_rng_key *rounding) {
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
    float given[3];
    ladd_adamw_control(given, (double)lr, (double)weight_decay, (double)beta1, (double)beta2, (double)step);
    const adamw_numbers a = {beta1, (float)(1.0 - (double)beta1), beta2, (float)(1.0 - (double)beta2), eps, given[0], given[1], given[2], grad_scale};
    const adamw_options options = {control, rounding != nullptr, rounding ? *rounding : ladd_rng_key{}};
    if (ladd_aligned16(p, m, v, g))
        return LADD_LAUNCH(ctx, adamw_kernel<4>, (unsigned)ladd_ceil_div(n, LADD_BLOCK * 4), LADD_BLOCK, 0, p, m, v, g, n, a, options);
    return LADD_LAUNCH(ctx, adamw_kernel<1>, (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, p, m, v, g, n, a, options);
}

/* ---- norm and clip, decided here: the host does not wait for them ---------------------------------------------------------- */

__global__ void clip_factor_kernel(float *factor, double *norm, double *failed, double *done, const double *squares, int n, const double *checked,
                                   int m, double max_norm, int who) {
    double sum = 0.0;
    for (int i = 0; i < n; i++) sum += squares[i];
    const double length = sqrt(sum);
    bool finite = isfinite(length);
    for (int i = 0; i < m; i++) finite = finite && isfinite(checked[i]);
    if (!finite && failed[0] == 0.0) failed[0] = who, failed[1] = length;
    const bool good = failed[0] == 0.0;
    *norm = length;
    *factor = !good ? __int_as_float(0x7FC00000) : (max_norm > 0.0 && length > max_norm ? (float)(max_norm / length) : 1.0f);
    *done += good ? 1.0 : 0.0;
}

ladd_status LADD_CUDA(clip_factor)(LADD_CTX, float *factor, double *norm, double *failed, double *done, const double *squares, int n,
                                   const double *checked, int m, double max_norm, int who) {
    return LADD_LAUNCH(ctx, clip_factor_kernel, 1, 1, 0, factor, norm, failed, done, squares, n, checked, m, max_norm, who);
}

__global__ void r1_factors_kernel(float *factors, double *penalty, const double *sums, float weight, float epsilon, float scale) {
    const double h = sums[0] != 0.0 ? (double)epsilon * sqrt(sums[1] / sums[0]) : 0.0;
    const float step = (float)h, slope = h != 0.0 ? (float)((double)weight / h) : 0.0f;
    factors[0] = step, factors[1] = -step, factors[2] = slope, factors[3] = -slope;
    *penalty += (double)scale * sums[0];
}

ladd_status LADD_CUDA(r1_factors)(LADD_CTX, float *factors, double *penalty, const double *sums, float weight, float epsilon, float scale) {
    return LADD_LAUNCH(ctx, r1_factors_kernel, 1, 1, 0, factors, penalty, sums, weight, epsilon, scale);
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
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, 0, sizeof(double) * (size_t)blocks));
    double *parts = (double *)scratch;
    LADD_TRY(LADD_LAUNCH(ctx, sum_squares_kernel<V>, (unsigned)blocks, LADD_BLOCK, 0, parts, x, n));
    return LADD_LAUNCH(ctx, sum_doubles_kernel, 1, LADD_BLOCK, 0, sum, parts, blocks);
}

ladd_status LADD_CUDA(sum_squares)(LADD_CTX, double *sum, const float *x, int64_t n) {
    if (n <= 0) {
        LADD_CUDA_TRY(ctx, cudaMemsetAsync(sum, 0, sizeof *sum, ladd_cuda(ctx)->stream));
        return LADD_OK;
    }
    return ladd_aligned16(x) ? sum_squares<4>(ctx, sum, x, n) : sum_squares<1>(ctx, sum, x, n);
}

/* ---- moving average -------------------------------------------------------------------------------------------------- */

struct ema_op {
    static constexpr bool READS_Y = true;
    float decay, rest;
    const float *control; /* or NULL */
    __device__ float operator()(float p, float, float e) const {
        const float keep = control ? control[0] : decay, take = control ? (float)(1.0 - (double)keep) : rest;
        return control && !isfinite(control[1]) ? e : __fadd_rn(__fmul_rn(keep, e), __fmul_rn(take, p));
    }
};

ladd_status LADD_CUDA(ema)(LADD_CTX, float *e, const float *p, float decay, int64_t n, const float *control) {
    if (!(decay >= 0.0f && decay <= 1.0f)) return ladd_fail(LADD_ERR_VALUE, "ema: a decay in [0, 1] expected, got %g", (double)decay);
    return ladd_map(ctx, e, p, (const float *)nullptr, n, ema_op{decay, (float)(1.0 - (double)decay), control});
}
