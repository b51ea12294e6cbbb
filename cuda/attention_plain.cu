/* Attention with plain multiply-adds: f32, and 16-bit tensors that the tensor cores' tiles do not fit (odd or very large heads, rows off 16 bytes).
 *
 * Fused like the others: a block owns 64 rows and up to 64 or 128 of their head's columns, walks over tiles of 64 rows of the other side, and keeps
 * a tile of probabilities in shared memory only. A head wider than those columns is shared by several blocks, each of which computes the scores anew:
 * that bounds the room a block needs whatever the head's size. A thread (x, y) of 16 x 16 holds rows 4y..4y+3 and columns 4x..4x+3 of a tile.
 */
#include "attention.cuh"

namespace {

constexpr int ROWS = 64, DEPTH = 16, LD = ROWS + 4, PLAIN_THREADS = 256;

struct plain_tiles {
    alignas(16) float a[DEPTH][LD], b[DEPTH][2 * ROWS + 4]; /* operands of a step of the inner dimension */
    alignas(16) float p[ROWS][LD];                          /* probabilities or their gradient: [inner row][owned row] */
};

__device__ __forceinline__ float4 quad(const float *p) { return *reinterpret_cast<const float4 *>(p); }

/* acc[4][4] += A[a0.., :] B[b0.., :]^T over the dh columns of two sets of rows; rows behind S count as zeros. */
template <typename T>
__device__ __forceinline__ void scores_add(float (&acc)[4][4], plain_tiles &s, const joint_rows<const T> &A, int a0, const joint_rows<const T> &B,
                                           int b0, int dh) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16, r = threadIdx.x / 4, k = threadIdx.x % 4 * 4;
    for (int d0 = 0; d0 < dh; d0 += DEPTH) {
        __syncthreads(); /* the former step is read */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool inside = d0 + k + i < dh;
            s.a[k + i][r] = inside && a0 + r < A.S ? ladd_to_float(A(a0 + r)[d0 + k + i]) : 0.0f;
            s.b[k + i][r] = inside && b0 + r < B.S ? ladd_to_float(B(b0 + r)[d0 + k + i]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            float4 u = quad(&s.a[i][4 * y]), v = quad(&s.b[i][4 * x]);
            float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) acc[m][n] = fmaf(us[m], vs[n], acc[m][n]);
        }
    }
}

/* Thread (x, y)'s part p[m][n] of a tile (owned row 4y+m, inner row 4x+n) goes to shared memory. */
__device__ __forceinline__ void tile_put(plain_tiles &s, const float (&p)[4][4]) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    __syncthreads(); /* the former tile is read */
#pragma unroll
    for (int n = 0; n < 4; n++) *reinterpret_cast<float4 *>(&s.p[4 * x + n][4 * y]) = make_float4(p[0][n], p[1][n], p[2][n], p[3][n]);
}

/* acc[w] += P^T B[b0.., c0 + 64w ..]: the product of the tile in shared memory with W slices of 64 columns. */
template <int W, typename T>
__device__ __forceinline__ void rows_add(float (&acc)[W][4][4], plain_tiles &s, const joint_rows<const T> &B, int b0, int c0, int dh) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int r0 = 0; r0 < ROWS; r0 += DEPTH) {
        __syncthreads(); /* the probabilities are there; the former step is read */
#pragma unroll
        for (int i = threadIdx.x; i < DEPTH * ROWS * W; i += PLAIN_THREADS) {
            int r = i / (ROWS * W), column = i % (ROWS * W);
            s.b[r][column] = b0 + r0 + r < B.S && c0 + column < dh ? ladd_to_float(B(b0 + r0 + r)[c0 + column]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            float4 u = quad(&s.p[r0 + i][4 * y]);
            float us[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
            for (int w = 0; w < W; w++) {
                float4 v = quad(&s.b[i][64 * w + 4 * x]);
                float vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int m = 0; m < 4; m++)
#pragma unroll
                    for (int n = 0; n < 4; n++) acc[w][m][n] = fmaf(us[m], vs[n], acc[w][m][n]);
            }
        }
    }
}

template <int W, typename T>
__device__ __forceinline__ void rows_store(const joint_rows<T> &out, const float (&acc)[W][4][4], const float (&factor)[4], int first, int c0,
                                           int dh) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int m = 0; m < 4; m++)
        if (first + 4 * y + m < out.S)
#pragma unroll
            for (int w = 0; w < W; w++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int column = c0 + 64 * w + 4 * x + n;
                    if (column < dh) out(first + 4 * y + m)[column] = ladd_from_float<T>(acc[w][m][n] * factor[m]);
                }
}

/* Over the sixteen threads that hold one row. */
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

/* Grid: (B heads tiles, slices of 64 W columns). */
template <typename T, int W>
__global__ void __launch_bounds__(PLAIN_THREADS) attention_forward_plain_kernel(const attention_args<T> a) {
    __shared__ plain_tiles s;
    const attention_place at(a);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, q0 = at.tile * ROWS, c0 = blockIdx.y * 64 * W;
    const auto q = rows_of(a, &attention_part<T>::q, at.b, at.head), k = rows_of(a, &attention_part<T>::k, at.b, at.head),
               v = rows_of(a, &attention_part<T>::v, at.b, at.head);
    float o[W][4][4] = {}, top[4], sum[4] = {};
#pragma unroll
    for (int m = 0; m < 4; m++) top[m] = -INFINITY;
    for (int k0 = 0; k0 < a.S; k0 += ROWS) {
        float p[4][4] = {};
        scores_add(p, s, q, q0, k, k0, a.dh);
#pragma unroll
        for (int m = 0; m < 4; m++) {
            float row_top = -INFINITY;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                p[m][n] = k0 + 4 * x + n < a.S ? p[m][n] * a.scale : -INFINITY;
                row_top = fmaxf(row_top, p[m][n]);
            }
            row_top = fmaxf(top[m], row_max(row_top));
            const float shrink = expf(top[m] - row_top);
            top[m] = row_top;
            sum[m] *= shrink;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                p[m][n] = expf(p[m][n] - row_top);
                sum[m] += p[m][n];
#pragma unroll
                for (int w = 0; w < W; w++) o[w][m][n] *= shrink;
            }
        }
        tile_put(s, p);
        rows_add(o, s, v, k0, c0, a.dh);
    }
    float inverse[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const float total = row_sum(sum[m]);
        const int row = q0 + 4 * y + m;
        inverse[m] = 1.0f / total;
        if (x == 0 && blockIdx.y == 0 && row < a.S) a.lse[at.statistics + row] = top[m] + logf(total);
    }
    rows_store(o_rows_of(a, &attention_part<T>::o, at.b, at.head), o, inverse, q0, c0, a.dh);
}

/* dK and dV: the block's rows are keys, the other side's queries. */
template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS) attention_dkdv_plain_kernel(const attention_args<T> a) {
    __shared__ plain_tiles s;
    const attention_place at(a);
    const int x = threadIdx.x % 16, k0 = at.tile * ROWS, c0 = blockIdx.y * 64;
    const auto q = rows_of(a, &attention_part<T>::q, at.b, at.head), k = rows_of(a, &attention_part<T>::k, at.b, at.head),
               v = rows_of(a, &attention_part<T>::v, at.b, at.head);
    const auto d_o = o_rows_of(a, &attention_part<T>::d_o, at.b, at.head);
    float dk[1][4][4] = {}, dv[1][4][4] = {};
    for (int q0 = 0; q0 < a.S; q0 += ROWS) {
        float p[4][4] = {}, ds[4][4] = {};
        scores_add(p, s, k, k0, q, q0, a.dh);
        scores_add(ds, s, v, k0, d_o, q0, a.dh);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int i = q0 + 4 * x + n;
            const float lse = i < a.S ? a.lse[at.statistics + i] : INFINITY, delta = i < a.S ? a.delta[at.statistics + i] : 0.0f;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                p[m][n] = expf(p[m][n] * a.scale - lse);
                ds[m][n] = p[m][n] * (ds[m][n] - delta);
            }
        }
        tile_put(s, p);
        rows_add(dv, s, d_o, q0, c0, a.dh);
        tile_put(s, ds);
        rows_add(dk, s, q, q0, c0, a.dh);
    }
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f}, scale[4] = {a.scale, a.scale, a.scale, a.scale};
    rows_store(rows_of(a, &attention_part<T>::dv, at.b, at.head), dv, one, k0, c0, a.dh);
    rows_store(rows_of(a, &attention_part<T>::dk, at.b, at.head), dk, scale, k0, c0, a.dh);
}

template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS) attention_dq_plain_kernel(const attention_args<T> a) {
    __shared__ plain_tiles s;
    const attention_place at(a);
    const int x = threadIdx.x % 16, y = threadIdx.x / 16, q0 = at.tile * ROWS, c0 = blockIdx.y * 64;
    const auto q = rows_of(a, &attention_part<T>::q, at.b, at.head), k = rows_of(a, &attention_part<T>::k, at.b, at.head),
               v = rows_of(a, &attention_part<T>::v, at.b, at.head);
    const auto d_o = o_rows_of(a, &attention_part<T>::d_o, at.b, at.head);
    float dq[1][4][4] = {}, lse[4], delta[4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const int row = q0 + 4 * y + m;
        lse[m] = row < a.S ? a.lse[at.statistics + row] : INFINITY;
        delta[m] = row < a.S ? a.delta[at.statistics + row] : 0.0f;
    }
    for (int k0 = 0; k0 < a.S; k0 += ROWS) {
        float p[4][4] = {}, ds[4][4] = {};
        scores_add(p, s, q, q0, k, k0, a.dh);
        scores_add(ds, s, d_o, q0, v, k0, a.dh);
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++) /* a key behind the end is zeros, but e^(0 - lse) may be infinite */
                ds[m][n] = k0 + 4 * x + n < a.S ? expf(p[m][n] * a.scale - lse[m]) * (ds[m][n] - delta[m]) : 0.0f;
        tile_put(s, ds);
        rows_add(dq, s, k, k0, c0, a.dh);
    }
    const float scale[4] = {a.scale, a.scale, a.scale, a.scale};
    rows_store(rows_of(a, &attention_part<T>::dq, at.b, at.head), dq, scale, q0, c0, a.dh);
}

template <typename T>
dim3 plain_grid(const attention_args<T> &a, int columns) {
    return dim3((unsigned)(a.B * a.heads * a.tiles), (unsigned)ladd_ceil_div(a.dh, columns));
}

}  // namespace

template <typename T>
ladd_status attention_forward_plain(const ladd_context *ctx, attention_args<T> a) {
    a.tiles = (int)ladd_ceil_div(a.S, ROWS);
    if (a.dh <= 64) return LADD_LAUNCH(ctx, (attention_forward_plain_kernel<T, 1>), plain_grid(a, 64), PLAIN_THREADS, 0, a);
    return LADD_LAUNCH(ctx, (attention_forward_plain_kernel<T, 2>), plain_grid(a, 128), PLAIN_THREADS, 0, a);
}

template <typename T>
ladd_status attention_backward_plain(const ladd_context *ctx, attention_args<T> a) {
    a.tiles = (int)ladd_ceil_div(a.S, ROWS);
    LADD_TRY(LADD_LAUNCH(ctx, attention_dkdv_plain_kernel<T>, plain_grid(a, 64), PLAIN_THREADS, 0, a));
    return LADD_LAUNCH(ctx, attention_dq_plain_kernel<T>, plain_grid(a, 64), PLAIN_THREADS, 0, a);
}

template ladd_status attention_forward_plain(const ladd_context *, attention_args<float>);
template ladd_status attention_forward_plain(const ladd_context *, attention_args<__nv_bfloat16>);
template ladd_status attention_forward_plain(const ladd_context *, attention_args<__half>);
template ladd_status attention_backward_plain(const ladd_context *, attention_args<float>);
template ladd_status attention_backward_plain(const ladd_context *, attention_args<__nv_bfloat16>);
template ladd_status attention_backward_plain(const ladd_context *, attention_args<__half>);
