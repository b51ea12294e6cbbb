/* Spectral normalisation: w_hat = w / sigma, sigma = |w^T u| (csrc/cpu/spectral_norm.c). The power iteration stays on the device and the host waits
 * for nothing. A pass leaves its vector unnormalised in scratch and every block of the next pass takes its length itself, always in the same order:
 * that costs some kilobytes from the L2 cache and saves a launch a vector. So one iteration is four launches.
 *
 * Where the CPU reports a weight without a direction (|w^T u| zero or not finite), here w_hat becomes NaN: it shows in the losses.
 */
#include "common.cuh"

enum { SPECTRAL_WARPS = LADD_BLOCK / LADD_WARP, SPECTRAL_SLOT = 0 };

/* |x| over n floats by the whole block, in double and a fixed order. */
__device__ __forceinline__ double spectral_length(const float *x, int n, double *shared) {
    double sum[1] = {0.0};
    for (int i = threadIdx.x; i < n; i += LADD_BLOCK) sum[0] += (double)x[i] * (double)x[i];
    ladd_block_sum(sum, shared);
    return sqrt(sum[0]);
}

/* v[K] = w^T u. A block has 32 columns and its warps share the rows out. u_out (NULL: u is taken as it is): u is divided by its length first and
 * written there by block 0. */
__global__ void __launch_bounds__(LADD_BLOCK) spectral_columns_kernel(float *v, float *u_out, const float *u, const float *w, int R, int K) {
    __shared__ double shared[LADD_WARP];
    __shared__ float sums[SPECTRAL_WARPS][LADD_WARP];
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP, k = blockIdx.x * LADD_WARP + lane;
    float inverse = 1.0f, sum = 0.0f;
    if (u_out) {
        const double length = spectral_length(u, R, shared);
        inverse = length > 0.0 ? (float)(1.0 / length) : 0.0f;
        if (blockIdx.x == 0)
            for (int r = threadIdx.x; r < R; r += LADD_BLOCK) u_out[r] = u[r] * inverse;
    }
    if (k < K) {
#pragma unroll 8
        for (int r = warp; r < R; r += SPECTRAL_WARPS) sum += u[r] * inverse * w[(int64_t)r * K + k];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || k >= K) return;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SPECTRAL_WARPS; i++) sum += sums[i][lane];
    v[k] = sum;
}

/* u[R] = w v / |v|: a warp a row. */
template <int V>
__global__ void __launch_bounds__(LADD_BLOCK) spectral_rows_kernel(float *u, const float *v, const float *w, int R, int K) {
    __shared__ double shared[LADD_WARP];
    const int lane = threadIdx.x % LADD_WARP, r = blockIdx.x * SPECTRAL_WARPS + threadIdx.x / LADD_WARP;
    const double length = spectral_length(v, K, shared);
    if (r >= R) return;
    float sum = 0.0f;
    for (int k = lane * V; k < K; k += LADD_WARP * V) {
        float a[V], b[V];
        ladd_load<float, V>(a, w + (int64_t)r * K + k);
        ladd_load<float, V>(b, v + k);
#pragma unroll
        for (int i = 0; i < V; i++) sum += a[i] * b[i];
    }
    sum = ladd_warp_sum(sum);
    if (lane == 0) u[r] = sum * (float)(1.0 / length);
}

/* w_hat = w / |v|; block 0 writes sigma = |v| and v_out = v / |v|. A thread has eight elements. */
enum { SPECTRAL_ITEMS = 8 };
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK)
    spectral_scale_kernel(T *w_hat, float *v_out, float *sigma, const float *v, const float *w, int K, int64_t n) {
    __shared__ double shared[LADD_WARP];
    const double length = spectral_length(v, K, shared);
    const float scale = (float)(1.0 / length) * (length < 3e38 ? 1.0f : NAN);
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) *sigma = (float)length;
        for (int k = threadIdx.x; k < K; k += LADD_BLOCK) v_out[k] = v[k] * scale;
    }
#pragma unroll
    for (int j = 0; j < SPECTRAL_ITEMS / V; j++) {
        const int64_t i = (((int64_t)blockIdx.x * (SPECTRAL_ITEMS / V) + j) * LADD_BLOCK + threadIdx.x) * V;
        if (i >= n) break;
        float x[V];
        ladd_load<float, V>(x, w + i);
#pragma unroll
        for (int l = 0; l < V; l++) x[l] *= scale;
        ladd_store<T, V>(w_hat + i, x);
    }
}

/* partial[R] = sum of dw_hat w_hat over a row: a warp a row. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) spectral_along_kernel(double *partial, const float *dw_hat, const T *w_hat, int R, int K) {
    const int lane = threadIdx.x % LADD_WARP, r = blockIdx.x * SPECTRAL_WARPS + threadIdx.x / LADD_WARP;
    if (r >= R) return;
    float sum = 0.0f;
    for (int k = lane * V; k < K; k += LADD_WARP * V) {
        float d[V], w[V];
        ladd_load<float, V>(d, dw_hat + (int64_t)r * K + k);
        ladd_load<T, V>(w, w_hat + (int64_t)r * K + k);
#pragma unroll
        for (int i = 0; i < V; i++) sum += d[i] * w[i];
    }
    sum = ladd_warp_sum(sum);
    if (lane == 0) partial[r] = (double)sum;
}

/* dw += (dw_hat - (sum of partial) u v^T) / sigma: a block a row. */
template <int V>
__global__ void __launch_bounds__(LADD_BLOCK) spectral_gradient_kernel(float *dw, const float *dw_hat, const float *u, const float *v,
                                                                       const float *sigma, const double *partial, int R, int K) {
    __shared__ double shared[LADD_WARP];
    const int r = blockIdx.x;
    double along[1] = {0.0};
    for (int i = threadIdx.x; i < R; i += LADD_BLOCK) along[0] += partial[i];
    ladd_block_sum(along, shared);
    const float row = (float)along[0] * u[r], scale = 1.0f / *sigma;
    for (int k = threadIdx.x * V; k < K; k += LADD_BLOCK * V) {
        float d[V], g[V], x[V];
        ladd_load<float, V>(d, dw_hat + (int64_t)r * K + k);
        ladd_load<float, V>(g, dw + (int64_t)r * K + k);
        ladd_load<float, V>(x, v + k);
#pragma unroll
        for (int i = 0; i < V; i++) g[i] += (d[i] - row * x[i]) * scale;
        ladd_store<float, V>(dw + (int64_t)r * K + k, g);
    }
}

template <typename T>
static ladd_status spectral_forward(LADD_CTX, T *w_hat, float *u, float *v, float *sigma, const float *w, int R, int K, int iterations) {
    void *block;
    const int64_t padded = ladd_ceil_div(R, 4) * 4, n = (int64_t)R * K;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, SPECTRAL_SLOT, (size_t)(padded + K) * sizeof(float)));
    float *u_raw = static_cast<float *>(block), *v_raw = u_raw + padded;
    const unsigned columns = (unsigned)ladd_ceil_div(K, LADD_WARP), rows = (unsigned)ladd_ceil_div(R, SPECTRAL_WARPS);
    for (int i = 0; i <= iterations; i++) {
        const float *from = i ? u_raw : u;
        LADD_TRY(LADD_LAUNCH(ctx, spectral_columns_kernel, columns, LADD_BLOCK, 0, v_raw, i ? u : (float *)nullptr, from, w, R, K));
        if (i == iterations) break;
        if (K % 4 == 0 && ladd_aligned16(w))
            LADD_TRY(LADD_LAUNCH(ctx, spectral_rows_kernel<4>, rows, LADD_BLOCK, 0, u_raw, v_raw, w, R, K));
        else
            LADD_TRY(LADD_LAUNCH(ctx, spectral_rows_kernel<1>, rows, LADD_BLOCK, 0, u_raw, v_raw, w, R, K));
    }
    const unsigned blocks = (unsigned)ladd_ceil_div(n, LADD_BLOCK * SPECTRAL_ITEMS);
    if (n % SPECTRAL_ITEMS == 0 && ladd_aligned16(w_hat, w))
        return LADD_LAUNCH(ctx, (spectral_scale_kernel<T, LADD_VEC<T>>), blocks, LADD_BLOCK, 0, w_hat, v, sigma, v_raw, w, K, n);
    return LADD_LAUNCH(ctx, (spectral_scale_kernel<T, 1>), blocks, LADD_BLOCK, 0, w_hat, v, sigma, v_raw, w, K, n);
}

template <typename T>
static ladd_status spectral_backward(LADD_CTX, float *dw, const float *dw_hat, const T *w_hat, const float *u, const float *v, const float *sigma,
                                     int R, int K) {
    void *scratch;
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, SPECTRAL_SLOT, (size_t)R * sizeof(double)));
    double *partial = static_cast<double *>(scratch);
    const unsigned rows = (unsigned)ladd_ceil_div(R, SPECTRAL_WARPS);
    if (K % 8 == 0 && ladd_aligned16(dw, dw_hat, w_hat, v)) {
        LADD_TRY(LADD_LAUNCH(ctx, (spectral_along_kernel<T, LADD_VEC<T>>), rows, LADD_BLOCK, 0, partial, dw_hat, w_hat, R, K));
        return LADD_LAUNCH(ctx, spectral_gradient_kernel<4>, (unsigned)R, LADD_BLOCK, 0, dw, dw_hat, u, v, sigma, partial, R, K);
    }
    LADD_TRY(LADD_LAUNCH(ctx, (spectral_along_kernel<T, 1>), rows, LADD_BLOCK, 0, partial, dw_hat, w_hat, R, K));
    return LADD_LAUNCH(ctx, spectral_gradient_kernel<1>, (unsigned)R, LADD_BLOCK, 0, dw, dw_hat, u, v, sigma, partial, R, K);
}

ladd_status LADD_CUDA(spectral_norm_forward)(LADD_CTX, ladd_act *w_hat, float *u, float *v, float *sigma, const float *w, int R, int K_,
                                             int iterations) {
    if (R < 1 || K_ < 1 || iterations < 0)
        return ladd_fail(LADD_ERR_VALUE, "spectral_norm: a matrix of at least 1 x 1 and iterations of at least 0 expected, got %d x %d and %d", R, K_,
                         iterations);
    LADD_CUDA_DISPATCH(ctx, T, return spectral_forward(ctx, (T *)w_hat, u, v, sigma, w, R, K_, iterations));
}

ladd_status LADD_CUDA(spectral_norm_backward)(LADD_CTX, float *dw, const float *dw_hat, const ladd_act *w_hat, const float *u, const float *v,
                                              const float *sigma, int R, int K_) {
    LADD_CUDA_DISPATCH(ctx, T, return spectral_backward(ctx, dw, dw_hat, (const T *)w_hat, u, v, sigma, R, K_));
}
