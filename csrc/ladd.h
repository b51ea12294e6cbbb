/* The core's whole interface: status, memory, parameters, models. Knows nothing of Python and nothing of CUDA.
 *
 * Letters, the same in C, Python and docs:
 *   B batch   C latent channels   H W latent size   h w token grid   N image tokens (h*w)   T text tokens   S tokens in all
 *   D inner width   heads, dh (head_dim): D = heads*dh   J context width   P pooled width   G groups   M N K of a matrix product
 * Arguments: outputs first, then what was saved by forward, inputs, parameters, sizes. `d` before a name is its gradient.
 * Accumulate rule: parameter gradients are added to (+=), activation gradients are written (=); an exception is said at the function.
 * All tensors are dense and row-major. Every function returns a status; on failure ladd_last_error() is one sentence saying what was
 * expected and what came. Nothing in the core prints, exits or aborts.
 */
#ifndef LADD_H
#define LADD_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    LADD_OK = 0,
    LADD_ERR_VALUE,       /* a size, setting or number that cannot be: ValueError */
    LADD_ERR_TYPE,        /* TypeError */
    LADD_ERR_MEMORY,      /* MemoryError */
    LADD_ERR_RUNTIME,     /* RuntimeError */
    LADD_ERR_INTERRUPTED, /* the caller's interrupt hook said stop: KeyboardInterrupt is already set */
} ladd_status;

/* Records the sentence for this thread and returns `code`, so that a check reads `return ladd_fail(LADD_ERR_VALUE, "...")`. */
ladd_status ladd_fail(ladd_status code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;
const char *ladd_last_error(void);
#define LADD_TRY(call)                          \
    do {                                        \
        ladd_status status_ = (call);           \
        if (status_ != LADD_OK) return status_; \
    } while (0)

/* ---- context --------------------------------------------------------------------------------------------------------- */

/* What activations and working copies of weights are stored as. The CPU computes in LADD_F32. Sums, statistics, gradients of parameters, masters and
 * moments are float everywhere. */
typedef enum { LADD_F32 = 0, LADD_BF16, LADD_F16 } ladd_dtype;

/* An element of the compute type: float on the CPU. Layers and models never index it or add to such a pointer (on a device it may be two
 * bytes wide): they step with ladd_at(). Only kernels look inside. */
typedef float ladd_act;

typedef struct ladd_backend ladd_backend; /* the table of kernels, backend.h */

typedef struct ladd_context {
    const ladd_backend *backend;
    void *state;                        /* the backend's own: a struct ladd_cuda_state (cuda/device.h); NULL on the CPU */
    ladd_dtype act;                     /* the compute type */
    size_t act_size;                    /* bytes of one ladd_act on this backend */
    int (*interrupted)(void *argument); /* asked between layers; nonzero stops with LADD_ERR_INTERRUPTED; may be NULL */
    void *interrupt_argument;
} ladd_context;

/* products: LADD_F32, or LADD_BF16 where the processor has AVX512_BF16: the factors of matrix products are rounded to it, everything else is float.
 * What lies in memory is float in both, so act is LADD_F32. The backend is NULL, with the error, where there is none. */
ladd_context ladd_cpu_context(ladd_dtype products);
ladd_status ladd_check_interrupt(const ladd_context *ctx);

static inline void *ladd_at_(const ladd_context *ctx, const void *base, ptrdiff_t elements) {
    return base ? (char *)(uintptr_t)base + elements * (ptrdiff_t)ctx->act_size : NULL;
}
#define ladd_at(ctx, base, elements) ((ladd_act *)ladd_at_((ctx), (base), (ptrdiff_t)(elements)))

/* Threads of the CPU backend. The same inputs give the same bits for any number of threads. */
ladd_status ladd_set_num_threads(int n);
int ladd_get_num_threads(void);

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

/* One block for all activations of one forward. Planned twice by the same code: first with base == NULL, which only counts; then, after
 * ladd_arena_reserve, with memory behind it. Running out is an error before anything was computed. */
typedef struct ladd_arena {
    char *base;
    size_t used, capacity; /* bytes */
} ladd_arena;

void *ladd_arena_take(ladd_arena *arena, size_t bytes);                     /* 64-byte aligned; NULL while counting */
ladd_status ladd_arena_reserve(const ladd_context *ctx, ladd_arena *arena); /* gets `used` bytes, resets `used` to 0 */
void ladd_arena_release(const ladd_context *ctx, ladd_arena *arena);        /* the block is kept for the next reserve of its size */
void ladd_empty_cache(void);                                                /* gives kept blocks back to the system */
size_t ladd_memory_in_use(void);                                            /* bytes in arenas now */
#define ladd_take_act(ctx, arena, count) ((ladd_act *)ladd_arena_take((arena), (size_t)(count) * (ctx)->act_size))
#define ladd_take_f32(arena, count) ((float *)ladd_arena_take((arena), (size_t)(count) * sizeof(float)))

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

enum { LADD_NAME_MAX = 112, LADD_MAX_DIMS = 4, LADD_MAX_LAYERS = 128 };

typedef struct ladd_param {
    char name[LADD_NAME_MAX]; /* diffusers' tensor name */
    int ndim;
    int64_t shape[LADD_MAX_DIMS];
    int64_t offset, count; /* elements, in the flat buffer */
    int trainable;         /* 0: a buffer (position table, spectral norm's u): saved and loaded, never updated */
} ladd_param;

/* All parameters of a model in one flat buffer; gradients in another of the same layout. Tensors used together lie next to each other.
 * Trainable ones come first: an optimizer step is one call over the first `trainable` elements. */
typedef struct ladd_params {
    ladd_param *table;
    int n, room;
    int64_t size, trainable; /* elements in all; elements that train */
    float *data;             /* [size] masters, where the model computes */
    float *grad;             /* [trainable], NULL until ladd_params_need_grad */
    const ladd_act *compute; /* [size] what layers read: data itself, or its copy in the compute type */
    int stale;               /* 1: data was written since the copy was made; 2: it may be written at any time (its memory was handed out) */
    ladd_context device;     /* where data, grad and compute live; backend NULL: host memory */
} ladd_params;

/* Build: add every entry (trainable ones first), then allocate. add returns the entry's offset, or -1 (error recorded). */
int64_t ladd_params_add(ladd_params *p, int trainable, const char *name, int ndim, const int64_t *shape);
ladd_status ladd_params_allocate(ladd_params *p);                       /* zero-filled, 64-byte aligned */
ladd_status ladd_params_need_grad(ladd_params *p);                      /* zero-filled on first call */
ladd_status ladd_params_place(const ladd_context *ctx, ladd_params *p); /* moves data to the context's device; on the CPU nothing */
/* At the head of every forward: an error unless ctx is where the model lives; brings `compute` up to date. */
ladd_status ladd_params_ready(const ladd_context *ctx, ladd_params *p);
/* Runs task(argument) while `data` is a host copy, and writes it back: for what is computed once on the host (initial values). */
ladd_status ladd_params_on_host(ladd_params *p, ladd_status (*task)(void *argument), void *argument);
const ladd_param *ladd_params_find(const ladd_params *p, const char *name); /* NULL if absent */
void ladd_params_free(ladd_params *p);

/* ---- random numbers: Philox4x32-10, keyed by what is drawn and for whom, never by thread, batch or device ----------------------------- */

typedef struct ladd_rng_key {
    uint64_t seed;
    uint32_t purpose; /* what the numbers are for; one constant a use */
    uint64_t step;
    const uint64_t *step_at; /* not NULL: where the backend computes, in the place of step */
} ladd_rng_key;

/* ---- MMDiT (SD3, SD3.5): models/mmdit.c ----------------------------------------------------------------------------------------------- */

typedef struct ladd_mmdit_config { /* fields and defaults of diffusers' transformer/config.json */
    int sample_size, patch_size, in_channels, out_channels, num_layers, num_attention_heads, attention_head_dim;
    int joint_attention_dim, caption_projection_dim, pooled_projection_dim, pos_embed_max_size;
    int qk_rms_norm;                     /* 0: none, 1: "rms_norm" */
    unsigned char dual[LADD_MAX_LAYERS]; /* 1: block has the second, image-only attention */
} ladd_mmdit_config;

typedef struct ladd_mmdit ladd_mmdit;
typedef struct ladd_mmdit_saved ladd_mmdit_saved; /* what one forward keeps for its backward */

typedef struct ladd_mmdit_call {
    int batch, height, width, text_tokens; /* B, H, W (latent pixels), T */
    const unsigned char *skip;             /* [num_layers] 1: block is bypassed; or NULL */
    int n_taps;                            /* 0: velocity. Else features after these blocks, ascending; stops at the deepest */
    const int *taps;
    int keep; /* ladd_mmdit_keep */
} ladd_mmdit_call;

/* Which backward will follow: none, any, or one that asks for gradients of latents and context alone and needs less kept. */
typedef enum { LADD_KEEP_NONE = 0, LADD_KEEP_ALL, LADD_KEEP_INPUTS } ladd_mmdit_keep;

ladd_status ladd_mmdit_create(ladd_mmdit **model, const ladd_mmdit_config *config); /* weights zero but the position table, which is computed */
void ladd_mmdit_free(ladd_mmdit *model);
ladd_params *ladd_mmdit_params(ladd_mmdit *model);
const ladd_mmdit_config *ladd_mmdit_get_config(const ladd_mmdit *model);
/* Initialisation of DiT: Xavier-normal linears, zero modulations and output layer, N(0, 0.02) embedders of time and pooled text. */
ladd_status ladd_mmdit_init(ladd_mmdit *model, uint64_t seed);
ladd_status ladd_mmdit_plan(const ladd_context *ctx, size_t *bytes, const ladd_mmdit *model, const ladd_mmdit_call *call);
/* velocity[B, out_channels, h*p, w*p] when n_taps == 0, else features[n_taps][B,N,D]. *saved is set when call->keep; free it with saved_free. */
ladd_status ladd_mmdit_forward(const ladd_context *ctx, ladd_act *velocity, ladd_act *const *features, ladd_mmdit_saved **saved, ladd_mmdit *model,
                               const ladd_mmdit_call *call, const ladd_act *latents /* [B,C,H,W] */, const float *sigma /* [B] in [0,1] */,
                               const ladd_act *context /* [B,T,J] */, const ladd_act *pooled /* [B,P] */);
/* One of dvelocity / dfeatures (as forward). dlatents, dcontext, dpooled may each be NULL. params != 0 adds to the parameter gradients. May be called
 * once a forward: it reuses the saved memory. */
ladd_status ladd_mmdit_backward(const ladd_context *ctx, ladd_act *dlatents, ladd_act *dcontext, ladd_act *dpooled, ladd_mmdit_saved *saved,
                                const ladd_act *dvelocity, const ladd_act *const *dfeatures, int params);
int ladd_mmdit_saved_all(const ladd_mmdit_saved *saved); /* whether backward may ask for gradients of parameters and pooled text */
void ladd_mmdit_saved_free(const ladd_context *ctx, ladd_mmdit_saved *saved);

/* ---- AutoencoderKL: models/autoencoder_kl.c ------------------------------------------------------------------------------------------- */

enum { LADD_VAE_MAX_LEVELS = 8 };
typedef struct ladd_vae_config { /* diffusers' vae/config.json */
    int in_channels, out_channels, latent_channels, levels, block_out_channels[LADD_VAE_MAX_LEVELS], layers_per_block, norm_num_groups;
    int use_quant_conv, use_post_quant_conv, mid_block_add_attention;
} ladd_vae_config;

typedef struct ladd_vae ladd_vae;
typedef struct ladd_vae_saved ladd_vae_saved;

ladd_status ladd_vae_create(ladd_vae **model, const ladd_vae_config *config);
void ladd_vae_free(ladd_vae *model);
ladd_params *ladd_vae_params(ladd_vae *model);
const ladd_vae_config *ladd_vae_get_config(const ladd_vae *model);
ladd_status ladd_vae_init(ladd_vae *model, uint64_t seed); /* Kaiming-uniform convolutions and linears as PyTorch's defaults, unit norms */
/* moments[B, 2*latent_channels, H/f, W/f] = [mean, logvar], logvar not yet clamped; f = 2^(levels-1); images[B,Cin,H,W], H and W multiples of f */
ladd_status ladd_vae_encode(const ladd_context *ctx, ladd_act *moments, ladd_vae_saved **saved /* NULL: nothing kept */, ladd_vae *model,
                            const ladd_act *images, int batch, int height, int width);
/* images[B,Cout,H*f,W*f] from z[B,latent_channels,H,W] (already unscaled) */
ladd_status ladd_vae_decode(const ladd_context *ctx, ladd_act *images, ladd_vae_saved **saved, ladd_vae *model, const ladd_act *z, int batch,
                            int height, int width);
/* dinput (may be NULL) and, with params, parameter gradients; for either direction. Once a forward. */
ladd_status ladd_vae_backward(const ladd_context *ctx, ladd_act *dinput, ladd_vae_saved *saved, const ladd_act *doutput, int params);
void ladd_vae_saved_free(const ladd_context *ctx, ladd_vae_saved *saved);
/* Bytes of activations of one encode of images[batch,Cin,height,width], or (decode) of one decode to images of that size; keep: that a backward
 * follows. */
ladd_status ladd_vae_plan(const ladd_context *ctx, size_t *bytes, ladd_vae *model, int decode, int batch, int height, int width, int keep);

/* ---- Discriminator heads: models/discriminator.c -------------------------------------------------------------------------------------- */

typedef enum { LADD_HEAD_NORM_NONE = 0, LADD_HEAD_NORM_GROUP = 1 } ladd_head_norm;
typedef struct ladd_disc_config {
    int feature_dim, n_taps, taps[LADD_MAX_LAYERS], pooled_dim; /* D; block indices; P (0: no pooled condition) */
    int width, kernel_size, norm, num_groups;                   /* width of the head after the 1x1 projection; odd kernel of the residual block */
    int spectral_norm;                                          /* 1: every weight that features pass is divided by its largest singular value */
    int condition_sigma, condition_pooled;                      /* projection discriminator on embed(t_hat) and pooled text */
    int condition_dim;                                          /* width of the projection space */
} ladd_disc_config;

typedef struct ladd_disc ladd_disc;
typedef struct ladd_disc_saved ladd_disc_saved;

ladd_status ladd_disc_create(ladd_disc **model, const ladd_disc_config *config);
void ladd_disc_free(ladd_disc *model);
ladd_params *ladd_disc_params(ladd_disc *model); /* spectral norm's u vectors are non-trainable entries */
const ladd_disc_config *ladd_disc_get_config(const ladd_disc *model);
ladd_status ladd_disc_init(ladd_disc *model, uint64_t seed);
/* logits[n_taps][B,h,w] from features[n_taps][B,h*w,D]. update_u: one power iteration on each spectral norm first (training). *saved as for mmdit. */
ladd_status ladd_disc_forward(const ladd_context *ctx, ladd_act *const *logits, ladd_disc_saved **saved, ladd_disc *model,
                              const ladd_act *const *features, const float *sigma /* [B] t_hat in [0,1] */,
                              const ladd_act *pooled /* [B,P] or NULL */, int batch, int grid_h, int grid_w, int update_u);
/* dfeatures[i] may be NULL. params != 0 adds to the parameter gradients. Unlike the others may be called more than once a forward. */
ladd_status ladd_disc_backward(const ladd_context *ctx, ladd_act *const *dfeatures, ladd_disc_saved *saved, const ladd_act *const *dlogits,
                               int params);
/* R1 on the heads' inputs after a forward on real pictures: penalty[1], where the model computes, += mean over the batch of |g|^2, g = d(sum of all
 * logits)/d(features), exact; weight * d(penalty)/d(parameters) is added to the gradients, a central difference with step `epsilon` relative to the
 * features (layers/discriminator_head.h). Any number of times a forward; float32 only. */
ladd_status ladd_disc_r1(const ladd_context *ctx, double *penalty, ladd_disc_saved *saved, float weight, float epsilon);
void ladd_disc_saved_free(const ladd_context *ctx, ladd_disc_saved *saved);

#ifdef __cplusplus
}
#endif
#endif
