/* What the CUDA kernels share: names, launches, the compute types, 16-byte accesses, sums in a fixed order.
 *
 * A kernel file defines `ladd_status LADD_CUDA(name)(...)` for each of its rows of LADD_KERNELS. An entry chooses the compute type with
 * LADD_CUDA_DISPATCH, scratch and stream come from the context (device.h), and every launch goes through LADD_LAUNCH: `<<<>>>` under nvcc, the tests'
 * emulator (tests/cuda_emulator) under a host compiler. Kernels compute in float whatever the compute type; they use no atomics on floats, and how
 * they cut their work depends on shapes only, so results are the same bits on every run.
 */
#ifndef LADD_COMMON_CUH
#define LADD_COMMON_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "device.h"

#define LADD_CUDA(name) ladd_cuda_##name
#define LADD_PROTOTYPE(name, arguments) extern "C" ladd_status LADD_CUDA(name) arguments;
LADD_KERNELS(LADD_PROTOTYPE)
#undef LADD_PROTOTYPE

/* ---- launches -------------------------------------------------------------------------------------------------------- */

/* LADD_LAUNCH(ctx, kernel, grid, block, shared_bytes, arguments...) queues a kernel on the context's stream; its value is the launch's ladd_status. A
 * kernel with template arguments is put in parentheses. Dynamic shared memory is LADD_DYNAMIC_SHARED(type, name) in the kernel: 16-byte aligned. A
 * kernel that wants more than 48 KB of it says so before with LADD_ALLOW_SHARED(ctx, kernel, bytes). */
#ifdef __CUDACC__
#define LADD_LAUNCH(ctx, kernel, grid, block, shared_bytes, ...)                         \
    (kernel<<<(grid), (block), (shared_bytes), ladd_cuda((ctx))->stream>>>(__VA_ARGS__), \
     ladd_cuda_check((ctx), cudaGetLastError(), "launch of " #kernel))
#define LADD_DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char ladd_dynamic_shared[]; \
    type *name = reinterpret_cast<type *>(ladd_dynamic_shared)
#else
#define LADD_LAUNCH(ctx, kernel, grid, block, shared_bytes, ...)                                                     \
    (ladd_emulator::launch(#kernel, kernel, (grid), (block), (shared_bytes), ladd_cuda((ctx))->stream, __VA_ARGS__), \
     ladd_cuda_check((ctx), cudaGetLastError(), "launch of " #kernel))
#define LADD_DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(ladd_emulator::dynamic_shared())
#endif
#define LADD_ALLOW_SHARED(ctx, kernel, bytes) \
    ladd_cuda_check((ctx), cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)), "shared memory of " #kernel)

/* Runs the statement with T as the context's compute type: LADD_CUDA_DISPATCH(ctx, T, return add(ctx, (T *)y, (const T *)a, n)); */
#define LADD_CUDA_DISPATCH(ctx, T, ...) \
    switch ((ctx)->act) {               \
        case LADD_F32: {                \
            using T = float;            \
            __VA_ARGS__;                \
        } break;                        \
        case LADD_BF16: {               \
            using T = __nv_bfloat16;    \
            __VA_ARGS__;                \
        } break;                        \
        case LADD_F16: {                \
            using T = __half;           \
            __VA_ARGS__;                \
        } break;                        \
    }                                   \
    return ladd_fail(LADD_ERR_RUNTIME, "a compute type of float32, bfloat16 or float16 expected, got number %d", (int)(ctx)->act)

/* Threads of a block where a kernel has no reason for another number. */
enum { LADD_BLOCK = 256, LADD_WARP = 32 };

static inline int64_t ladd_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- compute types --------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float ladd_to_float(float x) { return x; }
__device__ __forceinline__ float ladd_to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ladd_to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T ladd_from_float(float x);
template <>
__device__ __forceinline__ float ladd_from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 ladd_from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half ladd_from_float<__half>(float x) {
    return __float2half_rn(x);
}

/* ---- 16-byte accesses ------------------------------------------------------------------------------------------------ */

/* Elements of T in 16 bytes. */
template <typename T>
constexpr int LADD_VEC = 16 / (int)sizeof(T);

/* Whether all pointers lie on 16 bytes (host side): only then may a kernel with vector accesses be chosen. NULL counts as aligned. */
template <typename... P>
static inline bool ladd_aligned16(const P *...pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

/* V consecutive elements as float: one 16-byte access (two for float with V = 8) where V > 1, which needs alignment to 16 bytes; one element where V
 * is 1. */
template <typename T, int V>
__device__ __forceinline__ void ladd_load(float (&x)[V], const T *pointer) {
    if constexpr (V == 1) {
        x[0] = ladd_to_float(*pointer);
    } else {
        static_assert(V % LADD_VEC<T> == 0, "whole 16-byte vectors");
#pragma unroll
        for (int i = 0; i < V / LADD_VEC<T>; i++) {
            const uint4 raw = reinterpret_cast<const uint4 *>(pointer)[i];
            T part[LADD_VEC<T>];
            memcpy(part, &raw, 16);
#pragma unroll
            for (int j = 0; j < LADD_VEC<T>; j++) x[i * LADD_VEC<T> + j] = ladd_to_float(part[j]);
        }
    }
}

template <typename T, int V>
__device__ __forceinline__ void ladd_store(T *pointer, const float (&x)[V]) {
    if constexpr (V == 1) {
        *pointer = ladd_from_float<T>(x[0]);
    } else {
        static_assert(V % LADD_VEC<T> == 0, "whole 16-byte vectors");
#pragma unroll
        for (int i = 0; i < V / LADD_VEC<T>; i++) {
            T part[LADD_VEC<T>];
#pragma unroll
            for (int j = 0; j < LADD_VEC<T>; j++) part[j] = ladd_from_float<T>(x[i * LADD_VEC<T> + j]);
            uint4 raw;
            memcpy(&raw, part, 16);
            reinterpret_cast<uint4 *>(pointer)[i] = raw;
        }
    }
}

/* ---- sums in a fixed order ------------------------------------------------------------------------------------------- */

/* Over the 32 lanes; every lane gets the same bits. */
template <typename F>
__device__ __forceinline__ F ladd_warp_sum(F x) {
#pragma unroll
    for (int step = LADD_WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ __forceinline__ float ladd_warp_max(float x) {
#pragma unroll
    for (int step = LADD_WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* K sums over a one-dimensional block of whole warps (at most 32); every thread gets the results. `shared` [K * 32] may be used again at once: there
 * is a barrier before and behind. */
template <int K, typename F>
__device__ __forceinline__ void ladd_block_sum(F (&x)[K], F *shared) {
    const int lane = threadIdx.x % LADD_WARP, warp = threadIdx.x / LADD_WARP, warps = blockDim.x / LADD_WARP;
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = ladd_warp_sum(x[k]);
    __syncthreads();
    if (lane == 0)
#pragma unroll
        for (int k = 0; k < K; k++) shared[k * LADD_WARP + warp] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = ladd_warp_sum(lane < warps ? shared[k * LADD_WARP + lane] : F(0));
}

/* The second pass of a reduction in two: out[b * stride + i] = (or +=) sum over c of parts[b, c, i]; parts[B, chunks, n] float. A block takes 32
 * columns; warp s adds chunks s, s + 8, ... in order, then the eight sums are added in order. (One dimension of blocks: the others end at 65,535.) */
template <typename Out, bool ACCUMULATE>
__global__ void __launch_bounds__(LADD_BLOCK) ladd_sum_parts_kernel(Out *out, int64_t stride, const float *parts, int chunks, int n) {
    constexpr int SLICES = LADD_BLOCK / LADD_WARP;
    __shared__ float sums[SLICES][LADD_WARP];
    const unsigned tiles = (unsigned)(n + LADD_WARP - 1) / LADD_WARP;
    const int lane = threadIdx.x % LADD_WARP, slice = threadIdx.x / LADD_WARP, i = (int)(blockIdx.x % tiles) * LADD_WARP + lane;
    const int64_t b = blockIdx.x / tiles;
    const float *part = parts + b * chunks * n + i;
    float sum = 0.0f;
    if (i < n)
#pragma unroll 4
        for (int c = slice; c < chunks; c += SLICES) sum += part[(int64_t)c * n];
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || i >= n) return;
#pragma unroll
    for (int s = 1; s < SLICES; s++) sum += sums[s][lane];
    Out *to = out + b * stride + i;
    *to = ladd_from_float<Out>(ACCUMULATE ? ladd_to_float(*to) + sum : sum);
}

template <bool ACCUMULATE, typename Out>
static inline ladd_status ladd_sum_parts(const ladd_context *ctx, Out *out, int64_t stride, const float *parts, int B, int chunks, int n) {
    return LADD_LAUNCH(ctx, (ladd_sum_parts_kernel<Out, ACCUMULATE>), (unsigned)(ladd_ceil_div(n, LADD_WARP) * B), LADD_BLOCK, 0, out, stride, parts,
                       chunks, n);
}

/* ---- elementwise ----------------------------------------------------------------------------------------------------- */

/* y[i] = op(a[i], b[i], y[i]) for i < n: what is not read is NULL and comes as 0. V elements a thread in 16-byte accesses, a scalar tail. y may be a
 * or b. `op` is a struct with `__device__ float operator()(float a, float b, float y) const`, and READS_Y. */
template <int V, typename T, typename Op>
__global__ void __launch_bounds__(LADD_BLOCK) ladd_map_kernel(T *y, const T *a, const T *b, int64_t n, Op op) {
    const int64_t i = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V;
    if (i + V <= n) {
        float va[V] = {}, vb[V] = {}, vy[V] = {};
        if (a) ladd_load<T, V>(va, a + i);
        if (b) ladd_load<T, V>(vb, b + i);
        if (Op::READS_Y) ladd_load<T, V>(vy, y + i);
#pragma unroll
        for (int j = 0; j < V; j++) vy[j] = op(va[j], vb[j], vy[j]);
        ladd_store<T, V>(y + i, vy);
    } else {
#pragma unroll 1
        for (int64_t j = i; j < n; j++) {
            const float result = op(a ? ladd_to_float(a[j]) : 0.0f, b ? ladd_to_float(b[j]) : 0.0f, Op::READS_Y ? ladd_to_float(y[j]) : 0.0f);
            y[j] = ladd_from_float<T>(result);
        }
    }
}

template <typename T, typename Op>
static inline ladd_status ladd_map(const ladd_context *ctx, T *y, const T *a, const T *b, int64_t n, Op op) {
    if (n <= 0) return LADD_OK;
    if (ladd_aligned16(y, a, b))
        return LADD_LAUNCH(ctx, (ladd_map_kernel<LADD_VEC<T>, T, Op>), (unsigned)ladd_ceil_div(n, LADD_BLOCK * LADD_VEC<T>), LADD_BLOCK, 0, y, a, b,
                           n, op);
    return LADD_LAUNCH(ctx, (ladd_map_kernel<1, T, Op>), (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, y, a, b, n, op);
}

#endif
