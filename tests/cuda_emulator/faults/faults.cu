/* Kernels with one fault each, and sound twins of some: the emulator must tell them apart. And small kernels that show its tensor-core functions and
 * number types to the tests. Every function: out[n], in[n] are device memory. */
#include "../../../cuda/mma.cuh"

static ladd_cuda_state state;
static ladd_context context = {nullptr, &state, LADD_F32, 4, nullptr, nullptr};
static char sentence[700];

/* cuda/device.cu has the real ones; here an error is a sentence and nothing else. */
extern "C" ladd_status ladd_cuda_check(const ladd_context *, cudaError_t error, const char *) {
    snprintf(sentence, sizeof sentence, "%s", error == cudaSuccess ? "" : cudaGetErrorString(error));
    return error == cudaSuccess ? LADD_OK : LADD_ERR_RUNTIME;
}
extern "C" const char *fault_sentence() { return sentence; }
extern "C" int fault_alloc(void **block, size_t bytes) { return cudaMalloc(block, bytes); }
extern "C" int fault_free(void *block) {
    const cudaError_t error = cudaFree(block);
    cudaGetLastError(); /* else the next launch would meet it */
    return error;
}
extern "C" int fault_copy(void *to, const void *from, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyDefault); }

/* A block reverses 64 numbers through shared memory. */
template <bool BARRIER>
__global__ void reverse(float *out, const float *in) {
    __shared__ float shared[64];
    shared[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
    if (BARRIER) __syncthreads();
    out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void all_write_one(float *out, const float *in) { out[0] = in[threadIdx.x]; }
__global__ void blocks_write_one(float *out, const float *in) { out[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x]; }
__global__ void half_at_barrier(float *out, const float *in) {
    if (threadIdx.x < 32) __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}
__global__ void two_barriers(float *out, const float *in) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}
__global__ void lanes_missing(float *out, const float *in) {
    float x = in[threadIdx.x];
    if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
    out[threadIdx.x] = x;
}
__global__ void not_in_mask(float *out, const float *in) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1); }
__global__ void read_beyond(float *out, const float *in) { out[threadIdx.x] = in[threadIdx.x + 256]; }
__global__ void write_behind(float *out, const float *in) { out[(int)threadIdx.x - 1] = in[threadIdx.x]; }
__global__ void misaligned(float *out, const float *in) {
    float v[4];
    ladd_load<float, 4>(v, in + 1);
    out[threadIdx.x] = v[0];
}
__global__ void static_index(float *out, const float *in) {
    __shared__ float shared[32];
    shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x / 2];
}
__global__ void dynamic_index(float *out, const float *in) {
    LADD_DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x * 64] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x * 64];
}
/* Unwritten shared memory is NaN. */
__global__ void unwritten(float *out, const float *) {
    LADD_DYNAMIC_SHARED(float, shared);
    out[threadIdx.x] = shared[threadIdx.x];
}
/* Copies 256 numbers through shared memory, 16 bytes a thread. */
template <bool WAIT>
__global__ void copy_async(float *out, const float *in) {
    LADD_DYNAMIC_SHARED(float, shared);
    ladd_cp_async(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, threadIdx.x < 60);
    ladd_cp_async_commit();
    ladd_cp_async(shared + 256 + 4 * threadIdx.x, in, true);
    ladd_cp_async_commit();
    if (WAIT) ladd_cp_async_wait<1>();
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += 64) out[i] = shared[255 - i];
}

extern "C" int fault_run(const char *which, float *out, const float *in) {
#define CASE(name, kernel, grid, block, shared) \
    if (strcmp(which, name) == 0) return LADD_LAUNCH(&context, kernel, grid, block, shared, out, in)
    CASE("barrier", reverse<true>, 4, 64, 0);
    CASE("missing barrier", reverse<false>, 4, 64, 0);
    CASE("threads write one place", all_write_one, 1, 64, 0);
    CASE("blocks write one place", blocks_write_one, 4, 64, 0);
    CASE("half at a barrier", half_at_barrier, 1, 64, 0);
    CASE("two barriers", two_barriers, 1, 64, 0);
    CASE("lanes missing", lanes_missing, 1, 64, 0);
    CASE("lane not in its mask", not_in_mask, 1, 32, 0);
    CASE("read beyond", read_beyond, 1, 64, 0);
    CASE("write behind", write_behind, 1, 64, 0);
    CASE("misaligned", misaligned, 1, 1, 0);
    CASE("static index", static_index, 1, 64, 0);
    CASE("dynamic index", dynamic_index, 1, 64, 64 * 64 * 4 - 300);
    CASE("unwritten", unwritten, 1, 64, 256);
    CASE("asynchronous copy", copy_async<true>, 1, 64, 2048);
    CASE("copy without wait", copy_async<false>, 1, 64, 2048);
    CASE("block too large", all_write_one, 1, 1025, 0);
    CASE("grid too large", all_write_one, dim3(1, 65536), 1, 0);
    CASE("shared memory not asked for", unwritten, 1, 64, (48 << 10) + 1);
#undef CASE
    return -1;
}

/* d[16,8] = a[16,16] b[16,8], by ldmatrix of a and, transposed, of b. Types by number of bits kept: T. */
template <typename T>
__global__ void multiply(float *d, const T *a, const T *b) {
    LADD_DYNAMIC_SHARED(T, shared);
    T *sa = shared, *sb = shared + 256;
    for (int i = threadIdx.x; i < 256; i += 32) sa[i] = a[i];
    for (int i = threadIdx.x; i < 128; i += 32) sb[i] = b[i];
    __syncthreads();
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t fa[4], fb[2];
    float sums[4] = {};
    ladd_ldmatrix(fa, sa + (lane % 16) * 16 + lane / 16 * 8);
    ladd_ldmatrix_trans(fb, sb + (lane % 16) * 8);
    ladd_mma<T>(sums, fa, fb);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
extern "C" int fault_multiply(int half, float *d, const void *a, const void *b) {
    if (half) return LADD_LAUNCH(&context, multiply<__half>, 1, 32, 768, d, (const __half *)a, (const __half *)b);
    return LADD_LAUNCH(&context, multiply<__nv_bfloat16>, 1, 32, 768, d, (const __nv_bfloat16 *)a, (const __nv_bfloat16 *)b);
}

/* Rounds x[n] to T and back. */
template <typename T>
__global__ void round_trip(float *y, const float *x, int n) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) y[i] = ladd_to_float(ladd_from_float<T>(x[i]));
}
extern "C" int fault_round(int half, float *y, const float *x, int n) {
    if (half) return LADD_LAUNCH(&context, round_trip<__half>, (unsigned)ladd_ceil_div(n, 256), 256, 0, y, x, n);
    return LADD_LAUNCH(&context, round_trip<__nv_bfloat16>, (unsigned)ladd_ceil_div(n, 256), 256, 0, y, x, n);
}
