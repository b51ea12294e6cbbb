/* MMDiT: forward and backward of the SD3 / SD3.5 transformer on the table of kernels (equations: SD3 paper section 4; tensor layout: diffusers).
 *
 *   e = MLP_t(1000 sigma) + MLP_y(pooled);  mod = SiLU(e) W_mod^T + b for all blocks at once
 *   X = patches(latents) + position;  Y = context W^T + b
 *   block:  attention over [X, Y] jointly, second attention over X alone in dual blocks, feed-forward on each stream; every branch enters as
 *           LN(.) (1 + scale) + shift and leaves as X += gate * branch
 *   velocity = unpatchify(LN(X) (1 + scale) + shift) W^T
 *
 * With keep, each block keeps what its backward needs; without, all blocks share one set of buffers and the residual streams stay in place. What
 * costs little to make again is shared even so, and backward makes it again block by block: the norms' outputs, GELU's, and the residual streams
 * between two branches. That halves the memory of a kept pass. Features are the image stream after the tapped blocks; the pass ends at the deepest,
 * whose text branch after attention is not computed, for nobody reads it.
 */
#include <stdlib.h>
#include <string.h>

#include "mmdit_internal.h"

static const float NORM_EPS = 1e-6f;

typedef struct stream_saved { /* one token stream of one block; rows = B * tokens */
    ladd_act *in;             /* [rows,D] residual stream at entry */
    float *mean1, *rstd1;     /* [rows] of LN(in) */
    ladd_act *x1;             /* [rows,D] attention input */
    ladd_qkv_saved qkv;
    ladd_act *o, *a; /* [rows,D] attention output before and after its projection */
    ladd_act *mid;   /* [rows,D] residual stream after attention */
    float *mean2, *rstd2;
    ladd_act *x2, *h, *g, *m; /* feed-forward: input [rows,D], hidden before and after GELU [rows,4D], output [rows,D] */
    ladd_act *out;            /* [rows,D] residual stream at exit; the next block's in */
} stream_saved;

typedef struct block_saved {
    stream_saved x, y;
    float *lse;        /* [B,heads,N+T] */
    ladd_act *dual_x1; /* [B*N,D] second attention: input, q k v, output before and after its projection */
    ladd_qkv_saved dual_qkv;
    float *dual_lse; /* [B,heads,N] */
    ladd_act *dual_o, *dual_a;
} block_saved;

struct ladd_mmdit_saved {
    ladd_mmdit *model;
    int keep;                      /* ladd_mmdit_keep */
    int B, H, W, h, w, N, T, last; /* last: index of the last block that runs */
    int n_taps, taps[LADD_MAX_LAYERS], used;
    unsigned char skip[LADD_MAX_LAYERS];
    ladd_arena arena;
    block_saved *blocks;                             /* [num_layers] */
    ladd_act *patches;                               /* [B*N,Cin*p*p] */
    ladd_act *context, *pooled;                      /* copies of the inputs, for weight gradients */
    ladd_act *features;                              /* [B,256] of time */
    ladd_act *time_h, *time_a, *pooled_h, *pooled_a; /* [B,D] inside the embedders */
    ladd_act *e, *s, *sum;                           /* [B,D] conditioning, SiLU of it, one embedder's output */
    ladd_act *mod;                                   /* [B,mod_rows] */
    int mod_rows;
    float *mean, *rstd;        /* final norm, [B*N] */
    ladd_act *normed, *tokens; /* [B*N,D], [B*N,p*p*Cout] */
    ladd_act *x_end;           /* image stream after the last block */
    /* shared by all blocks, for each stream: x1, x2 and dual_x1; mid; qk of all attentions; g of both streams */
    ladd_act *x_in, *y_in, *x_mid, *y_mid, *qk_x, *qk_y, *g;
    /* backward only */
    ladd_act *dpatches; /* [B*N,Cin*p*p] */
    ladd_act *dx, *dy, *dmod, *branch_x, *branch_y, *branch_dual, *dqkv_x, *dqkv_y, *d_o_x, *d_o_y, *hidden, *ds;
};

/* ---- planning -------------------------------------------------------------------------------------------------------- */

static void plan_qkv(const ladd_context *ctx, ladd_arena *arena, ladd_qkv_saved *q, ladd_act *qk, int64_t rows, int D, int heads, int norm) {
    q->qkv = ladd_take_act(ctx, arena, rows * 3 * D);
    q->qk = qk;
    q->q_rstd = norm ? ladd_take_f32(arena, rows * heads) : NULL;
    q->k_rstd = norm ? ladd_take_f32(arena, rows * heads) : NULL;
}

/* ends: nobody reads this stream after the block's attention. */
static void plan_stream(const ladd_context *ctx, ladd_arena *arena, stream_saved *s, ladd_act *input, ladd_act *mid, ladd_act *qk, ladd_act *g,
                        ladd_act *hidden, int64_t rows, int D, int heads, int norm, int keep, int ends) {
    s->mean1 = ladd_take_f32(arena, rows);
    s->rstd1 = ladd_take_f32(arena, rows);
    s->x1 = s->x2 = input;
    plan_qkv(ctx, arena, &s->qkv, qk, rows, D, heads, norm);
    s->o = ladd_take_act(ctx, arena, rows * D);
    if (ends) return;
    s->a = ladd_take_act(ctx, arena, rows * D);
    s->mid = keep ? mid : s->in;
    s->mean2 = ladd_take_f32(arena, rows);
    s->rstd2 = ladd_take_f32(arena, rows);
    s->h = keep ? ladd_take_act(ctx, arena, rows * 4 * D) : g; /* GELU in place when nobody asks for its input */
    s->g = g;
    s->m = keep == LADD_KEEP_ALL ? ladd_take_act(ctx, arena, rows * D) : hidden; /* only the gate's gradient reads it */
    s->out = keep ? ladd_take_act(ctx, arena, rows * D) : s->in;
}

static void plan_block(const ladd_context *ctx, ladd_arena *arena, block_saved *b, const struct ladd_mmdit_saved *s, int dual, int ends) {
    const ladd_mmdit_config *c = &s->model->config;
    int D = s->model->D, heads = c->num_attention_heads, norm = c->qk_rms_norm;
    int64_t x_rows = (int64_t)s->B * s->N, y_rows = (int64_t)s->B * s->T;
    plan_stream(ctx, arena, &b->x, s->x_in, s->x_mid, s->qk_x, s->g, s->hidden, x_rows, D, heads, norm, s->keep, 0);
    plan_stream(ctx, arena, &b->y, s->y_in, s->y_mid, s->qk_y, s->g, s->hidden, y_rows, D, heads, norm, s->keep, ends);
    b->lse = ladd_take_f32(arena, (x_rows + y_rows) * heads);
    if (!dual) return;
    b->dual_x1 = s->x_in;
    plan_qkv(ctx, arena, &b->dual_qkv, s->qk_x, x_rows, D, heads, norm);
    b->dual_lse = ladd_take_f32(arena, x_rows * heads);
    b->dual_o = ladd_take_act(ctx, arena, x_rows * D);
    b->dual_a = ladd_take_act(ctx, arena, x_rows * D);
}

static void plan(const ladd_context *ctx, struct ladd_mmdit_saved *s) {
    ladd_mmdit *m = s->model;
    const ladd_mmdit_config *c = &m->config;
    ladd_arena *arena = &s->arena;
    int keep = s->keep, D = m->D, patch = c->patch_size * c->patch_size;
    int64_t B = s->B, x_rows = B * s->N, y_rows = B * s->T;
    s->patches = ladd_take_act(ctx, arena, x_rows * c->in_channels * patch);
    s->context = keep ? ladd_take_act(ctx, arena, y_rows * c->joint_attention_dim) : NULL;
    s->pooled = keep ? ladd_take_act(ctx, arena, B * c->pooled_projection_dim) : NULL;
    s->features = ladd_take_act(ctx, arena, B * LADD_TIME_FEATURES);
    ladd_act **small[] = {&s->time_h, &s->time_a, &s->pooled_h, &s->pooled_a, &s->e, &s->s, &s->sum};
    for (size_t i = 0; i < sizeof small / sizeof *small; i++) *small[i] = ladd_take_act(ctx, arena, B * D);
    s->mod = ladd_take_act(ctx, arena, B * s->mod_rows);
    ladd_act *x = ladd_take_act(ctx, arena, x_rows * D), *y = ladd_take_act(ctx, arena, y_rows * D);
    const int64_t rows = x_rows > y_rows ? x_rows : y_rows;
    s->x_in = ladd_take_act(ctx, arena, x_rows * D);
    s->y_in = ladd_take_act(ctx, arena, y_rows * D);
    s->x_mid = keep ? ladd_take_act(ctx, arena, x_rows * D) : NULL;
    s->y_mid = keep ? ladd_take_act(ctx, arena, y_rows * D) : NULL;
    /* Attention and feed-forward of a block take turns, so what each needs for a moment lies in one place. */
    const size_t start = arena->used;
    s->qk_x = c->qk_rms_norm ? ladd_take_act(ctx, arena, x_rows * 3 * D) : NULL;
    s->qk_y = c->qk_rms_norm ? ladd_take_act(ctx, arena, y_rows * 3 * D) : NULL;
    if (keep) {
        s->dqkv_x = ladd_take_act(ctx, arena, x_rows * 3 * D);
        s->dqkv_y = ladd_take_act(ctx, arena, y_rows * 3 * D);
        s->d_o_x = ladd_take_act(ctx, arena, x_rows * D);
        s->d_o_y = ladd_take_act(ctx, arena, y_rows * D);
    }
    const size_t end = arena->used;
    arena->used = start;
    s->g = ladd_take_act(ctx, arena, rows * 4 * D);
    s->hidden = ladd_take_act(ctx, arena, rows * (keep ? 4 : 1) * D);
    if (arena->used < end) arena->used = end;
    int any_dual = 0;
    for (int i = 0; i <= s->last; i++) any_dual |= c->dual[i] && !s->skip[i];
    block_saved shared = {.x.in = x, .y.in = y};
    if (!keep) plan_block(ctx, arena, &shared, s, any_dual, 0);
    for (int i = 0; i <= s->last; i++) {
        block_saved *b = &s->blocks[i];
        if (!keep) {
            *b = shared;
            continue;
        }
        b->x.in = x;
        b->y.in = y;
        if (s->skip[i]) {
            b->x.out = x;
            b->y.out = y;
            continue;
        }
        plan_block(ctx, arena, b, s, c->dual[i], i == s->last);
        x = b->x.out;
        y = b->y.out;
    }
    s->x_end = x;
    if (!s->n_taps) {
        s->mean = ladd_take_f32(arena, x_rows);
        s->rstd = ladd_take_f32(arena, x_rows);
        s->normed = ladd_take_act(ctx, arena, x_rows * D);
        s->tokens = ladd_take_act(ctx, arena, x_rows * patch * c->out_channels);
    }
    if (!keep) return;
    s->dpatches = ladd_take_act(ctx, arena, x_rows * c->in_channels * patch);
    s->dx = ladd_take_act(ctx, arena, x_rows * D);
    s->dy = ladd_take_act(ctx, arena, y_rows * D);
    s->dmod = keep == LADD_KEEP_ALL ? ladd_take_act(ctx, arena, B * s->mod_rows) : NULL;
    s->branch_x = ladd_take_act(ctx, arena, x_rows * D);
    s->branch_y = ladd_take_act(ctx, arena, y_rows * D);
    s->branch_dual = any_dual ? ladd_take_act(ctx, arena, x_rows * D) : NULL;
    s->ds = ladd_take_act(ctx, arena, B * D);
}

static ladd_status check_call(const ladd_mmdit *m, const ladd_mmdit_call *call) {
    const ladd_mmdit_config *c = &m->config;
    int p = c->patch_size;
    if (call->batch < 1 || call->text_tokens < 1)
        return ladd_fail(LADD_ERR_VALUE, "MMDiT: at least one sample and one text token expected, got batch %d and %d tokens", call->batch,
                         call->text_tokens);
    if (call->height < p || call->width < p || call->height / p > c->pos_embed_max_size || call->width / p > c->pos_embed_max_size)
        return ladd_fail(LADD_ERR_VALUE,
                         "MMDiT: latent height and width in [%d, %d] expected (patch_size, pos_embed_max_size * patch_size), got %d x %d", p,
                         c->pos_embed_max_size * p + p - 1, call->height, call->width);
    int64_t tokens = (int64_t)(call->height / p) * (call->width / p) + call->text_tokens;
    if (tokens * call->batch > INT32_MAX / 8)
        return ladd_fail(LADD_ERR_VALUE, "MMDiT: at most %d tokens in a batch expected, got %lld", INT32_MAX / 8, (long long)(tokens * call->batch));
    if (call->n_taps < 0 || call->n_taps > c->num_layers)
        return ladd_fail(LADD_ERR_VALUE, "MMDiT: at most %d taps expected, got %d", c->num_layers, call->n_taps);
    for (int i = 0; i < call->n_taps; i++)
        if (call->taps[i] < 0 || call->taps[i] >= c->num_layers || (i && call->taps[i] <= call->taps[i - 1]))
            return ladd_fail(LADD_ERR_VALUE, "MMDiT: taps must be ascending block numbers in [0, %d), got %d at place %d", c->num_layers,
                             call->taps[i], i);
    return LADD_OK;
}

/* A fresh state with its sizes set and its arena counted but not reserved. */
static ladd_status begin(const ladd_context *ctx, struct ladd_mmdit_saved **out, ladd_mmdit *m, const ladd_mmdit_call *call) {
    *out = NULL;
    LADD_TRY(check_call(m, call));
    const ladd_mmdit_config *c = &m->config;
    struct ladd_mmdit_saved *s = calloc(1, sizeof *s);
    if (s) s->blocks = calloc((size_t)c->num_layers, sizeof *s->blocks);
    if (!s || !s->blocks) {
        free(s);
        return ladd_fail(LADD_ERR_MEMORY, "out of memory for the state of a forward pass");
    }
    s->model = m;
    s->keep = call->keep;
    s->B = call->batch;
    s->H = call->height;
    s->W = call->width;
    s->h = call->height / c->patch_size;
    s->w = call->width / c->patch_size;
    s->N = s->h * s->w;
    s->T = call->text_tokens;
    s->n_taps = call->n_taps;
    for (int i = 0; i < call->n_taps; i++) s->taps[i] = call->taps[i];
    if (call->skip) memcpy(s->skip, call->skip, (size_t)c->num_layers);
    s->last = call->n_taps ? call->taps[call->n_taps - 1] : c->num_layers - 1;
    s->mod_rows = call->n_taps ? m->blocks[s->last].modulation_end : m->modulation_rows;
    plan(ctx, s);
    *out = s;
    return LADD_OK;
}

int ladd_mmdit_saved_all(const ladd_mmdit_saved *saved) { return saved->keep == LADD_KEEP_ALL; }

void ladd_mmdit_saved_free(const ladd_context *ctx, ladd_mmdit_saved *saved) {
    if (!saved) return;
    ladd_arena_release(ctx, &saved->arena);
    free(saved->blocks);
    free(saved);
}

ladd_status ladd_mmdit_plan(const ladd_context *ctx, size_t *bytes, const ladd_mmdit *model, const ladd_mmdit_call *call) {
    struct ladd_mmdit_saved *s;
    LADD_TRY(begin(ctx, &s, (ladd_mmdit *)model, call));
    *bytes = s->arena.used;
    ladd_mmdit_saved_free(ctx, s);
    return LADD_OK;
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */

static ladd_act *mod_row(const ladd_context *ctx, const struct ladd_mmdit_saved *s, int row) { return ladd_at(ctx, s->mod, row); }
static ladd_act *dmod_row(const ladd_context *ctx, const struct ladd_mmdit_saved *s, int row) { return s->dmod ? ladd_at(ctx, s->dmod, row) : NULL; }

static ladd_status normalise(const ladd_context *ctx, ladd_act *y, float *mean, float *rstd, const ladd_act *x, const struct ladd_mmdit_saved *s,
                             int shift, int scale, int tokens) {
    LADD_K(ctx, layer_norm_modulate_forward, y, mean, rstd, x, mod_row(ctx, s, shift), mod_row(ctx, s, scale), s->mod_rows, s->B, tokens, s->model->D,
           NORM_EPS);
    return LADD_OK;
}

/* out = in + gate * (o W^T + b) */
static ladd_status project_and_add(const ladd_context *ctx, ladd_act *out, ladd_act *a, const ladd_act *in, const ladd_act *o, const ladd_weights *w,
                                   const ladd_linear_params *p, const struct ladd_mmdit_saved *s, int gate, int tokens) {
    int D = s->model->D;
    LADD_K(ctx, linear_forward, a, o, ladd_weight(ctx, w, p->weight), ladd_weight(ctx, w, p->bias), s->B * tokens, D, D);
    LADD_K(ctx, gate_residual_forward, out, in, a, mod_row(ctx, s, gate), s->mod_rows, s->B, tokens, D);
    return LADD_OK;
}

static ladd_status feed_forward_and_add(const ladd_context *ctx, stream_saved *t, const ladd_weights *w, const ladd_mmdit_stream_params *p,
                                        const struct ladd_mmdit_saved *s, int tokens) {
    int D = s->model->D;
    LADD_TRY(normalise(ctx, t->x2, t->mean2, t->rstd2, t->mid, s, p->mod.shift2, p->mod.scale2, tokens));
    LADD_TRY(ladd_ff_forward(ctx, t->m, t->h, t->g, t->x2, w, &p->ff, s->B * tokens, D, 4 * D));
    LADD_K(ctx, gate_residual_forward, t->out, t->mid, t->m, mod_row(ctx, s, p->mod.gate2), s->mod_rows, s->B, tokens, D);
    return LADD_OK;
}

static float attention_scale(int dh) { return 1.0f / __builtin_sqrtf((float)dh); }

static ladd_status block_forward(const ladd_context *ctx, struct ladd_mmdit_saved *s, const ladd_weights *w, int i) {
    const ladd_mmdit_block_params *p = &s->model->blocks[i];
    const ladd_mmdit_config *c = &s->model->config;
    block_saved *b = &s->blocks[i];
    int heads = c->num_attention_heads, dh = c->attention_head_dim, B = s->B, N = s->N, T = s->T;

    LADD_TRY(normalise(ctx, b->x.x1, b->x.mean1, b->x.rstd1, b->x.in, s, p->x.mod.shift1, p->x.mod.scale1, N));
    LADD_TRY(normalise(ctx, b->y.x1, b->y.mean1, b->y.rstd1, b->y.in, s, p->y.mod.shift1, p->y.mod.scale1, T));
    LADD_TRY(ladd_qkv_forward(ctx, &b->x.qkv, b->x.x1, w, &p->x.qkv, B * N, heads, dh));
    LADD_TRY(ladd_qkv_forward(ctx, &b->y.qkv, b->y.x1, w, &p->y.qkv, B * T, heads, dh));
    ladd_stream streams[2] = {ladd_qkv_stream(ctx, &b->x.qkv, b->x.o, N, heads, dh), ladd_qkv_stream(ctx, &b->y.qkv, b->y.o, T, heads, dh)};
    LADD_K(ctx, attention_forward, streams, 2, b->lse, B, heads, dh, attention_scale(dh));
    if (c->dual[i]) /* reads the same LN(in), so before the residual stream moves on (it may be updated in place) */
        LADD_TRY(normalise(ctx, b->dual_x1, b->x.mean1, b->x.rstd1, b->x.in, s, p->x.mod.dual_shift, p->x.mod.dual_scale, N));
    LADD_TRY(project_and_add(ctx, b->x.mid, b->x.a, b->x.in, b->x.o, w, &p->x.out, s, p->x.mod.gate1, N));
    if (c->dual[i]) {
        LADD_TRY(ladd_qkv_forward(ctx, &b->dual_qkv, b->dual_x1, w, &p->dual_qkv, B * N, heads, dh));
        ladd_stream alone = ladd_qkv_stream(ctx, &b->dual_qkv, b->dual_o, N, heads, dh);
        LADD_K(ctx, attention_forward, &alone, 1, b->dual_lse, B, heads, dh, attention_scale(dh));
        LADD_TRY(project_and_add(ctx, b->x.mid, b->dual_a, b->x.mid, b->dual_o, w, &p->dual_out, s, p->x.mod.dual_gate, N));
    }
    LADD_TRY(feed_forward_and_add(ctx, &b->x, w, &p->x, s, N));
    if (i < s->last) { /* nobody reads the text stream after the last block that runs */
        LADD_TRY(project_and_add(ctx, b->y.mid, b->y.a, b->y.in, b->y.o, w, &p->y.out, s, p->y.mod.gate1, T));
        LADD_TRY(feed_forward_and_add(ctx, &b->y, w, &p->y, s, T));
    }
    return LADD_OK;
}

static ladd_status embed(const ladd_context *ctx, struct ladd_mmdit_saved *s, const ladd_weights *w, const ladd_act *latents, const float *sigma,
                         const ladd_act *context, const ladd_act *pooled) {
    ladd_mmdit *m = s->model;
    const ladd_mmdit_config *c = &m->config;
    int D = m->D, B = s->B;
    LADD_K(ctx, timestep_features, s->features, sigma, B, LADD_TIME_FEATURES);
    LADD_TRY(ladd_embedder_forward(ctx, s->sum, s->time_h, s->time_a, s->features, w, &m->time, B, LADD_TIME_FEATURES, D));
    LADD_TRY(ladd_embedder_forward(ctx, s->e, s->pooled_h, s->pooled_a, pooled, w, &m->pooled, B, c->pooled_projection_dim, D));
    LADD_K(ctx, add, s->e, s->sum, s->e, (int64_t)B * D);
    LADD_K(ctx, silu_forward, s->s, s->e, (int64_t)B * D);
    LADD_K(ctx, linear_forward, s->mod, s->s, ladd_weight(ctx, w, m->modulation_weight), ladd_weight(ctx, w, m->modulation_bias), B, s->mod_rows, D);
    LADD_K(ctx, patch_gather, s->patches, latents, B, c->in_channels, s->H, s->W, c->patch_size, 0);
    LADD_K(ctx, linear_forward, s->blocks[0].x.in, s->patches, ladd_weight(ctx, w, m->patch.weight), ladd_weight(ctx, w, m->patch.bias), B * s->N, D,
           c->in_channels * c->patch_size * c->patch_size);
    LADD_K(ctx, add_position, s->blocks[0].x.in, ladd_weight(ctx, w, m->position), B, s->h, s->w, c->pos_embed_max_size, D);
    LADD_K(ctx, linear_forward, s->blocks[0].y.in, context, ladd_weight(ctx, w, m->context.weight), ladd_weight(ctx, w, m->context.bias), B * s->T, D,
           c->joint_attention_dim);
    return LADD_OK;
}

static ladd_status run_forward(const ladd_context *ctx, ladd_act *velocity, ladd_act *const *features, struct ladd_mmdit_saved *s,
                               const ladd_act *latents, const float *sigma, const ladd_act *context, const ladd_act *pooled) {
    ladd_mmdit *m = s->model;
    const ladd_mmdit_config *c = &m->config;
    LADD_TRY(ladd_params_ready(ctx, &m->params));
    const ladd_weights w = {.data = m->params.compute};
    int D = m->D, p2 = c->patch_size * c->patch_size;
    int64_t image = (int64_t)s->B * s->N * D;
    if (s->context) {
        LADD_K(ctx, copy, s->context, context, (int64_t)s->B * s->T * c->joint_attention_dim);
        LADD_K(ctx, copy, s->pooled, pooled, (int64_t)s->B * c->pooled_projection_dim);
    }
    LADD_TRY(embed(ctx, s, &w, latents, sigma, context, pooled));
    for (int i = 0, tap = 0; i <= s->last; i++) {
        LADD_TRY(ladd_check_interrupt(ctx));
        if (!s->skip[i]) LADD_TRY(block_forward(ctx, s, &w, i));
        if (tap < s->n_taps && s->taps[tap] == i) LADD_K(ctx, copy, features[tap++], s->blocks[i].x.out, image);
    }
    if (s->n_taps) return LADD_OK;
    LADD_TRY(normalise(ctx, s->normed, s->mean, s->rstd, s->x_end, s, m->final_shift, m->final_scale, s->N));
    LADD_K(ctx, linear_forward, s->tokens, s->normed, ladd_weight(ctx, &w, m->proj_out.weight), ladd_weight(ctx, &w, m->proj_out.bias), s->B * s->N,
           p2 * c->out_channels, D);
    LADD_K(ctx, patch_scatter, velocity, s->tokens, s->B, c->out_channels, s->h * c->patch_size, s->w * c->patch_size, c->patch_size, 1);
    return LADD_OK;
}

ladd_status ladd_mmdit_forward(const ladd_context *ctx, ladd_act *velocity, ladd_act *const *features, ladd_mmdit_saved **saved, ladd_mmdit *model,
                               const ladd_mmdit_call *call, const ladd_act *latents, const float *sigma, const ladd_act *context,
                               const ladd_act *pooled) {
    if (saved) *saved = NULL;
    struct ladd_mmdit_saved *s;
    LADD_TRY(begin(ctx, &s, model, call));
    ladd_status status = ladd_arena_reserve(ctx, &s->arena);
    if (status == LADD_OK) {
        plan(ctx, s);
        status = run_forward(ctx, velocity, features, s, latents, sigma, context, pooled);
    }
    if (status == LADD_OK && call->keep)
        *saved = s;
    else
        ladd_mmdit_saved_free(ctx, s);
    return status;
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

/* Of out = in + gate * (o W^T + b): d_o, dgate and the projection's gradients from the residual stream's gradient dx; branch is overwritten. */
static ladd_status project_and_add_backward(const ladd_context *ctx, ladd_act *d_o, ladd_act *branch, const ladd_act *dx, const ladd_act *a,
                                            const ladd_act *o, const ladd_weights *w, const ladd_linear_params *p, const struct ladd_mmdit_saved *s,
                                            int gate, int tokens) {
    int D = s->model->D;
    LADD_K(ctx, gate_residual_backward, branch, dmod_row(ctx, s, gate), dx, a, mod_row(ctx, s, gate), s->mod_rows, s->B, tokens, D);
    LADD_K(ctx, linear_backward, d_o, ladd_weight_grad(w, p->weight), ladd_weight_grad(w, p->bias), branch, o, ladd_weight(ctx, w, p->weight),
           s->B * tokens, D, D);
    return LADD_OK;
}

/* Of y = LN(x) (1 + scale) + shift: dx += ..., dshift, dscale. */
static ladd_status normalise_backward(const ladd_context *ctx, ladd_act *dx, const ladd_act *dy, const ladd_act *x, const float *mean,
                                      const float *rstd, const struct ladd_mmdit_saved *s, int shift, int scale, int tokens) {
    LADD_K(ctx, layer_norm_modulate_backward, dx, dmod_row(ctx, s, shift), dmod_row(ctx, s, scale), dy, x, mean, rstd, mod_row(ctx, s, scale),
           s->mod_rows, s->B, tokens, s->model->D);
    return LADD_OK;
}

/* dx: gradient at the stream's exit on entry, at `mid` on return. */
static ladd_status feed_forward_and_add_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *branch, const stream_saved *t,
                                                 const ladd_weights *w, const ladd_mmdit_stream_params *p, const struct ladd_mmdit_saved *s,
                                                 int tokens) {
    int D = s->model->D;
    LADD_K(ctx, gate_residual_backward, branch, dmod_row(ctx, s, p->mod.gate2), dx, t->m, mod_row(ctx, s, p->mod.gate2), s->mod_rows, s->B, tokens,
           D);
    if (w->grad) {
        LADD_TRY(normalise(ctx, t->x2, t->mean2, t->rstd2, t->mid, s, p->mod.shift2, p->mod.scale2, tokens));
        LADD_K(ctx, gelu_forward, t->g, t->h, (int64_t)s->B * tokens * 4 * D);
    }
    LADD_TRY(ladd_ff_backward(ctx, branch, s->hidden, branch, t->h, t->g, t->x2, w, &p->ff, s->B * tokens, D, 4 * D));
    return normalise_backward(ctx, dx, branch, t->mid, t->mean2, t->rstd2, s, p->mod.shift2, p->mod.scale2, tokens);
}

static ladd_stream_grad stream_grad(const ladd_context *ctx, ladd_act *dqkv, const ladd_act *d_o, int D) {
    return (ladd_stream_grad){.dq = dqkv, .dk = ladd_at(ctx, dqkv, D), .dv = ladd_at(ctx, dqkv, 2 * D), .d_o = d_o};
}

/* The residual stream after a branch, which forward did not keep. */
static ladd_status residual_again(const ladd_context *ctx, ladd_act *out, const ladd_act *in, const ladd_act *branch,
                                  const struct ladd_mmdit_saved *s, int gate, int tokens) {
    LADD_K(ctx, gate_residual_forward, out, in, branch, mod_row(ctx, s, gate), s->mod_rows, s->B, tokens, s->model->D);
    return LADD_OK;
}

/* s->dx, s->dy: gradients at the block's exit on entry, at its entrance on return. */
static ladd_status block_backward(const ladd_context *ctx, struct ladd_mmdit_saved *s, const ladd_weights *w, int i) {
    const ladd_mmdit_block_params *p = &s->model->blocks[i];
    const ladd_mmdit_config *c = &s->model->config;
    const block_saved *b = &s->blocks[i];
    int heads = c->num_attention_heads, dh = c->attention_head_dim, B = s->B, N = s->N, T = s->T, D = s->model->D;
    float scale = attention_scale(dh);

    LADD_TRY(residual_again(ctx, b->x.mid, b->x.in, b->x.a, s, p->x.mod.gate1, N));
    if (c->dual[i]) LADD_TRY(residual_again(ctx, b->x.mid, b->x.mid, b->dual_a, s, p->x.mod.dual_gate, N));
    LADD_TRY(feed_forward_and_add_backward(ctx, s->dx, s->branch_x, &b->x, w, &p->x, s, N));
    if (i < s->last) {
        LADD_TRY(residual_again(ctx, b->y.mid, b->y.in, b->y.a, s, p->y.mod.gate1, T));
        LADD_TRY(feed_forward_and_add_backward(ctx, s->dy, s->branch_y, &b->y, w, &p->y, s, T));
    }
    /* both attentions see the same residual gradient; what LN(in) receives joins it only afterwards */
    if (c->dual[i]) {
        LADD_TRY(project_and_add_backward(ctx, s->d_o_x, s->branch_x, s->dx, b->dual_a, b->dual_o, w, &p->dual_out, s, p->x.mod.dual_gate, N));
        LADD_TRY(ladd_qkv_normalise(ctx, &b->dual_qkv, w, &p->dual_qkv, B * N, heads, dh));
        ladd_stream alone = ladd_qkv_stream(ctx, &b->dual_qkv, b->dual_o, N, heads, dh);
        ladd_stream_grad alone_grad = stream_grad(ctx, s->dqkv_x, s->d_o_x, D);
        LADD_K(ctx, attention_backward, &alone_grad, &alone, 1, b->dual_lse, B, heads, dh, scale);
        if (w->grad) LADD_TRY(normalise(ctx, b->dual_x1, b->x.mean1, b->x.rstd1, b->x.in, s, p->x.mod.dual_shift, p->x.mod.dual_scale, N));
        LADD_TRY(ladd_qkv_backward(ctx, s->branch_dual, s->dqkv_x, &b->dual_qkv, b->dual_x1, w, &p->dual_qkv, B * N, heads, dh));
    }
    LADD_TRY(project_and_add_backward(ctx, s->d_o_x, s->branch_x, s->dx, b->x.a, b->x.o, w, &p->x.out, s, p->x.mod.gate1, N));
    if (i < s->last)
        LADD_TRY(project_and_add_backward(ctx, s->d_o_y, s->branch_y, s->dy, b->y.a, b->y.o, w, &p->y.out, s, p->y.mod.gate1, T));
    else
        LADD_K(ctx, zero, s->d_o_y, (int64_t)B * T * D);
    LADD_TRY(ladd_qkv_normalise(ctx, &b->x.qkv, w, &p->x.qkv, B * N, heads, dh));
    LADD_TRY(ladd_qkv_normalise(ctx, &b->y.qkv, w, &p->y.qkv, B * T, heads, dh));
    ladd_stream streams[2] = {ladd_qkv_stream(ctx, &b->x.qkv, b->x.o, N, heads, dh), ladd_qkv_stream(ctx, &b->y.qkv, b->y.o, T, heads, dh)};
    ladd_stream_grad grads[2] = {stream_grad(ctx, s->dqkv_x, s->d_o_x, D), stream_grad(ctx, s->dqkv_y, s->d_o_y, D)};
    LADD_K(ctx, attention_backward, grads, streams, 2, b->lse, B, heads, dh, scale);
    if (w->grad) {
        LADD_TRY(normalise(ctx, b->x.x1, b->x.mean1, b->x.rstd1, b->x.in, s, p->x.mod.shift1, p->x.mod.scale1, N));
        LADD_TRY(normalise(ctx, b->y.x1, b->y.mean1, b->y.rstd1, b->y.in, s, p->y.mod.shift1, p->y.mod.scale1, T));
    }
    LADD_TRY(ladd_qkv_backward(ctx, s->branch_x, s->dqkv_x, &b->x.qkv, b->x.x1, w, &p->x.qkv, B * N, heads, dh));
    LADD_TRY(ladd_qkv_backward(ctx, s->branch_y, s->dqkv_y, &b->y.qkv, b->y.x1, w, &p->y.qkv, B * T, heads, dh));
    if (c->dual[i])
        LADD_TRY(normalise_backward(ctx, s->dx, s->branch_dual, b->x.in, b->x.mean1, b->x.rstd1, s, p->x.mod.dual_shift, p->x.mod.dual_scale, N));
    LADD_TRY(normalise_backward(ctx, s->dx, s->branch_x, b->x.in, b->x.mean1, b->x.rstd1, s, p->x.mod.shift1, p->x.mod.scale1, N));
    return normalise_backward(ctx, s->dy, s->branch_y, b->y.in, b->y.mean1, b->y.rstd1, s, p->y.mod.shift1, p->y.mod.scale1, T);
}

static ladd_status head_backward(const ladd_context *ctx, struct ladd_mmdit_saved *s, const ladd_weights *w, const ladd_act *dvelocity) {
    ladd_mmdit *m = s->model;
    const ladd_mmdit_config *c = &m->config;
    int D = m->D, p = c->patch_size;
    LADD_K(ctx, patch_gather, s->tokens, dvelocity, s->B, c->out_channels, s->h * p, s->w * p, p, 1);
    LADD_K(ctx, linear_backward, s->branch_x, ladd_weight_grad(w, m->proj_out.weight), ladd_weight_grad(w, m->proj_out.bias), s->tokens, s->normed,
           ladd_weight(ctx, w, m->proj_out.weight), s->B * s->N, p * p * c->out_channels, D);
    return normalise_backward(ctx, s->dx, s->branch_x, s->x_end, s->mean, s->rstd, s, m->final_shift, m->final_scale, s->N);
}

static ladd_status embed_backward(const ladd_context *ctx, ladd_act *dlatents, ladd_act *dcontext, ladd_act *dpooled, struct ladd_mmdit_saved *s,
                                  const ladd_weights *w) {
    ladd_mmdit *m = s->model;
    const ladd_mmdit_config *c = &m->config;
    int D = m->D, B = s->B, patch = c->in_channels * c->patch_size * c->patch_size;
    ladd_act *dpatches = dlatents ? s->dpatches : NULL;
    if (dlatents || w->grad)
        LADD_K(ctx, linear_backward, dpatches, ladd_weight_grad(w, m->patch.weight), ladd_weight_grad(w, m->patch.bias), s->dx, s->patches,
               ladd_weight(ctx, w, m->patch.weight), B * s->N, D, patch);
    if (dlatents) LADD_K(ctx, patch_scatter, dlatents, dpatches, B, c->in_channels, s->H, s->W, c->patch_size, 0);
    if (dcontext || w->grad)
        LADD_K(ctx, linear_backward, dcontext, ladd_weight_grad(w, m->context.weight), ladd_weight_grad(w, m->context.bias), s->dy, s->context,
               ladd_weight(ctx, w, m->context.weight), B * s->T, D, c->joint_attention_dim);
    if (!s->dmod) return LADD_OK;
    LADD_K(ctx, linear_backward, s->ds, ladd_weight_grad(w, m->modulation_weight), ladd_weight_grad(w, m->modulation_bias), s->dmod, s->s,
           ladd_weight(ctx, w, m->modulation_weight), B, s->mod_rows, D);
    LADD_K(ctx, silu_backward, s->ds, s->ds, s->e, (int64_t)B * D);
    if (w->grad) LADD_TRY(ladd_embedder_backward(ctx, NULL, s->sum, s->ds, s->time_h, s->time_a, s->features, w, &m->time, B, LADD_TIME_FEATURES, D));
    return ladd_embedder_backward(ctx, dpooled, s->sum, s->ds, s->pooled_h, s->pooled_a, s->pooled, w, &m->pooled, B, c->pooled_projection_dim, D);
}

ladd_status ladd_mmdit_backward(const ladd_context *ctx, ladd_act *dlatents, ladd_act *dcontext, ladd_act *dpooled, ladd_mmdit_saved *saved,
                                const ladd_act *dvelocity, const ladd_act *const *dfeatures, int params) {
    struct ladd_mmdit_saved *s = saved;
    ladd_mmdit *m = s->model;
    if (s->used) return ladd_fail(LADD_ERR_RUNTIME, "one backward a forward expected; this one's saved memory was used already");
    if ((params || dpooled) && !ladd_mmdit_saved_all(s))
        return ladd_fail(LADD_ERR_VALUE, "a forward that keeps all expected for gradients of parameters or pooled text, got one that keeps less");
    if (params) LADD_TRY(ladd_params_need_grad(&m->params));
    s->used = 1;
    const ladd_weights w = {.data = m->params.compute, .grad = params ? m->params.grad : NULL};
    int64_t image = (int64_t)s->B * s->N * m->D;
    if (!params && !dpooled) s->dmod = NULL; /* a frozen model asked for its inputs only: no gradient of the modulations */
    if (s->dmod) LADD_K(ctx, zero, s->dmod, (int64_t)s->B * s->mod_rows);
    LADD_K(ctx, zero, s->dx, image);
    LADD_K(ctx, zero, s->dy, (int64_t)s->B * s->T * m->D);
    if (!s->n_taps) LADD_TRY(head_backward(ctx, s, &w, dvelocity));
    for (int i = s->last, tap = s->n_taps - 1; i >= 0; i--) {
        LADD_TRY(ladd_check_interrupt(ctx));
        if (tap >= 0 && s->taps[tap] == i) {
            if (dfeatures[tap]) LADD_K(ctx, add, s->dx, s->dx, dfeatures[tap], image);
            tap--;
        }
        if (!s->skip[i]) LADD_TRY(block_backward(ctx, s, &w, i));
    }
    return embed_backward(ctx, dlatents, dcontext, dpooled, s, &w);
}
