/* One vector a sample against the channels of an image: the last layer of a discriminator head, whose weight depends on the condition. */
#include "common.cuh"

enum { CHANNEL_DOT_WARPS = LADD_BLOCK / LADD_WARP, CHANNEL_DOT_ITEMS = 8, CHANNEL_DOT_SLOT = 0 };

/* A block has 32 V pixels of a sample; its warps share the channels out, and their sums are added in order. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) channel_dot_kernel(T *y, const T *x, const T *e, const T *bias, int C, int L, int tiles) {
    __shared__ float sums[CHANNEL_DOT_WARPS][LADD_WARP * V];
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP;
    const int64_t b = blockIdx.x / tiles;
    const int l0 = blockIdx.x % tiles * LADD_WARP * V, l = l0 + lane * V;
    float sum[V] = {};
    if (l < L)
        for (int c = warp; c < C; c += CHANNEL_DOT_WARPS) {
            float v[V];
            const float factor = ladd_to_float(e[b * C + c]);
            ladd_load<T, V>(v, x + (b * C + c) * L + l);
#pragma unroll
            for (int i = 0; i < V; i++) sum[i] += factor * v[i];
        }
#pragma unroll
    for (int i = 0; i < V; i++) sums[warp][lane * V + i] = sum[i];
    __syncthreads();
    const int i = threadIdx.x;
    if (i >= LADD_WARP * V || l0 + i >= L) return;
    float total = ladd_to_float(*bias);
#pragma unroll
    for (int w = 0; w < CHANNEL_DOT_WARPS; w++) total += sums[w][i];
    y[b * L + l0 + i] = ladd_from_float<T>(total);
}

/* A warp has one channel of one sample: dx = e dy, de = sum of x dy (each NULL: skip). rows: B C. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK)
    channel_dot_backward_kernel(T *dx, T *de, const T *dy, const T *x, const T *e, int64_t rows, int C, int L) {
    const int lane = threadIdx.x % LADD_WARP;
    const int64_t row = (int64_t)blockIdx.x * CHANNEL_DOT_WARPS + threadIdx.x / LADD_WARP;
    if (row >= rows) return;
    const T *d = dy + row / C * L, *v_row = x + row * L;
    T *dx_row = dx ? dx + row * L : nullptr;
    const float factor = ladd_to_float(e[row]);
    float sum = 0.0f;
#pragma unroll 2
    for (int l = lane * V; l < L; l += LADD_WARP * V) {
        float g[V];
        ladd_load<T, V>(g, d + l);
        if (de) {
            float v[V];
            ladd_load<T, V>(v, v_row + l);
#pragma unroll
            for (int i = 0; i < V; i++) sum += v[i] * g[i];
        }
        if (dx_row) {
#pragma unroll
            for (int i = 0; i < V; i++) g[i] *= factor;
            ladd_store<T, V>(dx_row + l, g);
        }
    }
    sum = ladd_warp_sum(sum);
    if (de && lane == 0) de[row] = ladd_from_float<T>(sum);
}

template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK) channel_dot_bias_kernel(double *partial, const T *dy, int64_t n) {
    __shared__ double shared[LADD_WARP];
    double sum[1] = {0.0};
    for (int k = 0; k < CHANNEL_DOT_ITEMS; k++) {
        const int64_t i = ((int64_t)blockIdx.x * CHANNEL_DOT_ITEMS + k) * LADD_BLOCK + threadIdx.x;
        if (i < n) sum[0] += (double)ladd_to_float(dy[i]);
    }
    ladd_block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(LADD_BLOCK) channel_dot_bias_sum_kernel(float *dbias, const double *partial, int64_t count) {
    __shared__ double shared[LADD_WARP];
    double sum[1] = {0.0};
    for (int64_t i = threadIdx.x; i < count; i += LADD_BLOCK) sum[0] += partial[i];
    ladd_block_sum(sum, shared);
    if (threadIdx.x == 0) *dbias += (float)sum[0];
}

template <typename T, int V>
static ladd_status channel_dot_run(LADD_CTX, T *y, const T *x, const T *e, const T *bias, int B, int C, int L) {
    const int64_t tiles = ladd_ceil_div(L, LADD_WARP * V);
    return LADD_LAUNCH(ctx, (channel_dot_kernel<T, V>), (unsigned)(B * tiles), LADD_BLOCK, 0, y, x, e, bias, C, L, (int)tiles);
}

template <typename T>
static ladd_status channel_dot(LADD_CTX, T *y, const T *x, const T *e, const T *bias, int B, int C, int L) {
    if (B <= 0 || L <= 0) return LADD_OK;
    return L % LADD_VEC<T> == 0 && ladd_aligned16(x) ? channel_dot_run<T, LADD_VEC<T>>(ctx, y, x, e, bias, B, C, L)
                                                     : channel_dot_run<T, 1>(ctx, y, x, e, bias, B, C, L);
}

template <typename T>
static ladd_status channel_dot_backward(LADD_CTX, T *dx, T *de, float *dbias, const T *dy, const T *x, const T *e, int B, int C, int L) {
    const int64_t rows = (int64_t)B * C, n = (int64_t)B * L;
    if (rows <= 0 || L <= 0) return LADD_OK;
    if (dx || de) {
        const unsigned blocks = (unsigned)ladd_ceil_div(rows, CHANNEL_DOT_WARPS);
        if (L % LADD_VEC<T> == 0 && ladd_aligned16(dx, dy, x))
            LADD_TRY(LADD_LAUNCH(ctx, (channel_dot_backward_kernel<T, LADD_VEC<T>>), blocks, LADD_BLOCK, 0, dx, de, dy, x, e, rows, C, L));
        else
            LADD_TRY(LADD_LAUNCH(ctx, (channel_dot_backward_kernel<T, 1>), blocks, LADD_BLOCK, 0, dx, de, dy, x, e, rows, C, L));
    }
    if (!dbias) return LADD_OK;
    const int64_t blocks = ladd_ceil_div(n, LADD_BLOCK * CHANNEL_DOT_ITEMS);
    void *partial;
    LADD_TRY(ladd_cuda_scratch(ctx, &partial, CHANNEL_DOT_SLOT, (size_t)blocks * sizeof(double)));
    LADD_TRY(LADD_LAUNCH(ctx, (channel_dot_bias_kernel<T>), (unsigned)blocks, LADD_BLOCK, 0, (double *)partial, dy, n));
    return LADD_LAUNCH(ctx, channel_dot_bias_sum_kernel, 1, LADD_BLOCK, 0, dbias, (const double *)partial, blocks);
}

ladd_status LADD_CUDA(channel_dot_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *e, const ladd_act *bias, int B, int C, int L) {
    LADD_CUDA_DISPATCH(ctx, T, return channel_dot(ctx, (T *)y, (const T *)x, (const T *)e, (const T *)bias, B, C, L));
}

ladd_status LADD_CUDA(channel_dot_backward)(LADD_CTX, ladd_act *dx, ladd_act *de, float *dbias, const ladd_act *dy, const ladd_act *x,
                                            const ladd_act *e, int B, int C, int L) {
    LADD_CUDA_DISPATCH(ctx, T, return channel_dot_backward(ctx, (T *)dx, (T *)de, dbias, (const T *)dy, (const T *)x, (const T *)e, B, C, L));
}
