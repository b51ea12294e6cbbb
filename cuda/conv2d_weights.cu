/* 2-D convolution: gradients of weights and bias. dw[m][c,tap] is the sum over output pixels of dy[m] times the pixel of x that the tap meets: a
 * product whose long side, the pixels, is cut into parts by shape only. Every part leaves its sum in scratch, and a second pass adds the parts in
 * order.
 *
 * On the tensor cores a block has 64 output channels and 32 (one tap: 128) input channels, and a warp keeps the sums of eight input channels for a
 * window of 3 x 3 or 2 x 4 taps at once, so a patch that was loaded once serves all of them (conv2d.cuh). The other types and windows take the plain
 * tile.
 */
#include "conv2d.cuh"

enum { CONV_BM = 64, CONV_DY_PITCH = CONV_PIXELS + 8, CONV_BLOCKS = 264, CONV_MAX_PARTS_SIZE = 1 << 24, CONV_FMA = 64, CONV_FMA_K = 16 };

template <typename T>
struct conv_gradient {
    float *sums; /* [parts][taps][M][C] */
    const T *dy, *x;
    int B, C, H, W, M, gh, gw, kh, kw, step, r0, c0, parts, units, vector; /* vector: dy is read 16 bytes at a time */
    conv_tiling tiling;
};

/* First of n things that part i of `parts` has. */
__host__ __device__ static inline int64_t conv_cut(int64_t n, int parts, int i) { return n * i / parts; }

/* TR x TC: the window of taps; GROUPS of eight input channels a warp. */
template <typename T, int TR, int TC, int GROUPS>
__global__ void __launch_bounds__(CONV_THREADS, 2) conv_weights_mma_kernel(const conv_gradient<T> p) {
    constexpr int TAPS = TR * TC, CHANNELS = 32 * GROUPS, PITCH = CHANNELS + CONV_SKEW;
    LADD_DYNAMIC_SHARED(uint16_t, shared);
    uint16_t *dys = shared, *patches = shared + 2 * CONV_BM * CONV_DY_PITCH; /* [2][BM][dy pitch], [2][patch][pitch] */
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP, warp_m = warp % 2 * 32, warp_c = warp / 2 * GROUPS * 8;
    const int wide = (p.kw + TC - 1) / TC, windows = (p.kh + TR - 1) / TR * wide;
    const int part = blockIdx.x, m0 = blockIdx.y * CONV_BM, c0 = blockIdx.z / windows * CHANNELS;
    const int ti = blockIdx.z % windows / wide * TR, tj = blockIdx.z % windows % wide * TC;
    const int log_tw = p.tiling.log_tw, tw = 1 << log_tw, Wq = p.tiling.Wq, tiles = p.tiling.rows * p.tiling.cols;

    conv_patch<CHANNELS> patch;
    patch.C = p.C, patch.H = p.H, patch.W = p.W, patch.Wq = Wq, patch.pixels = p.tiling.patch, patch.divide = p.tiling.divide;
    /* Turns the patch to a unit of the sum, a tile of a sample. */
    auto choose = [&](int unit) {
        const int tile = unit % tiles;
        patch.x = reinterpret_cast<const uint16_t *>(p.x) + (int64_t)(unit / tiles) * p.C * p.H * p.W;
        patch.row = tile / p.tiling.cols * (CONV_PIXELS >> log_tw) * p.step + p.r0, patch.col = tile % p.tiling.cols * tw * p.step + p.c0;
    };
    /* dy of a unit, [output channel][pixel], zero outside; closes one group of asynchronous copies. */
    auto load_dy = [&](uint16_t *to, int unit) {
        const int b = unit / tiles, r0 = unit % tiles / p.tiling.cols * (CONV_PIXELS >> log_tw), q0 = unit % tiles % p.tiling.cols * tw;
        const uint16_t *dy = reinterpret_cast<const uint16_t *>(p.dy);
#pragma unroll 1 /* once a tile; the registers belong to the products */
        for (int k = 0; k < CONV_BM * CONV_PIXELS / 8 / CONV_THREADS; k++) {
            const int i = threadIdx.x + k * CONV_THREADS, m = i / (CONV_PIXELS / 8), n = i % (CONV_PIXELS / 8) * 8;
            const int r = r0 + (n >> log_tw), c = q0 + (n & (tw - 1));
            const bool inside = m0 + m < p.M && r < p.gh && c < p.gw;
            const uint16_t *from = dy + (inside ? (((int64_t)b * p.M + m0 + m) * p.gh + r) * p.gw + c : 0);
            if (p.vector) {
                ladd_cp_async(to + m * CONV_DY_PITCH + n, from, inside);
            } else {
                uint32_t e[8];
#pragma unroll
                for (int j = 0; j < 8; j++) e[j] = inside && c + j < p.gw ? from[j] : 0u;
                *reinterpret_cast<uint4 *>(to + m * CONV_DY_PITCH + n) =
                    make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
            }
        }
        ladd_cp_async_commit();
    };

    /* This lane's rows of the fragments: output channel lane % 16 of dy; pixel lane % 16 of the patch, whose rows come out transposed. */
    const int a_row = (warp_m + lane % 16) * CONV_DY_PITCH + lane / 16 * 8;
    const int b_row = ((lane % 16 >> log_tw) * Wq + (lane & (tw - 1))) * p.step * PITCH + warp_c + (ti * Wq + tj) * PITCH;
    const int b_step = (16 >> log_tw) * Wq * p.step * PITCH;
    float acc[2][TAPS][GROUPS][4];
#pragma unroll
    for (int i = 0; i < 2 * TAPS * GROUPS * 4; i++) acc[i / (TAPS * GROUPS * 4)][i / (GROUPS * 4) % TAPS][i / 4 % GROUPS][i % 4] = 0.0f;

    const int first = (int)conv_cut(p.units, p.parts, part), last = (int)conv_cut(p.units, p.parts, part + 1);
    choose(first);
    load_dy(dys, first);
    patch.fill(patches, 0, c0);
    for (int unit = first; unit < last; unit++) {
        const int now = (unit - first) % 2;
        uint16_t *later = patches + (1 - now) * patch.pixels * PITCH;
        ladd_cp_async_wait<0>();
        __syncthreads();
        const int more = unit + 1 < last ? patch.rounds() : 0;
        if (more) {
            choose(unit + 1);
            load_dy(dys + (1 - now) * CONV_BM * CONV_DY_PITCH, unit + 1);
        }
        const uint16_t *A = dys + now * CONV_BM * CONV_DY_PITCH + a_row, *X = patches + now * patch.pixels * PITCH + b_row;
        int round = 0;
#pragma unroll 1
        for (int k = 0; k < CONV_PIXELS; k += 16, X += b_step, round++) {
            uint4 ahead = make_uint4(0, 0, 0, 0); /* of the next patch, under way while the tensor cores work */
            if (round < more) ahead = patch.load(round, c0);
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) ladd_ldmatrix(a[m], A + m * 16 * CONV_DY_PITCH + k);
#pragma unroll
            for (int t = 0; t < TAPS; t++)
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    uint32_t x[2];
                    ladd_ldmatrix_trans(x, X + (t / TC * Wq + t % TC) * PITCH + g * 8); /* taps that are not there meet what is there; not kept */
#pragma unroll
                    for (int m = 0; m < 2; m++) ladd_mma<T>(acc[m][t][g], a[m], x);
                }
            if (round < more) patch.store(later, round, ahead);
        }
        if (more) patch.fill(later, CONV_PIXELS / 16, c0);
    }
#pragma unroll
    for (int t = 0; t < TAPS; t++) {
        if (ti + t / TC >= p.kh || tj + t % TC >= p.kw) continue;
        float *sums = p.sums + (((int64_t)part * p.kh + ti + t / TC) * p.kw + tj + t % TC) * p.M * p.C;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int m = m0 + warp_m + i / 2 * 8 + lane / 4, c = c0 + warp_c + g * 8 + lane % 4 * 2 + i % 2;
                if (m < p.M && c < p.C) sums[(int64_t)m * p.C + c] = acc[i / 4][t][g][i % 4];
            }
    }
}

/* 64 output by 64 input channels of one tap and part, 4 by 4 a thread. */
template <typename T>
__global__ void __launch_bounds__(CONV_THREADS) conv_weights_fma_kernel(const conv_gradient<T> p) {
    __shared__ float D[CONV_FMA_K][CONV_FMA + 4], X[CONV_FMA_K][CONV_FMA + 4];
    const int c0 = blockIdx.x * CONV_FMA, m0 = blockIdx.y * CONV_FMA, taps = p.kh * p.kw, tap = blockIdx.z % taps, part = blockIdx.z / taps;
    const int tm = threadIdx.x / 16 * 4, tc = threadIdx.x % 16 * 4, k = threadIdx.x % CONV_FMA_K, lane = threadIdx.x / CONV_FMA_K;
    const int64_t area = (int64_t)p.gh * p.gw, first = conv_cut(p.B * area, p.parts, part), last = conv_cut(p.B * area, p.parts, part + 1);
    float acc[4][4] = {};
    for (int64_t at = first; at < last; at += CONV_FMA_K) {
        const int64_t pixel = at + k;
        const int b = (int)(pixel / area), r = (int)(pixel % area / p.gw), c = (int)(pixel % area % p.gw);
        const int row = r * p.step + p.r0 + tap / p.kw, col = c * p.step + p.c0 + tap % p.kw;
        const bool inside = pixel < last && row >= 0 && row < p.H && col >= 0 && col < p.W;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int j = lane + 16 * i;
            D[k][j] = pixel < last && m0 + j < p.M ? ladd_to_float(p.dy[((int64_t)b * p.M + m0 + j) * area + pixel % area]) : 0.0f;
            X[k][j] = inside && c0 + j < p.C ? ladd_to_float(p.x[(((int64_t)b * p.C + c0 + j) * p.H + row) * p.W + col]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CONV_FMA_K; i++) {
            const float4 d = *reinterpret_cast<const float4 *>(&D[i][tm]), v = *reinterpret_cast<const float4 *>(&X[i][tc]);
            const float ds[4] = {d.x, d.y, d.z, d.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 16; j++) acc[j / 4][j % 4] += ds[j / 4] * vs[j % 4];
        }
    }
    float *sums = p.sums + ((int64_t)part * taps + tap) * p.M * p.C;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int m = m0 + tm + j / 4, c = c0 + tc + j % 4;
        if (m < p.M && c < p.C) sums[(int64_t)m * p.C + c] = acc[j / 4][j % 4];
    }
}

/* dw[M,C,taps] += sum of the parts in order. */
__global__ void __launch_bounds__(LADD_BLOCK) conv_weights_sum_kernel(float *dw, const float *sums, int parts, int taps, int M, int C) {
    const int64_t at = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x, size = (int64_t)taps * M * C;
    if (at >= size) return;
    float sum = 0.0f;
    for (int i = 0; i < parts; i++) sum += sums[i * size + at];
    dw[at % ((int64_t)M * C) * taps + at / ((int64_t)M * C)] += sum;
}

/* The same from the sixteen taps of the reversed kernel, sums[parts][16][Cin][Cout]: tap k of an axis was part of taps 2 - k and 3 - k. */
__global__ void __launch_bounds__(LADD_BLOCK) conv_weights_unfold_kernel(float *dw, const float *sums, int parts, int Cin, int Cout) {
    const int64_t at = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x, plane = (int64_t)Cin * Cout;
    if (at >= 9 * plane) return;
    const int k = (int)(at / plane), c_in = (int)(at % plane / Cout), c_out = (int)(at % Cout);
    float sum = 0.0f;
    for (int i = 0; i < parts; i++)
#pragma unroll
        for (int t = 0; t < 4; t++) sum += sums[(i * 16 + (2 - k / 3 + t / 2) * 4 + 2 - k % 3 + t % 2) * plane + at % plane];
    dw[((int64_t)c_out * Cin + c_in) * 9 + k] += sum;
}

/* sums[b * slices + slice][m] = sum of a slice of channel m of sample b; V elements an access. A block a sum, m fastest. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) conv_bias_kernel(float *sums, const T *dy, int M, int64_t area, int slices) {
    __shared__ float shared[LADD_WARP];
    const int m = (int)(blockIdx.x % M), slice = (int)(blockIdx.x / M % slices);
    const T *row = dy + ((int64_t)(blockIdx.x / M / slices) * M + m) * area;
    float sum[1] = {0.0f};
    for (int64_t i = conv_cut(area / V, slices, slice) + threadIdx.x; i < conv_cut(area / V, slices, slice + 1); i += LADD_BLOCK) {
        float v[V];
        ladd_load<T, V>(v, row + i * V);
#pragma unroll
        for (int j = 0; j < V; j++) sum[0] += v[j];
    }
    ladd_block_sum(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum[0];
}

template <typename T>
static ladd_status conv_bias(const ladd_context *ctx, float *dbias, const T *dy, int B, int M, int64_t area) {
    const int slices = (int)ladd_ceil_div(area, 1 << 14);
    const int64_t blocks = (int64_t)B * slices * M;
    void *scratch;
    if (blocks > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "convolution: at most %d slices of channels expected, got %lld", INT32_MAX, (long long)blocks);
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, CONV_PARTS_SLOT, (size_t)blocks * sizeof(float)));
    float *sums = static_cast<float *>(scratch);
    const unsigned grid = (unsigned)blocks;
    if (area % LADD_VEC<T> == 0 && ladd_aligned16(dy))
        LADD_TRY(LADD_LAUNCH(ctx, (conv_bias_kernel<T, LADD_VEC<T>>), grid, LADD_BLOCK, 0, sums, dy, M, area, slices));
    else
        LADD_TRY(LADD_LAUNCH(ctx, (conv_bias_kernel<T, 1>), grid, LADD_BLOCK, 0, sums, dy, M, area, slices));
    return ladd_sum_parts<true>(ctx, dbias, 0, sums, 1, B * slices, M);
}

template <typename T, int TR, int TC, int GROUPS>
static ladd_status conv_mma(const ladd_context *ctx, const conv_gradient<T> &p, size_t bytes) {
    const int64_t z = ladd_ceil_div(p.C, 32 * GROUPS) * ladd_ceil_div(p.kh, TR) * ladd_ceil_div(p.kw, TC);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, (conv_weights_mma_kernel<T, TR, TC, GROUPS>), bytes));
    return LADD_LAUNCH(ctx, (conv_weights_mma_kernel<T, TR, TC, GROUPS>), dim3((unsigned)p.parts, (unsigned)ladd_ceil_div(p.M, CONV_BM), (unsigned)z),
                       CONV_THREADS, bytes, p);
}

/* Parts of the sum over pixels in p.sums. */
template <typename T>
static ladd_status conv_parts(const ladd_context *ctx, conv_gradient<T> &p, const T *dy, const T *x, const ladd_conv *conv) {
    const int taps = conv->kh * conv->kw, groups = taps == 1 ? 4 : 1;
    const int rows = taps == 1 ? 1 : conv->kw == 4 ? 2 : 3, cols = taps == 1 ? 1 : conv->kw == 4 ? 4 : 3; /* the window */
    p.dy = dy, p.x = x;
    p.B = conv->B, p.C = conv->Cin, p.H = conv->H, p.W = conv->W, p.M = conv->Cout, p.gh = conv->Ho, p.gw = conv->Wo, p.kh = conv->kh,
    p.kw = conv->kw;
    p.step = conv->stride, p.r0 = -conv->pad_top, p.c0 = -conv->pad_left;
    p.tiling = conv_tile(p.gh, p.gw, p.kh, p.kw, p.step);
    p.vector = p.gw % 8 == 0 && ladd_aligned16(dy);
    const int64_t beyond = (int64_t)(rows - 1) * p.tiling.Wq + cols - 1; /* pixels that a window reads behind the last patch */
    const size_t bytes = ((size_t)CONV_BM * CONV_DY_PITCH * 2 + (size_t)(2 * p.tiling.patch + beyond) * (32 * groups + CONV_SKEW)) * 2;
    const bool mma = sizeof(T) == 2 && p.tiling.patch < CONV_MAX_PATCH && bytes <= ladd_cuda(ctx)->shared_memory;
    const int64_t tiles = (int64_t)p.tiling.rows * p.tiling.cols * p.B, size = (int64_t)taps * p.M * p.C;
    const int64_t blocks = mma ? ladd_ceil_div(p.M, CONV_BM) * ladd_ceil_div(p.C, 32 * groups) * ladd_ceil_div(p.kh, rows) * ladd_ceil_div(p.kw, cols)
                               : ladd_ceil_div(p.M, CONV_FMA) * ladd_ceil_div(p.C, CONV_FMA) * taps;
    if (tiles > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "convolution: at most %d tiles of pixels expected, got %lld", INT32_MAX, (long long)tiles);
    int64_t parts = ladd_ceil_div(CONV_BLOCKS, blocks);
    parts = parts < tiles ? parts : tiles;
    parts = parts < CONV_MAX_PARTS_SIZE / size ? parts : CONV_MAX_PARTS_SIZE / size;
    p.parts = (int)(parts > 1 ? parts : 1), p.units = (int)tiles;
    void *sums;
    LADD_TRY(ladd_cuda_scratch(ctx, &sums, CONV_PARTS_SLOT, (size_t)(p.parts * size) * sizeof(float)));
    p.sums = static_cast<float *>(sums);
    if constexpr (sizeof(T) == 2) {
        if (mma && taps == 1) return conv_mma<T, 1, 1, 4>(ctx, p, bytes);
        if (mma) return cols == 4 ? conv_mma<T, 2, 4, 1>(ctx, p, bytes) : conv_mma<T, 3, 3, 1>(ctx, p, bytes);
    }
    const dim3 grid((unsigned)ladd_ceil_div(p.C, CONV_FMA), (unsigned)ladd_ceil_div(p.M, CONV_FMA), (unsigned)(taps * p.parts));
    return LADD_LAUNCH(ctx, (conv_weights_fma_kernel<T>), grid, CONV_THREADS, 0, p);
}

template <typename T>
ladd_status conv_weight_gradients(const ladd_context *ctx, float *dw, float *dbias, const T *dy, const T *x, const ladd_conv *conv) {
    conv_gradient<T> p = {};
    if (dw && conv->upsample) {
        const ladd_conv back = conv_reversed(conv);
        LADD_TRY(conv_parts(ctx, p, x, dy, &back));
        LADD_TRY(LADD_LAUNCH(ctx, conv_weights_unfold_kernel, (unsigned)ladd_ceil_div(9 * (int64_t)conv->Cin * conv->Cout, LADD_BLOCK), LADD_BLOCK, 0,
                             dw, p.sums, p.parts, conv->Cin, conv->Cout));
    } else if (dw) {
        const int taps = conv->kh * conv->kw;
        LADD_TRY(conv_parts(ctx, p, dy, x, conv));
        LADD_TRY(LADD_LAUNCH(ctx, conv_weights_sum_kernel, (unsigned)ladd_ceil_div((int64_t)taps * conv->Cin * conv->Cout, LADD_BLOCK), LADD_BLOCK, 0,
                             dw, p.sums, p.parts, taps, conv->Cout, conv->Cin));
    }
    return dbias ? conv_bias(ctx, dbias, dy, conv->B, conv->Cout, (int64_t)conv->Ho * conv->Wo) : LADD_OK;
}
#define CONV_INSTANCE(T) \
    template ladd_status conv_weight_gradients<T>(const ladd_context *, float *, float *, const T *, const T *, const ladd_conv *);
CONV_INSTANCE(float)
CONV_INSTANCE(__nv_bfloat16)
CONV_INSTANCE(__half)
#undef CONV_INSTANCE
