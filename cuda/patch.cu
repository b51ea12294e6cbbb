/* Patches, position table, timestep features. */
#include "common.cuh"

/* ---- patches --------------------------------------------------------------------------------------------------------- */

typedef struct patch_sizes {
    int C, H, W, p, h, w, channel_last;
    int64_t n; /* elements of all tokens (gather) or of the image (scatter) */
} patch_sizes;

/* Where pixel (c, y, x) of sample b stands among the tokens. */
__device__ __forceinline__ int64_t token_index(const patch_sizes &s, int b, int c, int y, int x) {
    const int dy = y % s.p, dx = x % s.p;
    const int64_t token = ((int64_t)b * s.h + y / s.p) * s.w + x / s.p;
    const int within = s.channel_last ? (dy * s.p + dx) * s.C + c : (c * s.p + dy) * s.p + dx;
    return token * s.C * s.p * s.p + within;
}

/* A thread takes an element of the tokens; neighbours write neighbours. Latents are small beside everything else, so both directions go by element.
 */
template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK) patch_gather_kernel(T *tokens, const T *image, patch_sizes s) {
    const int64_t i = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x;
    if (i >= s.n) return;
    const int D = s.C * s.p * s.p;
    const int64_t token = i / D;
    const int within = (int)(i % D), x = (int)(token % s.w), y = (int)(token / s.w % s.h), b = (int)(token / s.w / s.h);
    const int pixel = s.channel_last ? within / s.C : within % (s.p * s.p), c = s.channel_last ? within % s.C : within / (s.p * s.p);
    tokens[i] = image[(((int64_t)b * s.C + c) * s.H + y * s.p + pixel / s.p) * s.W + x * s.p + pixel % s.p];
}

template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK) patch_scatter_kernel(T *image, const T *tokens, patch_sizes s) {
    const int64_t i = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x;
    if (i >= s.n) return;
    const int x = (int)(i % s.W), y = (int)(i / s.W % s.H);
    const int64_t plane = i / s.W / s.H;
    const bool covered = y < s.h * s.p && x < s.w * s.p;
    image[i] = covered ? tokens[token_index(s, (int)(plane / s.C), (int)(plane % s.C), y, x)] : ladd_from_float<T>(0.0f);
}

static ladd_status patch_check(patch_sizes *s, int C, int H, int W, int p, int channel_last) {
    if (p < 1 || p > H || p > W) return ladd_fail(LADD_ERR_VALUE, "a patch size between 1 and the image's %d x %d expected, got %d", H, W, p);
    *s = patch_sizes{C, H, W, p, H / p, W / p, channel_last, 0};
    return LADD_OK;
}

ladd_status LADD_CUDA(patch_gather)(LADD_CTX, ladd_act *tokens, const ladd_act *image, int B, int C, int H, int W, int p, int channel_last) {
    patch_sizes s;
    LADD_TRY(patch_check(&s, C, H, W, p, channel_last));
    s.n = (int64_t)B * s.h * s.w * C * p * p;
    LADD_CUDA_DISPATCH(
        ctx, T,
        return LADD_LAUNCH(ctx, patch_gather_kernel<T>, (unsigned)ladd_ceil_div(s.n, LADD_BLOCK), LADD_BLOCK, 0, (T *)tokens, (const T *)image, s));
}

ladd_status LADD_CUDA(patch_scatter)(LADD_CTX, ladd_act *image, const ladd_act *tokens, int B, int C, int H, int W, int p, int channel_last) {
    patch_sizes s;
    LADD_TRY(patch_check(&s, C, H, W, p, channel_last));
    s.n = (int64_t)B * C * H * W;
    LADD_CUDA_DISPATCH(
        ctx, T,
        return LADD_LAUNCH(ctx, patch_scatter_kernel<T>, (unsigned)ladd_ceil_div(s.n, LADD_BLOCK), LADD_BLOCK, 0, (T *)image, (const T *)tokens, s));
}

/* ---- position table -------------------------------------------------------------------------------------------------- */

/* A block takes a token; its table row is found once. */
template <int V, typename T>
__global__ void __launch_bounds__(LADD_BLOCK) add_position_kernel(T *x, const T *table, int h, int w, int max, int D) {
    const int64_t token = blockIdx.x;
    const int column = (int)(token % w) + (max - w) / 2, row = (int)(token / w % h) + (max - h) / 2;
    x += token * D;
    table += ((int64_t)row * max + column) * D;
    for (int i = threadIdx.x * V; i < D; i += LADD_BLOCK * V) {
        float a[V], b[V];
        ladd_load<T, V>(a, x + i);
        ladd_load<T, V>(b, table + i);
#pragma unroll
        for (int j = 0; j < V; j++) a[j] += b[j];
        ladd_store<T, V>(x + i, a);
    }
}

template <typename T>
static ladd_status add_position(LADD_CTX, T *x, const T *table, int B, int h, int w, int max, int D) {
    const int64_t blocks = (int64_t)B * h * w;
    if (blocks > INT32_MAX) return ladd_fail(LADD_ERR_VALUE, "position table: fewer than 2**31 tokens expected, got %lld", (long long)blocks);
    const unsigned tokens = (unsigned)blocks;
    if (D % LADD_VEC<T> == 0 && ladd_aligned16(x, table))
        return LADD_LAUNCH(ctx, (add_position_kernel<LADD_VEC<T>, T>), tokens, LADD_BLOCK, 0, x, table, h, w, max, D);
    return LADD_LAUNCH(ctx, (add_position_kernel<1, T>), tokens, LADD_BLOCK, 0, x, table, h, w, max, D);
}

ladd_status LADD_CUDA(add_position)(LADD_CTX, ladd_act *x, const ladd_act *table, int B, int h, int w, int max, int D) {
    if (h < 1 || w < 1 || h > max || w > max)
        return ladd_fail(LADD_ERR_VALUE, "a token grid of at most %d x %d (the position table) expected, got %d x %d", max, max, h, w);
    LADD_CUDA_DISPATCH(ctx, T, return add_position(ctx, (T *)x, (const T *)table, B, h, w, max, D));
}

/* ---- timestep features ----------------------------------------------------------------------------------------------- */

/* Sine and cosine in double, by way of a / pi: periods of 2 are taken off exactly, and 1 / pi in two parts keeps the rest as exact as a double is.
 * (sin() of a double reduces large arguments with a table in local memory.) */
__device__ __forceinline__ void sine_cosine(double a, double *sine, double *cosine) {
    constexpr double INVERSE = 0x1.45f306dc9c883p-2, REST = -0x1.6b01ec5417056p-56;
    const double half_turns = a * INVERSE, rest = fma(a, INVERSE, -half_turns) + a * REST;
    sincospi(half_turns - 2.0 * rint(0.5 * half_turns) + rest, sine, cosine);
}

/* The rounding steps of csrc/cpu/patch.c, which say why: exponent in float, exp in double rounded to float, product in float, sine and cosine in
 * double. */
template <typename T>
__global__ void __launch_bounds__(LADD_BLOCK) timestep_features_kernel(T *f, const float *sigma, int64_t n, int half) {
    const int64_t at = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x, b = at / half;
    if (at >= n) return;
    const int i = (int)(at % half);
    const float exponent = __fdiv_rn(__fmul_rn(-9.210340371976184f, (float)i), (float)half), frequency = (float)exp((double)exponent);
    const float a = __fmul_rn(__fmul_rn(sigma[b], 1000.0f), frequency);
    double sine, cosine;
    sine_cosine((double)a, &sine, &cosine);
    f += b * 2 * half + i;
    f[0] = ladd_from_float<T>((float)cosine);
    f[half] = ladd_from_float<T>((float)sine);
}

ladd_status LADD_CUDA(timestep_features)(LADD_CTX, ladd_act *f, const float *sigma, int B, int dim) {
    if (dim < 2 || dim % 2) return ladd_fail(LADD_ERR_VALUE, "an even number of timestep features expected, got %d", dim);
    const int64_t n = (int64_t)B * (dim / 2);
    if (n <= 0) return LADD_OK;
    LADD_CUDA_DISPATCH(
        ctx, T,
        return LADD_LAUNCH(ctx, timestep_features_kernel<T>, (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, (T *)f, sigma, n, dim / 2));
}
