/* Attention backward on the tensor cores, deterministic: every gradient has one writer that adds in a fixed order.
 *
 *   delta = rowsum(dO O)             by attention.cu, before the others
 *   P  = exp(scale Q K^T - lse)      recomputed by both kernels below
 *   dS = P (dO V^T - delta)
 *   dV = P^T dO,  dK = scale dS^T Q  attention_dkdv: a block owns a tile of keys and walks over the queries
 *   dQ = scale dS K                  attention_dq:   a block owns a tile of queries and walks over the keys
 *
 * Recomputing S and dP in the second kernel costs 7 products instead of 5; adding dQ from many blocks would need atomics or a wait for one's turn.
 * The first kernel computes the transposed tiles K Q^T and V dO^T: their accumulators are then the left operands of the next products as they are.
 */
#include "attention_mma.cuh"

namespace {

constexpr int KEYS = 64, PART = 32; /* a tile is used 32 rows at a time: that many scores and their gradients fit the registers */

/* dK and dV of 64 keys; warp w owns 16 of them. Tiles of QUERIES queries, their dO, lse and delta stream through two buffers. */
template <typename T, int DH, int QUERIES>
__global__ void __launch_bounds__(MMA_THREADS, DH <= 64 ? 3 : 2) attention_dkdv_kernel(const attention_args<T> a) {
    constexpr bool KEEP = DH <= 64; /* the fragments of K stay in registers where there is room */
    constexpr int AREA = QUERIES * DH;
    LADD_DYNAMIC_SHARED(T, sk);
    T *sv = sk + KEYS * DH, *sq = sv + KEYS * DH, *sdo = sq + 2 * AREA;
    float *slse = reinterpret_cast<float *>(sdo + 2 * AREA), *sdelta = slse + 2 * QUERIES;
    const attention_place at(a);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3;
    int k0 = at.tile * KEYS, query_tiles = (a.S + QUERIES - 1) / QUERIES;
    const float *lse = a.lse + at.statistics, *delta = a.delta + at.statistics;
    auto q = rows_of(a, &attention_part<T>::q, at.b, at.head);
    auto d_o = o_rows_of(a, &attention_part<T>::d_o, at.b, at.head);

    auto load_queries = [&](int j) {
        int buffer = j & 1;
        tile_load<DH, QUERIES>(sq + buffer * AREA, q, j * QUERIES, a.dh);
        tile_load<DH, QUERIES>(sdo + buffer * AREA, d_o, j * QUERIES, a.dh);
        ladd_cp_async_commit();
        if (threadIdx.x < QUERIES) { /* a query behind the end gets lse = inf: its probabilities are then 0 */
            int i = j * QUERIES + threadIdx.x;
            slse[buffer * QUERIES + threadIdx.x] = i < a.S ? lse[i] * LOG2_E : INFINITY;
            sdelta[buffer * QUERIES + threadIdx.x] = i < a.S ? delta[i] : 0.0f;
        }
    };
    tile_load<DH, KEYS>(sk, rows_of(a, &attention_part<T>::k, at.b, at.head), k0, a.dh);
    tile_load<DH, KEYS>(sv, rows_of(a, &attention_part<T>::v, at.b, at.head), k0, a.dh);
    load_queries(0);
    ladd_cp_async_wait<0>();
    __syncthreads();

    uint32_t kf[KEEP ? DH / 16 : 1][4];
    if (KEEP)
#pragma unroll
        for (int i = 0; i < DH / 16; i++) fragment_a<DH>(kf[i], sk, warp * 16, i);
    float dk[DH / 8][4] = {}, dv[DH / 8][4] = {};
    const float c = a.scale * LOG2_E;

    for (int j = 0; j < query_tiles; j++) {
        const T *qt = sq + (j & 1) * AREA, *dot = sdo + (j & 1) * AREA;
        const float *tile_lse = slse + (j & 1) * QUERIES, *tile_delta = sdelta + (j & 1) * QUERIES;
        if (j > 0) {
            ladd_cp_async_wait<0>();
            __syncthreads();
        }
        if (j + 1 < query_tiles) load_queries(j + 1);

#pragma unroll 1
        for (int part = 0; part < QUERIES; part += PART) {
            float p[PART / 8][4] = {}, ds[PART / 8][4] = {};
#pragma unroll
            for (int i = 0; i < DH / 16; i++) {
                uint32_t vf[4];
                fragment_a<DH>(vf, sv, warp * 16, i);
                if (!KEEP) fragment_a<DH>(kf[0], sk, warp * 16, i);
#pragma unroll
                for (int n = 0; n < PART / 16; n++) {
                    uint32_t f[2][2];
                    fragment_b_rows<DH>(f, qt, part + n * 16, i);
                    ladd_mma<T>(p[2 * n], kf[KEEP ? i : 0], f[0]);
                    ladd_mma<T>(p[2 * n + 1], kf[KEEP ? i : 0], f[1]);
                    fragment_b_rows<DH>(f, dot, part + n * 16, i);
                    ladd_mma<T>(ds[2 * n], vf, f[0]);
                    ladd_mma<T>(ds[2 * n + 1], vf, f[1]);
                }
            }
#pragma unroll
            for (int n = 0; n < PART / 8; n++) {
                float2 shift = *reinterpret_cast<const float2 *>(tile_lse + part + n * 8 + 2 * t);
                float2 d = *reinterpret_cast<const float2 *>(tile_delta + part + n * 8 + 2 * t);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    p[n][e] = exp2_fast(fmaf(p[n][e], c, e & 1 ? -shift.y : -shift.x));
                    ds[n][e] = p[n][e] * (ds[n][e] - (e & 1 ? d.y : d.x));
                }
            }
#pragma unroll
            for (int i = 0; i < PART / 16; i++) {
                uint32_t pf[4], dsf[4];
                fragment_a_from<T>(pf, p[2 * i], p[2 * i + 1]);
                fragment_a_from<T>(dsf, ds[2 * i], ds[2 * i + 1]);
#pragma unroll
                for (int n = 0; n < DH / 16; n++) {
                    uint32_t f[2][2];
                    fragment_b_columns<DH>(f, dot, part + i * 16, n);
                    ladd_mma<T>(dv[2 * n], pf, f[0]);
                    ladd_mma<T>(dv[2 * n + 1], pf, f[1]);
                    fragment_b_columns<DH>(f, qt, part + i * 16, n);
                    ladd_mma<T>(dk[2 * n], dsf, f[0]);
                    ladd_mma<T>(dk[2 * n + 1], dsf, f[1]);
                }
            }
        }
    }
    store_rows<DH>(rows_of(a, &attention_part<T>::dk, at.b, at.head), k0 + warp * 16, a.dh, dk, a.scale, a.scale, sk + warp * 16 * DH);
    store_rows<DH>(rows_of(a, &attention_part<T>::dv, at.b, at.head), k0 + warp * 16, a.dh, dv, 1.0f, 1.0f, sv + warp * 16 * DH);
}

/* dQ of 64 MT queries; warp w owns 16 MT of them. */
template <typename T, int DH, int MT>
__global__ void __launch_bounds__(MMA_THREADS) attention_dq_kernel(const attention_args<T> a) {
    constexpr int QUERIES = 64 * MT, AREA = KEYS * DH;
    LADD_DYNAMIC_SHARED(T, sq);
    T *sdo = sq + QUERIES * DH, *sk = sdo + QUERIES * DH, *sv = sk + 2 * AREA;
    const attention_place at(a);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int q0 = at.tile * QUERIES, key_tiles = (a.S + KEYS - 1) / KEYS;
    const float *lse = a.lse + at.statistics, *delta = a.delta + at.statistics;
    auto k = rows_of(a, &attention_part<T>::k, at.b, at.head), v = rows_of(a, &attention_part<T>::v, at.b, at.head);

    tile_load<DH, QUERIES>(sq, rows_of(a, &attention_part<T>::q, at.b, at.head), q0, a.dh);
    tile_load<DH, QUERIES>(sdo, o_rows_of(a, &attention_part<T>::d_o, at.b, at.head), q0, a.dh);
    tile_load<DH, KEYS>(sk, k, 0, a.dh);
    tile_load<DH, KEYS>(sv, v, 0, a.dh);
    ladd_cp_async_commit();
    ladd_cp_async_wait<0>();
    __syncthreads();

    uint32_t q[MT][DH / 16][4], d_o[MT][DH / 16][4];
    float dq[MT][DH / 8][4] = {}, shift[MT][2], d[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int row0 = (warp * MT + m) * 16;
#pragma unroll
        for (int i = 0; i < DH / 16; i++) {
            fragment_a<DH>(q[m][i], sq, row0, i);
            fragment_a<DH>(d_o[m][i], sdo, row0, i);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int row = q0 + row0 + g + 8 * h;
            shift[m][h] = row < a.S ? lse[row] * LOG2_E : INFINITY;
            d[m][h] = row < a.S ? delta[row] : 0.0f;
        }
    }
    const float c = a.scale * LOG2_E;

    for (int j = 0; j < key_tiles; j++) {
        const T *kt = sk + (j & 1) * AREA, *vt = sv + (j & 1) * AREA;
        if (j > 0) {
            ladd_cp_async_wait<0>();
            __syncthreads();
        }
        if (j + 1 < key_tiles) {
            int other = ((j + 1) & 1) * AREA;
            tile_load<DH, KEYS>(sk + other, k, (j + 1) * KEYS, a.dh);
            tile_load<DH, KEYS>(sv + other, v, (j + 1) * KEYS, a.dh);
            ladd_cp_async_commit();
        }
#pragma unroll 1
        for (int part = 0; part < KEYS; part += PART) {
            float p[MT][PART / 8][4] = {}, ds[MT][PART / 8][4] = {};
#pragma unroll
            for (int i = 0; i < DH / 16; i++)
#pragma unroll
                for (int n = 0; n < PART / 16; n++) {
                    uint32_t f[2][2], w[2][2];
                    fragment_b_rows<DH>(f, kt, part + n * 16, i);
                    fragment_b_rows<DH>(w, vt, part + n * 16, i);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        ladd_mma<T>(p[m][2 * n], q[m][i], f[0]);
                        ladd_mma<T>(p[m][2 * n + 1], q[m][i], f[1]);
                        ladd_mma<T>(ds[m][2 * n], d_o[m][i], w[0]);
                        ladd_mma<T>(ds[m][2 * n + 1], d_o[m][i], w[1]);
                    }
                }
            /* A key behind the end is a row of zeros, but 2^(0 - lse) may be infinite, so its scores are put out first. */
            int end = a.S - j * KEYS - part - 2 * t;
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < PART / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float x = fmaf(p[m][n][e], c, -shift[m][e >> 1]);
                        x = n * 8 + (e & 1) < end ? x : -INFINITY;
                        ds[m][n][e] = exp2_fast(x) * (ds[m][n][e] - d[m][e >> 1]);
                    }
#pragma unroll
            for (int i = 0; i < PART / 16; i++) {
                uint32_t dsf[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) fragment_a_from<T>(dsf[m], ds[m][2 * i], ds[m][2 * i + 1]);
#pragma unroll
                for (int n = 0; n < DH / 16; n++) {
                    uint32_t f[2][2];
                    fragment_b_columns<DH>(f, kt, part + i * 16, n);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        ladd_mma<T>(dq[m][2 * n], dsf[m], f[0]);
                        ladd_mma<T>(dq[m][2 * n + 1], dsf[m], f[1]);
                    }
                }
            }
        }
    }
    auto out = rows_of(a, &attention_part<T>::dq, at.b, at.head);
#pragma unroll
    for (int m = 0; m < MT; m++) {
        int row0 = (warp * MT + m) * 16;
        store_rows<DH>(out, q0 + row0, a.dh, dq[m], a.scale, a.scale, sq + row0 * DH);
    }
}

template <typename T, int DH, int QUERIES, int MT>
ladd_status launch(const ladd_context *ctx, attention_args<T> a) {
    constexpr size_t DKDV = (2 * KEYS + 4 * QUERIES) * DH * sizeof(T) + 4 * QUERIES * sizeof(float), DQ = (128 * MT + 4 * KEYS) * DH * sizeof(T);
    a.tiles = (int)ladd_ceil_div(a.S, KEYS);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, (attention_dkdv_kernel<T, DH, QUERIES>), DKDV));
    LADD_TRY(LADD_LAUNCH(ctx, (attention_dkdv_kernel<T, DH, QUERIES>), (unsigned)(a.B * a.heads * a.tiles), MMA_THREADS, DKDV, a));
    a.tiles = (int)ladd_ceil_div(a.S, 64 * MT);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, (attention_dq_kernel<T, DH, MT>), DQ));
    return LADD_LAUNCH(ctx, (attention_dq_kernel<T, DH, MT>), (unsigned)(a.B * a.heads * a.tiles), MMA_THREADS, DQ, a);
}

}  // namespace

template <typename T>
ladd_status attention_backward_mma(const ladd_context *ctx, attention_args<T> a) {
    return a.dh <= 64 ? launch<T, 64, 64, 2>(ctx, a) : launch<T, 128, 32, 1>(ctx, a);
}
template ladd_status attention_backward_mma(const ladd_context *, attention_args<__nv_bfloat16>);
template ladd_status attention_backward_mma(const ladd_context *, attention_args<__half>);
