/* Every model forward and backward at tiny sizes on arrays of exactly their size; bad configurations and calls; interruption; fork. */
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static int stop_now(void *argument) {
    int *left = argument;
    return (*left)-- <= 0;
}

/* ---- MMDiT ---- */

static ladd_mmdit_config mmdit_config(int patch, int in, int out, int norm, int dual) {
    ladd_mmdit_config c = {.sample_size = 8,
                           .patch_size = patch,
                           .in_channels = in,
                           .out_channels = out,
                           .num_layers = 3,
                           .num_attention_heads = 2,
                           .attention_head_dim = 8,
                           .joint_attention_dim = 5,
                           .caption_projection_dim = 16,
                           .pooled_projection_dim = 3,
                           .pos_embed_max_size = 9,
                           .qk_rms_norm = norm};
    c.dual[0] = c.dual[2] = (unsigned char)dual;
    return c;
}

typedef struct mmdit_io {
    float *latents, *context, *pooled, *velocity, *features[2], *dlatents, *dcontext, *dpooled, *sigma;
    int64_t n_latents, n_context, n_pooled, n_velocity, n_features;
} mmdit_io;

static mmdit_io mmdit_arrays(const ladd_mmdit_config *c, const ladd_mmdit_call *call) {
    int h = call->height / c->patch_size, w = call->width / c->patch_size, B = call->batch;
    mmdit_io io = {.n_latents = (int64_t)B * c->in_channels * call->height * call->width,
                   .n_context = (int64_t)B * call->text_tokens * c->joint_attention_dim,
                   .n_pooled = (int64_t)B * c->pooled_projection_dim,
                   .n_velocity = (int64_t)B * c->out_channels * h * w * c->patch_size * c->patch_size,
                   .n_features = (int64_t)B * h * w * c->caption_projection_dim};
    io.latents = test_array(io.n_latents, 1);
    io.context = test_array(io.n_context, 2);
    io.pooled = test_array(io.n_pooled, 3);
    io.sigma = test_array(B, 4);
    for (int b = 0; b < B; b++) io.sigma[b] = 0.3f + 0.1f * (float)b;
    io.velocity = test_poison(io.n_velocity);
    io.features[0] = test_poison(io.n_features);
    io.features[1] = test_poison(io.n_features);
    io.dlatents = test_poison(io.n_latents);
    io.dcontext = test_poison(io.n_context);
    io.dpooled = test_poison(io.n_pooled);
    return io;
}

static void mmdit_free(mmdit_io *io) {
    float *all[] = {io->latents,     io->context,  io->pooled,   io->velocity, io->features[0],
                    io->features[1], io->dlatents, io->dcontext, io->dpooled,  io->sigma};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void fill(ladd_params *p) {
    for (int64_t i = 0; i < p->trainable; i++) p->data[i] = (float)((i * 7919) % 201 - 100) * 2e-3f;
}

static void run_mmdit(const ladd_mmdit_config *config, int B, int H, int W, int T) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    ladd_mmdit *m = NULL;
    CHECK_OK(ladd_mmdit_create(&m, config));
    CHECK_OK(ladd_mmdit_init(m, 1));
    ladd_params *p = ladd_mmdit_params(m);
    CHECK(test_finite(p->data, p->size));
    fill(p);
    const unsigned char skip[3] = {0, 1, 0};
    const int taps[2] = {0, 1};
    for (int variant = 0; variant < 4; variant++) {
        ladd_mmdit_call call = {B, H, W, T, variant == 1 ? skip : NULL, variant >= 2 ? variant - 1 : 0, taps, 1};
        mmdit_io io = mmdit_arrays(config, &call);
        ladd_mmdit_saved *saved = NULL;
        size_t bytes = 0;
        CHECK_OK(ladd_mmdit_plan(&ctx, &bytes, m, &call));
        CHECK(bytes > 0);
        CHECK_OK(ladd_mmdit_forward(&ctx, io.velocity, io.features, &saved, m, &call, io.latents, io.sigma, io.context, io.pooled));
        const float *dfeatures[2] = {io.features[0], io.features[1]};
        CHECK_OK(ladd_mmdit_backward(&ctx, io.dlatents, io.dcontext, io.dpooled, saved, call.n_taps ? NULL : io.velocity,
                                     call.n_taps ? dfeatures : NULL, variant != 3));
        CHECK(test_finite(io.dlatents, io.n_latents) && test_finite(io.dcontext, io.n_context) && test_finite(io.dpooled, io.n_pooled));
        if (!call.n_taps) CHECK(test_finite(io.velocity, io.n_velocity));
        for (int i = 0; i < call.n_taps; i++) CHECK(test_finite(io.features[i], io.n_features));
        ladd_mmdit_saved_free(&ctx, saved);
        CHECK(ladd_memory_in_use() == 0);

        float *again = test_poison(io.n_velocity); /* nothing kept, and interrupted at each layer in turn */
        call.keep = 0;
        saved = NULL;
        for (int layers = 0; layers < 9; layers++) {
            int left = layers;
            ctx.interrupted = stop_now;
            ctx.interrupt_argument = &left;
            ladd_status status = ladd_mmdit_forward(&ctx, again, io.features, NULL, m, &call, io.latents, io.sigma, io.context, io.pooled);
            CHECK(status == LADD_OK || status == LADD_ERR_INTERRUPTED);
            CHECK(layers > 0 || status == LADD_ERR_INTERRUPTED);
            CHECK(ladd_memory_in_use() == 0);
        }
        ctx.interrupted = NULL;
        CHECK_OK(ladd_mmdit_forward(&ctx, again, io.features, NULL, m, &call, io.latents, io.sigma, io.context, io.pooled));
        if (!call.n_taps) CHECK(memcmp(again, io.velocity, (size_t)io.n_velocity * sizeof *again) == 0);
        free(again);
        mmdit_free(&io);
    }
    CHECK(test_finite(p->grad, p->trainable));
    ladd_mmdit_free(m);
}

static void bad_mmdit(void) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    ladd_mmdit *m = NULL;
    ladd_mmdit_config good = mmdit_config(2, 4, 4, 1, 1), bad;
#define REFUSE(change)                                                                                \
    do {                                                                                              \
        bad = good;                                                                                   \
        bad.change;                                                                                   \
        m = NULL;                                                                                     \
        CHECK(ladd_mmdit_create(&m, &bad) != LADD_OK && m == NULL && strlen(ladd_last_error()) > 10); \
    } while (0)
    REFUSE(patch_size = 0);
    REFUSE(in_channels = -1);
    REFUSE(out_channels = 0);
    REFUSE(num_layers = 0);
    REFUSE(num_layers = LADD_MAX_LAYERS + 1);
    REFUSE(num_attention_heads = 1 << 30);
    REFUSE(attention_head_dim = 7);
    REFUSE(caption_projection_dim = 17);
    REFUSE(pos_embed_max_size = 0);
    REFUSE(pos_embed_max_size = 1 << 30);
    REFUSE(joint_attention_dim = 0);
    REFUSE(pooled_projection_dim = -5);
    REFUSE(sample_size = 0);
#undef REFUSE
    CHECK_OK(ladd_mmdit_create(&m, &good));
    const int taps[2] = {1, 1}, deep[1] = {3}, below[1] = {-1};
    const ladd_mmdit_call calls[] = {{0, 4, 4, 2, NULL, 0, NULL, 0},      {1, 1, 4, 2, NULL, 0, NULL, 0},  {1, 4, 20, 2, NULL, 0, NULL, 0},
                                     {1, 4, 4, 0, NULL, 0, NULL, 0},      {1, 4, 4, -2, NULL, 0, NULL, 0}, {1, 4, 4, 2, NULL, 2, taps, 0},
                                     {1, 4, 4, 2, NULL, 1, deep, 0},      {1, 4, 4, 2, NULL, 1, below, 0}, {1 << 30, 4, 4, 2, NULL, 0, NULL, 1},
                                     {1, 4, 4, 1 << 30, NULL, 0, NULL, 1}};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        size_t bytes = 0;
        CHECK(ladd_mmdit_plan(&ctx, &bytes, m, &calls[i]) != LADD_OK);
        CHECK(ladd_mmdit_forward(&ctx, NULL, NULL, NULL, m, &calls[i], NULL, NULL, NULL, NULL) != LADD_OK);
    }
    ladd_mmdit_free(m);
    ladd_mmdit_free(NULL);
    ladd_mmdit_saved_free(&ctx, NULL);
}

/* The same bits in a child, whose threads are its own. */
static void fork_mmdit(void) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    ladd_mmdit_config config = mmdit_config(2, 4, 4, 1, 1);
    ladd_mmdit_call call = {2, 8, 6, 3, NULL, 0, NULL, 0};
    ladd_mmdit *m = NULL;
    CHECK_OK(ladd_mmdit_create(&m, &config));
    fill(ladd_mmdit_params(m));
    mmdit_io io = mmdit_arrays(&config, &call);
    CHECK_OK(ladd_mmdit_forward(&ctx, io.velocity, NULL, NULL, m, &call, io.latents, io.sigma, io.context, io.pooled));
    pid_t child = fork();
    CHECK(child >= 0);
    float *again = test_poison(io.n_velocity);
    CHECK_OK(ladd_mmdit_forward(&ctx, again, NULL, NULL, m, &call, io.latents, io.sigma, io.context, io.pooled));
    int same = memcmp(again, io.velocity, (size_t)io.n_velocity * sizeof *again) == 0;
    if (child == 0) _exit(same ? 0 : 1);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0 && same);
    free(again);
    mmdit_free(&io);
    ladd_mmdit_free(m);
}

void test_mmdit(void) {
    CHECK_OK(ladd_set_num_threads(2));
    ladd_mmdit_config configs[] = {mmdit_config(2, 4, 4, 0, 0), mmdit_config(2, 16, 16, 1, 1), mmdit_config(2, 33, 16, 1, 0),
                                   mmdit_config(1, 3, 5, 0, 1)};
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        run_mmdit(&configs[i], 2, 5, 7, 3);
        run_mmdit(&configs[i], 1, configs[i].patch_size, configs[i].patch_size, 1);
    }
    bad_mmdit();
    fork_mmdit();
}

/* ---- AutoencoderKL ---- */

static void run_vae(const ladd_vae_config *c, int B, int h, int w) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    ladd_vae *m = NULL;
    CHECK_OK(ladd_vae_create(&m, c));
    CHECK_OK(ladd_vae_init(m, 1));
    int f = 1 << (c->levels - 1);
    int64_t n_in = (int64_t)B * c->in_channels * h * f * w * f, n_out = (int64_t)B * c->out_channels * h * f * w * f;
    int64_t n_z = (int64_t)B * c->latent_channels * h * w;
    float *images = test_array(n_in, 1), *moments = test_poison(2 * n_z), *dimages = test_poison(n_in);
    float *z = test_array(n_z, 2), *decoded = test_poison(n_out), *dz = test_poison(n_z);
    ladd_vae_saved *saved = NULL;
    CHECK_OK(ladd_vae_encode(&ctx, moments, NULL, m, images, B, h * f, w * f));
    CHECK_OK(ladd_vae_encode(&ctx, moments, &saved, m, images, B, h * f, w * f));
    CHECK_OK(ladd_vae_backward(&ctx, dimages, saved, moments, 1));
    ladd_vae_saved_free(&ctx, saved);
    CHECK_OK(ladd_vae_decode(&ctx, decoded, NULL, m, z, B, h, w));
    CHECK_OK(ladd_vae_decode(&ctx, decoded, &saved, m, z, B, h, w));
    CHECK_OK(ladd_vae_backward(&ctx, dz, saved, decoded, 0));
    ladd_vae_saved_free(&ctx, saved);
    CHECK(test_finite(moments, 2 * n_z) && test_finite(dimages, n_in) && test_finite(decoded, n_out) && test_finite(dz, n_z));
    CHECK(test_finite(ladd_vae_params(m)->grad, ladd_vae_params(m)->trainable) && ladd_memory_in_use() == 0);
    if (f > 1) CHECK(ladd_vae_encode(&ctx, moments, NULL, m, images, B, h * f + 1, w * f) == LADD_ERR_VALUE);
    CHECK(ladd_vae_encode(&ctx, moments, NULL, m, images, 0, h * f, w * f) == LADD_ERR_VALUE);
    CHECK(ladd_vae_decode(&ctx, decoded, NULL, m, z, B, h, 0) == LADD_ERR_VALUE);
    CHECK(ladd_vae_decode(&ctx, decoded, NULL, m, z, 1 << 20, 1 << 20, 1 << 20) != LADD_OK);
    float *all[] = {images, moments, dimages, z, decoded, dz};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    ladd_vae_free(m);
}

void test_autoencoder(void) {
    const ladd_vae_config good = {3, 3, 4, 2, {8, 12}, 1, 4, 0, 0, 1};
    ladd_vae_config quant = {1, 2, 3, 3, {4, 4, 6}, 2, 2, 1, 1, 0}, one = {3, 3, 2, 1, {5}, 1, 5, 0, 1, 1};
    run_vae(&good, 2, 3, 5);
    run_vae(&quant, 1, 1, 2);
    run_vae(&one, 1, 1, 1);
    ladd_vae *m = NULL;
    ladd_vae_config bad[8];
    for (int i = 0; i < 8; i++) bad[i] = good;
    bad[0].in_channels = 0;
    bad[1].latent_channels = -1;
    bad[2].levels = 0;
    bad[3].levels = LADD_VAE_MAX_LEVELS + 1;
    bad[4].block_out_channels[1] = 0;
    bad[5].layers_per_block = -1;
    bad[6].norm_num_groups = 3;
    bad[7].block_out_channels[0] = 1 << 30;
    for (int i = 0; i < 8; i++) CHECK(ladd_vae_create(&m, &bad[i]) != LADD_OK && m == NULL);
    ladd_vae_free(NULL);
}

/* ---- discriminator ---- */

static void run_disc(const ladd_disc_config *c, int B, int h, int w) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    ladd_disc *m = NULL;
    CHECK_OK(ladd_disc_create(&m, c));
    CHECK_OK(ladd_disc_init(m, 1));
    int64_t n_features = (int64_t)B * h * w * c->feature_dim, n_logits = (int64_t)B * h * w;
    float *features[4], *dfeatures[4], *logits[4], *sigma = test_array(B, 1),
                                                   *pooled = c->pooled_dim ? test_array((int64_t)B * c->pooled_dim, 2) : NULL;
    for (int b = 0; b < B; b++) sigma[b] = 0.5f;
    for (int i = 0; i < c->n_taps; i++) {
        features[i] = test_array(n_features, 3 + (uint32_t)i);
        dfeatures[i] = test_poison(n_features);
        logits[i] = test_poison(n_logits);
    }
    ladd_disc_saved *saved = NULL;
    const float *const *in = (const float *const *)features, *const *dlogits = (const float *const *)logits;
    CHECK_OK(ladd_disc_forward(&ctx, logits, NULL, m, in, sigma, pooled, B, h, w, 0));
    CHECK_OK(ladd_disc_forward(&ctx, logits, &saved, m, in, sigma, pooled, B, h, w, 1));
    for (int i = 0; i < c->n_taps; i++) CHECK(test_finite(logits[i], n_logits));
    CHECK_OK(ladd_disc_backward(&ctx, dfeatures, saved, dlogits, 0));
    CHECK_OK(ladd_disc_backward(&ctx, NULL, saved, dlogits, 1));
    CHECK_OK(ladd_disc_backward(&ctx, dfeatures, saved, dlogits, 1));
    ladd_disc_saved_free(&ctx, saved);
    CHECK(test_finite(ladd_disc_params(m)->grad, ladd_disc_params(m)->trainable) && ladd_memory_in_use() == 0);
    CHECK(ladd_disc_forward(&ctx, logits, NULL, m, in, sigma, pooled, 0, h, w, 0) == LADD_ERR_VALUE);
    CHECK(ladd_disc_forward(&ctx, logits, NULL, m, in, sigma, pooled, B, 1 << 20, 1 << 20, 0) == LADD_ERR_VALUE);
    if (c->condition_pooled) CHECK(ladd_disc_forward(&ctx, logits, NULL, m, in, sigma, NULL, B, h, w, 0) == LADD_ERR_VALUE);
    for (int i = 0; i < c->n_taps; i++) {
        CHECK(test_finite(dfeatures[i], n_features));
        free(features[i]);
        free(dfeatures[i]);
        free(logits[i]);
    }
    free(sigma);
    free(pooled);
    ladd_disc_free(m);
}

void test_discriminator(void) {
    const ladd_disc_config good = {12, 2, {0, 2}, 7, 8, 3, LADD_HEAD_NORM_GROUP, 4, 1, 1, 1, 6};
    ladd_disc_config plain = {5, 1, {1}, 0, 3, 1, LADD_HEAD_NORM_NONE, 0, 0, 0, 0, 0},
                     wide = {9, 3, {0, 1, 2}, 4, 6, 5, LADD_HEAD_NORM_GROUP, 1, 1, 0, 1, 33};
    run_disc(&good, 2, 3, 5);
    run_disc(&plain, 1, 1, 1);
    run_disc(&wide, 2, 2, 1);
    ladd_disc *m = NULL;
    ladd_disc_config bad[9];
    for (int i = 0; i < 9; i++) bad[i] = good;
    bad[0].feature_dim = 0;
    bad[1].n_taps = 0;
    bad[2].n_taps = LADD_MAX_LAYERS + 1;
    bad[3].taps[1] = 0;
    bad[4].width = -8;
    bad[5].kernel_size = 2;
    bad[6].num_groups = 3;
    bad[7].pooled_dim = 0;
    bad[8].condition_dim = 0;
    for (int i = 0; i < 9; i++) CHECK(ladd_disc_create(&m, &bad[i]) == LADD_ERR_VALUE && m == NULL);
    ladd_disc_free(NULL);
}
