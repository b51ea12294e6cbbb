/* cuDNN's attention on the emulator: ladd's own kernels on the one stream that cuDNN would be given. Included by attention_cudnn.cu. */
#ifndef LADD_EMULATED_CUDNN_H
#define LADD_EMULATED_CUDNN_H
#include "../../cuda/common.cuh"

extern "C" {
int ladd_emulator_cudnn_calls; /* for the tests: that this way was taken */

ladd_status ladd_cudnn_attention_run(const ladd_context *ctx, const ladd_cudnn_attention *c) {
    ladd_emulator_cudnn_calls++;
    typedef ladd_act A; /* pointers only */
    const ladd_stream stream = {(const A *)c->q, (const A *)c->k, (const A *)c->v, c->row, c->batch, (A *)c->o, c->o_row, c->o_batch, c->S};
    const ladd_stream_grad grad = {(A *)c->dq, (A *)c->dk, (A *)c->dv, (const A *)c->d_o};
    setenv("LADD_CUDA_ATTENTION", "ladd", 1);
    const ladd_status status = c->dq ? ladd_cuda_attention_backward(ctx, &grad, &stream, 1, c->lse, c->B, c->heads, c->dh, c->scale)
                                     : ladd_cuda_attention_forward(ctx, &stream, 1, c->lse, c->B, c->heads, c->dh, c->scale);
    setenv("LADD_CUDA_ATTENTION", "cudnn", 1);
    return status;
}
}

#endif
