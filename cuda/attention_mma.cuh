/* Tiles of 16-bit rows in shared memory and their fragments for mma.m16n8k16.
 *
 * A tile row is DH elements; its 16-byte chunk c lies at place c ^ (row & 7). Eight consecutive rows of one chunk column then cover all 32 banks, so
 * ldmatrix, the copies in and the copies out are free of bank conflicts. Chunks behind dh hold zeros: they add nothing to a product.
 */
#ifndef LADD_ATTENTION_MMA_CUH
#define LADD_ATTENTION_MMA_CUH
#include "attention.cuh"
#include "mma.cuh"

constexpr int MMA_THREADS = 128; /* four warps, each the owner of its rows of the block's tile */

template <int DH>
__device__ __forceinline__ int tile_at(int row, int chunk) {
    return row * DH + ((chunk ^ (row & 7)) << 3);
}

/* Starts the copy of rows first .. first+ROWS-1 into a tile; rows behind S and chunks behind dh become zeros. */
template <int DH, int ROWS, typename T>
__device__ __forceinline__ void tile_load(T *tile, const joint_rows<const T> &rows, int first, int dh) {
    constexpr int CHUNKS = DH / 8, STEP = MMA_THREADS / CHUNKS;
    int chunk = threadIdx.x % CHUNKS, r = threadIdx.x / CHUNKS;
#pragma unroll 1 /* unrolled, the addresses would take registers that the products need */
    for (int i = 0; i < ROWS / STEP; i++, r += STEP) {
        int token = first + r;
        bool inside = token < rows.S && chunk * 8 < dh;
        const T *source = rows(token < rows.S ? token : rows.S - 1);
        ladd_cp_async(tile + tile_at<DH>(r, chunk), source + (inside ? chunk * 8 : 0), inside);
    }
}

/* The A fragment (16 rows x 16 columns) at row0, columns k16*16. */
template <int DH, typename T>
__device__ __forceinline__ void fragment_a(uint32_t (&a)[4], const T *tile, int row0, int k16) {
    int lane = threadIdx.x & 31;
    ladd_ldmatrix(a, tile + tile_at<DH>(row0 + (lane & 15), k16 * 2 + (lane >> 4)));
}

/* Two B fragments of a product with the transposed tile: B[k][n] = tile[row0 + n][k16*16 + k], n in [0, 16). */
template <int DH, typename T>
__device__ __forceinline__ void fragment_b_rows(uint32_t (&b)[2][2], const T *tile, int row0, int k16) {
    int lane = threadIdx.x & 31;
    uint32_t r[4];
    ladd_ldmatrix(r, tile + tile_at<DH>(row0 + (lane & 7) + ((lane >> 4) << 3), k16 * 2 + ((lane >> 3) & 1)));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

/* Two B fragments of a product with the tile itself: B[k][n] = tile[row0 + k][n16*16 + n], k and n in [0, 16). */
template <int DH, typename T>
__device__ __forceinline__ void fragment_b_columns(uint32_t (&b)[2][2], const T *tile, int row0, int n16) {
    int lane = threadIdx.x & 31;
    uint32_t r[4];
    ladd_ldmatrix_trans(r, tile + tile_at<DH>(row0 + (lane & 15), n16 * 2 + (lane >> 4)));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

/* Two neighbours of a row in one register, the left in the lower half. */
template <typename T>
__device__ __forceinline__ uint32_t pack2(float left, float right);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float left, float right) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(left, right);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float left, float right) {
    const __half2 pair = __floats2half2_rn(left, right);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

/* 2^x by the special function unit, 2 units in the last place; 2^-inf = 0. */
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
#else
    return exp2f(x);
#endif
}

/* A product's accumulator (two neighbouring 16x8 tiles) becomes the A fragment of the next product: the layouts agree, only the type changes. */
template <typename T>
__device__ __forceinline__ void fragment_a_from(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack2<T>(left[0], left[1]);
    a[1] = pack2<T>(left[2], left[3]);
    a[2] = pack2<T>(right[0], right[1]);
    a[3] = pack2<T>(right[2], right[3]);
}

/* Writes a warp's accumulators [16 rows, DH] times factor (one of row g, one of row g + 8) to the rows first .. of `out`: through shared memory,
 * so that whole 16-byte chunks go out. `staging` is the warp's own room of 16 tile rows that no other warp reads any more. */
template <int DH, typename T>
__device__ __forceinline__ void store_rows(const joint_rows<T> &out, int first, int dh, const float (&acc)[DH / 8][4], float low, float high,
                                           T *staging) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < DH / 8; n++) {
        *reinterpret_cast<uint32_t *>(staging + tile_at<DH>(g, n) + 2 * t) = pack2<T>(acc[n][0] * low, acc[n][1] * low);
        *reinterpret_cast<uint32_t *>(staging + tile_at<DH>(g + 8, n) + 2 * t) = pack2<T>(acc[n][2] * high, acc[n][3] * high);
    }
    __syncwarp();
    constexpr int CHUNKS = DH / 8;
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS / 32; i++) {
        int r = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
        if (first + r < out.S && chunk * 8 < dh)
            *reinterpret_cast<uint4 *>(out(first + r) + chunk * 8) = *reinterpret_cast<const uint4 *>(staging + tile_at<DH>(r, chunk));
    }
}

/* Sum and maximum over the four lanes that hold one row of an accumulator. */
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

#endif
