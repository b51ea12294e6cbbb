/* Projections, feed-forward and embedders of the transformer block: forward and backward. See transformer.h for shapes. */
#include "transformer.h"

ladd_status ladd_qkv_forward(const ladd_context *ctx, ladd_qkv_saved *saved, const ladd_act *x, const ladd_weights *w, const ladd_qkv_params *p,
                             int rows, int heads, int dh) {
    int D = heads * dh;
    LADD_K(ctx, linear_forward, saved->qkv, x, ladd_weight(ctx, w, p->weight), ladd_weight(ctx, w, p->bias), rows, 3 * D, D);
    return ladd_qkv_normalise(ctx, saved, w, p, rows, heads, dh);
}

ladd_status ladd_qkv_normalise(const ladd_context *ctx, const ladd_qkv_saved *saved, const ladd_weights *w, const ladd_qkv_params *p, int rows,
                               int heads, int dh) {
    if (p->norm_q < 0) return LADD_OK;
    const float eps = 1e-6f;
    const int D = heads * dh;
    LADD_K(ctx, rms_norm_heads_forward, saved->qk, saved->q_rstd, saved->qkv, ladd_weight(ctx, w, p->norm_q), rows, heads, dh, 3 * D, 3 * D, eps);
    LADD_K(ctx, rms_norm_heads_forward, ladd_at(ctx, saved->qk, D), saved->k_rstd, ladd_at(ctx, saved->qkv, D), ladd_weight(ctx, w, p->norm_k), rows,
           heads, dh, 3 * D, 3 * D, eps);
    return LADD_OK;
}

ladd_status ladd_qkv_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *dqkv, const ladd_qkv_saved *saved, const ladd_act *x,
                              const ladd_weights *w, const ladd_qkv_params *p, int rows, int heads, int dh) {
    int D = heads * dh;
    if (p->norm_q >= 0) {
        LADD_K(ctx, rms_norm_heads_backward, dqkv, ladd_weight_grad(w, p->norm_q), dqkv, saved->qkv, saved->q_rstd, ladd_weight(ctx, w, p->norm_q),
               rows, heads, dh, 3 * D, 3 * D, 3 * D);
        LADD_K(ctx, rms_norm_heads_backward, ladd_at(ctx, dqkv, D), ladd_weight_grad(w, p->norm_k), ladd_at(ctx, dqkv, D),
               ladd_at(ctx, saved->qkv, D), saved->k_rstd, ladd_weight(ctx, w, p->norm_k), rows, heads, dh, 3 * D, 3 * D, 3 * D);
    }
    LADD_K(ctx, linear_backward, dx, ladd_weight_grad(w, p->weight), ladd_weight_grad(w, p->bias), dqkv, x, ladd_weight(ctx, w, p->weight), rows,
           3 * D, D);
    return LADD_OK;
}

ladd_stream ladd_qkv_stream(const ladd_context *ctx, const ladd_qkv_saved *saved, ladd_act *o, int n, int heads, int dh) {
    int D = heads * dh;
    const ladd_act *qk = saved->qk ? saved->qk : saved->qkv;
    return (ladd_stream){.q = qk,
                         .k = ladd_at(ctx, qk, D),
                         .v = ladd_at(ctx, saved->qkv, 2 * D),
                         .row = 3 * D,
                         .batch = (ptrdiff_t)n * 3 * D,
                         .o = o,
                         .o_row = D,
                         .o_batch = (ptrdiff_t)n * D,
                         .n = n};
}

ladd_status ladd_ff_forward(const ladd_context *ctx, ladd_act *y, ladd_act *h, ladd_act *g, const ladd_act *x, const ladd_weights *w,
                            const ladd_ff_params *p, int rows, int D, int hidden) {
    LADD_K(ctx, linear_gelu_forward, g, h, x, ladd_weight(ctx, w, p->up.weight), ladd_weight(ctx, w, p->up.bias), rows, hidden, D);
    LADD_K(ctx, linear_forward, y, g, ladd_weight(ctx, w, p->down.weight), ladd_weight(ctx, w, p->down.bias), rows, D, hidden);
    return LADD_OK;
}

ladd_status ladd_ff_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *scratch, const ladd_act *dy, const ladd_act *h, const ladd_act *g,
                             const ladd_act *x, const ladd_weights *w, const ladd_ff_params *p, int rows, int D, int hidden) {
    LADD_K(ctx, linear_backward, scratch, ladd_weight_grad(w, p->down.weight), ladd_weight_grad(w, p->down.bias), dy, g,
           ladd_weight(ctx, w, p->down.weight), rows, D, hidden);
    LADD_K(ctx, gelu_backward, scratch, scratch, h, (int64_t)rows * hidden);
    LADD_K(ctx, linear_backward, dx, ladd_weight_grad(w, p->up.weight), ladd_weight_grad(w, p->up.bias), scratch, x,
           ladd_weight(ctx, w, p->up.weight), rows, hidden, D);
    return LADD_OK;
}

ladd_status ladd_embedder_forward(const ladd_context *ctx, ladd_act *y, ladd_act *h, ladd_act *a, const ladd_act *x, const ladd_weights *w,
                                  const ladd_embedder_params *p, int rows, int in, int D) {
    LADD_K(ctx, linear_forward, h, x, ladd_weight(ctx, w, p->first.weight), ladd_weight(ctx, w, p->first.bias), rows, D, in);
    LADD_K(ctx, silu_forward, a, h, (int64_t)rows * D);
    LADD_K(ctx, linear_forward, y, a, ladd_weight(ctx, w, p->second.weight), ladd_weight(ctx, w, p->second.bias), rows, D, D);
    return LADD_OK;
}

ladd_status ladd_embedder_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *scratch, const ladd_act *dy, const ladd_act *h, const ladd_act *a,
                                   const ladd_act *x, const ladd_weights *w, const ladd_embedder_params *p, int rows, int in, int D) {
    LADD_K(ctx, linear_backward, scratch, ladd_weight_grad(w, p->second.weight), ladd_weight_grad(w, p->second.bias), dy, a,
           ladd_weight(ctx, w, p->second.weight), rows, D, D);
    LADD_K(ctx, silu_backward, scratch, scratch, h, (int64_t)rows * D);
    LADD_K(ctx, linear_backward, dx, ladd_weight_grad(w, p->first.weight), ladd_weight_grad(w, p->first.bias), scratch, x,
           ladd_weight(ctx, w, p->first.weight), rows, D, in);
    return LADD_OK;
}
