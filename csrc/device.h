/* What a device brings to the core beside its tables of kernels. The extension ladd._cuda offers one such table of functions in a capsule, the tests'
 * emulator another; the binding takes either, so the core links neither. Streams and events are handles that only the device looks into. */
#ifndef LADD_DEVICE_H
#define LADD_DEVICE_H
#include "backend.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LADD_DEVICE_API = 3 }; /* raised when this struct or the table of kernels changes: both sides must agree */

typedef struct ladd_device_info {
    char name[256], architectures[128]; /* architectures: what the kernels were compiled for */
    int capability, driver, runtime;    /* 90 for 9.0; 13000 for 13.0 */
    size_t memory_free, memory_total;
} ladd_device_info;

/* Which engine serves attention calls of one type, head size and pass, by the tokens of all streams together. */
enum { LADD_ATTENTION_RULES = 64 };
typedef struct ladd_attention_rule {
    ladd_dtype act;
    int dh, backward, least, most; /* tokens, both included */
    int cudnn;                     /* 1: cuDNN, where it is there and takes the shape; 0: the device's own kernels */
} ladd_attention_rule;

typedef struct ladd_device_api {
    int version;
    size_t kernels; /* sizeof(ladd_backend) on the device's side */
    /* Called once. report records a sentence in the core; locate writes the path of a library ("cublasLt", "cudnn", "nccl") found by Python, or
     * fails. */
    void (*connect)(ladd_status (*report)(ladd_status code, const char *sentence),
                    ladd_status (*locate)(const char *library, char *path, size_t room));
    ladd_status (*count)(int *devices);
    ladd_status (*open)(void **state, int index);
    void (*close)(void *state);
    /* At the head and the end of every call. enter makes the device current in this thread, or is an error if it is no longer usable; leave makes
     * *before current again, in either case: other users of CUDA in the process count on their choice. */
    ladd_status (*enter)(void *state, void **before);
    void (*leave)(void *before);
    const ladd_backend *(*backend)(ladd_dtype act);
    ladd_status (*info)(void *state, ladd_device_info *info);
    ladd_status (*wait)(void *state);
    void *(*stream)(void *state);
    void (*use_stream)(void *state, void *stream, int own); /* own: back to the state's stream */
    /* What is queued next waits for what `stream` holds now. While calls are recorded: what is queued after the recording. */
    ladd_status (*wait_for)(void *state, void *stream);
    ladd_status (*let_wait)(void *state, void *stream);       /* `stream` waits for what is queued now */
    ladd_status (*record)(void *state, void **event);         /* a mark behind what is queued now; not while calls are recorded */
    int (*passed)(void *event);                               /* 1: all before the mark is done; the event is then gone */
    ladd_status (*owner_of)(const void *pointer, int *index); /* which device the memory is on; -1: none */
    ladd_status (*capture_begin)(void *state);                /* until capture_end, calls are recorded and not run */
    ladd_status (*capture_end)(void *state, void **graph);
    ladd_status (*replay)(void *state, void *graph);
    void (*graph_free)(void *graph);
    /* The first rule that fits decides; none: the device's own kernels. Replaces the rules from before. */
    ladd_status (*attention_rules)(void *state, const ladd_attention_rule *rules, int n);
} ladd_device_api;

#define LADD_DEVICE_CAPSULE "ladd.device_api"

#ifdef __cplusplus
}
#endif
#endif
