/* The device's side of a context: stream, scratch, host numbers on their way to the device, plans of the libraries; and how CUDA's errors become
 * statuses. Kernel files include this through common.cuh. Everything here is asynchronous on the state's stream unless a comment says that it waits.
 */
#ifndef LADD_CUDA_DEVICE_H
#define LADD_CUDA_DEVICE_H
#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "../csrc/device.h"

/* Scratch of the kernels: one block a slot, grown on demand, kept. Work on one stream runs in order, so a kernel may use a slot again as soon as the
 * launch that read it was queued. A wrapper that is called by another wrapper takes another slot. */
enum { LADD_CUDA_SLOTS = 4, LADD_CUDA_RESULTS = 8, LADD_CUDA_PLANS = 4, LADD_CUDA_STAGES = 64, LADD_CUDA_STAGE_BYTES = 1 << 16 };
#define LADD_CUDA_PINNED_MOST ((size_t)512 << 20) /* bytes on their way; more: the oldest copy is waited for */

typedef struct ladd_cuda_state {
    int index; /* of the device */
    int sm;    /* 10 * major + minor compute capability */
    int processors;
    size_t shared_memory; /* bytes that one block may ask for */
    cudaStream_t stream, own;
    void *scratch[LADD_CUDA_SLOTS];
    size_t scratch_bytes[LADD_CUDA_SLOTS];
    void *scratch_graph[LADD_CUDA_SLOTS]; /* the graph that owns it, or NULL */
    struct ladd_cuda_pool *pool;          /* device.cu: blocks handed out and kept */
    void *capturing;                      /* the graph that is being recorded, or NULL */
    int owes_wait;                        /* 1: others' streams were to be waited for while it was */
    int process;                          /* that opened the device: after fork() CUDA works in no other */
    /* A ring of small pinned blocks and their places on the device; an event a slot says when it may be written again. */
    char *stage_host, *stage_device;
    cudaEvent_t stage_done[LADD_CUDA_STAGES];
    int stage_next;
    struct ladd_cuda_pinned *pinned; /* device.cu: pinned blocks through which larger host arrays travel */
    size_t pinned_bytes;
    double *result;                                      /* [8] pinned: numbers that a kernel hands to the host */
    int tf32;                                            /* 1: f32 products may round their inputs to TF32 */
    void *plans[LADD_CUDA_PLANS];                        /* caches of linear.cu, conv2d.cu, ...: each file owns one, see LADD_CUDA_PLANS_ */
    void (*plans_free[LADD_CUDA_PLANS])(void *plans);    /* set with it */
    ladd_attention_rule attention[LADD_ATTENTION_RULES]; /* attention_engine.cu */
    int attention_rules;                                 /* how many there are */
    int cudnn;                                           /* 1: it can be opened, -1: it cannot, 0: not tried for a rule yet */
    ladd_status broken;                                  /* not LADD_OK: an error that CUDA does not recover from came on this device */
} ladd_cuda_state;
enum { LADD_CUDA_PLANS_LINEAR = 0, LADD_CUDA_PLANS_ATTENTION, LADD_CUDA_PLANS_CONV };

static inline ladd_cuda_state *ladd_cuda(const ladd_context *ctx) { return (ladd_cuda_state *)ctx->state; }

/* LADD_OK, or the status that `error` stands for, with a sentence: what was tried, CUDA's name and words. Out of memory is LADD_ERR_MEMORY and leaves
 * the device usable; an error after which CUDA refuses everything marks the device as broken and says so. */
ladd_status ladd_cuda_check(const ladd_context *ctx, cudaError_t error, const char *what);
#define LADD_CUDA_TRY(ctx, call) LADD_TRY(ladd_cuda_check((ctx), (call), #call))

/* *block: at least `bytes` of scratch, 256-byte aligned, not cleared. */
ladd_status ladd_cuda_scratch(const ladd_context *ctx, void **block, int slot, size_t bytes);
/* *device: a copy of `bytes` of host memory (times, sample numbers), valid for what is queued next; the host's may change at once. */
ladd_status ladd_cuda_stage(const ladd_context *ctx, const void **device, const void *host, size_t bytes);
/* Waits and copies `count` doubles from the device: losses and norms, the only numbers that the host waits for. */
ladd_status ladd_cuda_result(const ladd_context *ctx, double *host, const double *device, int count);

/* libraries.c: an entry point of a library that is opened at first use; NULL, and a sentence with what was tried and what to install, if it is
 * absent. */
typedef enum { LADD_LIBRARY_CUBLASLT = 0, LADD_LIBRARY_CUDNN, LADD_LIBRARY_NCCL, LADD_LIBRARIES } ladd_cuda_library;
void *ladd_cuda_symbol(ladd_cuda_library library, const char *name);

#ifdef __cplusplus
}
#endif
#endif
