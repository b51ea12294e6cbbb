/* Normal numbers, renoising and the steps of a sampler. The numbers are those of csrc/cpu/random.c to the bit: the same Philox words, and the same
 * arithmetic without contraction to fused multiply-adds (the _rn functions), with IEEE division and square root.
 *
 * Sample numbers are on the host and travel in the launch's parameters, RANDOM_SAMPLES of them a launch: nothing is staged, so a captured graph holds
 * them itself. Times and factors lie on the device, and so may the key's step: a replayed graph reads them anew.
 */
#include "common.cuh"

#include "../csrc/philox.h"

enum { RANDOM_SAMPLES = 64, RANDOM_GRID = 65535 /* of a launch's second axis */ };

struct random_rows {
    int64_t sample[RANDOM_SAMPLES];
};

/* ---- numbers ------------------------------------------------------------------------------------------------------------- */

/* a + b c, rounded twice. */
__device__ __forceinline__ float random_madd(float a, float b, float c) { return __fadd_rn(a, __fmul_rn(b, c)); }

/* (x + 1/2) / 2^32, in (0, 1]. */
__device__ __forceinline__ float random_uniform(uint32_t x) {
    const float high = (float)(int32_t)(x >> 16), low = (float)(int32_t)(x & 0xFFFFu);
    return __fmul_rn(__fadd_rn(random_madd(low, high, 65536.0f), 0.5f), 2.3283064365386963e-10f);
}

/* sqrt(-2 ln u), u = random_uniform(x); csrc/cpu/random.c explains the steps. */
__device__ __forceinline__ float random_radius(uint32_t x) {
    const float rest = random_uniform(~x);
    int32_t bits = __float_as_int(random_uniform(x));
    const int32_t e = (bits - 0x3F3504F3) >> 23;
    const float m = __int_as_float(bits - e * (1 << 23));
    const float top = e ? m - 1.0f : -rest, bottom = e ? m + 1.0f : 2.0f - rest;
    const float s = __fdiv_rn(top, bottom), z = __fmul_rn(s, s);
    const float p = random_madd(2.0f, z, random_madd(0.666666667f, z, random_madd(0.4f, z, random_madd(0.285714286f, z, 0.222222222f))));
    const float n = (float)e;
    const float ln = random_madd(random_madd(__fmul_rn(s, p), n, 1.42860677e-6f), n, 0.693145752f);
    return __fsqrt_rn(__fmul_rn(-2.0f, ln));
}

/* cos and sin of 2 pi x / 2^32. */
__device__ __forceinline__ void random_turn(float *cosine, float *sine, uint32_t x) {
    const uint32_t quadrant = (x + 0x20000000u) >> 30;
    const float a = __fmul_rn((float)(int32_t)(x - (quadrant << 30)), 1.46291807926715968e-9f), z = __fmul_rn(a, a);
    const float s = random_madd(a, __fmul_rn(a, z),
                                random_madd(-1.66666667e-1f, z, random_madd(8.33333333e-3f, z, random_madd(-1.98412698e-4f, z, 2.75573192e-6f))));
    const float c = random_madd(
        1.0f, z,
        random_madd(-0.5f, z, random_madd(4.16666667e-2f, z, random_madd(-1.38888889e-3f, z, random_madd(2.48015873e-5f, z, -2.75573192e-7f)))));
    const float swap_c = quadrant & 1 ? s : c, swap_s = quadrant & 1 ? c : s;
    *cosine = (quadrant + 1) & 2 ? -swap_c : swap_c;
    *sine = quadrant & 2 ? -swap_s : swap_s;
}

/* One thread makes the numbers of 16 bytes: one or two Philox blocks. x0 NULL: plain normal numbers. out may be x0. */
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(LADD_BLOCK)
    random_kernel(T *out, T *noise, const T *x0, const float *times, random_rows rows, ladd_rng_key key, int64_t n) {
    constexpr int V = LADD_VEC<T>;
    const int b = blockIdx.y;
    const int64_t e = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V, at = b * n + e;
    if (e >= n) return;
    const uint64_t sample = (uint64_t)rows.sample[b];
    uint32_t k[2];
    ladd_philox_key(k, key);
    float z[V], x[V];
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        const uint64_t block = (uint64_t)(e + i) / 4;
        const ladd_philox_words w = ladd_philox((uint32_t)block, (uint32_t)(block >> 32), (uint32_t)sample, (uint32_t)(sample >> 32), k[0], k[1]);
        const float r0 = random_radius(w.x[0]), r1 = random_radius(w.x[2]);
        float c0, s0, c1, s1;
        random_turn(&c0, &s0, w.x[1]);
        random_turn(&c1, &s1, w.x[3]);
        z[i] = __fmul_rn(r0, c0), z[i + 1] = __fmul_rn(r0, s0), z[i + 2] = __fmul_rn(r1, c1), z[i + 3] = __fmul_rn(r1, s1);
    }
    const float t = x0 ? times[b] : 0.0f, rest = 1.0f - t;
    if (VECTOR) {
        if (x0) {
            ladd_load<T, V>(x, x0 + at);
#pragma unroll
            for (int i = 0; i < V; i++) x[i] = random_madd(__fmul_rn(rest, x[i]), t, z[i]);
        }
        if (noise) ladd_store<T, V>(noise + at, z);
        ladd_store<T, V>(out + at, x0 ? x : z);
    } else {
#pragma unroll
        for (int i = 0; i < V; i++)
            if (e + i < n) {
                out[at + i] = ladd_from_float<T>(x0 ? random_madd(__fmul_rn(rest, ladd_to_float(x0[at + i])), t, z[i]) : z[i]);
                if (noise) noise[at + i] = ladd_from_float<T>(z[i]);
            }
    }
}

template <typename T>
static ladd_status random_run(LADD_CTX, T *out, T *noise, const T *x0, const float *t, ladd_rng_key key, const int64_t *samples, int B, int64_t n) {
    if (B < 0 || n < 0) return ladd_fail(LADD_ERR_VALUE, "random numbers: sizes of at least 0 expected, got B = %d, n = %lld", B, (long long)n);
    if (n == 0) return LADD_OK;
    const bool vector = n % LADD_VEC<T> == 0 && ladd_aligned16(out, noise, x0);
    for (int first = 0; first < B; first += RANDOM_SAMPLES) {
        const int count = B - first < RANDOM_SAMPLES ? B - first : RANDOM_SAMPLES;
        random_rows rows = {};
        for (int i = 0; i < count; i++) rows.sample[i] = samples[first + i];
        const dim3 grid((unsigned)ladd_ceil_div(n, LADD_BLOCK * LADD_VEC<T>), (unsigned)count);
        const int64_t at = first * n;
        T *e = noise ? noise + at : nullptr;
        const T *x = x0 ? x0 + at : nullptr;
        const float *times = t ? t + first : nullptr;
        if (vector)
            LADD_TRY(LADD_LAUNCH(ctx, (random_kernel<T, true>), grid, LADD_BLOCK, 0, out + at, e, x, times, rows, key, n));
        else
            LADD_TRY(LADD_LAUNCH(ctx, (random_kernel<T, false>), grid, LADD_BLOCK, 0, out + at, e, x, times, rows, key, n));
    }
    return LADD_OK;
}

ladd_status LADD_CUDA(normal)(LADD_CTX, ladd_act *out, ladd_rng_key key, const int64_t *samples, int B, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return random_run<T>(ctx, (T *)out, nullptr, nullptr, nullptr, key, samples, B, n));
}

ladd_status LADD_CUDA(renoise)(LADD_CTX, ladd_act *out, ladd_act *noise, const ladd_act *x0, const float *t, ladd_rng_key key, const int64_t *samples,
                               int B, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return random_run(ctx, (T *)out, (T *)noise, (const T *)x0, t, key, samples, B, n));
}

/* ---- steps: rows of n elements, each with its own factor ----------------------------------------------------------------------- */

struct interpolate_op {
    __device__ float operator()(float t, float x0, float noise) const { return (1.0f - t) * x0 + t * noise; }
};
struct predict_x0_op {
    __device__ float operator()(float t, float x, float v) const { return x - t * v; }
};
struct row_scale_op {
    __device__ float operator()(float factor, float x, float) const { return factor * x; }
};
struct euler_op {
    static constexpr bool READS_Y = false;
    float step;
    __device__ float operator()(float x, float v, float) const { return x + step * v; }
};

/* y may be a or b; b may be NULL. */
template <typename T, int V, typename Op>
__global__ void __launch_bounds__(LADD_BLOCK) random_rows_kernel(T *y, const T *a, const T *b, const float *factors, int64_t n, Op op) {
    const int64_t e = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V, at = blockIdx.y * n + e;
    if (e >= n) return;
    const float t = factors[blockIdx.y];
    float x[V], v[V] = {};
    ladd_load<T, V>(x, a + at);
    if (b) ladd_load<T, V>(v, b + at);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = op(t, x[i], v[i]);
    ladd_store<T, V>(y + at, x);
}

template <typename T, typename Op>
static ladd_status random_map(LADD_CTX, T *y, const T *a, const T *b, const float *t, int B, int64_t n, Op op) {
    if (n <= 0) return LADD_OK;
    const bool vector = n % LADD_VEC<T> == 0 && ladd_aligned16(y, a, b);
    for (int first = 0; first < B; first += RANDOM_GRID) {
        const int count = B - first < RANDOM_GRID ? B - first : RANDOM_GRID;
        const int64_t at = first * n;
        const float *factors = t + first;
        const dim3 grid((unsigned)ladd_ceil_div(n, LADD_BLOCK * (vector ? LADD_VEC<T> : 1)), (unsigned)count);
        const T *second = b ? b + at : nullptr;
        if (vector)
            LADD_TRY(LADD_LAUNCH(ctx, (random_rows_kernel<T, LADD_VEC<T>, Op>), grid, LADD_BLOCK, 0, y + at, a + at, second, factors, n, op));
        else
            LADD_TRY(LADD_LAUNCH(ctx, (random_rows_kernel<T, 1, Op>), grid, LADD_BLOCK, 0, y + at, a + at, second, factors, n, op));
    }
    return LADD_OK;
}

ladd_status LADD_CUDA(interpolate)(LADD_CTX, ladd_act *out, const ladd_act *x0, const ladd_act *noise, const float *t, int B, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return random_map(ctx, (T *)out, (const T *)x0, (const T *)noise, t, B, n, interpolate_op{}));
}

ladd_status LADD_CUDA(predict_x0)(LADD_CTX, ladd_act *x0, const ladd_act *x, const ladd_act *v, const float *t, int B, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return random_map(ctx, (T *)x0, (const T *)x, (const T *)v, t, B, n, predict_x0_op{}));
}

ladd_status LADD_CUDA(row_scale)(LADD_CTX, ladd_act *y, const ladd_act *x, const float *factor, int B, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return random_map(ctx, (T *)y, (const T *)x, (const T *)nullptr, factor, B, n, row_scale_op{}));
}

ladd_status LADD_CUDA(euler_step)(LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *v, float sigma, float sigma_next, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return ladd_map(ctx, (T *)out, (const T *)x, (const T *)v, n, euler_op{sigma_next - sigma}));
}
