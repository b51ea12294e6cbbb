/* Group normalisation with optional fused SiLU. Statistics take two passes over values that a block holds in registers (mean, then squared
 * deviations), so they keep their digits far from zero.
 *
 * Forward: a group that fits one block is read once and written once. A larger one is cut into slices by its size; each leaves its mean and squared
 * deviations, which one warp joins in order, and a second pass normalises: two reads, one write. Backward: sums of each channel (two reads), then dx
 * (two reads, one write); what a sum needs of the forward activation is computed again, not stored.
 */
#include "common.cuh"

enum {
    GROUP_ITEMS = 8,       /* vectors a thread holds */
    GROUP_ROW_PART = 4096, /* elements of a channel that one warp sums in the backward pass */
    GROUP_WARPS = LADD_BLOCK / LADD_WARP,
    GROUP_SLOT = 0
};

struct group_sizes {
    int C, L, G, channels, n; /* channels and elements of a group */
    float eps;
};

__device__ __forceinline__ float group_sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

template <bool SILU>
__device__ __forceinline__ float group_activate(float v) {
    return SILU ? v * group_sigmoid(v) : v;
}

/* One vector of group bg: normalised, scaled, activated, stored. e: its place in the group; a vector never spans two channels. */
template <typename T, int V, bool SILU>
__device__ __forceinline__ void group_finish(T *y, float (&x)[V], float mean, float rstd, const T *gamma, const T *beta, int g, int e,
                                             const group_sizes &s) {
    const int c = g * s.channels + e / s.L;
    const float scale = rstd * ladd_to_float(gamma[c]), shift = ladd_to_float(beta[c]);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] = group_activate<SILU>((x[j] - mean) * scale + shift);
    ladd_store<T, V>(y + e, x);
}

/* A block has slice blockIdx.x % slices of group blockIdx.x / slices. WHOLE: the slice is the group, and the block finishes it; else it leaves its
 * mean and squared deviations in moments[groups][slices]. */
template <typename T, int V, bool WHOLE, bool SILU>
__global__ void __launch_bounds__(LADD_BLOCK)
    group_forward_kernel(T *y, float *mean, float *rstd, float2 *moments, const T *x, const T *gamma, const T *beta, group_sizes s, int slices) {
    constexpr int SLICE = LADD_BLOCK * V * GROUP_ITEMS;
    __shared__ float shared[LADD_WARP];
    const int64_t bg = blockIdx.x / slices;
    const int first = (int)(blockIdx.x % slices) * SLICE;
    const int count = s.n - first < SLICE ? s.n - first : SLICE;
    const T *from = x + bg * s.n + first;
    float value[GROUP_ITEMS][V], sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < GROUP_ITEMS; i++) {
        const int e = (i * LADD_BLOCK + (int)threadIdx.x) * V;
        if (e < count) {
            ladd_load<T, V>(value[i], from + e);
#pragma unroll
            for (int j = 0; j < V; j++) sum[0] += value[i][j];
        }
    }
    ladd_block_sum(sum, shared);
    const float m = sum[0] / (float)count;
    sum[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUP_ITEMS; i++)
        if ((i * LADD_BLOCK + (int)threadIdx.x) * V < count)
#pragma unroll
            for (int j = 0; j < V; j++) sum[0] += (value[i][j] - m) * (value[i][j] - m);
    ladd_block_sum(sum, shared);
    if (!WHOLE) {
        if (threadIdx.x == 0) moments[blockIdx.x] = make_float2(m, sum[0]);
        return;
    }
    const float r = rsqrtf(sum[0] / (float)count + s.eps);
    if (threadIdx.x == 0) mean[bg] = m, rstd[bg] = r;
#pragma unroll
    for (int i = 0; i < GROUP_ITEMS; i++) {
        const int e = (i * LADD_BLOCK + (int)threadIdx.x) * V;
        if (e < count) group_finish<T, V, SILU>(y + bg * s.n, value[i], m, r, gamma, beta, (int)(bg % s.G), e, s);
    }
}

/* Joins the slices of a group: a warp a group. */
__global__ void __launch_bounds__(LADD_BLOCK)
    group_join_kernel(float *mean, float *rstd, const float2 *moments, int64_t groups, int64_t n, int slices, int slice, float eps) {
    const int lane = threadIdx.x % LADD_WARP;
    const int64_t bg = (int64_t)blockIdx.x * GROUP_WARPS + threadIdx.x / LADD_WARP;
    if (bg >= groups) return;
    double sum = 0.0, squares = 0.0;
    for (int i = lane; i < slices; i += LADD_WARP) {
        const int64_t count = n - (int64_t)i * slice < slice ? n - (int64_t)i * slice : slice;
        sum += (double)count * moments[bg * slices + i].x;
    }
    const double m = ladd_warp_sum(sum) / (double)n;
    for (int i = lane; i < slices; i += LADD_WARP) {
        const int64_t count = n - (int64_t)i * slice < slice ? n - (int64_t)i * slice : slice;
        const double d = moments[bg * slices + i].x - m;
        squares += moments[bg * slices + i].y + (double)count * d * d;
    }
    squares = ladd_warp_sum(squares);
    if (lane == 0) mean[bg] = (float)m, rstd[bg] = (float)(1.0 / sqrt(squares / (double)n + (double)eps));
}

template <typename T, int V, bool SILU>
__global__ void __launch_bounds__(LADD_BLOCK)
    group_apply_kernel(T *y, const float *mean, const float *rstd, const T *x, const T *gamma, const T *beta, group_sizes s, int slices) {
    constexpr int SLICE = LADD_BLOCK * V * GROUP_ITEMS;
    const int64_t bg = blockIdx.x / slices;
    const int first = (int)(blockIdx.x % slices) * SLICE;
    const float m = mean[bg], r = rstd[bg];
#pragma unroll 4
    for (int i = 0; i < GROUP_ITEMS; i++) {
        const int e = first + (i * LADD_BLOCK + (int)threadIdx.x) * V;
        float value[V];
        if (e >= s.n) break;
        ladd_load<T, V>(value, x + bg * s.n + e);
        group_finish<T, V, SILU>(y + bg * s.n, value, m, r, gamma, beta, (int)(bg % s.G), e, s);
    }
}

/* ---- backward: with h = (x - mean) rstd, v = h gamma + beta: dx = rstd (gamma dv - mean(gamma dv) - h mean(gamma dv h)), means over the group
 * ------------- */

/* The gradient before the activation. */
template <bool SILU>
__device__ __forceinline__ float group_before(float dy, float h, float gamma, float beta) {
    if (!SILU) return dy;
    const float v = h * gamma + beta, s = group_sigmoid(v);
    return dy * s * (1.0f + v * (1.0f - s));
}

/* sums[B C][parts] = sum of dv and of dv h over a part of a channel: a warp a part. */
template <typename T, int V, bool SILU>
__global__ void __launch_bounds__(LADD_BLOCK) group_sums_kernel(float2 *sums, const T *dy, const T *x, const float *mean, const float *rstd,
                                                                const T *gamma, const T *beta, int64_t count, int parts, group_sizes s) {
    const int lane = threadIdx.x % LADD_WARP;
    const int64_t at = (int64_t)blockIdx.x * GROUP_WARPS + threadIdx.x / LADD_WARP;
    if (at >= count) return;
    const int64_t row = at / parts;
    const int first = (int)(at % parts) * GROUP_ROW_PART, last = s.L - first < GROUP_ROW_PART ? s.L : first + GROUP_ROW_PART, c = (int)(row % s.C);
    const float m = mean[row / s.channels], r = rstd[row / s.channels], scale = ladd_to_float(gamma[c]), shift = ladd_to_float(beta[c]);
    float sum = 0.0f, sum_h = 0.0f;
    for (int l = first + lane * V; l < last; l += LADD_WARP * V) {
        float d[V], v[V];
        ladd_load<T, V>(d, dy + row * s.L + l);
        ladd_load<T, V>(v, x + row * s.L + l);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float h = (v[j] - m) * r, before = group_before<SILU>(d[j], h, scale, shift);
            sum += before;
            sum_h += before * h;
        }
    }
    sum = ladd_warp_sum(sum);
    sum_h = ladd_warp_sum(sum_h);
    if (lane == 0) sums[at] = make_float2(sum, sum_h);
}

/* Joins the parts of each channel into channel[B C], and the group's means of gamma dv and gamma dv h into means[B G]: a warp a group. */
template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK)
    group_means_kernel(float2 *means, float2 *channel, const float2 *sums, const T *gamma, int64_t groups, int parts, group_sizes s) {
    const int lane = threadIdx.x % LADD_WARP;
    const int64_t bg = (int64_t)blockIdx.x * GROUP_WARPS + threadIdx.x / LADD_WARP;
    if (bg >= groups) return;
    double a = 0.0, b = 0.0;
    for (int i = lane; i < s.channels; i += LADD_WARP) {
        const int64_t row = bg * s.channels + i;
        float2 sum = make_float2(0.0f, 0.0f);
        for (int p = 0; p < parts; p++) sum.x += sums[row * parts + p].x, sum.y += sums[row * parts + p].y;
        channel[row] = sum;
        const double g = (double)ladd_to_float(gamma[bg % s.G * s.channels + i]);
        a += g * sum.x;
        b += g * sum.y;
    }
    a = ladd_warp_sum(a);
    b = ladd_warp_sum(b);
    if (lane == 0) means[bg] = make_float2((float)(a / (double)s.n), (float)(b / (double)s.n));
}

/* dx may be dy. */
template <typename T, int V, bool SILU>
__global__ void __launch_bounds__(LADD_BLOCK) group_backward_kernel(T *dx, const T *dy, const T *x, const float *mean, const float *rstd,
                                                                    const float2 *means, const T *gamma, const T *beta, group_sizes s, int slices) {
    constexpr int SLICE = LADD_BLOCK * V * GROUP_ITEMS;
    const int64_t bg = blockIdx.x / slices;
    const int first = (int)(blockIdx.x % slices) * SLICE;
    const float m = mean[bg], r = rstd[bg];
    const float2 group = means[bg];
#pragma unroll 2
    for (int i = 0; i < GROUP_ITEMS; i++) {
        const int e = first + (i * LADD_BLOCK + (int)threadIdx.x) * V;
        const int64_t at = bg * s.n + e;
        if (e >= s.n) break;
        const int c = (int)(bg % s.G) * s.channels + e / s.L;
        const float scale = ladd_to_float(gamma[c]), shift = ladd_to_float(beta[c]);
        float d[V], v[V];
        ladd_load<T, V>(d, dy + at);
        ladd_load<T, V>(v, x + at);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float h = (v[j] - m) * r;
            d[j] = r * (scale * group_before<SILU>(d[j], h, scale, shift) - group.x - h * group.y);
        }
        ladd_store<T, V>(dx + at, d);
    }
}

/* dbeta[C] and dgamma[C] += sums over the samples in order (each NULL: skip). */
__global__ void __launch_bounds__(LADD_BLOCK) group_parameters_kernel(float *dgamma, float *dbeta, const float2 *channel, int B, int C) {
    const int c = blockIdx.x * LADD_BLOCK + threadIdx.x;
    if (c >= C) return;
    float sum = 0.0f, sum_h = 0.0f;
    for (int b = 0; b < B; b++) sum += channel[(int64_t)b * C + c].x, sum_h += channel[(int64_t)b * C + c].y;
    if (dbeta) dbeta[c] += sum;
    if (dgamma) dgamma[c] += sum_h;
}

/* ---- choosing ------------------------------------------------------------------------------------------------------------ */

static ladd_status group_check(group_sizes *s, int C, int L, int G, float eps) {
    if (G < 1 || C % G) return ladd_fail(LADD_ERR_VALUE, "group norm: a number of channels divisible by its %d groups expected, got %d", G, C);
    const int64_t n = (int64_t)(C / G) * L;
    if (n > 1 << 30) return ladd_fail(LADD_ERR_VALUE, "group norm: at most %d elements of a group expected, got %lld", 1 << 30, (long long)n);
    s->C = C, s->L = L, s->G = G, s->channels = C / G, s->n = (int)n, s->eps = eps;
    return LADD_OK;
}

template <typename T, int V, bool SILU>
static ladd_status group_forward(LADD_CTX, T *y, float *mean, float *rstd, const T *x, const T *gamma, const T *beta, int B, const group_sizes &s) {
    constexpr int SLICE = LADD_BLOCK * V * GROUP_ITEMS;
    const int64_t groups = (int64_t)B * s.G, slices = ladd_ceil_div(s.n, SLICE);
    if (groups * slices > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "group norm: at most %d slices of groups expected, got %lld", INT32_MAX, (long long)(groups * slices));
    const unsigned blocks = (unsigned)(groups * slices), joins = (unsigned)ladd_ceil_div(groups, GROUP_WARPS);
    float2 *none = nullptr;
    if (slices == 1)
        return LADD_LAUNCH(ctx, (group_forward_kernel<T, V, true, SILU>), blocks, LADD_BLOCK, 0, y, mean, rstd, none, x, gamma, beta, s, 1);
    void *scratch;
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, GROUP_SLOT, (size_t)(groups * slices) * sizeof(float2)));
    float2 *moments = static_cast<float2 *>(scratch);
    LADD_TRY(
        LADD_LAUNCH(ctx, (group_forward_kernel<T, V, false, SILU>), blocks, LADD_BLOCK, 0, y, mean, rstd, moments, x, gamma, beta, s, (int)slices));
    LADD_TRY(LADD_LAUNCH(ctx, group_join_kernel, joins, LADD_BLOCK, 0, mean, rstd, moments, groups, (int64_t)s.n, (int)slices, SLICE, s.eps));
    return LADD_LAUNCH(ctx, (group_apply_kernel<T, V, SILU>), blocks, LADD_BLOCK, 0, y, mean, rstd, x, gamma, beta, s, (int)slices);
}

template <typename T, int V, bool SILU>
static ladd_status group_backward(LADD_CTX, T *dx, float *dgamma, float *dbeta, const T *dy, const T *x, const float *mean, const float *rstd,
                                  const T *gamma, const T *beta, int B, const group_sizes &s) {
    const int64_t rows = (int64_t)B * s.C, groups = (int64_t)B * s.G, parts = ladd_ceil_div(s.L, GROUP_ROW_PART);
    const int64_t slices = ladd_ceil_div(s.n, LADD_BLOCK * V * GROUP_ITEMS);
    if (groups * slices > INT32_MAX)
        return ladd_fail(LADD_ERR_VALUE, "group norm: at most %d slices of groups expected, got %lld", INT32_MAX, (long long)(groups * slices));
    void *scratch;
    LADD_TRY(ladd_cuda_scratch(ctx, &scratch, GROUP_SLOT, (size_t)(rows * parts + rows + groups) * sizeof(float2)));
    float2 *sums = static_cast<float2 *>(scratch), *channel = sums + rows * parts, *means = channel + rows;
    LADD_TRY(LADD_LAUNCH(ctx, (group_sums_kernel<T, V, SILU>), (unsigned)ladd_ceil_div(rows * parts, GROUP_WARPS), LADD_BLOCK, 0, sums, dy, x, mean,
                         rstd, gamma, beta, rows * parts, (int)parts, s));
    LADD_TRY(LADD_LAUNCH(ctx, (group_means_kernel<T>), (unsigned)ladd_ceil_div(groups, GROUP_WARPS), LADD_BLOCK, 0, means, channel, sums, gamma,
                         groups, (int)parts, s));
    LADD_TRY(LADD_LAUNCH(ctx, (group_backward_kernel<T, V, SILU>), (unsigned)(groups * slices), LADD_BLOCK, 0, dx, dy, x, mean, rstd, means, gamma,
                         beta, s, (int)slices));
    if (!dgamma && !dbeta) return LADD_OK;
    return LADD_LAUNCH(ctx, group_parameters_kernel, (unsigned)ladd_ceil_div(s.C, LADD_BLOCK), LADD_BLOCK, 0, dgamma, dbeta, channel, B, s.C);
}

template <typename T>
static ladd_status group_choose_forward(LADD_CTX, int silu, T *y, float *mean, float *rstd, const T *x, const T *gamma, const T *beta, int B,
                                        const group_sizes &s) {
    constexpr int V = LADD_VEC<T>;
    const bool vector = s.L % V == 0 && ladd_aligned16(y, x);
    if (vector) return (silu ? group_forward<T, V, true> : group_forward<T, V, false>)(ctx, y, mean, rstd, x, gamma, beta, B, s);
    return (silu ? group_forward<T, 1, true> : group_forward<T, 1, false>)(ctx, y, mean, rstd, x, gamma, beta, B, s);
}

template <typename T>
static ladd_status group_choose_backward(LADD_CTX, int silu, T *dx, float *dgamma, float *dbeta, const T *dy, const T *x, const float *mean,
                                         const float *rstd, const T *gamma, const T *beta, int B, const group_sizes &s) {
    constexpr int V = LADD_VEC<T>;
    const bool vector = s.L % V == 0 && ladd_aligned16(dx, dy, x);
    if (vector)
        return (silu ? group_backward<T, V, true> : group_backward<T, V, false>)(ctx, dx, dgamma, dbeta, dy, x, mean, rstd, gamma, beta, B, s);
    return (silu ? group_backward<T, 1, true> : group_backward<T, 1, false>)(ctx, dx, dgamma, dbeta, dy, x, mean, rstd, gamma, beta, B, s);
}

ladd_status LADD_CUDA(group_norm_forward)(LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *gamma,
                                          const ladd_act *beta, int B, int C, int L, int G, float eps, int silu) {
    group_sizes s;
    LADD_TRY(group_check(&s, C, L, G, eps));
    if (B <= 0 || s.n <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T, return group_choose_forward(ctx, silu, (T *)y, mean, rstd, (const T *)x, (const T *)gamma, (const T *)beta, B, s));
}

ladd_status LADD_CUDA(group_norm_backward)(LADD_CTX, ladd_act *dx, float *dgamma, float *dbeta, const ladd_act *dy, const ladd_act *x,
                                           const float *mean, const float *rstd, const ladd_act *gamma, const ladd_act *beta, int B, int C, int L,
                                           int G, int silu) {
    group_sizes s;
    LADD_TRY(group_check(&s, C, L, G, 0.0f));
    if (B <= 0 || s.n <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(ctx, T,
                       return group_choose_backward(ctx, silu, (T *)dx, dgamma, dbeta, (const T *)dy, (const T *)x, mean, rstd, (const T *)gamma,
                                                    (const T *)beta, B, s));
}
