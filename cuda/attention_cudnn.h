/* cuDNN's attention, one stream of tokens: the second engine. attention_engine.cu brings two streams into one and chooses. */
#ifndef LADD_CUDA_ATTENTION_CUDNN_H
#define LADD_CUDA_ATTENTION_CUDNN_H
#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Token i of sample b, head j: pointer + b*batch + i*row + j*dh, as in ladd_stream. Gradients have the strides of what they are gradients of. */
typedef struct ladd_cudnn_attention {
    const void *q, *k, *v;
    void *o;
    float *lse; /* [B,heads,S] */
    const void *d_o;
    void *dq, *dk, *dv; /* NULL in forward */
    int B, heads, S, dh;
    int64_t row, batch, o_row, o_batch;
    float scale;
} ladd_cudnn_attention;

ladd_status ladd_cudnn_attention_run(const ladd_context *ctx, const ladd_cudnn_attention *call);

#ifdef __cplusplus
}
#endif
#endif
