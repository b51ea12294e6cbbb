/* Attention forward on the tensor cores.
 *
 * A block owns a tile of queries, a warp 16 MT of its rows with their output and running softmax statistics in registers. Tiles of 64 keys and values
 * stream through two buffers: while one is multiplied the next arrives by cp.async. Scores live in registers only; exponentials are taken in
 * base 2 with the scale folded in, p = 2^(s c - m c), c = scale log2(e).
 */
#include "attention_mma.cuh"

namespace {

constexpr int KEYS = 64; /* keys of a tile */

/* What a tile of scores s[16 rows, KEYS] does to a warp's rows: it becomes probabilities relative to the new maximum, the output and the sum so far
 * shrink to that maximum. `keys`: how many of the tile's keys there are. Index h: row g or g + 8 of the fragments. */
template <int N>
__device__ __forceinline__ void softmax_step(float (&s)[KEYS / 8][4], float (&o)[N][4], float (&top)[2], float (&sum)[2], float c, int keys) {
    if (keys < KEYS) { /* the ragged last tile */
        const int end = keys - 2 * (threadIdx.x & 3);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            if (n * 8 >= end) s[n][0] = s[n][2] = -INFINITY;
            if (n * 8 + 1 >= end) s[n][1] = s[n][3] = -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float row_top = top[h];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) row_top = fmaxf(row_top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        row_top = quad_max(row_top);
        const float shrink = exp2_fast((top[h] - row_top) * c), shift = row_top * c;
        float part = 0.0f;
        top[h] = row_top;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) {
            s[n][2 * h] = exp2_fast(fmaf(s[n][2 * h], c, -shift));
            s[n][2 * h + 1] = exp2_fast(fmaf(s[n][2 * h + 1], c, -shift));
            part += s[n][2 * h] + s[n][2 * h + 1];
        }
        sum[h] = sum[h] * shrink + part;
#pragma unroll
        for (int n = 0; n < N; n++) {
            o[n][2 * h] *= shrink;
            o[n][2 * h + 1] *= shrink;
        }
    }
}

/* The rows' lse, by the lane of each quad that holds column 0, and the row sums in all four lanes. */
__device__ __forceinline__ void finish_rows(float *lse, int row0, int S, const float (&top)[2], float (&sum)[2], float scale) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] = quad_sum(sum[h]);
        if (lane % 4 == 0 && row0 + g + 8 * h < S) lse[row0 + g + 8 * h] = top[h] * scale + logf(sum[h]);
    }
}

template <typename T, int DH, int MT>
__global__ void __launch_bounds__(MMA_THREADS) attention_forward_mma_kernel(const attention_args<T> a) {
    constexpr int QUERIES = 64 * MT;
    LADD_DYNAMIC_SHARED(T, sq);
    T *sk = sq + QUERIES * DH, *sv = sk + 2 * KEYS * DH;
    const attention_place at(a);
    int warp = threadIdx.x >> 5;
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
#pragma unroll
        for (int m = 0; m < MT; m++) softmax_step(s[m], o[m], top[m], sum[m], c, a.S - j * KEYS);
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
        finish_rows(lse, q0 + row0, a.S, top[m], sum[m], a.scale);
        store_rows<DH>(out, q0 + row0, a.dh, o[m], 1.0f / sum[m][0], 1.0f / sum[m][1],
                       sq + row0 * DH); /* only this warp ever read those rows of sq */
    }
}

/* Heads of 129 to 512 elements, as the autoencoder's one head is. A block owns 64 queries and 128 of the head's columns (grid y), so each of up to
 * four blocks computes the scores anew: their output would not fit one block's registers. The scores come in steps of 64 columns: the queries stay in
 * shared memory, the keys stream through two buffers, and a tile of values is on its way meanwhile.
 */
constexpr int CHUNK = 64, SLICE = 128;

template <typename T>
__global__ void __launch_bounds__(MMA_THREADS) attention_forward_wide_kernel(const attention_args<T> a, int chunks) {
    LADD_DYNAMIC_SHARED(T, sk);
    T *sv = sk + 2 * KEYS * CHUNK, *sq = sv + KEYS * SLICE;
    const attention_place at(a);
    const int warp = threadIdx.x >> 5, q0 = at.tile * 64, c0 = blockIdx.y * SLICE, steps = (a.S + KEYS - 1) / KEYS * chunks;
    const auto q = rows_of(a, &attention_part<T>::q, at.b, at.head), k = rows_of(a, &attention_part<T>::k, at.b, at.head),
               v = rows_of(a, &attention_part<T>::v, at.b, at.head);
    for (int i = 0; i < chunks; i++) tile_load<CHUNK, 64>(sq + i * 64 * CHUNK, q.from_column(i * CHUNK), q0, a.dh - i * CHUNK);
    tile_load<CHUNK, KEYS>(sk, k, 0, a.dh);
    ladd_cp_async_commit();

    float s[KEYS / 8][4], o[SLICE / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int step = 0; step < steps; step++) {
        const int j = step / chunks, i = step % chunks;
        ladd_cp_async_wait<0>();
        __syncthreads(); /* this step's keys are here, the tile's values from its second step on; every warp is done with the step before */
        if (step + 1 < steps) {
            const int column = (step + 1) % chunks * CHUNK;
            tile_load<CHUNK, KEYS>(sk + ((step + 1) & 1) * KEYS * CHUNK, k.from_column(column), (step + 1) / chunks * KEYS, a.dh - column);
        }
        if (i == 0) {
            tile_load<SLICE, KEYS>(sv, v.from_column(c0), j * KEYS, a.dh - c0);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
        }
        ladd_cp_async_commit();
#pragma unroll
        for (int x = 0; x < CHUNK / 16; x++) {
            uint32_t qf[4];
            fragment_a<CHUNK>(qf, sq + i * 64 * CHUNK, warp * 16, x);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                uint32_t f[2][2];
                fragment_b_rows<CHUNK>(f, sk + (step & 1) * KEYS * CHUNK, n * 16, x);
                ladd_mma<T>(s[2 * n], qf, f[0]);
                ladd_mma<T>(s[2 * n + 1], qf, f[1]);
            }
        }
        if (i + 1 < chunks) continue;
        softmax_step(s, o, top, sum, a.scale * LOG2_E, a.S - j * KEYS);
#pragma unroll
        for (int x = 0; x < KEYS / 16; x++) {
            uint32_t p[4];
            fragment_a_from<T>(p, s[2 * x], s[2 * x + 1]);
#pragma unroll
            for (int n = 0; n < SLICE / 16; n++) {
                uint32_t f[2][2];
                fragment_b_columns<SLICE>(f, sv, x * 16, n);
                ladd_mma<T>(o[2 * n], p, f[0]);
                ladd_mma<T>(o[2 * n + 1], p, f[1]);
            }
        }
    }
    __syncthreads(); /* the keys' buffers become the way out */
    const int row0 = q0 + warp * 16;
    finish_rows(a.lse + at.statistics, row0, blockIdx.y == 0 ? a.S : 0, top, sum, a.scale);
    store_rows<SLICE>(o_rows_of(a, &attention_part<T>::o, at.b, at.head).from_column(c0), row0, a.dh - c0, o, 1.0f / sum[0], 1.0f / sum[1],
                      sk + warp * 16 * SLICE);
}

template <typename T>
ladd_status launch_wide(const ladd_context *ctx, attention_args<T> a) {
    const int chunks = (int)ladd_ceil_div(a.dh, CHUNK);
    const size_t shared = (size_t)(2 * KEYS * CHUNK + KEYS * SLICE + chunks * 64 * CHUNK) * sizeof(T);
    a.tiles = (int)ladd_ceil_div(a.S, 64);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, attention_forward_wide_kernel<T>, shared));
    const dim3 grid((unsigned)(a.B * a.heads * a.tiles), (unsigned)ladd_ceil_div(a.dh, SLICE));
    return LADD_LAUNCH(ctx, attention_forward_wide_kernel<T>, grid, MMA_THREADS, shared, a, chunks);
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
    if (a.dh > 128) return launch_wide(ctx, a);
    return a.dh <= 64 ? launch<T, 64, 2>(ctx, a) : launch<T, 128, 1>(ctx, a);
}
template ladd_status attention_forward_mma(const ladd_context *, attention_args<__nv_bfloat16>);
template ladd_status attention_forward_mma(const ladd_context *, attention_args<__half>);
