/* Linear layers: products by gemm.cu with bias and GELU in their epilogues, and what the library does not do: those epilogues where it has none for a
 * shape or alignment, and the bias's gradient. */
#include "activation.cuh"
#include "gemm.h"

namespace {

/* y[M,N] += bias (NULL: none); GELU: that sum is kept in h and y = gelu_tanh(h). V columns a thread. */
template <typename T, int V, bool GELU>
__global__ void __launch_bounds__(LADD_BLOCK) linear_finish_kernel(T *y, T *h, const T *bias, int64_t n, int N) {
    const int64_t i = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V;
    if (i >= n) return;
    float x[V], b[V] = {};
    ladd_load(x, y + i);
    if (bias) ladd_load(b, bias + i % N);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] += b[j];
    if (GELU) {
        ladd_store(h + i, x);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] = ladd_gelu(x[j]);
    }
    ladd_store(y + i, x);
}

template <typename T, bool GELU>
ladd_status finish(LADD_CTX, T *y, T *h, const T *bias, int M, int N) {
    const int64_t n = (int64_t)M * N;
    constexpr int V = LADD_VEC<T>;
    if (N % V == 0 && ladd_aligned16(y, h, bias))
        return LADD_LAUNCH(ctx, (linear_finish_kernel<T, V, GELU>), (unsigned)ladd_ceil_div(n, LADD_BLOCK * V), LADD_BLOCK, 0, y, h, bias, n, N);
    return LADD_LAUNCH(ctx, (linear_finish_kernel<T, 1, GELU>), (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, y, h, bias, n, N);
}

/* parts[slice][N]: sums of dy's columns over `rows` rows. A block has 32 V columns and a warp every eighth row; the eight sums meet in warp order. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) linear_column_sums_kernel(float *parts, const T *dy, int M, int N, int rows) {
    constexpr int WARPS = LADD_BLOCK / LADD_WARP;
    __shared__ float shared[WARPS][LADD_WARP * V];
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP, column = (blockIdx.x * LADD_WARP + lane) * V;
    const int end = min(M, (int)(blockIdx.y + 1) * rows);
    float sum[V] = {};
    if (column < N)
#pragma unroll 4
        for (int m = blockIdx.y * rows + warp; m < end; m += WARPS) {
            float x[V];
            ladd_load(x, dy + (int64_t)m * N + column);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] += x[j];
        }
#pragma unroll
    for (int j = 0; j < V; j++) shared[warp][j * LADD_WARP + lane] = sum[j];
    __syncthreads();
    if (warp == 0 && column < N)
#pragma unroll
        for (int j = 0; j < V; j++) {
            float total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += shared[w][j * LADD_WARP + lane];
            parts[(int64_t)blockIdx.y * N + column + j] = total;
        }
}

/* dbias[N] += column sums of dy, in at most 64 slices of the rows. */
template <typename T>
ladd_status bias_gradient(LADD_CTX, float *dbias, const T *dy, int M, int N) {
    const int rows = (int)ladd_ceil_div(M, 64) > 128 ? (int)ladd_ceil_div(M, 64) : 128, slices = (int)ladd_ceil_div(M, rows);
    void *scratch;
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, 0, (size_t)slices * N * sizeof(float)));
    float *parts = (float *)scratch;
    constexpr int V = LADD_VEC<T>;
    const auto grid = [&](int columns) { return dim3((unsigned)ladd_ceil_div(N, columns), (unsigned)slices); };
    if (N % V == 0 && ladd_aligned16(dy))
        LADD_TRY(LADD_LAUNCH(ctx, (linear_column_sums_kernel<T, V>), grid(LADD_WARP * V), LADD_BLOCK, 0, parts, dy, M, N, rows));
    else
        LADD_TRY(LADD_LAUNCH(ctx, (linear_column_sums_kernel<T, 1>), grid(LADD_WARP), LADD_BLOCK, 0, parts, dy, M, N, rows));
    return ladd_sum_parts<true>(ctx, dbias, 0, parts, 1, slices, N);
}

template <typename T>
ladd_status forward(LADD_CTX, T *y, T *h, const T *x, const T *w, const T *bias, int M, int N, int K) {
    ladd_product p = {};
    p.c = y;
    p.a = x;
    p.b = w;
    p.M = M;
    p.N = N;
    p.K = K;
    p.b_transposed = 1;
    p.c_type = ctx->act;
    p.epilogue = h ? (bias ? LADD_EPILOGUE_BIAS_GELU : LADD_EPILOGUE_GELU) : bias ? LADD_EPILOGUE_BIAS : LADD_EPILOGUE_NONE;
    p.bias = bias;
    p.h = h;
    int applied;
    LADD_TRY(ladd_cuda_gemm(ctx, &p, &applied));
    if (applied) return LADD_OK;
    return h ? finish<T, true>(ctx, y, h, bias, M, N) : finish<T, false>(ctx, y, h, bias, M, N);
}

template <typename T>
ladd_status backward(LADD_CTX, T *dx, float *dw, float *dbias, const T *dy, const T *x, const T *w, int M, int N, int K) {
    int applied;
    ladd_product p = {};
    if (dx) { /* dx[M,K] = dy[M,N] w[N,K] */
        p.c = dx;
        p.a = dy;
        p.b = w;
        p.M = M;
        p.N = K;
        p.K = N;
        p.c_type = ctx->act;
        LADD_TRY(ladd_cuda_gemm(ctx, &p, &applied));
    }
    if (dw) { /* dw[N,K] += dy[M,N]^T x[M,K] */
        p.c = dw;
        p.a = dy;
        p.b = x;
        p.M = N;
        p.N = K;
        p.K = M;
        p.a_transposed = 1;
        p.c_type = LADD_F32;
        p.accumulate = 1;
        LADD_TRY(ladd_cuda_gemm(ctx, &p, &applied));
    }
    return dbias ? bias_gradient(ctx, dbias, dy, M, N) : LADD_OK;
}

}  // namespace

ladd_status LADD_CUDA(linear_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M, int N, int K_) {
    if (M <= 0 || N <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T, return forward(ctx, (T *)y, (T *)NULL, (const T *)x, (const T *)w, (const T *)bias, M, N, K_));
}

ladd_status LADD_CUDA(linear_gelu_forward)(LADD_CTX, ladd_act *y, ladd_act *h, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M,
                                           int N, int K_) {
    if (M <= 0 || N <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T, return forward(ctx, (T *)y, (T *)h, (const T *)x, (const T *)w, (const T *)bias, M, N, K_));
}

ladd_status LADD_CUDA(linear_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                       int M, int N, int K_) {
    if (M <= 0 || N <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T, return backward(ctx, (T *)dx, dw, dbias, (const T *)dy, (const T *)x, (const T *)w, M, N, K_));
}
