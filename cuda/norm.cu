/* Layer norm with modulation, gated residual, RMS norm per head; the formulas of csrc/cpu/norm.c.
 *
 *   y = (x - mean) rstd (1 + scale_b) + shift_b          rstd = 1 / sqrt(mean (x - mean)^2 + eps), variance in two passes
 *   dxhat = dy (1 + scale_b);  dx += rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat));  dscale_b = sum_n dy xhat;  dshift_b = sum_n dy
 *   y = x rstd w per head;  dx = rstd (dy w - x rstd^2 mean(dy w x));  dw = sum dy x rstd
 *
 * Rows are read from memory once: the later passes over a row find it in the cache. Sums over tokens take two launches, chunks of rows and then the
 * chunks in order. V: elements in one access; 1 where sizes or pointers do not allow 16 bytes.
 */
#include "common.cuh"

enum { ROW_WARPS = 4, CHUNK_ROWS = 16 };

/* Whether rows of D elements at these pointers, and modulations mod_stride apart, can be read in vectors. */
template <typename T, typename... P>
static bool vectors(int D, int64_t mod_stride, const P *...pointers) {
    return D % LADD_VEC<T> == 0 && mod_stride % LADD_VEC<T> == 0 && ladd_aligned16(pointers...);
}

/* ---- layer norm ------------------------------------------------------------------------------------------------------ */

/* A warp takes a row. */
template <int V, typename T>
__global__ void __launch_bounds__(ROW_WARPS *LADD_WARP)
    layer_norm_forward_kernel(T *y, float *save_mean, float *save_rstd, const T *x, const T *shift, const T *scale, int64_t mod_stride, int64_t rows,
                              int N, int D, float eps) {
    const int lane = threadIdx.x % LADD_WARP;
    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / LADD_WARP;
    if (row >= rows) return;
    x += row * D;
    y += row * D;
    float sum = 0.0f;
    for (int i = lane * V; i < D; i += LADD_WARP * V) {
        float v[V];
        ladd_load<T, V>(v, x + i);
#pragma unroll
        for (int j = 0; j < V; j++) sum += v[j];
    }
    const float mean = ladd_warp_sum(sum) / (float)D;
    float squares = 0.0f;
    for (int i = lane * V; i < D; i += LADD_WARP * V) {
        float v[V];
        ladd_load<T, V>(v, x + i);
#pragma unroll
        for (int j = 0; j < V; j++) squares += (v[j] - mean) * (v[j] - mean);
    }
    const float rstd = 1.0f / sqrtf(ladd_warp_sum(squares) / (float)D + eps);
    if (lane == 0) {
        save_mean[row] = mean;
        save_rstd[row] = rstd;
    }
    const int64_t modulation = row / N * mod_stride;
    for (int i = lane * V; i < D; i += LADD_WARP * V) {
        float v[V];
        ladd_load<T, V>(v, x + i);
#pragma unroll
        for (int j = 0; j < V; j++) v[j] = (v[j] - mean) * rstd;
        if (shift) {
            float a[V], b[V];
            ladd_load<T, V>(a, scale + modulation + i);
            ladd_load<T, V>(b, shift + modulation + i);
#pragma unroll
            for (int j = 0; j < V; j++) v[j] = v[j] * (1.0f + a[j]) + b[j];
        }
        ladd_store<T, V>(y + i, v);
    }
}

template <int V, typename T>
static ladd_status layer_norm_forward(LADD_CTX, T *y, float *mean, float *rstd, const T *x, const T *shift, const T *scale, int64_t mod_stride, int B,
                                      int N, int D, float eps) {
    const int64_t rows = (int64_t)B * N;
    return LADD_LAUNCH(ctx, (layer_norm_forward_kernel<V, T>), (unsigned)ladd_ceil_div(rows, ROW_WARPS), ROW_WARPS * LADD_WARP, 0, y, mean, rstd, x,
                       shift, scale, mod_stride, rows, N, D, eps);
}

ladd_status LADD_CUDA(layer_norm_modulate_forward)(LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *shift,
                                                   const ladd_act *scale, int64_t mod_stride, int B, int N, int D, float eps) {
    LADD_CUDA_DISPATCH(ctx, T,
                       const auto run = vectors<T>(D, mod_stride, y, x, shift, scale) ? layer_norm_forward<LADD_VEC<T>, T> : layer_norm_forward<1, T>;
                       return run(ctx, (T *)y, mean, rstd, (const T *)x, (const T *)shift, (const T *)scale, mod_stride, B, N, D, eps));
}

/* A block takes CHUNK_ROWS tokens of one sample: first a warp a row for the two means of dx, then a thread for V columns of all rows, which also sums
 * dshift and dscale of the chunk. shift_parts, scale_parts [B, chunks, D] or NULL. */
template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    layer_norm_backward_kernel(T *dx, float *shift_parts, float *scale_parts, const T *dy, const T *x, const float *mean, const float *rstd,
                               const T *scale, int64_t mod_stride, int N, int D) {
    __shared__ float means[4][CHUNK_ROWS]; /* of a row: mean, rstd, mean of dxhat, mean of dxhat xhat times rstd */
    const unsigned chunks = (unsigned)(N + CHUNK_ROWS - 1) / CHUNK_ROWS;
    const int chunk = (int)(blockIdx.x % chunks), b = (int)(blockIdx.x / chunks), n = min(CHUNK_ROWS, N - chunk * CHUNK_ROWS);
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP;
    const int64_t first = (int64_t)b * N + chunk * CHUNK_ROWS;
    x += first * D;
    dy += first * D;
    dx += first * D;
    if (scale) scale += b * mod_stride;
    for (int r = warp; r < n; r += LADD_BLOCK / LADD_WARP) {
        const float m = mean[first + r], s = rstd[first + r];
        float sum = 0.0f, product = 0.0f;
        for (int i = lane * V; i < D; i += LADD_WARP * V) {
            float g[V], v[V], a[V] = {};
            ladd_load<T, V>(g, dy + (int64_t)r * D + i);
            ladd_load<T, V>(v, x + (int64_t)r * D + i);
            if (scale) ladd_load<T, V>(a, scale + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                const float h = g[j] * (1.0f + a[j]);
                sum += h;
                product += h * (v[j] - m);
            }
        }
        sum = ladd_warp_sum(sum);
        product = ladd_warp_sum(product);
        if (lane == 0) {
            means[0][r] = m;
            means[1][r] = s;
            means[2][r] = sum / (float)D;
            means[3][r] = product * s * s / (float)D;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x * V; i < D; i += LADD_BLOCK * V) {
        float a[V] = {}, shift_sum[V] = {}, scale_sum[V] = {};
        if (scale) ladd_load<T, V>(a, scale + i);
        for (int r = 0; r < n; r++) {
            const float m = means[0][r], s = means[1][r], p = means[2][r], q = means[3][r];
            float g[V], v[V], d[V];
            ladd_load<T, V>(g, dy + (int64_t)r * D + i);
            ladd_load<T, V>(v, x + (int64_t)r * D + i);
            ladd_load<T, V>(d, dx + (int64_t)r * D + i);
#pragma unroll
            for (int j = 0; j < V; j++) {
                d[j] += s * (g[j] * (1.0f + a[j]) - p - (v[j] - m) * q);
                shift_sum[j] += g[j];
                scale_sum[j] += g[j] * ((v[j] - m) * s);
            }
            ladd_store<T, V>(dx + (int64_t)r * D + i, d);
        }
        if (shift_parts) {
            const int64_t at = ((int64_t)b * chunks + chunk) * D + i;
            ladd_store<float, V>(shift_parts + at, shift_sum);
            ladd_store<float, V>(scale_parts + at, scale_sum);
        }
    }
}

template <int V, typename T>
static ladd_status layer_norm_backward(LADD_CTX, T *dx, T *dshift, T *dscale, const T *dy, const T *x, const float *mean, const float *rstd,
                                       const T *scale, int64_t mod_stride, int B, int N, int D) {
    const int chunks = (int)ladd_ceil_div(N, CHUNK_ROWS);
    void *parts = nullptr;
    if (dshift) LADD_TRY(ladd_cuda_scratch(ctx, &parts, 0, 2 * sizeof(float) * (size_t)B * chunks * D));
    float *shift_parts = (float *)parts, *scale_parts = dshift ? shift_parts + (int64_t)B * chunks * D : nullptr;
    LADD_TRY(LADD_LAUNCH(ctx, (layer_norm_backward_kernel<V, T>), (unsigned)((int64_t)chunks * B), LADD_BLOCK, 0, dx, shift_parts, scale_parts, dy, x,
                         mean, rstd, scale, mod_stride, N, D));
    if (!dshift) return LADD_OK;
    LADD_TRY(ladd_sum_parts<false>(ctx, dshift, mod_stride, shift_parts, B, chunks, D));
    return ladd_sum_parts<false>(ctx, dscale, mod_stride, scale_parts, B, chunks, D);
}

ladd_status LADD_CUDA(layer_norm_modulate_backward)(LADD_CTX, ladd_act *dx, ladd_act *dshift, ladd_act *dscale, const ladd_act *dy, const ladd_act *x,
                                                    const float *mean, const float *rstd, const ladd_act *scale, int64_t mod_stride, int B, int N,
                                                    int D) {
    if (!dscale) dshift = nullptr;
    LADD_CUDA_DISPATCH(
        ctx, T, const auto run = vectors<T>(D, mod_stride, dx, dy, x, scale) ? layer_norm_backward<LADD_VEC<T>, T> : layer_norm_backward<1, T>;
        return run(ctx, (T *)dx, (T *)dshift, (T *)dscale, (const T *)dy, (const T *)x, mean, rstd, (const T *)scale, mod_stride, B, N, D));
}

/* ---- gated residual -------------------------------------------------------------------------------------------------- */

template <int V, typename T>
__global__ void __launch_bounds__(ROW_WARPS *LADD_WARP)
    gate_forward_kernel(T *out, const T *x, const T *y, const T *gate, int64_t mod_stride, int64_t rows, int N, int D) {
    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / LADD_WARP;
    if (row >= rows) return;
    gate += row / N * mod_stride;
    for (int i = threadIdx.x % LADD_WARP * V; i < D; i += LADD_WARP * V) {
        float a[V], b[V], g[V];
        ladd_load<T, V>(a, x + row * D + i);
        ladd_load<T, V>(b, y + row * D + i);
        ladd_load<T, V>(g, gate + i);
#pragma unroll
        for (int j = 0; j < V; j++) a[j] += g[j] * b[j];
        ladd_store<T, V>(out + row * D + i, a);
    }
}

template <int V, typename T>
static ladd_status gate_forward(LADD_CTX, T *out, const T *x, const T *y, const T *gate, int64_t mod_stride, int B, int N, int D) {
    const int64_t rows = (int64_t)B * N;
    return LADD_LAUNCH(ctx, (gate_forward_kernel<V, T>), (unsigned)ladd_ceil_div(rows, ROW_WARPS), ROW_WARPS * LADD_WARP, 0, out, x, y, gate,
                       mod_stride, rows, N, D);
}

ladd_status LADD_CUDA(gate_residual_forward)(LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *y, const ladd_act *gate, int64_t mod_stride,
                                             int B, int N, int D) {
    LADD_CUDA_DISPATCH(ctx, T, const auto run = vectors<T>(D, mod_stride, out, x, y, gate) ? gate_forward<LADD_VEC<T>, T> : gate_forward<1, T>;
                       return run(ctx, (T *)out, (const T *)x, (const T *)y, (const T *)gate, mod_stride, B, N, D));
}

/* A block takes CHUNK_ROWS tokens of one sample, a thread V columns of them. parts [B, chunks, D] or NULL: then y is not read. */
template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    gate_backward_kernel(T *dy, float *parts, const T *dout, const T *y, const T *gate, int64_t mod_stride, int N, int D) {
    const unsigned chunks = (unsigned)(N + CHUNK_ROWS - 1) / CHUNK_ROWS;
    const int chunk = (int)(blockIdx.x % chunks), b = (int)(blockIdx.x / chunks), n = min(CHUNK_ROWS, N - chunk * CHUNK_ROWS);
    const int64_t first = ((int64_t)b * N + chunk * CHUNK_ROWS) * D;
    gate += b * mod_stride;
    for (int i = threadIdx.x * V; i < D; i += LADD_BLOCK * V) {
        float g[V], sum[V] = {};
        ladd_load<T, V>(g, gate + i);
#pragma unroll 4
        for (int r = 0; r < n; r++) {
            const int64_t at = first + (int64_t)r * D + i;
            float d[V], v[V] = {};
            ladd_load<T, V>(d, dout + at);
            if (parts) ladd_load<T, V>(v, y + at);
#pragma unroll
            for (int j = 0; j < V; j++) {
                sum[j] += d[j] * v[j];
                d[j] *= g[j];
            }
            ladd_store<T, V>(dy + at, d);
        }
        if (parts) ladd_store<float, V>(parts + ((int64_t)b * chunks + chunk) * D + i, sum);
    }
}

template <int V, typename T>
static ladd_status gate_backward(LADD_CTX, T *dy, T *dgate, const T *dout, const T *y, const T *gate, int64_t mod_stride, int B, int N, int D) {
    const int chunks = (int)ladd_ceil_div(N, CHUNK_ROWS);
    void *parts = nullptr;
    if (dgate) LADD_TRY(ladd_cuda_scratch(ctx, &parts, 0, sizeof(float) * (size_t)B * chunks * D));
    LADD_TRY(LADD_LAUNCH(ctx, (gate_backward_kernel<V, T>), (unsigned)((int64_t)chunks * B), LADD_BLOCK, 0, dy, (float *)parts, dout, y, gate,
                         mod_stride, N, D));
    return dgate ? ladd_sum_parts<false>(ctx, dgate, mod_stride, (const float *)parts, B, chunks, D) : LADD_OK;
}

ladd_status LADD_CUDA(gate_residual_backward)(LADD_CTX, ladd_act *dy, ladd_act *dgate, const ladd_act *dout, const ladd_act *y, const ladd_act *gate,
                                              int64_t mod_stride, int B, int N, int D) {
    LADD_CUDA_DISPATCH(ctx, T, const auto run = vectors<T>(D, mod_stride, dy, dout, y, gate) ? gate_backward<LADD_VEC<T>, T> : gate_backward<1, T>;
                       return run(ctx, (T *)dy, (T *)dgate, (const T *)dout, (const T *)y, (const T *)gate, mod_stride, B, N, D));
}

/* ---- RMS norm per head ----------------------------------------------------------------------------------------------- */

/* A team of 1 to 32 lanes takes one head of one row and keeps it in registers: a lane has K runs of V elements, `team * V` apart. */
enum { HEAD_MOST = 128, HEAD_ROUNDS = 16 };
template <int V>
constexpr int HEAD_RUNS = V == 1 ? HEAD_MOST / LADD_WARP : 1;

template <int V>
static int team_of(int dh) {
    int team = 1;
    while (team < LADD_WARP && team * V < dh) team *= 2;
    return team;
}

__device__ __forceinline__ float team_sum(float x, int team) {
    for (int step = team / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* Runs of one head; zeros where `valid` is false or the head has ended. */
template <int V, typename T>
__device__ __forceinline__ void load_head(float (&v)[HEAD_RUNS<V>][V], const T *head, int member, int team, int dh, bool valid) {
#pragma unroll
    for (int k = 0; k < HEAD_RUNS<V>; k++) {
        const int i = (k * team + member) * V;
        if (valid && i < dh)
            ladd_load<T, V>(v[k], head + i);
        else
#pragma unroll
            for (int j = 0; j < V; j++) v[k][j] = 0.0f;
    }
}

template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK) rms_norm_forward_kernel(T *y, float *save_rstd, const T *x, const T *w, uint32_t items, int heads,
                                                                      int dh, int team, int64_t x_row, int64_t y_row, float eps) {
    const uint32_t item = blockIdx.x * (LADD_BLOCK / team) + threadIdx.x / team;
    const int64_t row = item / (uint32_t)heads;
    const int member = threadIdx.x % team, head = (int)(item % (uint32_t)heads) * dh;
    const bool valid = item < items;
    float v[HEAD_RUNS<V>][V], weight[HEAD_RUNS<V>][V], squares = 0.0f;
    load_head<V>(v, x + row * x_row + head, member, team, dh, valid);
    load_head<V>(weight, w, member, team, dh, valid);
#pragma unroll
    for (int k = 0; k < HEAD_RUNS<V>; k++)
#pragma unroll
        for (int j = 0; j < V; j++) squares += v[k][j] * v[k][j];
    const float rstd = 1.0f / sqrtf(team_sum(squares, team) / (float)dh + eps);
    if (!valid) return;
    if (member == 0) save_rstd[item] = rstd;
#pragma unroll
    for (int k = 0; k < HEAD_RUNS<V>; k++) {
        const int i = (k * team + member) * V;
        if (i >= dh) continue;
#pragma unroll
        for (int j = 0; j < V; j++) v[k][j] = v[k][j] * rstd * weight[k][j];
        ladd_store<T, V>(y + row * y_row + head + i, v[k]);
    }
}

/* Fewer than 2^31 heads: then numbers of heads have 32 bits, whose division costs a fraction of a 64-bit one. */
static ladd_status check_head(int rows, int heads, int dh) {
    if (dh < 1 || dh > HEAD_MOST) return ladd_fail(LADD_ERR_VALUE, "a head size from 1 to %d expected, got %d", (int)HEAD_MOST, dh);
    if ((int64_t)rows * heads > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "fewer than 2**31 heads in all rows expected, got %lld", (long long)rows * heads);
    return LADD_OK;
}

template <int V, typename T>
static ladd_status rms_norm_forward(LADD_CTX, T *y, float *rstd, const T *x, const T *w, int rows, int heads, int dh, ptrdiff_t x_row,
                                    ptrdiff_t y_row, float eps) {
    const int team = team_of<V>(dh);
    const int64_t items = (int64_t)rows * heads;
    return LADD_LAUNCH(ctx, (rms_norm_forward_kernel<V, T>), (unsigned)ladd_ceil_div(items, LADD_BLOCK / team), LADD_BLOCK, 0, y, rstd, x, w,
                       (uint32_t)items, heads, dh, team, (int64_t)x_row, (int64_t)y_row, eps);
}

ladd_status LADD_CUDA(rms_norm_heads_forward)(LADD_CTX, ladd_act *y, float *rstd, const ladd_act *x, const ladd_act *w, int rows, int heads, int dh,
                                              ptrdiff_t x_row, ptrdiff_t y_row, float eps) {
    LADD_TRY(check_head(rows, heads, dh));
    LADD_CUDA_DISPATCH(ctx, T, const bool wide = vectors<T>(dh, x_row, y, x, w) && y_row % LADD_VEC<T> == 0;
                       const auto run = wide ? rms_norm_forward<LADD_VEC<T>, T> : rms_norm_forward<1, T>;
                       return run(ctx, (T *)y, rstd, (const T *)x, (const T *)w, rows, heads, dh, x_row, y_row, eps));
}

/* Each team takes HEAD_ROUNDS items; the block's share of dw goes to parts[block, dh] (NULL: skip), its teams added in order. */
template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    rms_norm_backward_kernel(T *dx, float *parts, const T *dy, const T *x, const float *rstd, const T *w, uint32_t items, int heads, int dh, int team,
                             int64_t x_row, int64_t dy_row, int64_t dx_row) {
    constexpr int K = HEAD_RUNS<V>;
    __shared__ float shared[LADD_BLOCK * K * V];
    const int teams = LADD_BLOCK / team, member = threadIdx.x % team;
    float weight[K][V], sums[K][V] = {};
    load_head<V>(weight, w, member, team, dh, true);
    for (int round = 0; round < HEAD_ROUNDS; round++) {
        const uint32_t item = (blockIdx.x * HEAD_ROUNDS + round) * teams + threadIdx.x / team;
        const int64_t row = item / (uint32_t)heads;
        const int head = (int)(item % (uint32_t)heads) * dh;
        const bool valid = item < items;
        const float s = valid ? rstd[item] : 0.0f;
        float v[K][V], d[K][V], product = 0.0f;
        load_head<V>(v, x + row * x_row + head, member, team, dh, valid);
        load_head<V>(d, dy + row * dy_row + head, member, team, dh, valid);
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int j = 0; j < V; j++) {
                sums[k][j] += d[k][j] * v[k][j] * s;
                d[k][j] *= weight[k][j];
                product += d[k][j] * v[k][j];
            }
        const float c = team_sum(product, team) * s * s / (float)dh;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int i = (k * team + member) * V;
            if (!valid || i >= dh) continue;
#pragma unroll
            for (int j = 0; j < V; j++) d[k][j] = s * (d[k][j] - v[k][j] * c);
            ladd_store<T, V>(dx + row * dx_row + head + i, d[k]);
        }
    }
    if (!parts) return;
    const int room = team * K * V; /* columns of one team's sums, at least dh */
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < V; j++) shared[threadIdx.x / team * room + (k * team + member) * V + j] = sums[k][j];
    __syncthreads();
    if ((int)threadIdx.x < dh) {
        float sum = 0.0f;
        for (int t = 0; t < teams; t++) sum += shared[t * room + threadIdx.x];
        parts[(int64_t)blockIdx.x * dh + threadIdx.x] = sum;
    }
}

template <int V, typename T>
static ladd_status rms_norm_backward(LADD_CTX, T *dx, float *dw, const T *dy, const T *x, const float *rstd, const T *w, int rows, int heads, int dh,
                                     ptrdiff_t x_row, ptrdiff_t dy_row, ptrdiff_t dx_row) {
    const int team = team_of<V>(dh);
    const int64_t items = (int64_t)rows * heads, blocks = ladd_ceil_div(items, (int64_t)LADD_BLOCK / team * HEAD_ROUNDS);
    void *parts = nullptr;
    if (dw) LADD_TRY(ladd_cuda_scratch(ctx, &parts, 0, sizeof(float) * (size_t)blocks * dh));
    LADD_TRY(LADD_LAUNCH(ctx, (rms_norm_backward_kernel<V, T>), (unsigned)blocks, LADD_BLOCK, 0, dx, (float *)parts, dy, x, rstd, w, (uint32_t)items,
                         heads, dh, team, (int64_t)x_row, (int64_t)dy_row, (int64_t)dx_row));
    return dw ? ladd_sum_parts<true>(ctx, dw, 0, (const float *)parts, 1, (int)blocks, dh) : LADD_OK;
}

ladd_status LADD_CUDA(rms_norm_heads_backward)(LADD_CTX, ladd_act *dx, float *dw, const ladd_act *dy, const ladd_act *x, const float *rstd,
                                               const ladd_act *w, int rows, int heads, int dh, ptrdiff_t x_row, ptrdiff_t dy_row, ptrdiff_t dx_row) {
    LADD_TRY(check_head(rows, heads, dh));
    LADD_CUDA_DISPATCH(ctx, T, const bool wide = vectors<T>(dh, x_row, dx, dy, x, w) && dy_row % LADD_VEC<T> == 0 && dx_row % LADD_VEC<T> == 0;
                       const auto run = wide ? rms_norm_backward<LADD_VEC<T>, T> : rms_norm_backward<1, T>;
                       return run(ctx, (T *)dx, dw, (const T *)dy, (const T *)x, rstd, (const T *)w, rows, heads, dh, x_row, dy_row, dx_row));
}
