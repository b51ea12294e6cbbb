/* The activations as functions of one number, for the kernels that end in one. The slopes are taken for any x and replaced by their limits where |x|
 * is so large that they are 0 or 1 to the last bit: 0 * inf could arise. expf, not __expf: its error would show in float32. */
#ifndef LADD_ACTIVATION_CUH
#define LADD_ACTIVATION_CUH
#include "common.cuh"

/* gelu_tanh(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
__device__ __forceinline__ float ladd_gelu(float x) {
    const float y = x / (1.0f + expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
    return x < -10.0f ? 0.0f : y;
}
__device__ __forceinline__ float ladd_gelu_slope(float x) {
    const float s = 1.0f / (1.0f + expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
    const float slope = s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
    return x > 10.0f ? 1.0f : (x < -10.0f ? 0.0f : slope);
}
__device__ __forceinline__ float ladd_silu(float x) {
    const float y = x / (1.0f + expf(-x));
    return x < -86.0f ? 0.0f : y;
}
__device__ __forceinline__ float ladd_silu_slope(float x) {
    const float s = 1.0f / (1.0f + expf(-x));
    const float slope = s * (1.0f + x * (1.0f - s));
    return x > 86.0f ? 1.0f : (x < -86.0f ? 0.0f : slope);
}

#endif
