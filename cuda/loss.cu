/* Adversarial losses on logits; csrc/cpu/loss.c has the table of formulas. Values and slopes in double, as there: there are few logits, and saturated
 * ones must keep their digits. Two passes: blocks leave partial sums, one block adds them in a fixed order. */
#include "common.cuh"

enum { LOSS_ITEMS = 4, LOSS_SLOT = 0 };

/* Value of one logit; *slope is its derivative. A margin of NaN stays NaN in both. */
__device__ __forceinline__ double loss_of(double *slope, double l, ladd_loss loss, ladd_role role) {
    const double sign = role == LADD_ROLE_FAKE ? -1.0 : 1.0;
    if (loss == LADD_LOSS_LSGAN) {
        *slope = l - (role == LADD_ROLE_FAKE ? 0.0 : 1.0);
        return 0.5 * *slope * *slope;
    }
    if (loss != LADD_LOSS_HINGE) {
        const double x = -sign * l, e = exp(-fabs(x));
        *slope = -sign * (x > 0.0 ? 1.0 : e) / (1.0 + e);
        return (x > 0.0 ? x : 0.0) + log1p(e);
    }
    if (role == LADD_ROLE_GENERATOR) {
        *slope = -1.0;
        return -l;
    }
    const double margin = 1.0 - sign * l;
    *slope = margin <= 0.0 ? 0.0 : (margin == margin ? -sign : margin);
    return margin <= 0.0 ? 0.0 : margin;
}

/* partial[block] of blocks of LADD_BLOCK * LOSS_ITEMS logits; dlogits may be NULL. */
template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    loss_kernel(double *partial, T *dlogits, const T *logits, ladd_loss loss, ladd_role role, double factor, int64_t n) {
    __shared__ double shared[LADD_WARP];
    double sum[1] = {0.0};
    for (int k = 0; k < LOSS_ITEMS; k++) {
        const int64_t i = ((int64_t)blockIdx.x * LOSS_ITEMS + k) * LADD_BLOCK + threadIdx.x;
        if (i >= n) break;
        double slope;
        sum[0] += loss_of(&slope, (double)ladd_to_float(logits[i]), loss, role);
        if (dlogits) dlogits[i] = ladd_from_float<T>((float)(factor * slope));
    }
    ladd_block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(LADD_BLOCK) loss_mean_kernel(double *mean, const double *partial, int64_t count, int64_t n) {
    __shared__ double shared[LADD_WARP];
    double sum[1] = {0.0};
    for (int64_t i = threadIdx.x; i < count; i += LADD_BLOCK) sum[0] += partial[i];
    ladd_block_sum(sum, shared);
    if (threadIdx.x == 0) *mean = sum[0] / (double)n;
}

template <typename T>
static ladd_status loss_run(LADD_CTX, double *value, T *dlogits, const T *logits, ladd_loss loss, ladd_role role, float weight, int64_t n) {
    const int64_t blocks = ladd_ceil_div(n, LADD_BLOCK * LOSS_ITEMS);
    void *block;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, LOSS_SLOT, (size_t)(blocks + 1) * sizeof(double)));
    double *partial = static_cast<double *>(block), *mean = partial + blocks;
    LADD_TRY(
        LADD_LAUNCH(ctx, (loss_kernel<T>), (unsigned)blocks, LADD_BLOCK, 0, partial, dlogits, logits, loss, role, (double)weight / (double)n, n));
    LADD_TRY(LADD_LAUNCH(ctx, loss_mean_kernel, 1, LADD_BLOCK, 0, mean, partial, blocks, n));
    return ladd_cuda_result(ctx, value, mean, 1);
}

ladd_status LADD_CUDA(adversarial_loss)(LADD_CTX, double *value, ladd_act *dlogits, const ladd_act *logits, ladd_loss loss, ladd_role role,
                                        float weight, int64_t n) {
    if (n < 1) return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: at least 1 logit expected, got %lld", (long long)n);
    if ((int)loss < LADD_LOSS_HINGE || (int)loss > LADD_LOSS_BCE || (int)role < LADD_ROLE_REAL || (int)role > LADD_ROLE_GENERATOR)
        return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: loss 0..3 and role 0..2 expected, got %d and %d", (int)loss, (int)role);
    LADD_CUDA_DISPATCH(ctx, T, return loss_run(ctx, value, (T *)dlogits, (const T *)logits, loss, role, weight, n));
}
