/* Elementwise activations, the formulas of csrc/cpu/activation.c. NaN gives NaN; at plus and minus infinity the limits of the functions. */
#include "activation.cuh"

struct gelu_op {
    static constexpr bool READS_Y = false;
    __device__ float operator()(float x, float, float) const { return ladd_gelu(x); }
};
struct gelu_grad_op {
    static constexpr bool READS_Y = false;
    __device__ float operator()(float dy, float x, float) const { return dy * ladd_gelu_slope(x); }
};
struct silu_op {
    static constexpr bool READS_Y = false;
    __device__ float operator()(float x, float, float) const { return ladd_silu(x); }
};
struct silu_grad_op {
    static constexpr bool READS_Y = false;
    __device__ float operator()(float dy, float x, float) const { return dy * ladd_silu_slope(x); }
};
struct leaky_relu_op {
    static constexpr bool READS_Y = false;
    float slope;
    __device__ float operator()(float x, float, float) const { return x > 0.0f ? x : slope * x; }
};
struct leaky_relu_grad_op {
    static constexpr bool READS_Y = false;
    float slope;
    __device__ float operator()(float dy, float x, float) const { return x > 0.0f ? dy : slope * dy; }
};

template <typename Op>
static ladd_status run(LADD_CTX, ladd_act *y, const ladd_act *a, const ladd_act *b, int64_t n, Op op) {
    LADD_CUDA_DISPATCH(ctx, T, return ladd_map(ctx, (T *)y, (const T *)a, (const T *)b, n, op));
}

ladd_status LADD_CUDA(gelu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) { return run(ctx, y, x, nullptr, n, gelu_op{}); }

ladd_status LADD_CUDA(gelu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n) {
    return run(ctx, dx, dy, x, n, gelu_grad_op{});
}

ladd_status LADD_CUDA(silu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n) { return run(ctx, y, x, nullptr, n, silu_op{}); }

ladd_status LADD_CUDA(silu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n) {
    return run(ctx, dx, dy, x, n, silu_grad_op{});
}

ladd_status LADD_CUDA(leaky_relu_forward)(LADD_CTX, ladd_act *y, const ladd_act *x, float slope, int64_t n) {
    return run(ctx, y, x, nullptr, n, leaky_relu_op{slope});
}

ladd_status LADD_CUDA(leaky_relu_backward)(LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, float slope, int64_t n) {
    return run(ctx, dx, dy, x, n, leaky_relu_grad_op{slope});
}
