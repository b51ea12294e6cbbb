/* The table of kernels. csrc/cpu and cuda/ fill it with functions of the same names; layers/ and models/ call only through it and never ask
 * which device they are on. Adding a kernel: one line in LADD_KERNELS, one function ladd_cpu_<name> in cpu/, one in cuda/, one row in the
 * tests' case table. The struct, the prototypes and both tables are generated from this one list, so a forgotten kernel does not link.
 *
 * Pointers: ladd_act are activations or weights in the compute type, float and double are statistics, gradients of parameters, masters, and numbers
 * one a sample or step. All lie where the backend computes, so that nothing waits for them and a recorded sequence of calls reads them anew; what
 * lies on the host says so. mod_stride: elements between the modulation rows of two samples (shift, scale, gate of sample b start at pointer +
 * b*mod_stride).
 */
#ifndef LADD_BACKEND_H
#define LADD_BACKEND_H
#include "ladd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One token stream of a joint attention. Token i of sample b, head j starts at pointer + b*batch + i*row + j*dh. */
typedef struct ladd_stream {
    const ladd_act *q, *k, *v;
    ptrdiff_t row, batch; /* strides of q, k, v (and of dq, dk, dv) */
    ladd_act *o;
    ptrdiff_t o_row, o_batch; /* strides of o (and of d_o) */
    int n;                    /* tokens; 0: absent */
} ladd_stream;
typedef struct ladd_stream_grad {
    ladd_act *dq, *dk, *dv;
    const ladd_act *d_o;
} ladd_stream_grad;

typedef struct ladd_conv {
    int B, Cin, H, W, Cout, kh, kw, stride, pad_top, pad_left, pad_bottom, pad_right;
    int Ho, Wo;   /* (H + pad_top + pad_bottom - kh)/stride + 1, likewise */
    int upsample; /* 1: x is enlarged by two (nearest neighbour) before a 3x3 kernel of stride 1 and padding 1; Ho = 2H, Wo = 2W */
} ladd_conv;

typedef enum { LADD_LOSS_HINGE = 0, LADD_LOSS_LOGISTIC, LADD_LOSS_LSGAN, LADD_LOSS_BCE } ladd_loss;
typedef enum { LADD_ROLE_REAL = 0, LADD_ROLE_FAKE, LADD_ROLE_GENERATOR } ladd_role;

#define LADD_CTX const ladd_context *ctx

/* clang-format off */
#define LADD_KERNELS(K) \
  /* memory */ \
  K(zero, (LADD_CTX, ladd_act *y, int64_t n)) \
  K(copy, (LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n)) \
  /* y = a + b */ \
  K(add, (LADD_CTX, ladd_act *y, const ladd_act *a, const ladd_act *b, int64_t n)) \
  /* y += alpha x */ \
  K(axpy, (LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n)) \
  /* y = alpha x */ \
  K(scale, (LADD_CTX, ladd_act *y, const ladd_act *x, float alpha, int64_t n)) \
  /* y[B,Q,R] = x[B,R,Q] transposed within each sample */ \
  K(transpose, (LADD_CTX, ladd_act *y, const ladd_act *x, int B, int R, int Q)) \
  \
  /* linear: y[M,N] = x[M,K] w[N,K]^T + bias[N] (bias may be NULL) */ \
  K(linear_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M, int N, int K_)) \
  /* h = x w^T + bias is kept for backward, y = gelu_tanh(h) */ \
  K(linear_gelu_forward, (LADD_CTX, ladd_act *y, ladd_act *h, const ladd_act *x, const ladd_act *w, const ladd_act *bias, int M, int N, int K_)) \
  /* dx[M,K] = dy w (NULL: skip); dw[N,K] += dy^T x (NULL: skip); dbias[N] += column sums of dy (NULL: skip) */ \
  K(linear_backward, (LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w, int M, int N, int K_)) \
  \
  /* joint attention over streams[0] then streams[1]: o = softmax(scale q k^T) v per head; lse[B,heads,S] = log sum exp of each row */ \
  K(attention_forward, (LADD_CTX, const ladd_stream *streams, int n_streams, float *lse, int B, int heads, int dh, float scale)) \
  K(attention_backward, (LADD_CTX, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, const float *lse, int B, int heads, int dh, float scale)) \
  \
  /* y[B,N,D] = (x - mean) rstd (1 + scale_b) + shift_b; mean, rstd [B,N] are saved; shift and scale may both be NULL */ \
  K(layer_norm_modulate_forward, (LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *shift, const ladd_act *scale, int64_t mod_stride, int B, int N, int D, float eps)) \
  /* dx += (exception to the rule: it joins the residual stream); dshift, dscale [B rows at mod_stride] are written (NULL: skip both) */ \
  K(layer_norm_modulate_backward, (LADD_CTX, ladd_act *dx, ladd_act *dshift, ladd_act *dscale, const ladd_act *dy, const ladd_act *x, const float *mean, const float *rstd, const ladd_act *scale, int64_t mod_stride, int B, int N, int D)) \
  /* out[B,N,D] = x + gate_b y; out may be x */ \
  K(gate_residual_forward, (LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *y, const ladd_act *gate, int64_t mod_stride, int B, int N, int D)) \
  /* dy = gate_b dout; dgate_b = sum over tokens of dout y (written; NULL: skip). dx is dout itself */ \
  K(gate_residual_backward, (LADD_CTX, ladd_act *dy, ladd_act *dgate, const ladd_act *dout, const ladd_act *y, const ladd_act *gate, int64_t mod_stride, int B, int N, int D)) \
  /* per head of each row: y = x rstd w[dh], rstd[rows,heads] = 1/sqrt(mean x^2 + eps) is saved; head j of row r at pointer + r*row + j*dh */ \
  K(rms_norm_heads_forward, (LADD_CTX, ladd_act *y, float *rstd, const ladd_act *x, const ladd_act *w, int rows, int heads, int dh, ptrdiff_t x_row, ptrdiff_t y_row, float eps)) \
  /* dx (= , may be dy), dw[dh] += (NULL: skip); x is forward's input */ \
  K(rms_norm_heads_backward, (LADD_CTX, ladd_act *dx, float *dw, const ladd_act *dy, const ladd_act *x, const float *rstd, const ladd_act *w, int rows, int heads, int dh, ptrdiff_t x_row, ptrdiff_t dy_row, ptrdiff_t dx_row)) \
  \
  /* elementwise activations; backward takes forward's input x; dx may be dy */ \
  K(gelu_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n)) \
  K(gelu_backward, (LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n)) \
  K(silu_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, int64_t n)) \
  K(silu_backward, (LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, int64_t n)) \
  K(leaky_relu_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, float slope, int64_t n)) \
  K(leaky_relu_backward, (LADD_CTX, ladd_act *dx, const ladd_act *dy, const ladd_act *x, float slope, int64_t n)) \
  \
  /* tokens[B,h*w,C*p*p] <-> image[B,C,H,W], h = H/p, w = W/p rounded down. channel_last 0: (channel,dy,dx) as patch embedding reads; \
   * 1: (dy,dx,channel) as unpatchify writes. scatter writes zeros in rows and columns that no patch covers. */ \
  K(patch_gather, (LADD_CTX, ladd_act *tokens, const ladd_act *image, int B, int C, int H, int W, int p, int channel_last)) \
  K(patch_scatter, (LADD_CTX, ladd_act *image, const ladd_act *tokens, int B, int C, int H, int W, int p, int channel_last)) \
  /* x[B,h*w,D] += centre crop of table[max,max,D] */ \
  K(add_position, (LADD_CTX, ladd_act *x, const ladd_act *table, int B, int h, int w, int max, int D)) \
  /* f[B,dim] = [cos(a), sin(a)], a = 1000 sigma_b exp(-ln(10000) i/(dim/2)) */ \
  K(timestep_features, (LADD_CTX, ladd_act *f, const float *sigma, int B, int dim)) \
  \
  /* y[B,Cout,Ho,Wo]; w[Cout,Cin,kh,kw]; bias[Cout] or NULL */ \
  K(conv2d_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *w, const ladd_act *bias, const ladd_conv *conv)) \
  K(conv2d_backward, (LADD_CTX, ladd_act *dx, float *dw, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *w, const ladd_conv *conv)) \
  /* y[B,C,L] = act((x - mean_g) rstd_g gamma_c + beta_c), L = H*W; mean, rstd [B,G] saved; silu: act is SiLU, else identity */ \
  K(group_norm_forward, (LADD_CTX, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const ladd_act *gamma, const ladd_act *beta, int B, int C, int L, int G, float eps, int silu)) \
  /* dx may be dy; dgamma, dbeta += (NULL: skip) */ \
  K(group_norm_backward, (LADD_CTX, ladd_act *dx, float *dgamma, float *dbeta, const ladd_act *dy, const ladd_act *x, const float *mean, const float *rstd, const ladd_act *gamma, const ladd_act *beta, int B, int C, int L, int G, int silu)) \
  /* y[BC,2H,2W] nearest; backward dx[BC,H,W] = sum of the four */ \
  K(upsample2x_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, int BC, int H, int W)) \
  K(upsample2x_backward, (LADD_CTX, ladd_act *dx, const ladd_act *dy, int BC, int H, int W)) \
  \
  /* w_hat[R,K] = w / sigma, sigma = u^T w v; `iterations` power iterations update u[R] first; v[K] and sigma[1] are saved */ \
  K(spectral_norm_forward, (LADD_CTX, ladd_act *w_hat, float *u, float *v, float *sigma, const float *w, int R, int K_, int iterations)) \
  /* dw[R,K] += (dw_hat - (sum dw_hat w_hat) u v^T) / sigma */ \
  K(spectral_norm_backward, (LADD_CTX, float *dw, const float *dw_hat, const ladd_act *w_hat, const float *u, const float *v, const float *sigma, int R, int K_)) \
  /* y[B,L] = sum over c of e[B,C] x[B,C,L], plus bias[1]; backward: dx and de are written, dbias[1] += (each NULL: skip) */ \
  K(channel_dot_forward, (LADD_CTX, ladd_act *y, const ladd_act *x, const ladd_act *e, const ladd_act *bias, int B, int C, int L)) \
  K(channel_dot_backward, (LADD_CTX, ladd_act *dx, ladd_act *de, float *dbias, const ladd_act *dy, const ladd_act *x, const ladd_act *e, int B, int C, int L)) \
  /* values[3] = mean loss of logits[n], their mean, the share of them above 1 (role fake: below -1); dlogits[n] = gradient of the mean loss times \
   * `weight` (NULL: skip) */ \
  K(adversarial_loss, (LADD_CTX, double *values, ladd_act *dlogits, const ladd_act *logits, ladd_loss loss, ladd_role role, float weight, int64_t n)) \
  \
  /* out[B,n]: standard normal; row b is drawn for sample number samples[b] (on the host) */ \
  K(normal, (LADD_CTX, ladd_act *out, ladd_rng_key key, const int64_t *samples, int B, int64_t n)) \
  /* out[B,n] = (1 - t_b) x0 + t_b e, e drawn as by normal(); noise[B,n] receives e (NULL: not kept); samples on the host */ \
  K(renoise, (LADD_CTX, ladd_act *out, ladd_act *noise, const ladd_act *x0, const float *t, ladd_rng_key key, const int64_t *samples, int B, int64_t n)) \
  /* out = (1 - t_b) x0 + t_b noise */ \
  K(interpolate, (LADD_CTX, ladd_act *out, const ladd_act *x0, const ladd_act *noise, const float *t, int B, int64_t n)) \
  /* x0 = x - t_b v; also its vjp with v: dv = -t_b dx0 by row_scale */ \
  K(predict_x0, (LADD_CTX, ladd_act *x0, const ladd_act *x, const ladd_act *v, const float *t, int B, int64_t n)) \
  /* y = factor_b x */ \
  K(row_scale, (LADD_CTX, ladd_act *y, const ladd_act *x, const float *factor, int B, int64_t n)) \
  /* out = x + (sigma_next - sigma) v */ \
  K(euler_step, (LADD_CTX, ladd_act *out, const ladd_act *x, const ladd_act *v, float sigma, float sigma_next, int64_t n)) \
  \
  /* decoupled weight decay, bias-corrected; g is multiplied by grad_scale first; step counts from 1. m is NULL where beta1 is 0: it would be \
   * nothing but the last gradient. `control` (NULL: not given) takes the place of lr, \
   * weight_decay, step and grad_scale: its four numbers are those of ladd_adamw_control and g's factor; a factor that is not finite: nothing changes. \
   * rounding (NULL: none; the struct on the host): p is rounded to bfloat16, up or down at random so that the mean is kept; element i by word i % 4 of \
   * Philox block i / 4 */ \
  K(adamw, (LADD_CTX, float *p, float *m, float *v, const float *g, int64_t n, float lr, float beta1, float beta2, float eps, float weight_decay, int64_t step, float grad_scale, const float *control, const ladd_rng_key *rounding)) \
  /* factor[1] = min(1, max_norm / norm) (max_norm 0: 1) with norm[1] = the square root of the sum of squares[n]. Where norm or one of checked[m] is not \
   * finite, or failed[2] tells of an earlier failure, factor is NaN, and the first failure leaves failed = (who, norm); done[1] counts the others */ \
  K(clip_factor, (LADD_CTX, float *factor, double *norm, double *failed, double *done, const double *squares, int n, const double *checked, int m, double max_norm, int who)) \
  /* factors[4] = h, -h, weight/h, -weight/h with h = epsilon sqrt(sums[1] / sums[0]), zeros where one of the sums is 0; penalty[1] += scale sums[0] */ \
  K(r1_factors, (LADD_CTX, float *factors, double *penalty, const double *sums, float weight, float epsilon, float scale)) \
  /* sum[1] = sum of squares, accumulated in double in a fixed order; NaN or Inf shows in it */ \
  K(sum_squares, (LADD_CTX, double *sum, const float *x, int64_t n)) \
  /* e = decay e + (1 - decay) p; control (NULL: not given): control[0] takes the place of decay, and where control[1] is not finite nothing changes */ \
  K(ema, (LADD_CTX, float *e, const float *p, float decay, int64_t n, const float *control))
/* clang-format on */

struct ladd_backend {
    const char *name;
#define LADD_FIELD(name, arguments) ladd_status(*name) arguments;
    LADD_KERNELS(LADD_FIELD)
#undef LADD_FIELD
    /* Memory of the device: 64-byte aligned, not cleared, in the order of the context's stream. A released block may be reused by work queued later.
     */
    ladd_status (*alloc)(LADD_CTX, void **block, size_t bytes);
    void (*release)(LADD_CTX, void *block);
    /* Between host and device. The host's memory may change as soon as upload returns; download waits. On the CPU both are memcpy. */
    ladd_status (*upload)(LADD_CTX, void *device, const void *host, size_t bytes);
    ladd_status (*download)(LADD_CTX, void *host, const void *device, size_t bytes);
    /* Between float and the compute type, both on the device. */
    ladd_status (*to_act)(LADD_CTX, ladd_act *y, const float *x, int64_t n);
    ladd_status (*to_float)(LADD_CTX, float *y, const ladd_act *x, int64_t n);
};

/* The CPU's table for the best instruction set of this processor, or the one that LADD_CPU names (then missing support is an error: NULL). */
const ladd_backend *ladd_cpu_backend(ladd_dtype products);

/* LADD_K(ctx, name, arguments...) calls a kernel and returns from the caller if it fails. */
#define LADD_K(ctx, name, ...) LADD_TRY((ctx)->backend->name((ctx), __VA_ARGS__))

#ifdef __cplusplus
}
#endif
#endif
