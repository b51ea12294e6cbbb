/* Attention forward on the tensor cores.
 *
 * A block owns a tile of queries, a warp 16 MT of its rows with their output and running softmax statistics in registers. Tiles of 64 keys and values
 * stream through two buffers: while one is multiplied the next arrives by cp.async. Scores live in registers only; exponentials are taken in
 * base 2 with the scale folded in, p = 2^(s c - m c), c = scale log2(e).
 */
#include "attention_mma.cuh"

namespace {

constexpr int KEYS = 64; /* keys of a tile */

template <typename T, int DH, int MT>
__global__ void __launch_bounds__(MMA_THREADS) attention_forward_mma_kernel(const attention_args<T> a) {
    constexpr int QUERIES = 64 * MT;
    LADD_DYNAMIC_SHARED(T, sq);
    T *sk = sq + QUERIES * DH, *sv = sk + 2 * KEYS * DH;
    const attention_place at(a);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int q0 = at.tile * QUERIES, key_tiles = (a.S + KEYS - 1) / KEYS;
    auto k = rows_of(a, &attention_part<T>::k, at.b, at.head), v = rows_of(a, &attention_part<T>::v, at.b, at.head);

    tile_load<DH, QUERIES>(sq, rows_of(a, &attention_part<T>::q, at.b, at.head), q0, a.dh);
    tile_load<DH, KEYS>(sk, k, 0, a.dh);
    tile_load<DH, KEYS>(sv, v, 0, a.dh);
    ladd_cp_async_commit();
    ladd_cp_async_wait<0>();
    __syncthreads();

    uint32_t q[MT][DH / 16][4];
    float o[MT][DH / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) {
        top[m][0] = top[m][1] = -INFINITY;
#pragma unroll
        for (int i = 0; i < DH / 16; i++) fragment_a<DH>(q[m][i], sq, (warp * MT + m) * 16, i);
    }
    const float c = a.scale * LOG2_E;

    for (int j = 0; j < key_tiles; j++) {
        const T *kt = sk + (j & 1) * KEYS * DH, *vt = sv + (j & 1) * KEYS * DH;
        if (j > 0) {
            ladd_cp_async_wait<0>();
            __syncthreads(); /* tile j is here, and every warp is done with the other buffer */
        }
        if (j + 1 < key_tiles) {
            int other = ((j + 1) & 1) * KEYS * DH;
            tile_load<DH, KEYS>(sk + other, k, (j + 1) * KEYS, a.dh);
            tile_load<DH, KEYS>(sv + other, v, (j + 1) * KEYS, a.dh);
            ladd_cp_async_commit();
        }

        float s[MT][KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < DH / 16; i++)
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t f[2][2];
                fragment_b_rows<DH>(f, kt, n * 16, i);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    ladd_mma<T>(s[m][2 * n], q[m][i], f[0]);
                    ladd_mma<T>(s[m][2 * n + 1], q[m][i], f[1]);
                }
            }
        if (a.S - j * KEYS < KEYS) { /* the ragged last tile */
            int end = a.S - j * KEYS - 2 * t;
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    if (n * 8 >= end) s[m][n][0] = s[m][n][2] = -INFINITY;
                    if (n * 8 + 1 >= end) s[m][n][1] = s[m][n][3] = -INFINITY;
                }
        }
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) { /* rows g and g + 8 */
                float row_top = top[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) row_top = fmaxf(row_top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                row_top = quad_max(row_top);
                float shrink = exp2_fast((top[m][h] - row_top) * c), shift = row_top * c, part = 0;
                top[m][h] = row_top;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    s[m][n][2 * h] = exp2_fast(fmaf(s[m][n][2 * h], c, -shift));
                    s[m][n][2 * h + 1] = exp2_fast(fmaf(s[m][n][2 * h + 1], c, -shift));
                    part += s[m][n][2 * h] + s[m][n][2 * h + 1];
                }
                sum[m][h] = sum[m][h] * shrink + part;
#pragma unroll
                for (int n = 0; n < DH / 8; n++) {
                    o[m][n][2 * h] *= shrink;
                    o[m][n][2 * h + 1] *= shrink;
                }
            }
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            uint32_t p[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) fragment_a_from<T>(p[m], s[m][2 * i], s[m][2 * i + 1]);
#pragma unroll
            for (int n = 0; n < DH / 16; n++) {
                uint32_t f[2][2];
                fragment_b_columns<DH>(f, vt, i * 16, n);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    ladd_mma<T>(o[m][2 * n], p[m], f[0]);
                    ladd_mma<T>(o[m][2 * n + 1], p[m], f[1]);
                }
            }
        }
    }

    auto out = o_rows_of(a, &attention_part<T>::o, at.b, at.head);
    float *lse = a.lse + at.statistics;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int row0 = (warp * MT + m) * 16;
        float low = quad_sum(sum[m][0]), high = quad_sum(sum[m][1]);
        if (t == 0) {
            if (q0 + row0 + g < a.S) lse[q0 + row0 + g] = top[m][0] * a.scale + logf(low);
            if (q0 + row0 + g + 8 < a.S) lse[q0 + row0 + g + 8] = top[m][1] * a.scale + logf(high);
        }
        store_rows<DH>(out, q0 + row0, a.dh, o[m], 1.0f / low, 1.0f / high, sq + row0 * DH); /* only this warp ever read those rows of sq */
    }
}

template <typename T, int DH, int MT>
ladd_status launch(const ladd_context *ctx, attention_args<T> a) {
    constexpr size_t SHARED = (64 * MT + 4 * KEYS) * DH * sizeof(T);
    a.tiles = (int)ladd_ceil_div(a.S, 64 * MT);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, (attention_forward_mma_kernel<T, DH, MT>), SHARED));
    return LADD_LAUNCH(ctx, (attention_forward_mma_kernel<T, DH, MT>), (unsigned)(a.B * a.heads * a.tiles), MMA_THREADS, SHARED, a);
}

}  // namespace

template <typename T>
ladd_status attention_forward_mma(const ladd_context *ctx, attention_args<T> a) {
    return a.dh <= 64 ? launch<T, 64, 2>(ctx, a) : launch<T, 128, 1>(ctx, a);
}
template ladd_status attention_forward_mma(const ladd_context *, attention_args<__nv_bfloat16>);
template ladd_status attention_forward_mma(const ladd_context *, attention_args<__half>);
