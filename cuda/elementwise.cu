/* Memory-bound helpers: 16 bytes an access wherever sizes and pointers allow; the transpose goes through shared memory so that both of its sides do.
 */
#include "common.cuh"

struct add_op {
    static constexpr bool READS_Y = false;
    __device__ float operator()(float a, float b, float) const { return a + b; }
};
struct axpy_op {
    static constexpr bool READS_Y = true;
    float alpha;
    __device__ float operator()(float x, float, float y) const { return y + alpha * x; }
};
struct scale_op {
    static constexpr bool READS_Y = false;
    float alpha;
    __device__ float operator()(float x, float, float) const { return alpha * x; }
};

ladd_status LADD_CUDA(zero)(LADD_CTX, ladd_act *y, int64_t n) {
    if (n <= 0) return LADD_OK;
    return ladd_cuda_check(ctx, cudaMemsetAsync(y, 0, (size_t)n * ctx->act_size, ladd_cuda(ctx)->stream), "zero");
}

ladd_status LADD_CUDA(copy)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) {
    if (n <= 0 || y == x) return LADD_OK;
    return ladd_cuda_check(ctx, cudaMemcpyAsync(y, x, (size_t)n * ctx->act_size, cudaMemcpyDeviceToDevice, ladd_cuda(ctx)->stream), "copy");
}

ladd_status LADD_CUDA(add)(LADD_CTX, ladd_act *y, const ladd_act *a, const ladd_act *b, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return ladd_map(ctx, (T *)y, (const T *)a, (const T *)b, n, add_op{}));
}

ladd_status LADD_CUDA(axpy)(LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return ladd_map(ctx, (T *)y, (const T *)x, (const T *)nullptr, n, axpy_op{alpha}));
}

ladd_status LADD_CUDA(scale)(LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return ladd_map(ctx, (T *)y, (const T *)x, (const T *)nullptr, n, scale_op{alpha}));
}

/* ---- transpose ------------------------------------------------------------------------------------------------------- */

/* A tile of 64 x 64 in shared memory, a word wider, so that neither its rows nor its columns fall into one bank. Each of 256 threads moves V elements
 * of a row of x into it, then V elements of a column out as a piece of a row of y. */
enum { TILE = 64 };

template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK) transpose_kernel(T *y, const T *x, int R, int Q, int tiles_q) {
    constexpr int PIECES = TILE / V, STEP = LADD_BLOCK / PIECES;
    __shared__ T tile[TILE][TILE + 4 / sizeof(T)];
    const int64_t sample = (int64_t)blockIdx.y * R * Q;
    const int r0 = blockIdx.x / tiles_q * TILE, q0 = blockIdx.x % tiles_q * TILE;
    const int across = threadIdx.x % PIECES * V, down = threadIdx.x / PIECES;
    for (int i = down; i < TILE; i += STEP)
        if (r0 + i < R && q0 + across < Q) {
            float v[V];
            ladd_load<T, V>(v, x + sample + (int64_t)(r0 + i) * Q + q0 + across);
#pragma unroll
            for (int j = 0; j < V; j++) tile[i][across + j] = ladd_from_float<T>(v[j]);
        }
    __syncthreads();
    for (int i = down; i < TILE; i += STEP)
        if (q0 + i < Q && r0 + across < R) {
            T *to = y + sample + (int64_t)(q0 + i) * R + r0 + across;
            if constexpr (V == 1) {
                *to = tile[across][i];
            } else {
                T part[V];
#pragma unroll
                for (int j = 0; j < V; j++) part[j] = tile[across + j][i];
                uint4 raw;
                memcpy(&raw, part, 16);
                __stcg(reinterpret_cast<uint4 *>(to), raw); /* a plain store is taken apart into four here */
            }
        }
}

template <int V, typename T>
static ladd_status transpose(LADD_CTX, T *y, const T *x, int B, int R, int Q) {
    const int64_t tiles_q = ladd_ceil_div(Q, TILE), tiles = ladd_ceil_div(R, TILE) * tiles_q;
    for (int b = 0; b < B; b += 65535) { /* a grid's second dimension ends there */
        const int64_t from = (int64_t)b * R * Q;
        const unsigned samples = (unsigned)(B - b < 65535 ? B - b : 65535);
        LADD_TRY(LADD_LAUNCH(ctx, (transpose_kernel<V, T>), dim3((unsigned)tiles, samples), LADD_BLOCK, 0, y + from, x + from, R, Q, (int)tiles_q));
    }
    return LADD_OK;
}

ladd_status LADD_CUDA(transpose)(LADD_CTX, ladd_act *y, const ladd_act *x, int B, int R, int Q) {
    if (B <= 0 || R <= 0 || Q <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T, const bool wide = R % LADD_VEC<T> == 0 && Q % LADD_VEC<T> == 0 && ladd_aligned16(y, x);
                       return (wide ? transpose<LADD_VEC<T>, T> : transpose<1, T>)(ctx, (T *)y, (const T *)x, B, R, Q));
}
