/* The pieces of a transformer block that every token stream shares, written once on the table of kernels. */
#ifndef LADD_TRANSFORMER_H
#define LADD_TRANSFORMER_H
#include "../backend.h"

/* Offsets into a model's flat parameter buffer; -1: the tensor does not exist. */
typedef struct ladd_qkv_params {
    int64_t weight, bias;   /* [3D,D], [3D]: q, k, v rows next to each other */
    int64_t norm_q, norm_k; /* [dh] each, RMS norm of q and k per head */
} ladd_qkv_params;
typedef struct ladd_linear_params {
    int64_t weight, bias;
} ladd_linear_params;

/* What a model hands to its layers: weights in the compute type, and where parameter gradients go (NULL: frozen, none are computed). */
typedef struct ladd_weights {
    const ladd_act *data;
    float *grad;
} ladd_weights;
static inline const ladd_act *ladd_weight(const ladd_context *ctx, const ladd_weights *w, int64_t offset) {
    return offset < 0 ? NULL : ladd_at(ctx, w->data, offset);
}
static inline float *ladd_weight_grad(const ladd_weights *w, int64_t offset) { return offset < 0 || !w->grad ? NULL : w->grad + offset; }

/* Saved by ladd_qkv_forward for one stream of `rows` tokens. */
typedef struct ladd_qkv_saved {
    ladd_act *qkv;          /* [rows,3D] as projected */
    ladd_act *qk;           /* [rows,3D] q and k after RMS norm (the last third unused: one stride serves q, k, v); NULL without norm */
    float *q_rstd, *k_rstd; /* [rows,heads] */
} ladd_qkv_saved;

/* q, k, v = x W^T + b, then RMS norm per head on q and k where the weights exist (sd3: block step 2). */
ladd_status ladd_qkv_forward(const ladd_context *ctx, ladd_qkv_saved *saved, const ladd_act *x /* [rows,D] */, const ladd_weights *w,
                             const ladd_qkv_params *p, int rows, int heads, int dh);
/* The norm alone: qk and its statistics from qkv once more, where they were not kept until backward. */
ladd_status ladd_qkv_normalise(const ladd_context *ctx, const ladd_qkv_saved *saved, const ladd_weights *w, const ladd_qkv_params *p, int rows,
                               int heads, int dh);
/* dqkv[rows,3D] holds gradients after the norm on entry and is overwritten; dx[rows,D] is written. */
ladd_status ladd_qkv_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *dqkv, const ladd_qkv_saved *saved, const ladd_act *x,
                              const ladd_weights *w, const ladd_qkv_params *p, int rows, int heads, int dh);
/* This stream's part of a joint attention; o[B,n,D] is dense. */
ladd_stream ladd_qkv_stream(const ladd_context *ctx, const ladd_qkv_saved *saved, ladd_act *o, int n, int heads, int dh);

typedef struct ladd_ff_params {
    ladd_linear_params up, down; /* [4D,D], [D,4D] */
} ladd_ff_params;
/* y[rows,D] = gelu(x up^T + b) down^T + b; h and g [rows,hidden] are saved. */
ladd_status ladd_ff_forward(const ladd_context *ctx, ladd_act *y, ladd_act *h, ladd_act *g, const ladd_act *x, const ladd_weights *w,
                            const ladd_ff_params *p, int rows, int D, int hidden);
/* dx[rows,D] is written; scratch[rows,hidden]. dx may be dy. */
ladd_status ladd_ff_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *scratch, const ladd_act *dy, const ladd_act *h, const ladd_act *g,
                             const ladd_act *x, const ladd_weights *w, const ladd_ff_params *p, int rows, int D, int hidden);

/* Linear -> SiLU -> Linear, the embedders of time and pooled text. h, a [rows,D] saved. */
typedef struct ladd_embedder_params {
    ladd_linear_params first, second;
} ladd_embedder_params;
ladd_status ladd_embedder_forward(const ladd_context *ctx, ladd_act *y, ladd_act *h, ladd_act *a, const ladd_act *x, const ladd_weights *w,
                                  const ladd_embedder_params *p, int rows, int in, int D);
ladd_status ladd_embedder_backward(const ladd_context *ctx, ladd_act *dx /* NULL: skip */, ladd_act *scratch /* [rows,D] */, const ladd_act *dy,
                                   const ladd_act *h, const ladd_act *a, const ladd_act *x, const ladd_weights *w, const ladd_embedder_params *p,
                                   int rows, int in, int D);
#endif
