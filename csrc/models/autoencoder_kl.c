/* AutoencoderKL, the image autoencoder of Stable Diffusion 3. Encoder and decoder are each a list of operations that follows from the configuration;
 * forward walks the list, backward walks it from the end. Tensor names are those of diffusers.
 *
 *   encoder: conv_in, levels x (layers_per_block residual blocks, downsampling by two but in the last), mid block, norm + SiLU, conv_out, quant_conv?
 *   decoder: post_quant_conv?, conv_in, mid block, levels x (layers_per_block + 1 residual blocks, upsampling by two but in the last), norm + SiLU,
 * conv_out mid block: residual block, attention over pixels?, residual block
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../layers/resnet_block.h"

enum { VAE_PURPOSE_INIT = 1, VAE_MAX_CHANNELS = 16384, VAE_MAX_LAYERS = 64, VAE_SCOPE = 64 };

typedef enum { VAE_CONV, VAE_DOWNSAMPLE, VAE_UPSAMPLE, VAE_RESNET, VAE_ATTENTION, VAE_NORM_SILU } vae_op_kind;
typedef struct vae_op {
    vae_op_kind kind;
    int in, out; /* channels */
    union {
        ladd_conv_params conv; /* VAE_CONV, VAE_DOWNSAMPLE, VAE_UPSAMPLE */
        ladd_resnet_params resnet;
        ladd_spatial_attention_params attention;
        ladd_norm_params norm;
    } p;
} vae_op;

typedef struct vae_part {
    vae_op *ops;
    int n, room;
} vae_part;

struct ladd_vae {
    ladd_vae_config config;
    ladd_params params;
    vae_part encoder, decoder;
};

/* What one operation keeps. */
typedef struct vae_op_saved {
    ladd_image_size size; /* of its input */
    ladd_act *y;          /* its output; NULL for the last, which writes to the caller's */
    float *mean, *rstd;   /* VAE_NORM_SILU */
    union {
        ladd_resnet_saved resnet;
        ladd_spatial_attention_saved attention;
    } inner;
} vae_op_saved;

struct ladd_vae_saved {
    ladd_vae *model;
    const vae_part *part;
    ladd_arena arena;
    ladd_act *input;    /* copy, for the first convolution's gradient: the caller's may change before backward */
    ladd_act *work;     /* of the operation that runs now */
    ladd_act *grads[2]; /* gradients between operations, used in turn */
    int spent;          /* backward was called */
    vae_op_saved ops[]; /* [part->n] */
};

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

typedef struct builder {
    ladd_params *params;
    const ladd_vae_config *config;
    ladd_status status;
} builder;

/* `scope` is empty or ends in a dot; kind is "weight" or "bias". */
static int64_t add_tensor(builder *b, const char *scope, const char *name, const char *kind, int ndim, const int64_t *shape) {
    char full[LADD_NAME_MAX];
    snprintf(full, sizeof full, "%s%s.%s", scope, name, kind);
    int64_t offset = b->status == LADD_OK ? ladd_params_add(b->params, 1, full, ndim, shape) : -1;
    if (offset < 0 && b->status == LADD_OK) b->status = LADD_ERR_MEMORY;
    return offset;
}

static ladd_conv_params add_conv(builder *b, const char *scope, const char *name, int in, int out, int k) {
    ladd_conv_params p = {.in = in, .out = out, .k = k};
    p.weight = add_tensor(b, scope, name, "weight", 4, (int64_t[]){out, in, k, k});
    p.bias = add_tensor(b, scope, name, "bias", 1, (int64_t[]){out});
    return p;
}

static ladd_norm_params add_norm(builder *b, const char *scope, const char *name, int C) {
    ladd_norm_params p;
    p.weight = add_tensor(b, scope, name, "weight", 1, (int64_t[]){C});
    p.bias = add_tensor(b, scope, name, "bias", 1, (int64_t[]){C});
    return p;
}

static vae_op *add_op(builder *b, vae_part *part, vae_op_kind kind, int in, int out) {
    if (part->n == part->room) {
        int room = part->room ? 2 * part->room : 32;
        vae_op *ops = realloc(part->ops, (size_t)room * sizeof *ops);
        if (!ops) {
            b->status = ladd_fail(LADD_ERR_MEMORY, "out of memory for a list of %d operations", room);
            return NULL;
        }
        part->ops = ops;
        part->room = room;
    }
    vae_op *op = &part->ops[part->n++];
    *op = (vae_op){.kind = kind, .in = in, .out = out};
    return op;
}

static void add_conv_op(builder *b, vae_part *part, vae_op_kind kind, const char *scope, const char *name, int in, int out, int k) {
    vae_op *op = add_op(b, part, kind, in, out);
    if (op) op->p.conv = add_conv(b, scope, name, in, out, k);
}

static void add_norm_op(builder *b, vae_part *part, const char *scope, const char *name, int C) {
    vae_op *op = add_op(b, part, VAE_NORM_SILU, C, C);
    if (op) op->p.norm = add_norm(b, scope, name, C);
}

static void add_resnet_op(builder *b, vae_part *part, const char *scope, int in, int out) {
    vae_op *op = add_op(b, part, VAE_RESNET, in, out);
    if (!op) return;
    ladd_resnet_params *p = &op->p.resnet;
    p->norm1 = add_norm(b, scope, "norm1", in);
    p->conv1 = add_conv(b, scope, "conv1", in, out, 3);
    p->norm2 = add_norm(b, scope, "norm2", out);
    p->conv2 = add_conv(b, scope, "conv2", out, out, 3);
    p->shortcut = in != out ? add_conv(b, scope, "conv_shortcut", in, out, 1) : (ladd_conv_params){.weight = -1, .bias = -1};
}

/* Weights of q, k, v lie next to each other, then their biases, so that one product serves the three. */
static void add_attention_op(builder *b, vae_part *part, const char *scope, int C) {
    static const char *const names[] = {"to_q", "to_k", "to_v"};
    vae_op *op = add_op(b, part, VAE_ATTENTION, C, C);
    if (!op) return;
    ladd_spatial_attention_params *p = &op->p.attention;
    p->C = C;
    p->norm = add_norm(b, scope, "group_norm", C);
    for (int i = 0; i < 3; i++) {
        int64_t at = add_tensor(b, scope, names[i], "weight", 2, (int64_t[]){C, C});
        if (i == 0) p->qkv.weight = at;
    }
    for (int i = 0; i < 3; i++) {
        int64_t at = add_tensor(b, scope, names[i], "bias", 1, (int64_t[]){C});
        if (i == 0) p->qkv.bias = at;
    }
    p->out.weight = add_tensor(b, scope, "to_out.0", "weight", 2, (int64_t[]){C, C});
    p->out.bias = add_tensor(b, scope, "to_out.0", "bias", 1, (int64_t[]){C});
}

static void add_mid_block(builder *b, vae_part *part, const char *side, int C) {
    char scope[VAE_SCOPE];
    for (int i = 0; i < 2; i++) {
        snprintf(scope, sizeof scope, "%s.mid_block.resnets.%d.", side, i);
        add_resnet_op(b, part, scope, C, C);
        snprintf(scope, sizeof scope, "%s.mid_block.attentions.0.", side);
        if (i == 0 && b->config->mid_block_add_attention) add_attention_op(b, part, scope, C);
    }
}

static void add_encoder(builder *b, vae_part *part) {
    const ladd_vae_config *c = b->config;
    int last = c->levels - 1, C = c->block_out_channels[0], moments = 2 * c->latent_channels;
    char scope[VAE_SCOPE];
    add_conv_op(b, part, VAE_CONV, "encoder.", "conv_in", c->in_channels, C, 3);
    for (int i = 0; i <= last; i++) {
        int width = c->block_out_channels[i];
        for (int j = 0; j < c->layers_per_block; j++, C = width) {
            snprintf(scope, sizeof scope, "encoder.down_blocks.%d.resnets.%d.", i, j);
            add_resnet_op(b, part, scope, C, width);
        }
        snprintf(scope, sizeof scope, "encoder.down_blocks.%d.downsamplers.0.", i);
        if (i < last) add_conv_op(b, part, VAE_DOWNSAMPLE, scope, "conv", C, C, 3);
    }
    add_mid_block(b, part, "encoder", C);
    add_norm_op(b, part, "encoder.", "conv_norm_out", C);
    add_conv_op(b, part, VAE_CONV, "encoder.", "conv_out", C, moments, 3);
    if (c->use_quant_conv) add_conv_op(b, part, VAE_CONV, "", "quant_conv", moments, moments, 1);
}

static void add_decoder(builder *b, vae_part *part) {
    const ladd_vae_config *c = b->config;
    int last = c->levels - 1, C = c->block_out_channels[last];
    char scope[VAE_SCOPE];
    if (c->use_post_quant_conv) add_conv_op(b, part, VAE_CONV, "", "post_quant_conv", c->latent_channels, c->latent_channels, 1);
    add_conv_op(b, part, VAE_CONV, "decoder.", "conv_in", c->latent_channels, C, 3);
    add_mid_block(b, part, "decoder", C);
    for (int i = 0; i <= last; i++) {
        int width = c->block_out_channels[last - i];
        for (int j = 0; j <= c->layers_per_block; j++, C = width) {
            snprintf(scope, sizeof scope, "decoder.up_blocks.%d.resnets.%d.", i, j);
            add_resnet_op(b, part, scope, C, width);
        }
        snprintf(scope, sizeof scope, "decoder.up_blocks.%d.upsamplers.0.", i);
        if (i < last) add_conv_op(b, part, VAE_UPSAMPLE, scope, "conv", C, C, 3);
    }
    add_norm_op(b, part, "decoder.", "conv_norm_out", C);
    add_conv_op(b, part, VAE_CONV, "decoder.", "conv_out", C, c->out_channels, 3);
}

static ladd_status check_config(const ladd_vae_config *c) {
    const struct {
        const char *name;
        int value, least, most;
    } sizes[] = {{"in_channels", c->in_channels, 1, VAE_MAX_CHANNELS},         {"out_channels", c->out_channels, 1, VAE_MAX_CHANNELS},
                 {"latent_channels", c->latent_channels, 1, VAE_MAX_CHANNELS}, {"number of block_out_channels", c->levels, 1, LADD_VAE_MAX_LEVELS},
                 {"layers_per_block", c->layers_per_block, 1, VAE_MAX_LAYERS}, {"norm_num_groups", c->norm_num_groups, 1, VAE_MAX_CHANNELS}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].least || sizes[i].value > sizes[i].most)
            return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL config: %s in [%d, %d] expected, got %d", sizes[i].name, sizes[i].least, sizes[i].most,
                             sizes[i].value);
    for (int i = 0; i < c->levels; i++) {
        int width = c->block_out_channels[i];
        if (width < 1 || width > VAE_MAX_CHANNELS || width % c->norm_num_groups)
            return ladd_fail(LADD_ERR_VALUE,
                             "AutoencoderKL config: block_out_channels in [1, %d] and divisible by norm_num_groups (%d) expected, got %d",
                             VAE_MAX_CHANNELS, c->norm_num_groups, width);
    }
    return LADD_OK;
}

ladd_status ladd_vae_create(ladd_vae **model, const ladd_vae_config *config) {
    *model = NULL;
    LADD_TRY(check_config(config));
    ladd_vae *m = calloc(1, sizeof *m);
    if (!m) return ladd_fail(LADD_ERR_MEMORY, "out of memory for an AutoencoderKL");
    m->config = *config;
    builder b = {.params = &m->params, .config = &m->config};
    add_encoder(&b, &m->encoder);
    add_decoder(&b, &m->decoder);
    if (b.status == LADD_OK) b.status = ladd_params_allocate(&m->params);
    if (b.status != LADD_OK) {
        ladd_vae_free(m);
        return b.status;
    }
    *model = m;
    return LADD_OK;
}

void ladd_vae_free(ladd_vae *model) {
    if (!model) return;
    ladd_params_free(&model->params);
    free(model->encoder.ops);
    free(model->decoder.ops);
    free(model);
}

ladd_params *ladd_vae_params(ladd_vae *model) { return &model->params; }
const ladd_vae_config *ladd_vae_get_config(const ladd_vae *model) { return &model->config; }

/* Weights and biases of convolutions and linears: uniform within 1/sqrt(fan_in). erf(z/sqrt 2) of a standard normal z is uniform in (-1, 1). */
ladd_status ladd_vae_init(ladd_vae *model, uint64_t seed) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    if (!ctx.backend) return LADD_ERR_VALUE;
    const int64_t sample = 0;
    double bound = 0.0;
    for (int i = 0; i < model->params.n; i++) {
        const ladd_param *e = &model->params.table[i];
        float *data = model->params.data + e->offset;
        if (strstr(e->name, "norm")) {
            float value = strstr(e->name, ".weight") ? 1.0f : 0.0f;
            for (int64_t j = 0; j < e->count; j++) data[j] = value;
            continue;
        }
        if (e->ndim > 1) bound = 1.0 / sqrt((double)(e->count / e->shape[0])); /* a bias follows its weight and shares the bound */
        LADD_K(&ctx, normal, data, ((ladd_rng_key){.seed = seed, .purpose = VAE_PURPOSE_INIT, .step = (uint64_t)i}), &sample, 1, e->count);
        for (int64_t j = 0; j < e->count; j++) data[j] = (float)(bound * erf((double)data[j] * 0.70710678118654752));
    }
    return LADD_OK;
}

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

static ladd_image_size output_size(const vae_op *op, ladd_image_size s) {
    if (op->kind == VAE_DOWNSAMPLE) return (ladd_image_size){s.B, s.H / 2, s.W / 2, s.G};
    if (op->kind == VAE_UPSAMPLE) return (ladd_image_size){s.B, 2 * s.H, 2 * s.W, s.G};
    return s;
}

static int64_t elements(ladd_image_size s, int C) { return (int64_t)s.B * C * s.H * s.W; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t work_elements(const vae_op *op, ladd_image_size s, int keep) {
    if (op->kind == VAE_RESNET) return ladd_resnet_work(&op->p.resnet, s, keep);
    if (op->kind == VAE_ATTENTION) return ladd_spatial_attention_work(&op->p.attention, s, keep);
    return 0;
}

/* Called twice: with a counting arena, then with memory. Without keep, operations share their memory and outputs alternate between two buffers. */
static void take(const ladd_context *ctx, ladd_vae_saved *s, ladd_image_size size, int keep) {
    const vae_part *part = s->part;
    ladd_arena *arena = &s->arena;
    int64_t work = 0, between = 0; /* the largest work space, the largest tensor between two operations */
    for (int i = 0; i < part->n; i++) {
        s->ops[i].size = i ? output_size(&part->ops[i - 1], s->ops[i - 1].size) : size;
        work = larger(work, work_elements(&part->ops[i], s->ops[i].size, keep));
        if (i) between = larger(between, elements(s->ops[i].size, part->ops[i].in));
    }
    s->work = ladd_take_act(ctx, arena, work);
    ladd_act *pair[2]; /* gradients when kept, else outputs */
    for (int i = 0; i < 2; i++) pair[i] = ladd_take_act(ctx, arena, between);
    if (keep) {
        s->input = ladd_take_act(ctx, arena, elements(size, part->ops[0].in));
        memcpy(s->grads, pair, sizeof pair);
    }
    size_t mark = arena->used, most = mark;
    for (int i = 0; i < part->n; i++) {
        const vae_op *op = &part->ops[i];
        vae_op_saved *o = &s->ops[i];
        if (!keep) arena->used = mark;
        o->y = keep && i < part->n - 1 ? ladd_take_act(ctx, arena, elements(output_size(op, o->size), op->out)) : pair[i % 2];
        if (op->kind == VAE_RESNET)
            ladd_resnet_take(ctx, &o->inner.resnet, arena, &op->p.resnet, o->size);
        else if (op->kind == VAE_ATTENTION)
            ladd_spatial_attention_take(ctx, &o->inner.attention, arena, &op->p.attention, o->size);
        else if (op->kind == VAE_NORM_SILU) {
            o->mean = ladd_take_f32(arena, (int64_t)size.B * size.G);
            o->rstd = ladd_take_f32(arena, (int64_t)size.B * size.G);
        }
        if (arena->used > most) most = arena->used;
    }
    arena->used = most;
}

/* ---- forward and backward -------------------------------------------------------------------------------------------- */

/* The convolution of a VAE_CONV, VAE_DOWNSAMPLE or VAE_UPSAMPLE. Downsampling pads on the right and at the bottom only. */
static ladd_conv op_conv(const vae_op *op, ladd_image_size s) {
    ladd_conv conv = ladd_conv_same(&op->p.conv, s);
    ladd_image_size out = output_size(op, s);
    if (op->kind == VAE_DOWNSAMPLE) {
        conv.stride = 2;
        conv.pad_top = conv.pad_left = 0;
    }
    conv.upsample = op->kind == VAE_UPSAMPLE;
    conv.Ho = out.H;
    conv.Wo = out.W;
    return conv;
}

static ladd_status op_forward(const ladd_context *ctx, ladd_act *y, vae_op_saved *o, ladd_act *work, const ladd_act *x, const ladd_weights *w,
                              const vae_op *op) {
    ladd_image_size s = o->size;
    if (op->kind == VAE_RESNET) return ladd_resnet_forward(ctx, y, &o->inner.resnet, work, x, w, &op->p.resnet, s);
    if (op->kind == VAE_ATTENTION) return ladd_spatial_attention_forward(ctx, y, &o->inner.attention, work, x, w, &op->p.attention, s);
    if (op->kind == VAE_NORM_SILU) {
        const ladd_act *gamma = ladd_weight(ctx, w, op->p.norm.weight), *beta = ladd_weight(ctx, w, op->p.norm.bias);
        return ctx->backend->group_norm_forward(ctx, y, o->mean, o->rstd, x, gamma, beta, s.B, op->in, s.H * s.W, s.G, LADD_GROUP_NORM_EPS, 1);
    }
    ladd_conv conv = op_conv(op, s);
    return ctx->backend->conv2d_forward(ctx, y, x, ladd_weight(ctx, w, op->p.conv.weight), ladd_weight(ctx, w, op->p.conv.bias), &conv);
}

/* dx may be NULL for a VAE_CONV, with which both lists begin. */
static ladd_status op_backward(const ladd_context *ctx, ladd_act *dx, ladd_act *work, const ladd_act *dy, const vae_op_saved *o, const ladd_act *x,
                               const ladd_weights *w, const vae_op *op) {
    ladd_image_size s = o->size;
    if (op->kind == VAE_RESNET) return ladd_resnet_backward(ctx, dx, work, dy, &o->inner.resnet, x, w, &op->p.resnet, s);
    if (op->kind == VAE_ATTENTION) return ladd_spatial_attention_backward(ctx, dx, work, dy, &o->inner.attention, x, w, &op->p.attention, s);
    if (op->kind == VAE_NORM_SILU) {
        const ladd_act *gamma = ladd_weight(ctx, w, op->p.norm.weight), *beta = ladd_weight(ctx, w, op->p.norm.bias);
        float *dgamma = ladd_weight_grad(w, op->p.norm.weight), *dbeta = ladd_weight_grad(w, op->p.norm.bias);
        return ctx->backend->group_norm_backward(ctx, dx, dgamma, dbeta, dy, x, o->mean, o->rstd, gamma, beta, s.B, op->in, s.H * s.W, s.G, 1);
    }
    ladd_conv conv = op_conv(op, s);
    float *dw = ladd_weight_grad(w, op->p.conv.weight), *dbias = ladd_weight_grad(w, op->p.conv.bias);
    return ctx->backend->conv2d_backward(ctx, dx, dw, dbias, dy, x, ladd_weight(ctx, w, op->p.conv.weight), &conv);
}

static ladd_status run(const ladd_context *ctx, ladd_act *output, ladd_vae_saved *s, const ladd_act *input, ladd_image_size size, int keep) {
    const vae_part *part = s->part;
    ladd_weights w = {.data = s->model->params.compute};
    LADD_TRY(ladd_params_ready(ctx, &s->model->params));
    take(ctx, s, size, keep);
    LADD_TRY(ladd_arena_reserve(ctx, &s->arena));
    take(ctx, s, size, keep);
    if (keep) LADD_K(ctx, copy, s->input, input, elements(size, part->ops[0].in));
    const ladd_act *x = input;
    for (int i = 0; i < part->n; i++) {
        LADD_TRY(ladd_check_interrupt(ctx));
        ladd_act *y = i < part->n - 1 ? s->ops[i].y : output;
        LADD_TRY(op_forward(ctx, y, &s->ops[i], s->work, x, &w, &part->ops[i]));
        x = y;
    }
    return LADD_OK;
}

static ladd_status forward(const ladd_context *ctx, ladd_act *output, ladd_vae_saved **saved, ladd_vae *model, const vae_part *part,
                           const ladd_act *input, ladd_image_size size) {
    ladd_vae_saved *s = calloc(1, sizeof *s + (size_t)part->n * sizeof *s->ops);
    if (!s) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the list of saved activations");
    s->model = model;
    s->part = part;
    ladd_status status = run(ctx, output, s, input, size, saved != NULL);
    if (status == LADD_OK && saved)
        *saved = s;
    else
        ladd_vae_saved_free(ctx, s);
    return status;
}

/* Kernels count the pixels of a tensor, and its rows over batch and channels, in int. */
static ladd_status check_size(const ladd_vae *model, int batch, int height, int width) {
    const ladd_vae_config *c = &model->config;
    int widest = c->in_channels > c->out_channels ? c->in_channels : c->out_channels;
    for (int i = 0; i < c->levels; i++)
        if (c->block_out_channels[i] > widest) widest = c->block_out_channels[i];
    if (2 * c->latent_channels > widest) widest = 2 * c->latent_channels;
    if (batch < 1 || height < 1 || width < 1)
        return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL: batch, height and width of at least 1 expected, got %d, %d, %d", batch, height, width);
    if ((int64_t)batch * height > INT_MAX / width || batch > INT_MAX / widest)
        return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL: at most %d pixels in a batch expected, got %d images of %d by %d", INT_MAX, batch, height,
                         width);
    return LADD_OK;
}

ladd_status ladd_vae_encode(const ladd_context *ctx, ladd_act *moments, ladd_vae_saved **saved, ladd_vae *model, const ladd_act *images, int batch,
                            int height, int width) {
    if (saved) *saved = NULL;
    int factor = 1 << (model->config.levels - 1);
    LADD_TRY(check_size(model, batch, height, width));
    if (height % factor || width % factor)
        return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL: images whose height and width are multiples of %d expected, got %d by %d", factor, height,
                         width);
    return forward(ctx, moments, saved, model, &model->encoder, images, (ladd_image_size){batch, height, width, model->config.norm_num_groups});
}

ladd_status ladd_vae_decode(const ladd_context *ctx, ladd_act *images, ladd_vae_saved **saved, ladd_vae *model, const ladd_act *z, int batch,
                            int height, int width) {
    if (saved) *saved = NULL;
    int factor = 1 << (model->config.levels - 1);
    if (height > INT_MAX / factor || width > INT_MAX / factor)
        return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL: latents of at most %d by %d expected, got %d by %d", INT_MAX / factor, INT_MAX / factor,
                         height, width);
    LADD_TRY(check_size(model, batch, height * factor, width * factor));
    return forward(ctx, images, saved, model, &model->decoder, z, (ladd_image_size){batch, height, width, model->config.norm_num_groups});
}

ladd_status ladd_vae_backward(const ladd_context *ctx, ladd_act *dinput, ladd_vae_saved *saved, const ladd_act *doutput, int params) {
    if (saved->spent) return ladd_fail(LADD_ERR_RUNTIME, "AutoencoderKL: one backward a forward expected, this is the second");
    ladd_params *p = &saved->model->params;
    if (params) LADD_TRY(ladd_params_need_grad(p));
    saved->spent = 1;
    ladd_weights w = {.data = p->compute, .grad = params ? p->grad : NULL};
    const ladd_act *dy = doutput;
    for (int i = saved->part->n - 1; i >= 0; i--) {
        LADD_TRY(ladd_check_interrupt(ctx));
        ladd_act *dx = i ? saved->grads[i % 2] : dinput;
        LADD_TRY(op_backward(ctx, dx, saved->work, dy, &saved->ops[i], i ? saved->ops[i - 1].y : saved->input, &w, &saved->part->ops[i]));
        dy = dx;
    }
    return LADD_OK;
}

ladd_status ladd_vae_plan(const ladd_context *ctx, size_t *bytes, ladd_vae *model, int decode, int batch, int height, int width, int keep) {
    const vae_part *part = decode ? &model->decoder : &model->encoder;
    int factor = 1 << (model->config.levels - 1);
    LADD_TRY(check_size(model, batch, height, width));
    if (height % factor || width % factor)
        return ladd_fail(LADD_ERR_VALUE, "AutoencoderKL: images whose height and width are multiples of %d expected, got %d by %d", factor, height,
                         width);
    ladd_vae_saved *s = calloc(1, sizeof *s + (size_t)part->n * sizeof *s->ops);
    if (!s) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the list of saved activations");
    s->model = model;
    s->part = part;
    int down = decode ? factor : 1;
    take(ctx, s, (ladd_image_size){batch, height / down, width / down, model->config.norm_num_groups}, keep);
    *bytes = s->arena.used;
    free(s);
    return LADD_OK;
}

void ladd_vae_saved_free(const ladd_context *ctx, ladd_vae_saved *saved) {
    if (!saved) return;
    ladd_arena_release(ctx, &saved->arena);
    free(saved);
}
