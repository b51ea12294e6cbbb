/* The convolutional layers of an autoencoder: residual block and attention over the pixels of an image. */
#ifndef LADD_RESNET_BLOCK_H
#define LADD_RESNET_BLOCK_H
#include "transformer.h"

typedef struct ladd_norm_params {
    int64_t weight, bias; /* [C] each */
} ladd_norm_params;
typedef struct ladd_conv_params {
    int64_t weight, bias; /* [Cout,Cin,k,k], [Cout] */
    int in, out, k;
} ladd_conv_params;

/* B samples of H by W pixels; the group norms have G groups. */
typedef struct ladd_image_size {
    int B, H, W, G;
} ladd_image_size;
#define LADD_GROUP_NORM_EPS 1e-6f

/* Stride 1, an odd kernel, padded so that the size stays. */
ladd_conv ladd_conv_same(const ladd_conv_params *p, ladd_image_size s);

/* y = shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); shortcut: 1x1 convolution, or none where the channels stay (weight -1). */
typedef struct ladd_resnet_params {
    ladd_norm_params norm1, norm2;
    ladd_conv_params conv1, conv2, shortcut;
} ladd_resnet_params;
typedef struct ladd_resnet_saved {
    ladd_act *h1, *c1, *h2;               /* [B,Cin,H,W], [B,Cout,H,W] twice: inputs of conv1, norm2 and conv2 */
    float *mean1, *rstd1, *mean2, *rstd2; /* [B,G] */
} ladd_resnet_saved;
void ladd_resnet_take(const ladd_context *ctx, ladd_resnet_saved *saved, ladd_arena *arena, const ladd_resnet_params *p, ladd_image_size s);
/* Elements of the work space of forward, or with `backward` of both. */
int64_t ladd_resnet_work(const ladd_resnet_params *p, ladd_image_size s, int backward);
/* y[B,Cout,H,W] from x[B,Cin,H,W] */
ladd_status ladd_resnet_forward(const ladd_context *ctx, ladd_act *y, ladd_resnet_saved *saved, ladd_act *work, const ladd_act *x,
                                const ladd_weights *w, const ladd_resnet_params *p, ladd_image_size s);
ladd_status ladd_resnet_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *work, const ladd_act *dy, const ladd_resnet_saved *saved,
                                 const ladd_act *x, const ladd_weights *w, const ladd_resnet_params *p, ladd_image_size s);

/* y = x + out(attention(qkv(norm(x)))), one head as wide as the channels, over the H*W pixels of a sample. */
typedef struct ladd_spatial_attention_params {
    ladd_norm_params norm;
    ladd_linear_params qkv, out; /* [3C,C], [3C] (q, k, v rows next to each other); [C,C], [C] */
    int C;
} ladd_spatial_attention_params;
typedef struct ladd_spatial_attention_saved {
    ladd_act *tokens, *qkv, *o; /* [B,H*W,C] normalised, [B,H*W,3C], [B,H*W,C] */
    float *mean, *rstd, *lse;   /* [B,G] twice, [B,H*W] */
} ladd_spatial_attention_saved;
void ladd_spatial_attention_take(const ladd_context *ctx, ladd_spatial_attention_saved *saved, ladd_arena *arena,
                                 const ladd_spatial_attention_params *p, ladd_image_size s);
int64_t ladd_spatial_attention_work(const ladd_spatial_attention_params *p, ladd_image_size s, int backward);
/* y, x [B,C,H,W] */
ladd_status ladd_spatial_attention_forward(const ladd_context *ctx, ladd_act *y, ladd_spatial_attention_saved *saved, ladd_act *work,
                                           const ladd_act *x, const ladd_weights *w, const ladd_spatial_attention_params *p, ladd_image_size s);
ladd_status ladd_spatial_attention_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *work, const ladd_act *dy,
                                            const ladd_spatial_attention_saved *saved, const ladd_act *x, const ladd_weights *w,
                                            const ladd_spatial_attention_params *p, ladd_image_size s);
#endif
