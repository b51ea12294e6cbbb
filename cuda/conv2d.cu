/* 2-D convolution: results and input gradients. See conv2d.cuh for how tiles and patches lie.
 *
 * A pass multiplies packed weights [tap][M][C] by patches of x[B,C,H,W] and writes y[B,M,.,.] at every y_step-th pixel. The gradient of the input is
 * such a pass over dy with flipped weights, one phase for each of the stride^2 positions of dx; a convolution of an enlarged image is one of four
 * phases with two taps an axis (csrc/cpu/conv2d.c derives both). The phases of one tile are neighbouring blocks, so their interleaved pixels meet in
 * the L2 cache.
 *
 * 16-bit types go to the tensor cores: 8 warps, 128 pixels by 16, 64 or 128 output channels, weights through a three-stage asynchronous pipeline, the
 * next chunk's patch loaded between the products of this one. f32, and windows too large for shared memory, take the plain tile of conv_fma_kernel.
 */
#include "conv2d.cuh"

enum { CONV_CHUNK = 32, CONV_PITCH = CONV_CHUNK + CONV_SKEW, CONV_STAGES = 3, CONV_MAX_PHASES = 4 };

/* Output (r,c) of the grid gh x gw reads row r*step + r0 + tap, column c*step + c0 + tap, and is written to row r*y_step + y_r, column c*y_step +
 * y_c. */
struct conv_phase {
    int kh, kw, r0, c0, gh, gw, y_r, y_c;
    int64_t packed; /* where its weights start */
};

template <typename T>
struct conv_pass {
    T *y;
    const T *x, *bias, *packed; /* bias may be NULL */
    int B, C, H, W, step, M, YH, YW, y_step, Cp, Mp, phases;
    conv_phase phase[CONV_MAX_PHASES];
    conv_tiling tiling;
};

/* Which tile, phase, sample and output channels a block has: those that read the same pixels follow each other. */
struct conv_place {
    int m0, phase, tile_row, tile_col, b;
};
template <typename T>
__device__ __forceinline__ conv_place conv_place_of(const conv_pass<T> &p, int block_m) {
    conv_place at;
    uint32_t id = blockIdx.x;
    const uint32_t m_tiles = (uint32_t)(p.Mp / block_m), cols = (uint32_t)p.tiling.cols, rows = (uint32_t)p.tiling.rows;
    at.m0 = (int)(id % m_tiles) * block_m, id /= m_tiles;
    at.phase = (int)(id % (uint32_t)p.phases), id /= (uint32_t)p.phases;
    at.tile_col = (int)(id % cols), id /= cols;
    at.tile_row = (int)(id % rows), at.b = (int)(id / rows);
    return at;
}

/* ---- weights ------------------------------------------------------------------------------------------------------------- */

/* Weight of output channel m, input channel c, tap (i,j): w[m*wm + c*wc + i*wi + j*wj]. fold 1: the two taps of phase (fold_r, fold_c) of an
 * enlarging kernel, fold 2: the four taps of its reverse; each is a sum of taps of w. */
template <typename T>
struct conv_weights {
    const T *w;
    int64_t wm, wc, wi, wj;
    int fold, fold_r, fold_c;
};

/* Bit k: tap `a` of the folded kernel holds w's tap k. */
__device__ __forceinline__ int conv_fold_mask(int fold, int phase, int a) {
    return fold == 1 ? 0x4361 >> 4 * (2 * phase + a) & 7 : 0x1364 >> 4 * a & 7;
}

template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK) conv_pack_kernel(T *packed, conv_weights<T> w, int kh, int kw, int M, int C, int Mp, int Cp) {
    const int64_t at = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x;
    if (at >= (int64_t)kh * kw * Mp * Cp) return;
    const int c = (int)(at % Cp), m = (int)(at / Cp % Mp), tap = (int)(at / Cp / Mp), i = tap / kw, j = tap % kw;
    float value = 0.0f;
    if (m < M && c < C) {
        const T *from = w.w + m * w.wm + c * w.wc;
        if (w.fold) {
            const int rows = conv_fold_mask(w.fold, w.fold_r, i), cols = conv_fold_mask(w.fold, w.fold_c, j);
#pragma unroll
            for (int k = 0; k < 9; k++)
                if (rows >> k / 3 & cols >> k % 3 & 1) value += ladd_to_float(from[k]);
        } else {
            value = ladd_to_float(from[i * w.wi + j * w.wj]);
        }
    }
    packed[at] = ladd_from_float<T>(value);
}

/* ---- tensor cores -------------------------------------------------------------------------------------------------------- */

/* WM x WN warps, each MT x 16 output channels by NT x 8 pixels. */
template <typename T, int WM, int WN, int MT, int NT>
__global__ void __launch_bounds__(CONV_THREADS, 2) conv_mma_kernel(const conv_pass<T> p) {
    constexpr int BM = WM * MT * 16, PAIRS = NT / 2;
    static_assert(WM * WN * LADD_WARP == CONV_THREADS && WN * NT * 8 == CONV_PIXELS && NT % 2 == 0, "a tile is shared out evenly");
    LADD_DYNAMIC_SHARED(uint16_t, shared);
    uint16_t *weights = shared, *patches = shared + CONV_STAGES * BM * CONV_PITCH; /* [stages][BM][pitch], [2][patch][pitch] */
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP, warp_m = warp % WM * MT * 16, warp_n = warp / WM * NT * 8;
    const conv_place at = conv_place_of(p, BM);
    const conv_phase &phase = p.phase[at.phase];
    const int log_tw = p.tiling.log_tw, tw = 1 << log_tw, Wq = p.tiling.Wq, taps = phase.kh * phase.kw, chunks = p.Cp / CONV_CHUNK;
    const int r0 = at.tile_row * (CONV_PIXELS >> log_tw), c0 = at.tile_col * tw, iterations = taps * chunks;

    conv_patch<CONV_CHUNK> patch;
    patch.x = reinterpret_cast<const uint16_t *>(p.x) + (int64_t)at.b * p.C * p.H * p.W;
    patch.C = p.C, patch.H = p.H, patch.W = p.W, patch.Wq = Wq, patch.pixels = p.tiling.patch, patch.divide = p.tiling.divide;
    patch.row = r0 * p.step + phase.r0, patch.col = c0 * p.step + phase.c0;

    /* Weights of one tap and chunk are one stage, and a thread copies 16 bytes of every 64th row; `next` runs ahead of the products. */
    const int64_t tap_size = (int64_t)p.Mp * p.Cp;
    const T *chunk_weights = p.packed + phase.packed + (int64_t)(at.m0 + threadIdx.x / 4) * p.Cp + threadIdx.x % 4 * 8, *from = chunk_weights;
    const int to = threadIdx.x / 4 * CONV_PITCH + threadIdx.x % 4 * 8;
    int next_tap = 0, next = 0;
    auto load_weights = [&]() {
        if (next < iterations) {
            uint16_t *stage = weights + next % CONV_STAGES * BM * CONV_PITCH + to;
#pragma unroll
            for (int i = 0; i < BM; i += CONV_THREADS / 4)
                if (BM >= CONV_THREADS / 4 || (int)threadIdx.x < BM * 4) ladd_cp_async(stage + i * CONV_PITCH, from + (int64_t)i * p.Cp, true);
            from += tap_size;
            if (++next_tap == taps) next_tap = 0, from = chunk_weights += CONV_CHUNK;
        }
        next++;
        ladd_cp_async_commit();
    };

    /* Where this lane's rows of the fragments lie: output channel lane % 16 of the weights, pixel (lane / 16) * 8 + lane % 8 of the patch. */
    const int a_row = (warp_m + lane % 16) * CONV_PITCH + lane / 16 * 8;
    int b_row[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int n = warp_n + i * 16 + lane / 16 * 8 + lane % 8;
        b_row[i] = ((n >> log_tw) * Wq + (n & (tw - 1))) * p.step * CONV_PITCH + lane / 8 % 2 * 8;
    }
    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;

    if (iterations) patch.fill(patches, 0, 0);
    for (int i = 0; i < CONV_STAGES - 1; i++) load_weights();
    int done = 0;
    for (int chunk = 0; chunk < chunks; chunk++) {
        const uint16_t *now = patches + chunk % 2 * patch.pixels * CONV_PITCH;
        uint16_t *later = patches + (chunk + 1) % 2 * patch.pixels * CONV_PITCH;
        const int more = chunk + 1 < chunks ? patch.rounds() : 0, c_next = (chunk + 1) * CONV_CHUNK;
        int round = 0;
        for (int ti = 0, tap = 0; ti < phase.kh; ti++)
            for (int tj = 0; tj < phase.kw; tj++, tap++, done++) {
                ladd_cp_async_wait<CONV_STAGES - 2>();
                __syncthreads();
                load_weights();
                /* Two rounds of the next patch are under way while the tensor cores work. */
                uint4 v0 = make_uint4(0, 0, 0, 0), v1 = v0;
                if (round < more) v0 = patch.load(round, c_next);
                if (round + 1 < more) v1 = patch.load(round + 1, c_next);
                const uint16_t *A = weights + done % CONV_STAGES * BM * CONV_PITCH + a_row, *X = now + (ti * Wq + tj) * CONV_PITCH;
#pragma unroll
                for (int k = 0; k < CONV_CHUNK; k += 16) {
                    uint32_t a[MT][4], b[NT][2];
#pragma unroll
                    for (int m = 0; m < MT; m++) ladd_ldmatrix(a[m], A + m * 16 * CONV_PITCH + k);
#pragma unroll
                    for (int i = 0; i < PAIRS; i++) {
                        uint32_t both[4];
                        ladd_ldmatrix(both, X + b_row[i] + k);
                        b[2 * i][0] = both[0], b[2 * i][1] = both[1], b[2 * i + 1][0] = both[2], b[2 * i + 1][1] = both[3];
                    }
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int n = 0; n < NT; n++) ladd_mma<T>(acc[m][n], a[m], b[n]);
                }
                if (round < more) patch.store(later, round, v0);
                if (round + 1 < more) patch.store(later, round + 1, v1);
                round += 2;
            }
        if (more) patch.fill(later, 2 * taps, c_next); /* what large strides leave */
    }

    /* Registers 0 and 1 are neighbouring pixels of channel lane / 4, 2 and 3 of the channel eight further. */
    T *y = p.y + (int64_t)at.b * p.M * p.YH * p.YW;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int pixel = warp_n + n * 8 + lane % 4 * 2, r = r0 + (pixel >> log_tw), c = c0 + (pixel & (tw - 1));
        if (r >= phase.gh || c >= phase.gw) continue;
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
            const int channel = at.m0 + warp_m + m * 8 + lane / 4;
            if (channel >= p.M) continue;
            const float bias = p.bias ? ladd_to_float(p.bias[channel]) : 0.0f;
            T *to = y + ((int64_t)channel * p.YH + r * p.y_step + phase.y_r) * p.YW + c * p.y_step + phase.y_c;
            const T low = ladd_from_float<T>(acc[m / 2][n][m % 2 * 2] + bias), high = ladd_from_float<T>(acc[m / 2][n][m % 2 * 2 + 1] + bias);
            if (c + 1 < phase.gw && p.y_step == 1 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
                T pair[2] = {low, high};
                uint32_t word;
                memcpy(&word, pair, 4);
                *reinterpret_cast<uint32_t *>(to) = word;
            } else {
                to[0] = low;
                if (c + 1 < phase.gw) to[p.y_step] = high;
            }
        }
    }
}

/* ---- any type, any window: 64 output channels by 64 pixels, 4 by 4 a thread ------------------------------------------------------ */

enum { CONV_FMA = 64, CONV_FMA_K = 16 };

template <typename T>
__global__ void __launch_bounds__(CONV_THREADS) conv_fma_kernel(const conv_pass<T> p) {
    __shared__ float A[CONV_FMA_K][CONV_FMA + 4], X[CONV_FMA_K][CONV_FMA + 4];
    const conv_phase &phase = p.phase[blockIdx.z];
    const int m0 = blockIdx.y * CONV_FMA, tm = threadIdx.x / 16 * 4, tn = threadIdx.x % 16 * 4;
    const int64_t n0 = (int64_t)blockIdx.x * CONV_FMA, area = (int64_t)phase.gh * phase.gw;
    float acc[4][4] = {};
    /* Loads: one pixel and four channels a thread; four output channels and one channel. */
    const int load_n = threadIdx.x % CONV_FMA, load_c = threadIdx.x / CONV_FMA, a_c = threadIdx.x % CONV_FMA_K, a_m = threadIdx.x / CONV_FMA_K;
    const int64_t n = n0 + load_n;
    const int b = (int)(n / (area ? area : 1)), r = area ? (int)(n % area / phase.gw) : 0, c = area ? (int)(n % area % phase.gw) : 0;
    const T *x = p.x + (int64_t)b * p.C * p.H * p.W;
    for (int tap = 0; tap < phase.kh * phase.kw; tap++) {
        const int row = r * p.step + phase.r0 + tap / phase.kw, col = c * p.step + phase.c0 + tap % phase.kw;
        const bool inside = n < p.B * area && row >= 0 && row < p.H && col >= 0 && col < p.W;
        const T *w = p.packed + phase.packed + ((int64_t)tap * p.Mp + m0) * p.Cp;
        for (int k0 = 0; k0 < p.C; k0 += CONV_FMA_K) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int k = load_c + 4 * i;
                X[k][load_n] = inside && k0 + k < p.C ? ladd_to_float(x[((int64_t)(k0 + k) * p.H + row) * p.W + col]) : 0.0f;
                A[a_c][a_m + 16 * i] = ladd_to_float(w[(int64_t)(a_m + 16 * i) * p.Cp + k0 + a_c]);
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < CONV_FMA_K; k++) {
                const float4 a = *reinterpret_cast<const float4 *>(&A[k][tm]), v = *reinterpret_cast<const float4 *>(&X[k][tn]);
                const float as[4] = {a.x, a.y, a.z, a.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[i][j] += as[i] * vs[j];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int64_t pixel = n0 + tn + j;
        if (pixel >= p.B * area) continue;
        const int sample = (int)(pixel / area), pr = (int)(pixel % area / phase.gw), pc = (int)(pixel % area % phase.gw);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int channel = m0 + tm + i;
            if (channel >= p.M) continue;
            const float bias = p.bias ? ladd_to_float(p.bias[channel]) : 0.0f;
            p.y[(((int64_t)sample * p.M + channel) * p.YH + pr * p.y_step + phase.y_r) * p.YW + pc * p.y_step + phase.y_c] =
                ladd_from_float<T>(acc[i][j] + bias);
        }
    }
}

/* ---- choosing ------------------------------------------------------------------------------------------------------------ */

template <typename T, int WM, int WN, int MT, int NT>
static ladd_status conv_launch(const ladd_context *ctx, const conv_pass<T> &p, size_t bytes, int64_t tiles) {
    const int64_t blocks = tiles * (p.Mp / (WM * MT * 16));
    if (blocks > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "convolution: at most %d tiles of pixels expected, got %lld", INT32_MAX, (long long)blocks);
    LADD_TRY(LADD_ALLOW_SHARED(ctx, (conv_mma_kernel<T, WM, WN, MT, NT>), bytes));
    return LADD_LAUNCH(ctx, (conv_mma_kernel<T, WM, WN, MT, NT>), (unsigned)blocks, CONV_THREADS, bytes, p);
}

/* Fills in the sizes that follow from the others, packs the weights and runs the pass. weights[phases]. */
template <typename T>
static ladd_status conv_run(const ladd_context *ctx, conv_pass<T> &p, const conv_weights<T> *weights) {
    int kh = 0, kw = 0, gh = 0, gw = 0;
    for (int i = 0; i < p.phases; i++) {
        kh = p.phase[i].kh > kh ? p.phase[i].kh : kh, kw = p.phase[i].kw > kw ? p.phase[i].kw : kw;
        gh = p.phase[i].gh > gh ? p.phase[i].gh : gh, gw = p.phase[i].gw > gw ? p.phase[i].gw : gw;
    }
    if (gh == 0 || gw == 0) return LADD_OK;
    p.tiling = conv_tile(gh, gw, kh, kw, p.step);
    int block_m = p.M <= 16 ? 16 : p.M <= 64 ? 64 : 128;
    const size_t bytes = ((size_t)CONV_STAGES * block_m + 2 * (size_t)p.tiling.patch) * CONV_PITCH * 2;
    const bool mma = sizeof(T) == 2 && p.tiling.patch < CONV_MAX_PATCH && bytes <= ladd_cuda(ctx)->shared_memory;
    if (!mma) block_m = CONV_FMA;
    p.Mp = (int)ladd_ceil_div(p.M, block_m) * block_m;
    p.Cp = (int)ladd_ceil_div(p.C, CONV_CHUNK) * CONV_CHUNK;
    int64_t size = 0;
    for (int i = 0; i < p.phases; i++) {
        p.phase[i].packed = size;
        size += (int64_t)p.phase[i].kh * p.phase[i].kw * p.Mp * p.Cp;
    }
    void *block;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, CONV_PACKED_SLOT, (size_t)(size > 0 ? size : 1) * sizeof(T)));
    T *packed = static_cast<T *>(block);
    p.packed = packed;
    for (int i = 0; i < p.phases; i++) {
        const conv_phase &phase = p.phase[i];
        const int64_t count = (int64_t)phase.kh * phase.kw * p.Mp * p.Cp;
        if (count)
            LADD_TRY(LADD_LAUNCH(ctx, (conv_pack_kernel<T>), (unsigned)ladd_ceil_div(count, LADD_BLOCK), LADD_BLOCK, 0, packed + phase.packed,
                                 weights[i], phase.kh, phase.kw, p.M, p.C, p.Mp, p.Cp));
    }
    if constexpr (sizeof(T) == 2) {
        if (mma) {
            const int64_t tiles = (int64_t)p.tiling.rows * p.tiling.cols * p.phases * p.B;
            if (block_m == 16) return conv_launch<T, 1, 8, 1, 2>(ctx, p, bytes, tiles);
            return block_m == 64 ? conv_launch<T, 2, 4, 2, 4>(ctx, p, bytes, tiles) : conv_launch<T, 2, 4, 4, 4>(ctx, p, bytes, tiles);
        }
    }
    const dim3 grid((unsigned)ladd_ceil_div((int64_t)p.B * gh * gw, CONV_FMA), (unsigned)(p.Mp / CONV_FMA), (unsigned)p.phases);
    return LADD_LAUNCH(ctx, (conv_fma_kernel<T>), grid, CONV_THREADS, 0, p);
}

template <typename T>
static ladd_status conv_forward(const ladd_context *ctx, T *y, const T *x, const T *w, const T *bias, const ladd_conv *conv, int fold) {
    const int taps = conv->kh * conv->kw;
    conv_pass<T> p = {};
    p.y = y, p.x = x, p.bias = bias;
    p.B = conv->B, p.C = conv->Cin, p.H = conv->H, p.W = conv->W, p.step = conv->stride, p.M = conv->Cout, p.YH = conv->Ho, p.YW = conv->Wo;
    p.y_step = 1, p.phases = 1;
    p.phase[0] = {conv->kh, conv->kw, -conv->pad_top, -conv->pad_left, conv->Ho, conv->Wo, 0, 0, 0};
    conv_weights<T> weights = {w, (int64_t)conv->Cin * taps, taps, conv->kw, 1, 0, 0, 0};
    if (fold) weights.wm = 9, weights.wc = (int64_t)conv->Cout * 9, weights.fold = 2; /* w is [Cin, Cout, 3, 3] as seen from this pass */
    return conv_run(ctx, p, &weights);
}

template <typename T>
static ladd_status conv_upsample_forward(const ladd_context *ctx, T *y, const T *x, const T *w, const T *bias, const ladd_conv *conv) {
    conv_pass<T> p = {};
    conv_weights<T> weights[4];
    p.y = y, p.x = x, p.bias = bias;
    p.B = conv->B, p.C = conv->Cin, p.H = conv->H, p.W = conv->W, p.step = 1, p.M = conv->Cout, p.YH = conv->Ho, p.YW = conv->Wo;
    p.y_step = 2, p.phases = 4;
    for (int i = 0; i < 4; i++) {
        const int r = i / 2, c = i % 2;
        p.phase[i] = {2, 2, r - 1, c - 1, conv->H, conv->W, r, c, 0};
        weights[i] = {w, (int64_t)conv->Cin * 9, 9, 3, 1, 1, r, c};
    }
    return conv_run(ctx, p, weights);
}

template <typename T>
static ladd_status conv_input_gradient(const ladd_context *ctx, T *dx, const T *dy, const T *w, const ladd_conv *conv) {
    const int taps = conv->kh * conv->kw, s = conv->stride;
    conv_pass<T> p = {};
    conv_weights<T> weights[CONV_MAX_PHASES];
    p.y = dx, p.x = dy;
    p.B = conv->B, p.C = conv->Cout, p.H = conv->Ho, p.W = conv->Wo, p.step = 1, p.M = conv->Cin, p.YH = conv->H, p.YW = conv->W, p.y_step = s;
    for (int i = 0; i < s * s; i++) {
        ladd_conv_axis r = ladd_conv_phase(i / s, conv->pad_top, conv->kh, s, conv->H),
                       c = ladd_conv_phase(i % s, conv->pad_left, conv->kw, s, conv->W);
        if (!r.taps || !c.taps) r.taps = c.taps = 0; /* no tap reaches: zeros */
        if (r.grid && c.grid) {
            p.phase[p.phases] = {r.taps, c.taps, r.origin, c.origin, r.grid, c.grid, i / s, i % s, 0};
            weights[p.phases++] = {
                r.taps ? w + r.last_tap * conv->kw + c.last_tap : w, taps, (int64_t)conv->Cin * taps, -(int64_t)s * conv->kw, -s, 0, 0, 0};
        }
        if (p.phases == CONV_MAX_PHASES || (i + 1 == s * s && p.phases)) {
            LADD_TRY(conv_run(ctx, p, weights));
            p.phases = 0;
        }
    }
    return LADD_OK;
}

/* ---- the table's rows ---------------------------------------------------------------------------------------------------- */

template <typename T>
static ladd_status conv_result(const ladd_context *ctx, T *y, const T *x, const T *w, const T *bias, const ladd_conv *conv) {
    return conv->upsample ? conv_upsample_forward(ctx, y, x, w, bias, conv) : conv_forward(ctx, y, x, w, bias, conv, 0);
}

template <typename T>
static ladd_status conv_gradients(const ladd_context *ctx, T *dx, float *dw, float *dbias, const T *dy, const T *x, const T *w,
                                  const ladd_conv *conv) {
    const ladd_conv back = conv_reversed(conv);
    if (dx) LADD_TRY(conv->upsample ? conv_forward<T>(ctx, dx, dy, w, NULL, &back, 1) : conv_input_gradient(ctx, dx, dy, w, conv));
    return conv_weight_gradients(ctx, dw, dbias, dy, x, conv);
}

ladd_status LADD_CUDA(conv2d_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, const ladd_conv *conv) {
    LADD_TRY(ladd_conv_check(conv));
    LADD_CUDA_DISPATCH(ctx, T, return conv_result(ctx, (T *)y, (const T *)x, (const T *)w, (const T *)bias, conv));
}

ladd_status LADD_CUDA(conv2d_backward)(LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w,
                                       const ladd_conv *conv) {
    LADD_TRY(ladd_conv_check(conv));
    LADD_CUDA_DISPATCH(ctx, T, return conv_gradients(ctx, (T *)dx, dw, dbias, (const T *)dy, (const T *)x, (const T *)w, conv));
}
