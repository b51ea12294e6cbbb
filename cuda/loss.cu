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

/* partial[block, 3] (losses, logits, logits beyond the margin) of blocks of LADD_BLOCK * LOSS_ITEMS logits; dlogits may be NULL. */
template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    loss_kernel(double *partial, T *dlogits, const T *logits, ladd_loss loss, ladd_role role, double factor, int64_t n) {
    __shared__ double shared[3 * LADD_WARP];
    const double sign = role == LADD_ROLE_FAKE ? -1.0 : 1.0;
    double sum[3] = {0.0, 0.0, 0.0};
    for (int k = 0; k < LOSS_ITEMS; k++) {
        const int64_t i = ((int64_t)blockIdx.x * LOSS_ITEMS + k) * LADD_BLOCK + threadIdx.x;
        if (i >= n) break;
        double slope;
        const double l = (double)ladd_to_float(logits[i]);
        sum[0] += loss_of(&slope, l, loss, role);
        sum[1] += l;
        sum[2] += sign * l > 1.0 ? 1.0 : 0.0;
        if (dlogits) dlogits[i] = ladd_from_float<T>((float)(factor * slope));
    }
    ladd_block_sum(sum, shared);
    if (threadIdx.x < 3) partial[(int64_t)blockIdx.x * 3 + threadIdx.x] = threadIdx.x == 0 ? sum[0] : (threadIdx.x == 1 ? sum[1] : sum[2]);
}

__global__ void __launch_bounds__(LADD_BLOCK) loss_mean_kernel(double *means, const double *partial, int64_t count, int64_t n) {
    __shared__ double shared[3 * LADD_WARP];
    double sum[3] = {0.0, 0.0, 0.0};
    for (int64_t i = threadIdx.x; i < count; i += LADD_BLOCK) {
        sum[0] += partial[3 * i];
        sum[1] += partial[3 * i + 1];
        sum[2] += partial[3 * i + 2];
    }
    ladd_block_sum(sum, shared);
    if (threadIdx.x < 3) means[threadIdx.x] = (threadIdx.x == 0 ? sum[0] : (threadIdx.x == 1 ? sum[1] : sum[2])) / (double)n;
}

template <typename T>
static ladd_status loss_run(LADD_CTX, double *values, T *dlogits, const T *logits, ladd_loss loss, ladd_role role, float weight, int64_t n) {
    const int64_t blocks = ladd_ceil_div(n, LADD_BLOCK * LOSS_ITEMS);
    void *block;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, LOSS_SLOT, (size_t)blocks * 3 * sizeof(double)));
    double *partial = static_cast<double *>(block);
    LADD_TRY(
        LADD_LAUNCH(ctx, (loss_kernel<T>), (unsigned)blocks, LADD_BLOCK, 0, partial, dlogits, logits, loss, role, (double)weight / (double)n, n));
    return LADD_LAUNCH(ctx, loss_mean_kernel, 1, LADD_BLOCK, 0, values, partial, blocks, n);
}

ladd_status LADD_CUDA(adversarial_loss)(LADD_CTX, double *values, ladd_act *dlogits, const ladd_act *logits, ladd_loss loss, ladd_role role,
                                        float weight, int64_t n) {
    if (n < 1) return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: at least 1 logit expected, got %lld", (long long)n);
    if ((int)loss < LADD_LOSS_HINGE || (int)loss > LADD_LOSS_BCE || (int)role < LADD_ROLE_REAL || (int)role > LADD_ROLE_GENERATOR)
        return ladd_fail(LADD_ERR_VALUE, "adversarial_loss: loss 0..3 and role 0..2 expected, got %d and %d", (int)loss, (int)role);
    LADD_CUDA_DISPATCH(ctx, T, return loss_run(ctx, values, (T *)dlogits, (const T *)logits, loss, role, weight, n));
}
