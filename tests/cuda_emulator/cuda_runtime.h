/* The part of CUDA's language and run-time interface that cuda/ uses, on the emulator. */
#ifndef LADD_EMULATED_CUDA_RUNTIME_H
#define LADD_EMULATED_CUDA_RUNTIME_H
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (ladd_emulator::thread->index)
#define blockIdx (ladd_emulator::block_index)
#define blockDim (ladd_emulator::block_size)
#define gridDim (ladd_emulator::grid_size)
#define warpSize 32

/* ---- barriers, shuffles, votes --------------------------------------------------------------------------------------- */

#define __syncthreads() ladd_emulator::barrier(__LINE__)
#define __syncwarp(...) ((void)ladd_emulator::vote(ladd_emulator_mask(__VA_ARGS__), 0, __LINE__))
#define __shfl_sync(mask, value, from, ...) ladd_emulator::shuffle((mask), (value), ladd_emulator_from((from), ##__VA_ARGS__), __LINE__)
#define __shfl_xor_sync(mask, value, bits, ...) ladd_emulator::shuffle((mask), (value), ladd_emulator_xor((bits), ##__VA_ARGS__), __LINE__)
#define __shfl_down_sync(mask, value, by, ...) ladd_emulator::shuffle((mask), (value), ladd_emulator_down((by), ##__VA_ARGS__), __LINE__)
#define __shfl_up_sync(mask, value, by, ...) ladd_emulator::shuffle((mask), (value), ladd_emulator_up((by), ##__VA_ARGS__), __LINE__)
#define __ballot_sync(mask, predicate) ladd_emulator::vote((mask), (predicate) != 0, __LINE__)
#define __any_sync(mask, predicate) (ladd_emulator::vote((mask), (predicate) != 0, __LINE__) != 0)
#define __all_sync(mask, predicate) (ladd_emulator::vote((mask), (predicate) != 0, __LINE__) == (mask))
static inline uint32_t ladd_emulator_mask(uint32_t mask = 0xffffffffu) { return mask; }
/* The lane that a shuffle of `width` lanes reads; beyond the segment's end it is one's own. */
static inline int ladd_emulator_from(int from, int width = 32) {
    const int lane = ladd_emulator::thread->lane;
    return (lane & ~(width - 1)) + (from & (width - 1));
}
static inline int ladd_emulator_xor(int bits, int width = 32) {
    const int lane = ladd_emulator::thread->lane, from = lane ^ bits;
    return from / width > lane / width ? lane : from;
}
static inline int ladd_emulator_down(int by, int width = 32) {
    const int lane = ladd_emulator::thread->lane, from = lane + by;
    return from / width == lane / width ? from : lane;
}
static inline int ladd_emulator_up(int by, int width = 32) {
    const int lane = ladd_emulator::thread->lane, from = lane - by;
    return from >= 0 && from / width == lane / width ? from : lane;
}

/* ---- vectors --------------------------------------------------------------------------------------------------------- */

#define LADD_EMULATOR_VECTORS(type, name)                                   \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };          \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LADD_EMULATOR_VECTORS(float, float)
LADD_EMULATOR_VECTORS(int, int)
LADD_EMULATOR_VECTORS(unsigned, uint)
#undef LADD_EMULATOR_VECTORS
struct alignas(16) double2 {
    double x, y;
};

/* ---- numbers --------------------------------------------------------------------------------------------------------- */

template <typename T>
static inline T __ldg(const T *pointer) {
    return *pointer;
}
template <typename T>
static inline T __ldcs(const T *pointer) {
    return *pointer;
}
template <typename T>
static inline void __stcs(T *pointer, T value) {
    *pointer = value;
}
template <typename T>
static inline void __stcg(T *pointer, T value) {
    *pointer = value;
}
#define __expf(x) expf(x) /* macros: the C library declares functions of these names */
#define __logf(x) logf(x)
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline void ladd_emulator_sincospif(float x, float *s, float *c) {
    *s = (float)sin(M_PI * (double)x);
    *c = (float)cos(M_PI * (double)x);
}
#define sincospif ladd_emulator_sincospif
static inline void ladd_emulator_sincospi(double x, double *s, double *c) {
    *s = sin(M_PI * x);
    *c = cos(M_PI * x);
}
#define sincospi ladd_emulator_sincospi
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename To, typename From>
static inline To ladd_emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float x) { return ladd_emulator_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return ladd_emulator_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return ladd_emulator_bits<float>(x); }
static inline float __int_as_float(int x) { return ladd_emulator_bits<float>(x); }

/* CUDA's min and max for the types that meet in kernels. */
template <typename A, typename B>
static inline std::common_type_t<A, B> min(A a, B b) {
    return b < a ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}
template <typename A, typename B>
static inline std::common_type_t<A, B> max(A a, B b) {
    return a < b ? (std::common_type_t<A, B>)b : (std::common_type_t<A, B>)a;
}

/* ---- run time: memory.cpp -------------------------------------------------------------------------------------------- */

/* clang-format off */
#define LADD_EMULATOR_ERRORS(E) \
    E(InvalidValue, 1) E(MemoryAllocation, 2) E(InvalidConfiguration, 9) E(InsufficientDriver, 35) E(InvalidDeviceFunction, 98) \
    E(NoDevice, 100) E(InvalidDevice, 101) E(NoKernelImageForDevice, 209) E(ECCUncorrectable, 214) E(UnsupportedPtxVersion, 222) \
    E(NotReady, 600) E(IllegalAddress, 700) E(LaunchTimeout, 702) E(ContextIsDestroyed, 709) E(Assert, 710) E(HardwareStackError, 714) \
    E(IllegalInstruction, 715) E(MisalignedAddress, 716) E(InvalidAddressSpace, 717) E(InvalidPc, 718) E(LaunchFailure, 719) \
    E(NvlinkUncorrectable, 220) E(SystemDriverMismatch, 803) E(StreamCaptureUnsupported, 900) E(StreamCaptureInvalidated, 901) \
    E(StreamCaptureIsolation, 905) E(CapturedEvent, 907)
/* clang-format on */
enum cudaError_t : int {
    cudaSuccess = 0,
#define LADD_EMULATOR_ERROR(name, number) cudaError##name = number,
    LADD_EMULATOR_ERRORS(LADD_EMULATOR_ERROR)
#undef LADD_EMULATOR_ERROR
};
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error); /* for a failed launch: what the emulator found */
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <typename K>
static inline cudaError_t cudaFuncSetAttribute(K *kernel, cudaFuncAttribute, int bytes) {
    return ladd_emulator::allow_shared((const void *)kernel, bytes);
}

enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
cudaError_t cudaMalloc(void **block, size_t bytes);
cudaError_t cudaFree(void *block);
cudaError_t cudaMallocAsync(void **block, size_t bytes, cudaStream_t stream);
cudaError_t cudaFreeAsync(void *block, cudaStream_t stream);
cudaError_t cudaMallocHost(void **block, size_t bytes);
cudaError_t cudaFreeHost(void *block);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset(void *to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);

enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostAllocDefault = 0 };
typedef struct ladd_emulator_event *cudaEvent_t;
cudaError_t cudaHostAlloc(void **block, size_t bytes, unsigned flags);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaSetDevice(int device);
/* The driver's, which ladd looks up on a device. */
int cuCtxGetCurrent(void **context);
int cuCtxSetCurrent(void *context);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetDeviceCount(int *count);
struct cudaDeviceProp {
    char name[256];
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
struct cudaFuncAttributes {
    int binaryVersion;
};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *kernel);
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
};
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer);

/* A graph keeps launches, copies and fills as they were queued, and runs them when it is launched. */
typedef struct ladd_emulator_graph *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready);

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);

#endif
