/* Residual block and attention over pixels (diffusers' ResnetBlock2D without time embedding, and Attention as AutoencoderKL's mid block uses it). */
#include "resnet_block.h"

#include <math.h>

static int64_t pixels(ladd_image_size s) { return (int64_t)s.H * s.W; }
static int64_t elements(ladd_image_size s, int C) { return (int64_t)s.B * C * pixels(s); }

ladd_conv ladd_conv_same(const ladd_conv_params *p, ladd_image_size s) {
    int pad = p->k / 2;
    return (ladd_conv){.B = s.B,
                       .Cin = p->in,
                       .H = s.H,
                       .W = s.W,
                       .Cout = p->out,
                       .kh = p->k,
                       .kw = p->k,
                       .stride = 1,
                       .pad_top = pad,
                       .pad_left = pad,
                       .pad_bottom = pad,
                       .pad_right = pad,
                       .Ho = s.H,
                       .Wo = s.W};
}

static ladd_status conv_forward(const ladd_context *ctx, ladd_act *y, const ladd_act *x, const ladd_weights *w, const ladd_conv_params *p,
                                ladd_image_size s) {
    ladd_conv conv = ladd_conv_same(p, s);
    return ctx->backend->conv2d_forward(ctx, y, x, ladd_weight(ctx, w, p->weight), ladd_weight(ctx, w, p->bias), &conv);
}
static ladd_status conv_backward(const ladd_context *ctx, ladd_act *dx, const ladd_act *dy, const ladd_act *x, const ladd_weights *w,
                                 const ladd_conv_params *p, ladd_image_size s) {
    ladd_conv conv = ladd_conv_same(p, s);
    return ctx->backend->conv2d_backward(ctx, dx, ladd_weight_grad(w, p->weight), ladd_weight_grad(w, p->bias), dy, x, ladd_weight(ctx, w, p->weight),
                                         &conv);
}
static ladd_status norm_forward(const ladd_context *ctx, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_weights *w,
                                const ladd_norm_params *p, int C, ladd_image_size s, int silu) {
    return ctx->backend->group_norm_forward(ctx, y, mean, rstd, x, ladd_weight(ctx, w, p->weight), ladd_weight(ctx, w, p->bias), s.B, C,
                                            (int)pixels(s), s.G, LADD_GROUP_NORM_EPS, silu);
}
/* In place: d holds dy on entry, dx on return. */
static ladd_status norm_backward(const ladd_context *ctx, ladd_act *d, const ladd_act *x, const float *mean, const float *rstd, const ladd_weights *w,
                                 const ladd_norm_params *p, int C, ladd_image_size s, int silu) {
    return ctx->backend->group_norm_backward(ctx, d, ladd_weight_grad(w, p->weight), ladd_weight_grad(w, p->bias), d, x, mean, rstd,
                                             ladd_weight(ctx, w, p->weight), ladd_weight(ctx, w, p->bias), s.B, C, (int)pixels(s), s.G, silu);
}

/* ---- residual block -------------------------------------------------------------------------------------------------- */

void ladd_resnet_take(const ladd_context *ctx, ladd_resnet_saved *saved, ladd_arena *arena, const ladd_resnet_params *p, ladd_image_size s) {
    saved->h1 = ladd_take_act(ctx, arena, elements(s, p->conv1.in));
    saved->c1 = ladd_take_act(ctx, arena, elements(s, p->conv1.out));
    saved->h2 = ladd_take_act(ctx, arena, elements(s, p->conv1.out));
    float **statistics[] = {&saved->mean1, &saved->rstd1, &saved->mean2, &saved->rstd2};
    for (int i = 0; i < 4; i++) *statistics[i] = ladd_take_f32(arena, (int64_t)s.B * s.G);
}

int64_t ladd_resnet_work(const ladd_resnet_params *p, ladd_image_size s, int backward) {
    int out = p->shortcut.weight >= 0 ? p->conv1.out : 0;
    if (backward) out = p->conv1.in > p->conv1.out ? p->conv1.in : p->conv1.out;
    return elements(s, out);
}

ladd_status ladd_resnet_forward(const ladd_context *ctx, ladd_act *y, ladd_resnet_saved *saved, ladd_act *work, const ladd_act *x,
                                const ladd_weights *w, const ladd_resnet_params *p, ladd_image_size s) {
    LADD_TRY(norm_forward(ctx, saved->h1, saved->mean1, saved->rstd1, x, w, &p->norm1, p->conv1.in, s, 1));
    LADD_TRY(conv_forward(ctx, saved->c1, saved->h1, w, &p->conv1, s));
    LADD_TRY(norm_forward(ctx, saved->h2, saved->mean2, saved->rstd2, saved->c1, w, &p->norm2, p->conv1.out, s, 1));
    LADD_TRY(conv_forward(ctx, y, saved->h2, w, &p->conv2, s));
    const ladd_act *bypass = x;
    if (p->shortcut.weight >= 0) {
        LADD_TRY(conv_forward(ctx, work, x, w, &p->shortcut, s));
        bypass = work;
    }
    LADD_K(ctx, add, y, y, bypass, elements(s, p->conv1.out));
    return LADD_OK;
}

ladd_status ladd_resnet_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *work, const ladd_act *dy, const ladd_resnet_saved *saved,
                                 const ladd_act *x, const ladd_weights *w, const ladd_resnet_params *p, ladd_image_size s) {
    LADD_TRY(conv_backward(ctx, work, dy, saved->h2, w, &p->conv2, s));
    LADD_TRY(norm_backward(ctx, work, saved->c1, saved->mean2, saved->rstd2, w, &p->norm2, p->conv1.out, s, 1));
    LADD_TRY(conv_backward(ctx, dx, work, saved->h1, w, &p->conv1, s));
    LADD_TRY(norm_backward(ctx, dx, x, saved->mean1, saved->rstd1, w, &p->norm1, p->conv1.in, s, 1));
    const ladd_act *bypass = dy;
    if (p->shortcut.weight >= 0) {
        LADD_TRY(conv_backward(ctx, work, dy, x, w, &p->shortcut, s));
        bypass = work;
    }
    LADD_K(ctx, add, dx, dx, bypass, elements(s, p->conv1.in));
    return LADD_OK;
}

/* ---- attention over pixels ------------------------------------------------------------------------------------------- */

void ladd_spatial_attention_take(const ladd_context *ctx, ladd_spatial_attention_saved *saved, ladd_arena *arena,
                                 const ladd_spatial_attention_params *p, ladd_image_size s) {
    int64_t n = elements(s, p->C);
    saved->tokens = ladd_take_act(ctx, arena, n);
    saved->qkv = ladd_take_act(ctx, arena, 3 * n);
    saved->o = ladd_take_act(ctx, arena, n);
    saved->mean = ladd_take_f32(arena, (int64_t)s.B * s.G);
    saved->rstd = ladd_take_f32(arena, (int64_t)s.B * s.G);
    saved->lse = ladd_take_f32(arena, s.B * pixels(s));
}

int64_t ladd_spatial_attention_work(const ladd_spatial_attention_params *p, ladd_image_size s, int backward) {
    return (backward ? 5 : 1) * elements(s, p->C);
}

static ladd_stream pixel_stream(const ladd_context *ctx, const ladd_spatial_attention_saved *saved, int C, ladd_image_size s) {
    ptrdiff_t L = pixels(s);
    return (ladd_stream){.q = saved->qkv,
                         .k = ladd_at(ctx, saved->qkv, C),
                         .v = ladd_at(ctx, saved->qkv, 2 * C),
                         .row = 3 * (ptrdiff_t)C,
                         .batch = 3 * L * C,
                         .o = saved->o,
                         .o_row = C,
                         .o_batch = L * C,
                         .n = (int)L};
}

ladd_status ladd_spatial_attention_forward(const ladd_context *ctx, ladd_act *y, ladd_spatial_attention_saved *saved, ladd_act *work,
                                           const ladd_act *x, const ladd_weights *w, const ladd_spatial_attention_params *p, ladd_image_size s) {
    int C = p->C, L = (int)pixels(s), rows = s.B * L;
    LADD_TRY(norm_forward(ctx, y, saved->mean, saved->rstd, x, w, &p->norm, C, s, 0));
    LADD_K(ctx, transpose, saved->tokens, y, s.B, C, L);
    LADD_K(ctx, linear_forward, saved->qkv, saved->tokens, ladd_weight(ctx, w, p->qkv.weight), ladd_weight(ctx, w, p->qkv.bias), rows, 3 * C, C);
    ladd_stream stream = pixel_stream(ctx, saved, C, s);
    LADD_K(ctx, attention_forward, &stream, 1, saved->lse, s.B, 1, C, 1.0f / sqrtf((float)C));
    LADD_K(ctx, linear_forward, work, saved->o, ladd_weight(ctx, w, p->out.weight), ladd_weight(ctx, w, p->out.bias), rows, C, C);
    LADD_K(ctx, transpose, y, work, s.B, L, C);
    LADD_K(ctx, add, y, y, x, elements(s, C));
    return LADD_OK;
}

ladd_status ladd_spatial_attention_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *work, const ladd_act *dy,
                                            const ladd_spatial_attention_saved *saved, const ladd_act *x, const ladd_weights *w,
                                            const ladd_spatial_attention_params *p, ladd_image_size s) {
    int C = p->C, L = (int)pixels(s), rows = s.B * L;
    int64_t n = elements(s, C);
    ladd_act *dtokens = work, *d_o = ladd_at(ctx, work, n), *dqkv = ladd_at(ctx, work, 2 * n);
    LADD_K(ctx, transpose, dtokens, dy, s.B, C, L);
    LADD_K(ctx, linear_backward, d_o, ladd_weight_grad(w, p->out.weight), ladd_weight_grad(w, p->out.bias), dtokens, saved->o,
           ladd_weight(ctx, w, p->out.weight), rows, C, C);
    ladd_stream stream = pixel_stream(ctx, saved, C, s);
    ladd_stream_grad grad = {.dq = dqkv, .dk = ladd_at(ctx, dqkv, C), .dv = ladd_at(ctx, dqkv, 2 * C), .d_o = d_o};
    LADD_K(ctx, attention_backward, &grad, &stream, 1, saved->lse, s.B, 1, C, 1.0f / sqrtf((float)C));
    LADD_K(ctx, linear_backward, dtokens, ladd_weight_grad(w, p->qkv.weight), ladd_weight_grad(w, p->qkv.bias), dqkv, saved->tokens,
           ladd_weight(ctx, w, p->qkv.weight), rows, 3 * C, C);
    LADD_K(ctx, transpose, dx, dtokens, s.B, L, C);
    LADD_TRY(norm_backward(ctx, dx, x, saved->mean, saved->rstd, w, &p->norm, C, s, 0));
    LADD_K(ctx, add, dx, dx, dy, n);
    return LADD_OK;
}
