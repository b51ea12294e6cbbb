/* cuDNN's attention on the emulator: ladd's own kernels on the one stream that cuDNN would be given. Included by attention_cudnn.cu. */
#ifndef LADD_EMULATED_CUDNN_H
#define LADD_EMULATED_CUDNN_H
#include <cstdlib>
#include <string>

extern "C" {
/* For the tests: how often this way was taken; whether the library is there; the head size that it refuses to plan. */
int ladd_emulator_cudnn_calls, ladd_emulator_cudnn_absent, ladd_emulator_cudnn_refused;
}

bool attention_cudnn_there() { return !ladd_emulator_cudnn_absent; }

template <typename T>
ladd_status attention_cudnn_plan(const ladd_context *, const attention_args<T> &a, bool) {
    if (ladd_emulator_cudnn_absent) return ladd_fail(LADD_ERR_RUNTIME, "the library cudnn expected: none on the emulator");
    if (a.dh == ladd_emulator_cudnn_refused) return ladd_fail(LADD_ERR_RUNTIME, "cuDNN attention, plan: head_dim %d refused", a.dh);
    return LADD_OK;
}

template <typename T>
ladd_status attention_cudnn_run(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    ladd_emulator_cudnn_calls++;
    typedef ladd_act A; /* pointers only */
    const attention_part<T> &p = a.part[0];
    const ladd_stream stream = {(const A *)p.q, (const A *)p.k, (const A *)p.v, p.row, p.batch, (A *)p.o, p.o_row, p.o_batch, a.S};
    const ladd_stream_grad grad = {(A *)p.dq, (A *)p.dk, (A *)p.dv, (const A *)p.d_o};
    const char *wanted = getenv("LADD_CUDA_ATTENTION");
    const std::string before = wanted ? wanted : "";
    setenv("LADD_CUDA_ATTENTION", "ladd", 1);
    const ladd_status status = backward ? ladd_cuda_attention_backward(ctx, &grad, &stream, 1, a.lse, a.B, a.heads, a.dh, a.scale)
                                        : ladd_cuda_attention_forward(ctx, &stream, 1, a.lse, a.B, a.heads, a.dh, a.scale);
    if (before.empty())
        unsetenv("LADD_CUDA_ATTENTION");
    else
        setenv("LADD_CUDA_ATTENTION", before.c_str(), 1);
    return status;
}

#endif
