/* MMDiT: the table of tensors under diffusers' names, initial values, the position table (facts: SD3 paper section 4 and diffusers'
 * SD3Transformer2DModel configuration). The order in the flat buffer is ours: what one product reads lies together (q, k, v; the modulations of all
 * blocks). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mmdit_internal.h"

typedef struct builder {
    ladd_params *params;
    int failed;
} builder;

static int64_t add_shaped(builder *b, int trainable, const char *name, int ndim, const int64_t *shape) {
    int64_t offset = b->failed ? -1 : ladd_params_add(b->params, trainable, name, ndim, shape);
    if (offset < 0) b->failed = 1;
    return offset;
}
static int64_t add_matrix(builder *b, const char *prefix, const char *name, int rows, int columns) {
    char full[LADD_NAME_MAX + 32];
    snprintf(full, sizeof full, "%s%s.weight", prefix, name);
    return add_shaped(b, 1, full, 2, (int64_t[]){rows, columns});
}
static int64_t add_vector(builder *b, const char *prefix, const char *name, const char *kind, int count) {
    char full[LADD_NAME_MAX + 32];
    snprintf(full, sizeof full, "%s%s.%s", prefix, name, kind);
    return add_shaped(b, 1, full, 1, (int64_t[]){count});
}
static ladd_linear_params add_linear(builder *b, const char *prefix, const char *name, int rows, int columns) {
    ladd_linear_params p;
    p.weight = add_matrix(b, prefix, name, rows, columns);
    p.bias = add_vector(b, prefix, name, "bias", rows);
    return p;
}
static ladd_qkv_params add_qkv(builder *b, const char *prefix, const char *const names[3], const char *norm_q, const char *norm_k, int D, int dh,
                               int norm) {
    ladd_qkv_params p = {.norm_q = -1, .norm_k = -1};
    for (int i = 0; i < 3; i++) {
        int64_t at = add_matrix(b, prefix, names[i], D, D);
        if (i == 0) p.weight = at;
    }
    for (int i = 0; i < 3; i++) {
        int64_t at = add_vector(b, prefix, names[i], "bias", D);
        if (i == 0) p.bias = at;
    }
    if (norm) {
        p.norm_q = add_vector(b, prefix, norm_q, "weight", dh);
        p.norm_k = add_vector(b, prefix, norm_k, "weight", dh);
    }
    return p;
}

static ladd_mod_rows modulation_chunks(int first_row, int D, int pre_only, int dual) {
    if (pre_only) return (ladd_mod_rows){.scale1 = first_row, .shift1 = first_row + D}; /* diffusers' order: scale, then shift */
    ladd_mod_rows rows = {first_row, first_row + D, first_row + 2 * D, first_row + 3 * D, first_row + 4 * D, first_row + 5 * D, 0, 0, 0};
    if (dual) {
        rows.dual_shift = first_row + 6 * D;
        rows.dual_scale = first_row + 7 * D;
        rows.dual_gate = first_row + 8 * D;
    }
    return rows;
}

/* Modulation linears of all blocks: all weights, then all biases. Fills the row numbers on the way. */
static void add_modulations(builder *b, ladd_mmdit *m) {
    const ladd_mmdit_config *c = &m->config;
    int D = m->D;
    char name[64];
    for (int pass = 0; pass < 2; pass++) {
        int row = 0;
        for (int i = 0; i < c->num_layers; i++) {
            int last = i == c->num_layers - 1, dual = c->dual[i];
            int x_rows = (dual ? 9 : 6) * D, y_rows = (last ? 2 : 6) * D;
            ladd_mmdit_block_params *block = &m->blocks[i];
            for (int stream = 0; stream < 2; stream++) {
                int rows = stream ? y_rows : x_rows;
                snprintf(name, sizeof name, "transformer_blocks.%d.%s.linear", i, stream ? "norm1_context" : "norm1");
                int64_t at = pass ? add_vector(b, "", name, "bias", rows) : add_matrix(b, "", name, rows, D);
                if (row == 0) *(pass ? &m->modulation_bias : &m->modulation_weight) = at;
                if (stream)
                    block->y.mod = modulation_chunks(row, D, last, 0);
                else
                    block->x.mod = modulation_chunks(row, D, 0, dual);
                row += rows;
            }
            block->modulation_end = row;
        }
        if (pass)
            add_vector(b, "", "norm_out.linear", "bias", 2 * D);
        else
            add_matrix(b, "", "norm_out.linear", 2 * D, D);
        m->final_scale = row;
        m->final_shift = row + D;
        m->modulation_rows = row + 2 * D;
    }
}

static void add_block(builder *b, ladd_mmdit *m, int i) {
    const ladd_mmdit_config *c = &m->config;
    int D = m->D, dh = c->attention_head_dim, norm = c->qk_rms_norm, last = i == c->num_layers - 1;
    const ladd_linear_params none = {-1, -1};
    ladd_mmdit_block_params *block = &m->blocks[i];
    char prefix[48];
    snprintf(prefix, sizeof prefix, "transformer_blocks.%d.", i);
    block->x.qkv = add_qkv(b, prefix, (const char *[]){"attn.to_q", "attn.to_k", "attn.to_v"}, "attn.norm_q", "attn.norm_k", D, dh, norm);
    block->x.out = add_linear(b, prefix, "attn.to_out.0", D, D);
    block->y.qkv = add_qkv(b, prefix, (const char *[]){"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}, "attn.norm_added_q",
                           "attn.norm_added_k", D, dh, norm);
    block->y.out = last ? none : add_linear(b, prefix, "attn.to_add_out", D, D);
    if (c->dual[i]) {
        block->dual_qkv = add_qkv(b, prefix, (const char *[]){"attn2.to_q", "attn2.to_k", "attn2.to_v"}, "attn2.norm_q", "attn2.norm_k", D, dh, norm);
        block->dual_out = add_linear(b, prefix, "attn2.to_out.0", D, D);
    }
    block->x.ff.up = add_linear(b, prefix, "ff.net.0.proj", 4 * D, D);
    block->x.ff.down = add_linear(b, prefix, "ff.net.2", D, 4 * D);
    block->y.ff.up = last ? none : add_linear(b, prefix, "ff_context.net.0.proj", 4 * D, D);
    block->y.ff.down = last ? none : add_linear(b, prefix, "ff_context.net.2", D, 4 * D);
}

/* Fixed 2-D sine-cosine table. The column coordinate fills the first half of the channels, the row coordinate the second; each half is [sin, cos]. */
static void fill_position_table(ladd_mmdit *m) {
    const ladd_mmdit_config *c = &m->config;
    int max = c->pos_embed_max_size, D = m->D, quarter = D / 4;
    float *table = m->params.data + m->position;
    float step = (float)((double)max / (double)(c->sample_size / c->patch_size));
    for (int coordinate = 0; coordinate < max; coordinate++) {
        float g = (float)coordinate / step;
        for (int k = 0; k < quarter; k++) {
            double angle = (double)g * (1.0 / pow(10000.0, (double)k / (double)quarter));
            float s = (float)sin(angle), co = (float)cos(angle);
            for (int other = 0; other < max; other++) {
                float *as_column = table + ((size_t)other * max + coordinate) * D, *as_row = table + ((size_t)coordinate * max + other) * D;
                as_column[k] = s;
                as_column[quarter + k] = co;
                as_row[2 * quarter + k] = s;
                as_row[3 * quarter + k] = co;
            }
        }
    }
}

static ladd_status check_config(const ladd_mmdit_config *c) {
    const struct {
        const char *name;
        int value, most;
    } sizes[] = {{"sample_size", c->sample_size, 65536},
                 {"patch_size", c->patch_size, 64},
                 {"in_channels", c->in_channels, 65536},
                 {"out_channels", c->out_channels, 65536},
                 {"num_layers", c->num_layers, LADD_MAX_LAYERS},
                 {"num_attention_heads", c->num_attention_heads, 1024},
                 {"attention_head_dim", c->attention_head_dim, 512},
                 {"joint_attention_dim", c->joint_attention_dim, 1 << 20},
                 {"caption_projection_dim", c->caption_projection_dim, 1 << 20},
                 {"pooled_projection_dim", c->pooled_projection_dim, 1 << 20},
                 {"pos_embed_max_size", c->pos_embed_max_size, 4096}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return ladd_fail(LADD_ERR_VALUE, "MMDiT config: %s in [1, %d] expected, got %d", sizes[i].name, sizes[i].most, sizes[i].value);
    int64_t D = (int64_t)c->num_attention_heads * c->attention_head_dim;
    if (D > 16384) return ladd_fail(LADD_ERR_VALUE, "MMDiT config: inner width of at most 16384 expected, got %lld", (long long)D);
    if (c->caption_projection_dim != D)
        return ladd_fail(LADD_ERR_VALUE, "MMDiT config: caption_projection_dim must equal num_attention_heads * attention_head_dim = %lld, got %d",
                         (long long)D, c->caption_projection_dim);
    if (D % 4) return ladd_fail(LADD_ERR_VALUE, "MMDiT config: an inner width divisible by 4 expected (position table), got %lld", (long long)D);
    if (c->sample_size < c->patch_size)
        return ladd_fail(LADD_ERR_VALUE, "MMDiT config: sample_size of at least patch_size (%d) expected, got %d", c->patch_size, c->sample_size);
    return LADD_OK;
}

ladd_status ladd_mmdit_create(ladd_mmdit **model, const ladd_mmdit_config *config) {
    *model = NULL;
    LADD_TRY(check_config(config));
    ladd_mmdit *m = calloc(1, sizeof *m);
    if (m) m->blocks = calloc((size_t)config->num_layers, sizeof *m->blocks);
    if (!m || !m->blocks) {
        free(m);
        return ladd_fail(LADD_ERR_MEMORY, "out of memory for an MMDiT");
    }
    m->config = *config;
    m->D = config->num_attention_heads * config->attention_head_dim;
    int D = m->D, patch = config->patch_size * config->patch_size;
    builder b = {.params = &m->params};
    add_modulations(&b, m);
    m->patch.weight = add_shaped(&b, 1, "pos_embed.proj.weight", 4, (int64_t[]){D, config->in_channels, config->patch_size, config->patch_size});
    m->patch.bias = add_vector(&b, "", "pos_embed.proj", "bias", D);
    m->time.first = add_linear(&b, "time_text_embed.timestep_embedder.", "linear_1", D, LADD_TIME_FEATURES);
    m->time.second = add_linear(&b, "time_text_embed.timestep_embedder.", "linear_2", D, D);
    m->pooled.first = add_linear(&b, "time_text_embed.text_embedder.", "linear_1", D, config->pooled_projection_dim);
    m->pooled.second = add_linear(&b, "time_text_embed.text_embedder.", "linear_2", D, D);
    m->context = add_linear(&b, "", "context_embedder", D, config->joint_attention_dim);
    for (int i = 0; i < config->num_layers; i++) add_block(&b, m, i);
    m->proj_out = add_linear(&b, "", "proj_out", patch * config->out_channels, D);
    m->position = add_shaped(&b, 0, "pos_embed.pos_embed", 3, (int64_t[]){1, (int64_t)config->pos_embed_max_size * config->pos_embed_max_size, D});
    ladd_status status = b.failed ? LADD_ERR_MEMORY : ladd_params_allocate(&m->params);
    if (status != LADD_OK) {
        ladd_mmdit_free(m);
        return status;
    }
    fill_position_table(m);
    *model = m;
    return LADD_OK;
}

void ladd_mmdit_free(ladd_mmdit *model) {
    if (!model) return;
    ladd_params_free(&model->params);
    free(model->blocks);
    free(model);
}

ladd_params *ladd_mmdit_params(ladd_mmdit *model) { return &model->params; }
const ladd_mmdit_config *ladd_mmdit_get_config(const ladd_mmdit *model) { return &model->config; }

static int contains(const char *name, const char *part) { return strstr(name, part) != NULL; }

ladd_status ladd_mmdit_init(ladd_mmdit *model, uint64_t seed) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    if (!ctx.backend) return LADD_ERR_VALUE;
    const int64_t sample = 0;
    for (int i = 0; i < model->params.n; i++) {
        const ladd_param *e = &model->params.table[i];
        float *data = model->params.data + e->offset;
        if (!e->trainable) continue;
        if (e->ndim == 1) { /* biases 0, RMS norm weights 1 */
            float value = contains(e->name, ".norm_") && contains(e->name, ".weight") ? 1.0f : 0.0f;
            for (int64_t j = 0; j < e->count; j++) data[j] = value;
            continue;
        }
        double fan_out = (double)e->shape[0], fan_in = (double)(e->count / e->shape[0]), std = sqrt(2.0 / (fan_in + fan_out));
        if (contains(e->name, "time_text_embed.")) std = 0.02;
        if (contains(e->name, "norm1.linear") || contains(e->name, "norm1_context.linear") || contains(e->name, "norm_out.linear") ||
            contains(e->name, "proj_out.weight"))
            std = 0.0; /* every block starts as the identity, the velocity as 0 */
        LADD_K(&ctx, normal, data, ((ladd_rng_key){.seed = seed, .purpose = 1, .step = (uint64_t)i}), &sample, 1, e->count);
        LADD_K(&ctx, scale, data, data, (float)std, e->count);
    }
    return LADD_OK;
}
