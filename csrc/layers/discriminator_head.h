/* One discriminator head: logits of every token from the features after one block of the teacher.
 *
 *   p = features W_p^T + b_p                        1x1 projection D -> C, then onto the grid: [B,C,h,w]
 *   a = leaky(norm1(p))                             norm: group norm or none; slope 0.2
 *   r = leaky(norm2(conv(a)))                       odd kernel, zero padding
 *   psi_b = W_s embed(t_hat_b) + W_y pooled_b + c   condition, K numbers a sample
 *   logit = (w_out + W_d psi_b / sqrt(K)) . (r + a) / sqrt(2) + b_out
 *
 * The projection <phi(h), psi> of a projection discriminator with linear phi is written as <h, W_d psi> (W_d = phi^T): one vector a sample in place
 * of K numbers a token. Spectral norm is on W_p, conv, w_out and W_d: all that features pass. The condition's own maps are free, as in StyleGAN-T. */
#ifndef LADD_DISCRIMINATOR_HEAD_H
#define LADD_DISCRIMINATOR_HEAD_H
#include "transformer.h"

/* A weight as an R x K matrix; u: offset of its singular vector estimate [R], -1 without spectral norm. */
typedef struct ladd_head_matrix {
    int64_t weight, u;
    int R, K;
} ladd_head_matrix;

/* Offsets into the flat parameter buffer; -1: absent. */
typedef struct ladd_head_params {
    ladd_head_matrix proj, conv, out, direction;                /* [C,D], [C,C*k*k], [1,C], [C,K] */
    int64_t proj_bias, conv_bias, out_bias;                     /* [C], [C], [1] */
    int64_t norm1_weight, norm1_bias, norm2_weight, norm2_bias; /* [C] each */
    int64_t condition_sigma, condition_pooled, condition_bias;  /* [K,K], [K,P], [K] */
} ladd_head_params;

typedef struct ladd_head_sizes {
    int B, h, w;
    int D, C, kernel, groups, K, P; /* groups 0: no norm; K 0: not conditioned; P: width of pooled */
} ladd_head_sizes;

/* The normalised weight that a forward used, with what its gradient needs. */
typedef struct ladd_head_matrix_saved {
    ladd_act *w_hat; /* [R,K]; NULL without spectral norm: the weight itself is used */
    float *u, *v, *sigma;
} ladd_head_matrix_saved;

typedef struct ladd_head_saved {
    ladd_head_matrix_saved proj, conv, out, direction;
    ladd_act *p, *a, *c, *r, *sum;        /* [B,C,h*w]; p and c are a and r without norm; sum = r + a */
    const ladd_act *side_a, *side_r;      /* whose sign the leaky ReLUs follow: a and r, but in ladd_head_r1 those of another forward */
    float *mean1, *rstd1, *mean2, *rstd2; /* [B,groups] */
    ladd_act *psi, *e;                    /* [B,K] times 1/sqrt(K); [B,C] times 1/sqrt(2) */
} ladd_head_saved;

/* Shared by all heads of a discriminator. */
typedef struct ladd_head_scratch {
    ladd_act *tokens, *d1, *d2; /* [B*h*w,C] each */
    ladd_act *condition, *d_e;  /* [B,K], [B,C] */
    float *dw_hat;              /* [largest matrix] */
} ladd_head_scratch;

void ladd_head_take(const ladd_context *ctx, ladd_head_saved *saved, ladd_arena *arena, const ladd_head_params *p, const ladd_head_sizes *s);

/* logits[B,h*w] from features[B,h*w,D]; embedded[B,K] (of t_hat) and pooled[B,P] are NULL where the head has no such condition. With update_u, one
 * power iteration moves the estimates u in `buffers`, the whole parameter buffer. */
ladd_status ladd_head_forward(const ladd_context *ctx, ladd_act *logits, ladd_head_saved *saved, const ladd_head_scratch *scratch,
                              const ladd_act *features, const ladd_act *embedded, const ladd_act *pooled, const ladd_weights *w, float *buffers,
                              const ladd_head_params *p, const ladd_head_sizes *s, int update_u);
/* dfeatures (NULL: skip) is written; dembedded[B,K] is added to (heads share it; NULL: skip). Parameter gradients go to w->grad. */
ladd_status ladd_head_backward(const ladd_context *ctx, ladd_act *dfeatures, ladd_act *dembedded, const ladd_head_saved *saved,
                               const ladd_head_scratch *scratch, const ladd_act *dlogits, const ladd_act *features, const ladd_act *embedded,
                               const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p, const ladd_head_sizes *s);

/* Room for ladd_head_r1. */
typedef struct ladd_head_r1_room {
    ladd_head_saved moved;
    ladd_act *dlogits;      /* [B,h*w] */
    ladd_act *g, *features; /* [B,h*w,D] each */
    float *floats;          /* [B*h*w*D] */
    double *sums;           /* [2] |g|^2, |features|^2 */
    float *factors;         /* [4] of r1_factors */
    double *unused;         /* [3] of adversarial_loss */
    ladd_act *ones;         /* [B*h*w] */
} ladd_head_r1_room;

void ladd_head_r1_take(const ladd_context *ctx, ladd_head_r1_room *room, ladd_arena *arena, const ladd_head_params *p, const ladd_head_sizes *s);
/* penalty[1] += scale |g|^2, g = d(sum of logits)/d(features); weight * d|g|^2/d(parameters) is added to w->grad and, as ladd_head_backward does, to
 * dembedded. |g|^2 is exact. Its derivative is that of the sum's slope along g, taken as a central difference of the parameter gradients at
 * features +- epsilon g |features| / |g| of a head whose leaky ReLUs stay on the side where `saved` has them: between their kinks the head is smooth,
 * across one the difference would be of the size 1/epsilon. Needs float32. */
ladd_status ladd_head_r1(const ladd_context *ctx, double *penalty, ladd_act *dembedded, const ladd_head_saved *saved,
                         const ladd_head_scratch *scratch, ladd_head_r1_room *room, const ladd_act *features, const ladd_act *embedded,
                         const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p, const ladd_head_sizes *s, float weight,
                         float epsilon, float scale);
#endif
