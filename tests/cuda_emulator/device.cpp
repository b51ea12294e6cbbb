#include <vector>
#include "../../cuda/device.h"
extern "C" {
const ladd_backend *ladd_cpu_backend(void) { return nullptr; }
ladd_status ladd_cuda_check(const ladd_context *, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return LADD_OK;
    return ladd_fail(LADD_ERR_RUNTIME, "%s: %s", what, cudaGetErrorString(error));
}
ladd_status ladd_cuda_scratch(const ladd_context *ctx, void **block, int slot, size_t bytes) {
    ladd_cuda_state *s = ladd_cuda(ctx);
    if (s->scratch_bytes[slot] < bytes) {
        cudaFree(s->scratch[slot]);
        LADD_TRY(ladd_cuda_check(ctx, cudaMalloc(&s->scratch[slot], bytes), "scratch"));
        s->scratch_bytes[slot] = bytes;
    }
    *block = s->scratch[slot];
    return LADD_OK;
}
ladd_status ladd_cuda_stage(const ladd_context *ctx, const void **device, const void *host, size_t bytes) {
    void *block;
    LADD_TRY(ladd_cuda_check(ctx, cudaMalloc(&block, bytes), "stage"));
    *device = block;
    return ladd_cuda_check(ctx, cudaMemcpy(block, host, bytes, cudaMemcpyHostToDevice), "stage");
}
ladd_status ladd_cuda_result(const ladd_context *ctx, double *host, const double *device, int count) {
    return ladd_cuda_check(ctx, cudaMemcpy(host, device, (size_t)count * 8, cudaMemcpyDeviceToHost), "result");
}
}
