/* Nearest-neighbour upsampling by two and its gradient. A thread has 16 bytes of the smaller image's row, so 32 bytes of each of two rows of the
 * larger. */
#include "common.cuh"

/* rows: of all planes of the smaller image. V 1 where rows do not hold whole vectors. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) resample_up_kernel(T *y, const T *x, int64_t rows, int W) {
    const int64_t i = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x, row = i / (W / V);
    const int c = (int)(i % (W / V)) * V;
    if (row >= rows) return;
    float in[V], out[2 * V];
    ladd_load<T, V>(in, x + row * W + c);
#pragma unroll
    for (int j = 0; j < 2 * V; j++) out[j] = in[j / 2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        T *to = y + (2 * row + r) * 2 * W + 2 * c;
        if constexpr (V > 1) {
            ladd_store<T, 2 * V>(to, out);
        } else {
            to[0] = to[1] = ladd_from_float<T>(out[0]);
        }
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) resample_down_kernel(T *dx, const T *dy, int64_t rows, int W) {
    const int64_t i = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x, row = i / (W / V);
    const int c = (int)(i % (W / V)) * V;
    if (row >= rows) return;
    const T *top = dy + 4 * row * W + 2 * c, *bottom = top + 2 * W;
    float sum[V];
    if constexpr (V > 1) {
        float a[2 * V], b[2 * V];
        ladd_load<T, 2 * V>(a, top);
        ladd_load<T, 2 * V>(b, bottom);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] = (a[2 * j] + a[2 * j + 1]) + (b[2 * j] + b[2 * j + 1]);
    } else {
        sum[0] = (ladd_to_float(top[0]) + ladd_to_float(top[1])) + (ladd_to_float(bottom[0]) + ladd_to_float(bottom[1]));
    }
    ladd_store<T, V>(dx + row * W + c, sum);
}

template <typename T>
static ladd_status resample(LADD_CTX, bool up, T *out, const T *in, int64_t rows, int W) {
    if (rows <= 0 || W <= 0) return LADD_OK;
    const bool vector = W % LADD_VEC<T> == 0 && ladd_aligned16(out, in);
    const unsigned blocks = (unsigned)ladd_ceil_div(rows * (vector ? W / LADD_VEC<T> : W), LADD_BLOCK);
    if (up && vector) return LADD_LAUNCH(ctx, (resample_up_kernel<T, LADD_VEC<T>>), blocks, LADD_BLOCK, 0, out, in, rows, W);
    if (up) return LADD_LAUNCH(ctx, (resample_up_kernel<T, 1>), blocks, LADD_BLOCK, 0, out, in, rows, W);
    if (vector) return LADD_LAUNCH(ctx, (resample_down_kernel<T, LADD_VEC<T>>), blocks, LADD_BLOCK, 0, out, in, rows, W);
    return LADD_LAUNCH(ctx, (resample_down_kernel<T, 1>), blocks, LADD_BLOCK, 0, out, in, rows, W);
}

ladd_status LADD_CUDA(upsample2x_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int BC, int H, int W) {
    LADD_CUDA_DISPATCH(ctx, T, return resample(ctx, true, (T *)y, (const T *)x, (int64_t)BC * H, W));
}

ladd_status LADD_CUDA(upsample2x_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, int BC, int H, int W) {
    LADD_CUDA_DISPATCH(ctx, T, return resample(ctx, false, (T *)dx, (const T *)dy, (int64_t)BC * H, W));
}
