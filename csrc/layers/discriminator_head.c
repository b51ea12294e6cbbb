/* Forward and backward of one discriminator head. See discriminator_head.h for the formula and shapes. */
#include <math.h>

#include "discriminator_head.h"

static const float SLOPE = 0.2f, NORM_EPS = 1e-5f, HALF_ROOT = 0.707106781f;

/* Whole floats (statistics, u, gradients) through kernels that count in elements of the compute type. */
static int64_t float_elements(const ladd_context *ctx, int64_t count) { return count * (int64_t)(sizeof(float) / ctx->act_size); }

/* ---- weights under spectral norm ---- */

static void matrix_take(const ladd_context *ctx, ladd_head_matrix_saved *saved, ladd_arena *arena, const ladd_head_matrix *m) {
    *saved = (ladd_head_matrix_saved){0};
    if (m->weight < 0 || m->u < 0) return;
    saved->w_hat = ladd_take_act(ctx, arena, (int64_t)m->R * m->K);
    saved->u = ladd_take_f32(arena, m->R);
    saved->v = ladd_take_f32(arena, m->K);
    saved->sigma = ladd_take_f32(arena, 1);
}

/* u is copied, for a later forward may move it before this one's backward. */
static ladd_status matrix_forward(const ladd_context *ctx, const ladd_head_matrix_saved *saved, const ladd_head_matrix *m, float *buffers,
                                  int update_u) {
    if (m->weight < 0 || m->u < 0) return LADD_OK;
    float *u = buffers + m->u;
    LADD_K(ctx, spectral_norm_forward, saved->w_hat, u, saved->v, saved->sigma, buffers + m->weight, m->R, m->K, update_u ? 1 : 0);
    LADD_K(ctx, copy, (ladd_act *)saved->u, (const ladd_act *)u, float_elements(ctx, m->R));
    return LADD_OK;
}

static const ladd_act *matrix_weight(const ladd_context *ctx, const ladd_head_matrix_saved *saved, const ladd_head_matrix *m, const ladd_weights *w) {
    return saved->w_hat ? saved->w_hat : ladd_weight(ctx, w, m->weight);
}

/* Where a kernel adds this weight's gradient: the zeroed dw_hat, or the flat buffer itself without spectral norm; NULL when frozen. */
static ladd_status matrix_gradient(const ladd_context *ctx, float **target, const ladd_head_matrix_saved *saved, const ladd_head_matrix *m,
                                   const ladd_weights *w, float *dw_hat) {
    *target = ladd_weight_grad(w, m->weight);
    if (!*target || !saved->w_hat) return LADD_OK;
    *target = dw_hat;
    LADD_K(ctx, zero, (ladd_act *)dw_hat, float_elements(ctx, (int64_t)m->R * m->K));
    return LADD_OK;
}

static ladd_status matrix_backward(const ladd_context *ctx, const ladd_head_matrix_saved *saved, const ladd_head_matrix *m, const ladd_weights *w,
                                   const float *dw_hat) {
    float *dw = ladd_weight_grad(w, m->weight);
    if (!dw || !saved->w_hat) return LADD_OK;
    LADD_K(ctx, spectral_norm_backward, dw, dw_hat, saved->w_hat, saved->u, saved->v, saved->sigma, m->R, m->K);
    return LADD_OK;
}

/* ---- the head ---- */

static ladd_conv head_conv(const ladd_head_sizes *s) {
    int pad = s->kernel / 2;
    return (ladd_conv){.B = s->B,
                       .Cin = s->C,
                       .H = s->h,
                       .W = s->w,
                       .Cout = s->C,
                       .kh = s->kernel,
                       .kw = s->kernel,
                       .stride = 1,
                       .pad_top = pad,
                       .pad_left = pad,
                       .pad_bottom = pad,
                       .pad_right = pad,
                       .Ho = s->h,
                       .Wo = s->w};
}

void ladd_head_take(const ladd_context *ctx, ladd_head_saved *saved, ladd_arena *arena, const ladd_head_params *p, const ladd_head_sizes *s) {
    int64_t image = (int64_t)s->B * s->h * s->w * s->C, statistics = (int64_t)s->B * s->groups;
    *saved = (ladd_head_saved){0};
    matrix_take(ctx, &saved->proj, arena, &p->proj);
    matrix_take(ctx, &saved->conv, arena, &p->conv);
    matrix_take(ctx, &saved->out, arena, &p->out);
    matrix_take(ctx, &saved->direction, arena, &p->direction);
    saved->p = ladd_take_act(ctx, arena, image);
    saved->c = ladd_take_act(ctx, arena, image);
    saved->a = s->groups ? ladd_take_act(ctx, arena, image) : saved->p;
    saved->r = s->groups ? ladd_take_act(ctx, arena, image) : saved->c;
    saved->sum = ladd_take_act(ctx, arena, image);
    saved->mean1 = ladd_take_f32(arena, statistics);
    saved->rstd1 = ladd_take_f32(arena, statistics);
    saved->mean2 = ladd_take_f32(arena, statistics);
    saved->rstd2 = ladd_take_f32(arena, statistics);
    saved->psi = ladd_take_act(ctx, arena, (int64_t)s->B * s->K);
    saved->e = ladd_take_act(ctx, arena, (int64_t)s->B * s->C);
    saved->side_a = saved->a;
    saved->side_r = saved->r;
}

/* e[B,C] = (w_out + W_d psi / sqrt(K)) / sqrt(2): the vector that the channels of each sample meet. */
static ladd_status direction_forward(const ladd_context *ctx, const ladd_head_saved *saved, const ladd_head_scratch *scratch,
                                     const ladd_act *embedded, const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p,
                                     const ladd_head_sizes *s) {
    const ladd_act *w_out = matrix_weight(ctx, &saved->out, &p->out, w);
    if (s->K) {
        const ladd_act *bias = ladd_weight(ctx, w, p->condition_bias);
        if (embedded) LADD_K(ctx, linear_forward, saved->psi, embedded, ladd_weight(ctx, w, p->condition_sigma), bias, s->B, s->K, s->K);
        if (pooled) {
            ladd_act *y = embedded ? scratch->condition : saved->psi;
            LADD_K(ctx, linear_forward, y, pooled, ladd_weight(ctx, w, p->condition_pooled), embedded ? NULL : bias, s->B, s->K, s->P);
            if (embedded) LADD_K(ctx, add, saved->psi, saved->psi, y, (int64_t)s->B * s->K);
        }
        LADD_K(ctx, scale, saved->psi, saved->psi, 1.0f / sqrtf((float)s->K), (int64_t)s->B * s->K);
        LADD_K(ctx, linear_forward, saved->e, saved->psi, matrix_weight(ctx, &saved->direction, &p->direction, w), w_out, s->B, s->C, s->K);
    } else {
        for (int b = 0; b < s->B; b++) LADD_K(ctx, copy, ladd_at(ctx, saved->e, (int64_t)b * s->C), w_out, s->C);
    }
    LADD_K(ctx, scale, saved->e, saved->e, HALF_ROOT, (int64_t)s->B * s->C);
    return LADD_OK;
}

/* From d_e[B,C], already times 1/sqrt(2), to w_out, W_d and the condition. */
static ladd_status direction_backward(const ladd_context *ctx, ladd_act *dembedded, const ladd_head_saved *saved, const ladd_head_scratch *scratch,
                                      const ladd_act *embedded, const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p,
                                      const ladd_head_sizes *s) {
    float *d;
    LADD_TRY(matrix_gradient(ctx, &d, &saved->out, &p->out, w, scratch->dw_hat));
    LADD_K(ctx, linear_backward, NULL, NULL, d, scratch->d_e, NULL, NULL, s->B, s->C, 1); /* w_out is e's bias: column sums */
    LADD_TRY(matrix_backward(ctx, &saved->out, &p->out, w, scratch->dw_hat));
    if (!s->K) return LADD_OK;
    const ladd_act *W_d = matrix_weight(ctx, &saved->direction, &p->direction, w);
    LADD_TRY(matrix_gradient(ctx, &d, &saved->direction, &p->direction, w, scratch->dw_hat));
    LADD_K(ctx, linear_backward, scratch->condition, d, NULL, scratch->d_e, saved->psi, W_d, s->B, s->C, s->K);
    LADD_TRY(matrix_backward(ctx, &saved->direction, &p->direction, w, scratch->dw_hat));
    ladd_act *dpsi = scratch->condition;
    LADD_K(ctx, scale, dpsi, dpsi, 1.0f / sqrtf((float)s->K), (int64_t)s->B * s->K);
    float *dbias = ladd_weight_grad(w, p->condition_bias);
    if (pooled) {
        LADD_K(ctx, linear_backward, NULL, ladd_weight_grad(w, p->condition_pooled), dbias, dpsi, pooled, ladd_weight(ctx, w, p->condition_pooled),
               s->B, s->K, s->P);
        dbias = NULL; /* counted once */
    }
    if (embedded) {
        LADD_K(ctx, linear_backward, scratch->d1, ladd_weight_grad(w, p->condition_sigma), dbias, dpsi, embedded,
               ladd_weight(ctx, w, p->condition_sigma), s->B, s->K, s->K);
        LADD_K(ctx, axpy, dembedded, scratch->d1, 1.0f, (int64_t)s->B * s->K);
    }
    return LADD_OK;
}

/* Where `sides` are the tensor itself, its own sign; else that of another forward: then x keeps the slope that it had there. */
static ladd_status leaky_relu(const ladd_context *ctx, ladd_act *x, const ladd_act *sides, int64_t n) {
    if (sides == x)
        LADD_K(ctx, leaky_relu_forward, x, x, SLOPE, n);
    else
        LADD_K(ctx, leaky_relu_backward, x, x, sides, SLOPE, n);
    return LADD_OK;
}

/* From the features to the logits, with the weights and the direction e that `saved` holds. */
static ladd_status trunk_forward(const ladd_context *ctx, ladd_act *logits, ladd_head_saved *saved, const ladd_head_scratch *scratch,
                                 const ladd_act *features, const ladd_weights *w, const ladd_head_params *p, const ladd_head_sizes *s) {
    int N = s->h * s->w;
    int64_t image = (int64_t)s->B * N * s->C;
    const ladd_act *W_p = matrix_weight(ctx, &saved->proj, &p->proj, w), *W_c = matrix_weight(ctx, &saved->conv, &p->conv, w);
    LADD_K(ctx, linear_forward, scratch->tokens, features, W_p, ladd_weight(ctx, w, p->proj_bias), s->B * N, s->C, s->D);
    LADD_K(ctx, transpose, saved->p, scratch->tokens, s->B, N, s->C);
    if (s->groups)
        LADD_K(ctx, group_norm_forward, saved->a, saved->mean1, saved->rstd1, saved->p, ladd_weight(ctx, w, p->norm1_weight),
               ladd_weight(ctx, w, p->norm1_bias), s->B, s->C, N, s->groups, NORM_EPS, 0);
    LADD_TRY(leaky_relu(ctx, saved->a, saved->side_a, image));

    ladd_conv conv = head_conv(s);
    LADD_K(ctx, conv2d_forward, saved->c, saved->a, W_c, ladd_weight(ctx, w, p->conv_bias), &conv);
    if (s->groups)
        LADD_K(ctx, group_norm_forward, saved->r, saved->mean2, saved->rstd2, saved->c, ladd_weight(ctx, w, p->norm2_weight),
               ladd_weight(ctx, w, p->norm2_bias), s->B, s->C, N, s->groups, NORM_EPS, 0);
    LADD_TRY(leaky_relu(ctx, saved->r, saved->side_r, image));
    LADD_K(ctx, add, saved->sum, saved->r, saved->a, image);
    LADD_K(ctx, channel_dot_forward, logits, saved->sum, saved->e, ladd_weight(ctx, w, p->out_bias), s->B, s->C, N);
    return LADD_OK;
}

ladd_status ladd_head_forward(const ladd_context *ctx, ladd_act *logits, ladd_head_saved *saved, const ladd_head_scratch *scratch,
                              const ladd_act *features, const ladd_act *embedded, const ladd_act *pooled, const ladd_weights *w, float *buffers,
                              const ladd_head_params *p, const ladd_head_sizes *s, int update_u) {
    LADD_TRY(matrix_forward(ctx, &saved->proj, &p->proj, buffers, update_u));
    LADD_TRY(matrix_forward(ctx, &saved->conv, &p->conv, buffers, update_u));
    LADD_TRY(matrix_forward(ctx, &saved->out, &p->out, buffers, update_u));
    LADD_TRY(matrix_forward(ctx, &saved->direction, &p->direction, buffers, update_u));
    LADD_TRY(direction_forward(ctx, saved, scratch, embedded, pooled, w, p, s));
    return trunk_forward(ctx, logits, saved, scratch, features, w, p, s);
}

/* Leaky ReLU keeps the sign, so its backward reads the output, a or r, in place of the input, which is not kept. */
ladd_status ladd_head_backward(const ladd_context *ctx, ladd_act *dfeatures, ladd_act *dembedded, const ladd_head_saved *saved,
                               const ladd_head_scratch *scratch, const ladd_act *dlogits, const ladd_act *features, const ladd_act *embedded,
                               const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p, const ladd_head_sizes *s) {
    int N = s->h * s->w;
    int64_t image = (int64_t)s->B * N * s->C;
    float *d;
    if (w->grad) {
        LADD_K(ctx, channel_dot_backward, NULL, scratch->d_e, ladd_weight_grad(w, p->out_bias), dlogits, saved->sum, saved->e, s->B, s->C, N);
        LADD_K(ctx, scale, scratch->d_e, scratch->d_e, HALF_ROOT, (int64_t)s->B * s->C);
        LADD_TRY(direction_backward(ctx, dembedded, saved, scratch, embedded, pooled, w, p, s));
    }
    ladd_act *dsum = scratch->d1, *dr = scratch->d2, *da = scratch->tokens; /* da: of the convolution's input, then with the shortcut's dsum */
    LADD_K(ctx, channel_dot_backward, dsum, NULL, NULL, dlogits, saved->sum, saved->e, s->B, s->C, N);

    LADD_K(ctx, leaky_relu_backward, dr, dsum, saved->side_r, SLOPE, image);
    if (s->groups)
        LADD_K(ctx, group_norm_backward, dr, ladd_weight_grad(w, p->norm2_weight), ladd_weight_grad(w, p->norm2_bias), dr, saved->c, saved->mean2,
               saved->rstd2, ladd_weight(ctx, w, p->norm2_weight), ladd_weight(ctx, w, p->norm2_bias), s->B, s->C, N, s->groups, 0);
    ladd_conv conv = head_conv(s);
    LADD_TRY(matrix_gradient(ctx, &d, &saved->conv, &p->conv, w, scratch->dw_hat));
    LADD_K(ctx, conv2d_backward, da, d, ladd_weight_grad(w, p->conv_bias), dr, saved->a, matrix_weight(ctx, &saved->conv, &p->conv, w), &conv);
    LADD_TRY(matrix_backward(ctx, &saved->conv, &p->conv, w, scratch->dw_hat));
    LADD_K(ctx, add, da, da, dsum, image);

    LADD_K(ctx, leaky_relu_backward, da, da, saved->side_a, SLOPE, image);
    if (s->groups)
        LADD_K(ctx, group_norm_backward, da, ladd_weight_grad(w, p->norm1_weight), ladd_weight_grad(w, p->norm1_bias), da, saved->p, saved->mean1,
               saved->rstd1, ladd_weight(ctx, w, p->norm1_weight), ladd_weight(ctx, w, p->norm1_bias), s->B, s->C, N, s->groups, 0);
    ladd_act *dtokens = scratch->d1;
    LADD_K(ctx, transpose, dtokens, da, s->B, s->C, N);
    LADD_TRY(matrix_gradient(ctx, &d, &saved->proj, &p->proj, w, scratch->dw_hat));
    LADD_K(ctx, linear_backward, dfeatures, d, ladd_weight_grad(w, p->proj_bias), dtokens, features, matrix_weight(ctx, &saved->proj, &p->proj, w),
           s->B * N, s->C, s->D);
    LADD_TRY(matrix_backward(ctx, &saved->proj, &p->proj, w, scratch->dw_hat));
    return LADD_OK;
}

/* ---- R1 ---- */

void ladd_head_r1_take(const ladd_context *ctx, ladd_head_r1_room *room, ladd_arena *arena, const ladd_head_params *p, const ladd_head_sizes *s) {
    int64_t tokens = (int64_t)s->B * s->h * s->w;
    ladd_head_take(ctx, &room->moved, arena, p, s);
    room->dlogits = ladd_take_act(ctx, arena, tokens);
    room->g = ladd_take_act(ctx, arena, tokens * s->D);
    room->features = ladd_take_act(ctx, arena, tokens * s->D);
    room->floats = ladd_take_f32(arena, tokens * s->D);
    room->sums = ladd_arena_take(arena, 2 * sizeof(double));
    room->factors = ladd_take_f32(arena, 4);
    room->unused = ladd_arena_take(arena, 3 * sizeof(double));
    room->ones = ladd_take_act(ctx, arena, tokens);
}

static ladd_status squares_of(const ladd_context *ctx, double *sum, const ladd_act *x, float *floats, int64_t n) {
    LADD_TRY(ctx->backend->to_float(ctx, floats, x, n));
    LADD_K(ctx, sum_squares, sum, floats, n);
    return LADD_OK;
}

/* Ones: the gradient of the hinge loss of a generator, which is a negative mean of any logits. */
static ladd_status fill(const ladd_context *ctx, ladd_act *ones, double *unused, const ladd_act *any, int64_t n) {
    LADD_K(ctx, adversarial_loss, unused, ones, any, LADD_LOSS_HINGE, LADD_ROLE_GENERATOR, -(float)n, n);
    return LADD_OK;
}

ladd_status ladd_head_r1(const ladd_context *ctx, double *penalty, ladd_act *dembedded, const ladd_head_saved *saved,
                         const ladd_head_scratch *scratch, ladd_head_r1_room *room, const ladd_act *features, const ladd_act *embedded,
                         const ladd_act *pooled, const ladd_weights *w, const ladd_head_params *p, const ladd_head_sizes *s, float weight,
                         float epsilon, float scale) {
    int64_t tokens = (int64_t)s->B * s->h * s->w, n = tokens * s->D;
    const ladd_weights frozen = {.data = w->data};
    LADD_TRY(fill(ctx, room->ones, room->unused, features, tokens));
    LADD_TRY(ladd_head_backward(ctx, room->g, NULL, saved, scratch, room->ones, features, embedded, pooled, &frozen, p, s));
    LADD_TRY(squares_of(ctx, room->sums, room->g, room->floats, n));
    LADD_TRY(squares_of(ctx, room->sums + 1, features, room->floats, n));
    LADD_K(ctx, r1_factors, room->factors, penalty, room->sums, weight, epsilon, scale);

    ladd_head_saved *moved = &room->moved;
    moved->proj = saved->proj, moved->conv = saved->conv, moved->out = saved->out, moved->direction = saved->direction;
    moved->psi = saved->psi, moved->e = saved->e;
    moved->side_a = saved->side_a, moved->side_r = saved->side_r;
    for (int side = 0; side < 2; side++) { /* + and -; both steps are 0 where |g| or |features| is */
        LADD_K(ctx, row_scale, room->features, room->g, room->factors + side, 1, n);
        LADD_K(ctx, add, room->features, room->features, features, n);
        LADD_TRY(trunk_forward(ctx, room->dlogits, moved, scratch, room->features, w, p, s));
        LADD_K(ctx, row_scale, room->dlogits, room->ones, room->factors + 2 + side, 1, tokens);
        LADD_TRY(ladd_head_backward(ctx, NULL, dembedded, moved, scratch, room->dlogits, room->features, embedded, pooled, w, p, s));
    }
    return LADD_OK;
}
