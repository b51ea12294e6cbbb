/* The discriminator of LADD: one head (layers/discriminator_head.h) on the features after each tapped block of the teacher, and an embedding of the
 * re-noising time t_hat that the heads share.
 *
 *   sigma_embedder.linear_1, .linear_2          features of 1000 t_hat -> K -> SiLU -> K
 *   heads.{i}.proj, .norm1, .conv, .norm2, .out, .direction, .condition_sigma, .condition_pooled, .condition_bias      i counts the taps from 0
 *   heads.{i}.{proj,conv,out,direction}.weight_u          spectral norm's estimates of the first left singular vector: buffers
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../layers/discriminator_head.h"

enum { DISC_TIME_FEATURES = 256, DISC_PURPOSE_INIT = 16, DISC_INIT_ITERATIONS = 20, DISC_MAX_SIZE = 1 << 20, DISC_MAX_KERNEL = 63 };

struct ladd_disc {
    ladd_disc_config config;
    ladd_params params;
    ladd_embedder_params embedder;
    ladd_head_params *heads; /* [n_taps] */
    int64_t largest;         /* elements of the largest matrix under spectral norm */
};

struct ladd_disc_saved {
    ladd_disc *model;
    ladd_arena arena;
    ladd_head_sizes sizes;
    ladd_head_scratch scratch;
    ladd_head_saved heads[LADD_MAX_LAYERS];
    ladd_act *features[LADD_MAX_LAYERS];                             /* copies, for W_p's gradient: the caller's may change before backward */
    ladd_act *pooled;                                                /* [B,P] copy */
    ladd_act *time, *time_h, *time_a, *embedded, *dembedded, *dtime; /* [B,256], then [B,K] each */
};

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

static int64_t add_tensor(ladd_disc *m, int trainable, const char *scope, const char *name, int ndim, const int64_t *shape, int *failed) {
    char full[LADD_NAME_MAX];
    snprintf(full, sizeof full, "%s%s", scope, name);
    int64_t offset = ladd_params_add(&m->params, trainable, full, ndim, shape);
    if (offset < 0) *failed = 1;
    return offset;
}

static int64_t add_vector(ladd_disc *m, const char *scope, const char *name, int size, int *failed) {
    return add_tensor(m, 1, scope, name, 1, (int64_t[]){size}, failed);
}

static int64_t add_matrix(ladd_disc *m, const char *scope, const char *name, int rows, int columns, int *failed) {
    return add_tensor(m, 1, scope, name, 2, (int64_t[]){rows, columns}, failed);
}

static ladd_head_matrix as_matrix(ladd_disc *m, int64_t weight, int R, int K) {
    if (weight >= 0 && (int64_t)R * K > m->largest) m->largest = (int64_t)R * K;
    return (ladd_head_matrix){.weight = weight, .u = -1, .R = R, .K = K};
}

static ladd_status add_parameters(ladd_disc *m) {
    const ladd_disc_config *c = &m->config;
    int failed = 0, sigma = c->condition_sigma, pooled = c->condition_pooled, K = c->condition_dim, C = c->width, k = c->kernel_size;
    char scope[32];
    m->embedder = (ladd_embedder_params){{-1, -1}, {-1, -1}};
    if (sigma) {
        m->embedder.first.weight = add_matrix(m, "", "sigma_embedder.linear_1.weight", K, DISC_TIME_FEATURES, &failed);
        m->embedder.first.bias = add_vector(m, "", "sigma_embedder.linear_1.bias", K, &failed);
        m->embedder.second.weight = add_matrix(m, "", "sigma_embedder.linear_2.weight", K, K, &failed);
        m->embedder.second.bias = add_vector(m, "", "sigma_embedder.linear_2.bias", K, &failed);
    }
    for (int i = 0; i < c->n_taps; i++) {
        ladd_head_params *p = &m->heads[i];
        int64_t none = -1;
        snprintf(scope, sizeof scope, "heads.%d.", i);
        p->proj = as_matrix(m, add_matrix(m, scope, "proj.weight", C, c->feature_dim, &failed), C, c->feature_dim);
        p->proj_bias = add_vector(m, scope, "proj.bias", C, &failed);
        p->norm1_weight = c->norm ? add_vector(m, scope, "norm1.weight", C, &failed) : none;
        p->norm1_bias = c->norm ? add_vector(m, scope, "norm1.bias", C, &failed) : none;
        p->conv = as_matrix(m, add_tensor(m, 1, scope, "conv.weight", 4, (int64_t[]){C, C, k, k}, &failed), C, C * k * k);
        p->conv_bias = add_vector(m, scope, "conv.bias", C, &failed);
        p->norm2_weight = c->norm ? add_vector(m, scope, "norm2.weight", C, &failed) : none;
        p->norm2_bias = c->norm ? add_vector(m, scope, "norm2.bias", C, &failed) : none;
        p->out = as_matrix(m, add_matrix(m, scope, "out.weight", 1, C, &failed), 1, C);
        p->out_bias = add_vector(m, scope, "out.bias", 1, &failed);
        p->direction = as_matrix(m, sigma || pooled ? add_matrix(m, scope, "direction.weight", C, K, &failed) : none, C, K);
        p->condition_sigma = sigma ? add_matrix(m, scope, "condition_sigma.weight", K, K, &failed) : none;
        p->condition_pooled = pooled ? add_matrix(m, scope, "condition_pooled.weight", K, c->pooled_dim, &failed) : none;
        p->condition_bias = sigma || pooled ? add_vector(m, scope, "condition_bias", K, &failed) : none;
    }
    for (int i = 0; c->spectral_norm && i < c->n_taps; i++) { /* buffers come after all that trains */
        ladd_head_params *p = &m->heads[i];
        snprintf(scope, sizeof scope, "heads.%d.", i);
        p->proj.u = add_tensor(m, 0, scope, "proj.weight_u", 1, (int64_t[]){C}, &failed);
        p->conv.u = add_tensor(m, 0, scope, "conv.weight_u", 1, (int64_t[]){C}, &failed);
        p->out.u = add_tensor(m, 0, scope, "out.weight_u", 1, (int64_t[]){1}, &failed);
        if (p->direction.weight >= 0) p->direction.u = add_tensor(m, 0, scope, "direction.weight_u", 1, (int64_t[]){C}, &failed);
    }
    return failed ? LADD_ERR_VALUE : ladd_params_allocate(&m->params);
}

static ladd_status check_config(const ladd_disc_config *c) {
    const struct {
        const char *name;
        int value, least, most;
    } sizes[] = {{"feature_dim", c->feature_dim, 1, DISC_MAX_SIZE},
                 {"number of taps", c->n_taps, 1, LADD_MAX_LAYERS},
                 {"pooled_dim", c->pooled_dim, 0, DISC_MAX_SIZE},
                 {"width", c->width, 1, 16384},
                 {"kernel_size", c->kernel_size, 1, DISC_MAX_KERNEL},
                 {"norm", c->norm, LADD_HEAD_NORM_NONE, LADD_HEAD_NORM_GROUP},
                 {"num_groups", c->num_groups, c->norm ? 1 : 0, 16384},
                 {"condition_dim", c->condition_dim, c->condition_sigma || c->condition_pooled ? 1 : 0, 16384}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return ladd_fail(LADD_ERR_VALUE, "discriminator config: %s in [%d, %d] expected, got %d", sizes[i].name, sizes[i].least, sizes[i].most,
                             sizes[i].value);
    for (int i = 0; i < c->n_taps; i++)
        if (c->taps[i] < 0 || (i && c->taps[i] <= c->taps[i - 1]))
            return ladd_fail(LADD_ERR_VALUE, "discriminator config: taps of at least 0 in ascending order expected, got %d at position %d",
                             c->taps[i], i);
    if (c->kernel_size % 2 == 0) return ladd_fail(LADD_ERR_VALUE, "discriminator config: an odd kernel_size expected, got %d", c->kernel_size);
    if (c->norm && c->width % c->num_groups)
        return ladd_fail(LADD_ERR_VALUE, "discriminator config: width divisible by num_groups expected, got %d and %d", c->width, c->num_groups);
    if (c->condition_pooled && c->pooled_dim == 0)
        return ladd_fail(LADD_ERR_VALUE, "discriminator config: a pooled_dim of at least 1 expected with condition_pooled, got 0");
    if ((int64_t)c->width * c->width * c->kernel_size * c->kernel_size > INT_MAX)
        return ladd_fail(LADD_ERR_VALUE, "discriminator config: width^2 kernel_size^2 below 2^31 expected, got width %d and kernel_size %d", c->width,
                         c->kernel_size);
    return LADD_OK;
}

ladd_status ladd_disc_create(ladd_disc **model, const ladd_disc_config *config) {
    *model = NULL;
    LADD_TRY(check_config(config));
    ladd_disc *m = calloc(1, sizeof *m);
    if (m) m->heads = calloc((size_t)config->n_taps, sizeof *m->heads);
    if (!m || !m->heads) {
        free(m);
        return ladd_fail(LADD_ERR_MEMORY, "out of memory for a discriminator");
    }
    m->config = *config;
    ladd_status status = add_parameters(m);
    if (status != LADD_OK) {
        ladd_disc_free(m);
        return status;
    }
    *model = m;
    return LADD_OK;
}

void ladd_disc_free(ladd_disc *model) {
    if (!model) return;
    ladd_params_free(&model->params);
    free(model->heads);
    free(model);
}

ladd_params *ladd_disc_params(ladd_disc *model) { return &model->params; }
const ladd_disc_config *ladd_disc_get_config(const ladd_disc *model) { return &model->config; }

/* Power iterations until u is close to the first singular vector, so that the first training step already divides by the right number. */
static ladd_status settle(const ladd_context *ctx, ladd_disc *m, const ladd_head_matrix *matrix, float *w_hat, float *v) {
    float sigma;
    if (matrix->u < 0) return LADD_OK;
    LADD_K(ctx, spectral_norm_forward, w_hat, m->params.data + matrix->u, v, &sigma, m->params.data + matrix->weight, matrix->R, matrix->K,
           DISC_INIT_ITERATIONS);
    return LADD_OK;
}

/* Matrices N(0, 1/fan_in), group norm 1, biases 0; u random, then settled. */
ladd_status ladd_disc_init(ladd_disc *model, uint64_t seed) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    if (!ctx.backend) return LADD_ERR_VALUE;
    const int64_t sample = 0;
    for (int i = 0; i < model->params.n; i++) {
        const ladd_param *e = &model->params.table[i];
        float *data = model->params.data + e->offset;
        if (e->ndim > 1 || !e->trainable) {
            double fan_in = e->trainable ? (double)(e->count / e->shape[0]) : (double)e->count;
            LADD_K(&ctx, normal, data, ((ladd_rng_key){.seed = seed, .purpose = DISC_PURPOSE_INIT, .step = (uint64_t)i}), &sample, 1, e->count);
            LADD_K(&ctx, scale, data, data, (float)(1.0 / sqrt(fan_in)), e->count);
        } else {
            for (int64_t j = 0; j < e->count; j++) data[j] = 0.0f;
        }
    }
    float *scratch = malloc(2 * (size_t)model->largest * sizeof *scratch); /* w_hat and v */
    if (!scratch) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a matrix of %lld elements", (long long)model->largest);
    ladd_status status = LADD_OK;
    for (int i = 0; i < model->config.n_taps && status == LADD_OK; i++) {
        const ladd_head_params *p = &model->heads[i];
        const ladd_head_matrix *matrices[] = {&p->proj, &p->conv, &p->out, &p->direction};
        for (int j = 0; j < 4 && status == LADD_OK; j++) status = settle(&ctx, model, matrices[j], scratch, scratch + model->largest);
        for (int j = 0; p->norm1_weight >= 0 && j < model->config.width; j++)
            model->params.data[p->norm1_weight + j] = model->params.data[p->norm2_weight + j] = 1.0f;
    }
    free(scratch);
    return status;
}

/* ---- forward and backward -------------------------------------------------------------------------------------------- */

/* Called twice: with a counting arena, then with memory. Without keep, all heads use the same memory. */
static void take(const ladd_context *ctx, ladd_disc_saved *s, int keep) {
    const ladd_disc_config *c = &s->model->config;
    const ladd_head_sizes *z = &s->sizes;
    ladd_arena *arena = &s->arena;
    int64_t rows = (int64_t)z->B * z->h * z->w, condition = (int64_t)z->B * z->K, image = rows * z->C;
    if (c->condition_sigma) {
        s->time = ladd_take_act(ctx, arena, (int64_t)z->B * DISC_TIME_FEATURES);
        s->time_h = ladd_take_act(ctx, arena, condition);
        s->time_a = ladd_take_act(ctx, arena, condition);
        s->embedded = ladd_take_act(ctx, arena, condition);
    }
    s->scratch.tokens = ladd_take_act(ctx, arena, image);
    s->scratch.condition = ladd_take_act(ctx, arena, condition);
    if (keep) {
        if (c->condition_sigma) {
            s->dembedded = ladd_take_act(ctx, arena, condition);
            s->dtime = ladd_take_act(ctx, arena, condition);
        }
        if (c->condition_pooled) s->pooled = ladd_take_act(ctx, arena, (int64_t)z->B * z->P);
        s->scratch.d1 = ladd_take_act(ctx, arena, image > condition ? image : condition);
        s->scratch.d2 = ladd_take_act(ctx, arena, image);
        s->scratch.d_e = ladd_take_act(ctx, arena, (int64_t)z->B * z->C);
        s->scratch.dw_hat = ladd_take_f32(arena, s->model->largest);
    }
    size_t mark = arena->used, most = mark;
    for (int i = 0; i < c->n_taps; i++) {
        if (keep)
            s->features[i] = ladd_take_act(ctx, arena, rows * z->D);
        else
            arena->used = mark;
        ladd_head_take(ctx, &s->heads[i], arena, &s->model->heads[i], z);
        if (arena->used > most) most = arena->used;
    }
    arena->used = most;
}

static ladd_status check_call(const ladd_disc *model, const ladd_act *pooled, int B, int h, int w) {
    const ladd_disc_config *c = &model->config;
    int64_t most = INT_MAX / (c->kernel_size + 1); /* kernels count rows and padded columns in int */
    if (B < 1 || h < 1 || w < 1 || h > most || w > most || (int64_t)B * h > most / w)
        return ladd_fail(LADD_ERR_VALUE,
                         "discriminator: a batch and grid of at least 1, batch * tokens of at most %lld expected, got batch %d, grid %d x %d",
                         (long long)most, B, h, w);
    if (c->condition_pooled && !pooled)
        return ladd_fail(LADD_ERR_VALUE, "discriminator: pooled[%d,%d] expected (condition_pooled is on), got none", B, c->pooled_dim);
    return LADD_OK;
}

static ladd_status run_forward(const ladd_context *ctx, ladd_act *const *logits, ladd_disc_saved *s, const ladd_act *const *features,
                               const float *sigma, const ladd_act *pooled, int keep, int update_u) {
    ladd_disc *m = s->model;
    const ladd_head_sizes *z = &s->sizes;
    LADD_TRY(ladd_params_ready(ctx, &m->params));
    const ladd_weights w = {.data = m->params.compute};
    if (m->config.condition_sigma) {
        LADD_K(ctx, timestep_features, s->time, sigma, z->B, DISC_TIME_FEATURES);
        LADD_TRY(ladd_embedder_forward(ctx, s->embedded, s->time_h, s->time_a, s->time, &w, &m->embedder, z->B, DISC_TIME_FEATURES, z->K));
    }
    if (!m->config.condition_pooled) pooled = NULL;
    if (keep && pooled) LADD_K(ctx, copy, s->pooled, pooled, (int64_t)z->B * z->P);
    for (int i = 0; i < m->config.n_taps; i++) {
        LADD_TRY(ladd_check_interrupt(ctx));
        if (keep) LADD_K(ctx, copy, s->features[i], features[i], (int64_t)z->B * z->h * z->w * z->D);
        LADD_TRY(ladd_head_forward(ctx, logits[i], &s->heads[i], &s->scratch, features[i], s->embedded, pooled, &w, m->params.data, &m->heads[i], z,
                                   update_u));
    }
    return LADD_OK;
}

ladd_status ladd_disc_forward(const ladd_context *ctx, ladd_act *const *logits, ladd_disc_saved **saved, ladd_disc *model,
                              const ladd_act *const *features, const float *sigma, const ladd_act *pooled, int batch, int grid_h, int grid_w,
                              int update_u) {
    if (saved) *saved = NULL;
    LADD_TRY(check_call(model, pooled, batch, grid_h, grid_w));
    const ladd_disc_config *c = &model->config;
    ladd_disc_saved *s = calloc(1, sizeof *s);
    if (!s) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a discriminator's forward");
    s->model = model;
    s->sizes = (ladd_head_sizes){.B = batch,
                                 .h = grid_h,
                                 .w = grid_w,
                                 .D = c->feature_dim,
                                 .C = c->width,
                                 .kernel = c->kernel_size,
                                 .groups = c->norm ? c->num_groups : 0,
                                 .K = c->condition_sigma || c->condition_pooled ? c->condition_dim : 0,
                                 .P = c->pooled_dim};
    take(ctx, s, saved != NULL);
    ladd_status status = ladd_arena_reserve(ctx, &s->arena);
    if (status == LADD_OK) {
        take(ctx, s, saved != NULL);
        status = run_forward(ctx, logits, s, features, sigma, pooled, saved != NULL, update_u);
    } else {
        s->arena = (ladd_arena){0};
    }
    if (status == LADD_OK && saved)
        *saved = s;
    else
        ladd_disc_saved_free(ctx, s);
    return status;
}

ladd_status ladd_disc_backward(const ladd_context *ctx, ladd_act *const *dfeatures, ladd_disc_saved *saved, const ladd_act *const *dlogits,
                               int params) {
    ladd_disc *m = saved->model;
    const ladd_head_sizes *z = &saved->sizes;
    if (params) LADD_TRY(ladd_params_need_grad(&m->params));
    const ladd_weights w = {.data = m->params.compute, .grad = params ? m->params.grad : NULL};
    int embedded = params && m->config.condition_sigma;
    if (embedded) LADD_K(ctx, zero, saved->dembedded, (int64_t)z->B * z->K);
    for (int i = 0; i < m->config.n_taps; i++) {
        LADD_TRY(ladd_check_interrupt(ctx));
        LADD_TRY(ladd_head_backward(ctx, dfeatures ? dfeatures[i] : NULL, saved->dembedded, &saved->heads[i], &saved->scratch, dlogits[i],
                                    saved->features[i], saved->embedded, saved->pooled, &w, &m->heads[i], z));
    }
    if (embedded)
        LADD_TRY(ladd_embedder_backward(ctx, NULL, saved->dtime, saved->dembedded, saved->time_h, saved->time_a, saved->time, &w, &m->embedder, z->B,
                                        DISC_TIME_FEATURES, z->K));
    return LADD_OK;
}

ladd_status ladd_disc_r1(const ladd_context *ctx, double *penalty, ladd_disc_saved *saved, float weight, float epsilon) {
    ladd_disc *m = saved->model;
    const ladd_head_sizes *z = &saved->sizes;
    if (ctx->act != LADD_F32) return ladd_fail(LADD_ERR_VALUE, "discriminator: R1 needs float32, a narrower type hides its finite difference");
    if (!(epsilon > 0.0f)) return ladd_fail(LADD_ERR_VALUE, "discriminator: epsilon above 0 expected, got %g", (double)epsilon);
    LADD_TRY(ladd_params_need_grad(&m->params));
    const ladd_weights w = {.data = m->params.compute, .grad = m->params.grad};
    ladd_head_r1_room room;
    ladd_arena arena = {0};
    ladd_head_r1_take(ctx, &room, &arena, &m->heads[0], z);
    LADD_TRY(ladd_arena_reserve(ctx, &arena));
    ladd_head_r1_take(ctx, &room, &arena, &m->heads[0], z);

    int embedded = m->config.condition_sigma;
    ladd_status status = LADD_OK;
    if (embedded) status = ctx->backend->zero(ctx, saved->dembedded, (int64_t)z->B * z->K);
    for (int i = 0; i < m->config.n_taps && status == LADD_OK; i++) {
        status = ladd_check_interrupt(ctx);
        if (status == LADD_OK)
            status = ladd_head_r1(ctx, penalty, saved->dembedded, &saved->heads[i], &saved->scratch, &room, saved->features[i], saved->embedded,
                                  saved->pooled, &w, &m->heads[i], z, weight / (float)z->B, epsilon, 1.0f / (float)z->B);
    }
    ladd_arena_release(ctx, &arena);
    LADD_TRY(status);
    if (embedded)
        LADD_TRY(ladd_embedder_backward(ctx, NULL, saved->dtime, saved->dembedded, saved->time_h, saved->time_a, saved->time, &w, &m->embedder, z->B,
                                        DISC_TIME_FEATURES, z->K));
    return LADD_OK;
}

void ladd_disc_saved_free(const ladd_context *ctx, ladd_disc_saved *saved) {
    if (!saved) return;
    ladd_arena_release(ctx, &saved->arena);
    free(saved);
}
