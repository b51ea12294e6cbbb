/* Kernels at odd sizes on arrays of exactly their size, each a float away from alignment: every element is read and written inside. What they compute
 * is proven by tests/test_kernels.py. */
#include <math.h>

#include "check.h"

/* Malloc aligns to 16 bytes; kernels must take any address of a float. The block's end is exact, which is where overruns happen. */
static float *odd(int64_t count, uint32_t seed) {
    float *x = test_array(count + 1, seed);
    return x + 1;
}
/* For outputs: what is not written stays NaN. */
static float *unwritten(int64_t count) {
    float *x = odd(count, 0);
    for (int64_t i = 0; i < count; i++) x[i] = NAN;
    return x;
}
static void drop(float *x) { free(x - 1); }

static void linear(const ladd_context *ctx, int M, int N, int K) {
    const ladd_backend *k = ctx->backend;
    float *y = unwritten((int64_t)M * N), *h = unwritten((int64_t)M * N), *x = odd((int64_t)M * K, 3), *w = odd((int64_t)N * K, 4), *bias = odd(N, 5);
    float *dx = unwritten((int64_t)M * K), *dw = odd((int64_t)N * K, 7), *dbias = odd(N, 8);
    CHECK_OK(k->linear_forward(ctx, y, x, w, bias, M, N, K));
    CHECK_OK(k->linear_forward(ctx, y, x, w, NULL, M, N, K));
    CHECK_OK(k->linear_gelu_forward(ctx, y, h, x, w, bias, M, N, K));
    CHECK_OK(k->gelu_backward(ctx, h, y, h, (int64_t)M * N));
    CHECK_OK(k->linear_backward(ctx, dx, dw, dbias, y, x, w, M, N, K));
    CHECK_OK(k->linear_backward(ctx, NULL, NULL, NULL, y, x, w, M, N, K));
    CHECK(test_finite(dx, (int64_t)M * K) && test_finite(dw, (int64_t)N * K) && test_finite(dbias, N));
    float *all[] = {y, h, x, w, bias, dx, dw, dbias};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void attention(const ladd_context *ctx, int B, int heads, int dh, int n0, int n1) {
    const int n[2] = {n0, n1}, row = 3 * heads * dh;
    float *qkv[2], *o[2], *d[2], *d_o[2], *lse = unwritten((int64_t)B * heads * (n0 + n1));
    ladd_stream streams[2];
    ladd_stream_grad grads[2];
    for (int s = 0; s < 2; s++) {
        qkv[s] = odd((int64_t)B * n[s] * row, 10);
        d[s] = unwritten((int64_t)B * n[s] * row);
        o[s] = unwritten((int64_t)B * n[s] * heads * dh);
        d_o[s] = odd((int64_t)B * n[s] * heads * dh, 13);
        streams[s] = (ladd_stream){qkv[s], qkv[s] + heads * dh, qkv[s] + 2 * heads * dh,      row, (ptrdiff_t)n[s] * row,
                                   o[s],   heads * dh,          (ptrdiff_t)n[s] * heads * dh, n[s]};
        grads[s] = (ladd_stream_grad){d[s], d[s] + heads * dh, d[s] + 2 * heads * dh, d_o[s]};
    }
    int count = n1 ? 2 : 1;
    CHECK_OK(ctx->backend->attention_forward(ctx, streams, count, lse, B, heads, dh, 0.3f));
    CHECK_OK(ctx->backend->attention_backward(ctx, grads, streams, count, lse, B, heads, dh, 0.3f));
    for (int s = 0; s < 2; s++) {
        CHECK(test_finite(o[s], (int64_t)B * n[s] * heads * dh) && test_finite(d[s], (int64_t)B * n[s] * row));
        drop(qkv[s]);
        drop(d[s]);
        drop(o[s]);
        drop(d_o[s]);
    }
    drop(lse);
}

static void conv2d(const ladd_context *ctx, ladd_conv c) {
    c.Ho = (c.H + c.pad_top + c.pad_bottom - c.kh) / c.stride + 1;
    c.Wo = (c.W + c.pad_left + c.pad_right - c.kw) / c.stride + 1;
    if (c.upsample) c.Ho = 2 * c.H, c.Wo = 2 * c.W;
    int64_t n_y = (int64_t)c.B * c.Cout * c.Ho * c.Wo, n_x = (int64_t)c.B * c.Cin * c.H * c.W, n_w = (int64_t)c.Cout * c.Cin * c.kh * c.kw;
    float *y = unwritten(n_y), *x = odd(n_x, 15), *w = odd(n_w, 16), *bias = odd(c.Cout, 17), *dx = unwritten(n_x), *dw = odd(n_w, 19),
          *db = odd(c.Cout, 20);
    CHECK_OK(ctx->backend->conv2d_forward(ctx, y, x, w, bias, &c));
    CHECK_OK(ctx->backend->conv2d_forward(ctx, y, x, w, NULL, &c));
    CHECK_OK(ctx->backend->conv2d_backward(ctx, dx, dw, db, y, x, w, &c));
    CHECK_OK(ctx->backend->conv2d_backward(ctx, NULL, NULL, NULL, y, x, w, &c));
    CHECK_OK(ctx->backend->conv2d_backward(ctx, dx, NULL, NULL, y, NULL, w, &c));
    CHECK(test_finite(y, n_y) && test_finite(dx, n_x) && test_finite(dw, n_w) && test_finite(db, c.Cout));
    float *all[] = {y, x, w, bias, dx, dw, db};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void norms(const ladd_context *ctx, int B, int N, int D, int G) {
    const ladd_backend *k = ctx->backend;
    int64_t n = (int64_t)B * N * D;
    float *y = unwritten(n), *x = odd(n, 22), *dx = odd(n, 23), *mean = unwritten((int64_t)B * N), *rstd = unwritten((int64_t)B * N);
    float *mod = odd((int64_t)B * 3 * D, 26), *dmod = odd((int64_t)B * 3 * D, 27), *w = odd(D, 28), *dw = odd(D, 29), *b = odd(D, 30),
          *db = odd(D, 31);
    CHECK_OK(k->layer_norm_modulate_forward(ctx, y, mean, rstd, x, mod, mod + D, 3 * D, B, N, D, 1e-6f));
    CHECK_OK(k->layer_norm_modulate_backward(ctx, dx, dmod, dmod + D, y, x, mean, rstd, mod + D, 3 * D, B, N, D));
    CHECK_OK(k->layer_norm_modulate_forward(ctx, y, mean, rstd, x, NULL, NULL, 0, B, N, D, 1e-6f));
    CHECK_OK(k->layer_norm_modulate_backward(ctx, dx, NULL, NULL, y, x, mean, rstd, NULL, 0, B, N, D));
    CHECK_OK(k->gate_residual_forward(ctx, y, x, y, mod + 2 * D, 3 * D, B, N, D));
    CHECK_OK(k->gate_residual_backward(ctx, dx, dmod, x, y, mod + 2 * D, 3 * D, B, N, D));
    CHECK_OK(k->gate_residual_backward(ctx, dx, NULL, x, y, mod + 2 * D, 3 * D, B, N, D));
    CHECK(test_finite(y, n) && test_finite(dx, n));
    CHECK_OK(k->rms_norm_heads_forward(ctx, y, rstd, x, w, B * N, 1, D, D, D, 1e-6f));
    CHECK_OK(k->rms_norm_heads_backward(ctx, dx, dw, y, x, rstd, w, B * N, 1, D, D, D, D));
    CHECK_OK(k->rms_norm_heads_backward(ctx, y, NULL, y, x, rstd, w, B * N, 1, D, D, D, D));
    for (int silu = 0; silu < 2; silu++) { /* as B images of D channels and N pixels */
        float *m = odd((int64_t)B * G, 32), *r = odd((int64_t)B * G, 33);
        CHECK_OK(k->group_norm_forward(ctx, y, m, r, x, w, b, B, D, N, G, 1e-6f, silu));
        CHECK_OK(k->group_norm_backward(ctx, dx, dw, db, y, x, m, r, w, b, B, D, N, G, silu));
        CHECK_OK(k->group_norm_backward(ctx, y, NULL, NULL, y, x, m, r, w, b, B, D, N, G, silu));
        drop(m);
        drop(r);
    }
    float *dots = odd((int64_t)B * N, 34);
    CHECK_OK(k->channel_dot_forward(ctx, dots, x, mod, w, B, D, N));
    CHECK_OK(k->channel_dot_backward(ctx, dx, dmod, dw, dots, x, mod, B, D, N));
    CHECK_OK(k->transpose(ctx, y, x, B, N, D));
    float *all[] = {y, x, dx, mean, rstd, mod, dmod, w, dw, b, db, dots};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void images(const ladd_context *ctx, int B, int C, int H, int W, int p) {
    const ladd_backend *k = ctx->backend;
    int64_t n = (int64_t)B * C * H * W;
    int h = H / p, w = W / p;
    float *image = odd(n, 35), *tokens = unwritten((int64_t)B * h * w * C * p * p), *big = unwritten(4 * n), *table = odd(15 * 15 * C * p * p, 38);
    for (int last = 0; last < 2; last++) {
        CHECK_OK(k->patch_gather(ctx, tokens, image, B, C, H, W, p, last));
        CHECK_OK(k->patch_scatter(ctx, image, tokens, B, C, H, W, p, last));
    }
    CHECK(test_finite(tokens, (int64_t)B * h * w * C * p * p) && test_finite(image, n));
    CHECK_OK(k->add_position(ctx, tokens, table, B, h, w, 15, C * p * p));
    CHECK_OK(k->upsample2x_forward(ctx, big, image, B * C, H, W));
    CHECK(test_finite(big, 4 * n));
    CHECK_OK(k->upsample2x_backward(ctx, image, big, B * C, H, W));
    drop(image);
    drop(tokens);
    drop(big);
    drop(table);
}

static void vectors(const ladd_context *ctx, int B, int64_t n) {
    const ladd_backend *k = ctx->backend;
    float *x = odd(B * n, 39), *y = odd(B * n, 40), *z = odd(B * n, 41), *t = odd(B, 42), *m = odd(B * n, 43), *v = odd(B * n, 44);
    int64_t *samples = malloc((size_t)B * sizeof *samples);
    CHECK(samples != NULL);
    for (int b = 0; b < B; b++) samples[b] = ((int64_t)1 << 40) + b;
    ladd_rng_key key = {.seed = UINT64_MAX, .purpose = UINT32_MAX, .step = UINT64_MAX};
    double value = 0.0, values[3];
    CHECK_OK(k->normal(ctx, y, key, samples, B, n));
    CHECK_OK(k->renoise(ctx, x, z, x, t, key, samples, B, n));
    CHECK_OK(k->renoise(ctx, x, NULL, x, t, key, samples, B, n));
    CHECK_OK(k->interpolate(ctx, y, x, z, t, B, n));
    CHECK_OK(k->predict_x0(ctx, y, x, z, t, B, n));
    CHECK_OK(k->row_scale(ctx, y, y, t, B, n));
    CHECK_OK(k->euler_step(ctx, y, y, z, 1.0f, 0.5f, B * n));
    CHECK_OK(k->silu_forward(ctx, z, y, B * n));
    CHECK_OK(k->silu_backward(ctx, z, z, y, B * n));
    CHECK_OK(k->gelu_forward(ctx, z, y, B * n));
    CHECK_OK(k->gelu_backward(ctx, z, z, y, B * n));
    CHECK_OK(k->leaky_relu_forward(ctx, z, y, 0.2f, B * n));
    CHECK_OK(k->leaky_relu_backward(ctx, z, z, y, 0.2f, B * n));
    CHECK_OK(k->add(ctx, z, z, y, B * n));
    CHECK_OK(k->axpy(ctx, z, y, 0.1f, B * n));
    CHECK_OK(k->scale(ctx, z, y, 0.1f, B * n));
    CHECK_OK(k->copy(ctx, z, y, B * n));
    for (int loss = LADD_LOSS_HINGE; loss <= LADD_LOSS_BCE; loss++)
        for (int role = LADD_ROLE_REAL; role <= LADD_ROLE_GENERATOR; role++) {
            CHECK_OK(k->adversarial_loss(ctx, values, z, y, (ladd_loss)loss, (ladd_role)role, 1.0f, B * n));
            CHECK_OK(k->adversarial_loss(ctx, values, NULL, y, (ladd_loss)loss, (ladd_role)role, 1.0f, B * n));
        }
    CHECK(k->adversarial_loss(ctx, values, z, y, (ladd_loss)9, LADD_ROLE_REAL, 1.0f, B * n) == LADD_ERR_VALUE);
    CHECK_OK(k->zero(ctx, m, B * n));
    CHECK_OK(k->zero(ctx, v, B * n));
    CHECK_OK(k->adamw(ctx, x, m, v, y, B * n, 1e-3f, 0.9f, 0.99f, 1e-8f, 0.01f, 1, 1.0f, NULL, NULL));
    CHECK(k->adamw(ctx, x, m, v, y, B * n, 1e-3f, 0.9f, 0.99f, 1e-8f, 0.01f, 0, 1.0f, NULL, NULL) == LADD_ERR_VALUE);
    CHECK_OK(k->adamw(ctx, x, NULL, v, y, B * n, 1e-3f, 0.0f, 0.99f, 1e-8f, 0.01f, 1, 1.0f, NULL, NULL));
    CHECK(k->adamw(ctx, x, NULL, v, y, B * n, 1e-3f, 0.9f, 0.99f, 1e-8f, 0.01f, 1, 1.0f, NULL, NULL) == LADD_ERR_VALUE);
    CHECK_OK(k->ema(ctx, x, y, 0.9f, B * n, NULL));
    CHECK_OK(k->sum_squares(ctx, &value, x, B * n));
    CHECK(value > 0.0 && test_finite(x, B * n));
    float *all[] = {x, y, z, t, m, v};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
    free(samples);
}

static void spectral(const ladd_context *ctx, int R, int K) {
    float *w = odd((int64_t)R * K, 45), *w_hat = unwritten((int64_t)R * K), *u = odd(R, 47), *v = unwritten(K), *dw = odd((int64_t)R * K, 49),
          sigma = 0.0f;
    CHECK_OK(ctx->backend->spectral_norm_forward(ctx, w_hat, u, v, &sigma, w, R, K, 2));
    CHECK_OK(ctx->backend->spectral_norm_backward(ctx, dw, w, w_hat, u, v, &sigma, R, K));
    CHECK(sigma > 0.0f && test_finite(dw, (int64_t)R * K));
    float *zero = calloc((size_t)R * (size_t)K, sizeof *zero);
    CHECK(zero != NULL && ctx->backend->spectral_norm_forward(ctx, w_hat, u, v, &sigma, zero, R, K, 1) == LADD_ERR_VALUE);
    free(zero);
    float *all[] = {w, w_hat, u, v, dw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

void test_kernels(void) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    CHECK_OK(ladd_set_num_threads(2));
    const int shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {1, 33, 65}, {17, 1, 16}, {66, 47, 31}, {300, 129, 200}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) linear(&ctx, shapes[i][0], shapes[i][1], shapes[i][2]);
    const int heads[][5] = {{1, 1, 1, 1, 0}, {2, 3, 8, 5, 2},    {1, 2, 64, 33, 7},  {1, 1, 24, 65, 64},
                            {2, 1, 5, 1, 1}, {1, 1, 128, 19, 0}, {1, 2, 16, 130, 31}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) attention(&ctx, heads[i][0], heads[i][1], heads[i][2], heads[i][3], heads[i][4]);
    const ladd_conv convs[] = {
        {.B = 1, .Cin = 1, .H = 1, .W = 1, .Cout = 1, .kh = 1, .kw = 1, .stride = 1},
        {.B = 2, .Cin = 3, .H = 5, .W = 7, .Cout = 5, .kh = 3, .kw = 3, .stride = 1, .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1},
        {.B = 1, .Cin = 17, .H = 8, .W = 6, .Cout = 9, .kh = 3, .kw = 3, .stride = 2, .pad_bottom = 1, .pad_right = 1},
        {.B = 1, .Cin = 4, .H = 2, .W = 1, .Cout = 3, .kh = 9, .kw = 9, .stride = 1, .pad_top = 4, .pad_left = 4, .pad_bottom = 4, .pad_right = 4},
        {.B = 1, .Cin = 33, .H = 9, .W = 20, .Cout = 34, .kh = 3, .kw = 3, .stride = 1, .pad_top = 1, .pad_left = 1, .pad_bottom = 1, .pad_right = 1},
        {.B = 2, .Cin = 5, .H = 3, .W = 3, .Cout = 70, .kh = 1, .kw = 1, .stride = 1},
        {.B = 1,
         .Cin = 1,
         .H = 1,
         .W = 1,
         .Cout = 1,
         .kh = 3,
         .kw = 3,
         .stride = 1,
         .pad_top = 1,
         .pad_left = 1,
         .pad_bottom = 1,
         .pad_right = 1,
         .upsample = 1},
        {.B = 2,
         .Cin = 5,
         .H = 7,
         .W = 9,
         .Cout = 18,
         .kh = 3,
         .kw = 3,
         .stride = 1,
         .pad_top = 1,
         .pad_left = 1,
         .pad_bottom = 1,
         .pad_right = 1,
         .upsample = 1},
    };
    for (size_t i = 0; i < sizeof convs / sizeof *convs; i++) conv2d(&ctx, convs[i]);
    norms(&ctx, 1, 1, 2, 1);
    norms(&ctx, 2, 5, 33, 3);
    norms(&ctx, 3, 67, 16, 16);
    norms(&ctx, 1, 300, 130, 10);
    images(&ctx, 1, 1, 1, 1, 1);
    images(&ctx, 2, 3, 5, 7, 2);
    images(&ctx, 1, 17, 9, 13, 3);
    vectors(&ctx, 1, 1);
    vectors(&ctx, 3, 17);
    vectors(&ctx, 2, 40001);
    spectral(&ctx, 1, 1);
    spectral(&ctx, 3, 7);
    spectral(&ctx, 33, 270);
    float sigma[3] = {0.0f, 0.5f, 1.0f}, *f = odd(3 * 6, 50);
    CHECK_OK(ctx.backend->timestep_features(&ctx, f, sigma, 3, 6));
    drop(f);
}
