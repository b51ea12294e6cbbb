/* What the files of the binding share. This folder is the only place that includes Python.h.
 *
 * The order of every entry point: check all arguments, allocate the results, core_begin (lock the object, release the GIL), compute, core_end (take
 * the GIL back, unlock, turn the status into an exception). So bad input is refused before anything changed.
 */
#ifndef LADD_BINDING_H
#define LADD_BINDING_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL ladd_core_array_api
#ifndef LADD_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>
#include <stdatomic.h>
#include <time.h>

#include "../device.h"

/* ---- module ---------------------------------------------------------------------------------------------------------- */

enum { CORE_MMDIT, CORE_VAE, CORE_DISC, CORE_KINDS };
typedef struct core_state {
    PyTypeObject *model_type, *types[CORE_KINDS], *saved_types[CORE_KINDS], *device_type, *array_type, *guest_type;
} core_state;

/* One function a family of kernels: adds its PyMethodDef table to the module. */
int core_add_dense(PyObject *module);
int core_add_norm(PyObject *module);
int core_add_image(PyObject *module);
int core_add_diffusion(PyObject *module);
int core_add_flat(PyObject *module);
/* Devices and their arrays. */
int core_add_array(PyObject *module, core_state *state);
int core_add_device(PyObject *module, core_state *state);
/* The type that the models share, and one function a model: makes its types and adds them. */
int core_add_model(PyObject *module, core_state *state);
int core_add_mmdit(PyObject *module, core_state *state);
int core_add_vae(PyObject *module, core_state *state);
int core_add_disc(PyObject *module, core_state *state);

/* The state of the module that `type` (or a base of it) belongs to. */
core_state *core_state_of(PyTypeObject *type);

/* A row of a method table for a function that takes positional and keyword arguments. */
#define CORE_METHOD(name, function, doc) {name, (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS, doc}

/* ---- calls into the core --------------------------------------------------------------------------------------------- */

typedef struct core_device core_device; /* below; NULL stands for the CPU everywhere */

/* Held while a call works on an object. Signal handlers run in the middle of a call, in its thread: a handler that calls the same object would wait
 * for itself for ever, so it is refused. */
typedef struct core_lock {
    PyThread_type_lock lock;
    _Atomic unsigned long holder; /* the thread that has it, or 0 */
} core_lock;
int core_lock_init(core_lock *lock); /* 0, or -1 and an exception */
void core_lock_free(core_lock *lock);

typedef struct core_call {
    ladd_context ctx;
    core_lock *lock;     /* of the object, NULL for plain kernels */
    core_device *device; /* its lock is held too: calls on one device queue their work one after the other */
    void *before;        /* what was current in this thread */
    PyThreadState *thread;
    struct timespec checked; /* when Ctrl-C was last looked for */
} core_call;

ladd_context core_context(const core_device *device, ladd_dtype compute);
/* 0, or -1 with an exception when no backend serves this processor, the device is unusable or this very thread is in a call of the same object. */
int core_begin(core_call *call, core_lock *lock, core_device *device, ladd_dtype compute);
int core_end(core_call *call, ladd_status status); /* 0, or -1 with the exception that the status stands for */
int core_raise(ladd_status status);                /* sets that exception (GIL held); always -1 */

/* Runs one kernel of the table where the arrays of `dims` are; `result` becomes 0 or -1. */
#define CORE_KERNEL(result, dims, name, ...) CORE_KERNEL_IN(result, dims, (dims)->act, name, __VA_ARGS__)
/* The same with products in another dtype than the arrays': the CPU's bfloat16. */
#define CORE_KERNEL_IN(result, dims, compute, name, ...)                                              \
    do {                                                                                              \
        core_call call_;                                                                              \
        result = core_begin(&call_, NULL, (dims)->device, compute);                                   \
        if (result == 0) result = core_end(&call_, call_.ctx.backend->name(&call_.ctx, __VA_ARGS__)); \
    } while (0)

/* ---- devices: device_type.c, array_type.c ------------------------------------------------------------------------------ */

enum { CORE_MAX_DIMS = 8 };

struct core_device {
    PyObject_HEAD const ladd_device_api *api;
    PyObject *provider; /* the capsule that api came in */
    void *state;
    int index;
    char label[16]; /* "cuda:0" */
    core_lock lock;
    PyTypeObject *array_type, *guest_type;
    struct core_waiting *waiting; /* memory of others that queued work may still read */
    int recording;                /* 1: calls are recorded into a graph */
};

typedef struct core_array {
    PyObject_HEAD core_device *device;
    ladd_dtype dtype;
    int ndim;
    int64_t shape[CORE_MAX_DIMS], count;
    void *data;
    PyObject *base; /* whose memory it is; NULL: its own block */
    int *stale;     /* of the parameters that it shows, or NULL */
    int lent;       /* 1: its address was given away, and whoever has it may work on it after it ends here */
} core_array;

int core_is_array(PyObject *object);
void core_array_dealloc(PyObject *object);
size_t core_item_size(ladd_dtype dtype);
const char *core_dtype_name(ladd_dtype dtype);
int core_dtype(PyObject *object, const char *name, ladd_dtype *out); /* "float32", "bfloat16", "float16" */
PyObject *core_array_new(core_device *device, ladd_dtype dtype, int ndim, const int64_t *shape, int zeroed);
PyObject *core_array_view(core_device *device, PyObject *base, int *stale, ladd_dtype dtype, void *data, int ndim, const int64_t *shape);
void core_array_written(core_array *array); /* the weights that it shows are newer than their working copy */

/* ---- arguments: convert.c -------------------------------------------------------------------------------------------- */

/* Sizes by letter. A letter that is 0 is not known yet: the first array that carries it sets it, the others must agree. */
typedef struct core_dims {
    int64_t of[128];
    core_device *device; /* where the arrays are; the first one decides, unless `placed` says that it is decided */
    ladd_dtype act;
    int placed;
} core_dims;
#define DIM(dims, letter) ((dims)->of[(unsigned char)(letter)])
#define IDIM(dims, letter) ((int)DIM(dims, letter))

/* Arrays are ndarrays (float32) or DeviceArrays. A shape has one letter an axis, every size from 1 to INT_MAX; '*' at its end stands for any further
 * axes, whose product (1 for none) becomes the size of '*'. '=' at its head: float32 whatever the compute type is (statistics, gradients of
 * parameters, masters); '@': float32 numbers one a sample (times, factors), in host memory or on the device of the others.
 *
 * Checks that `object` is such an array: aligned, C-contiguous, on the device of the others. NULL and an exception, or the array borrowed. */
PyObject *core_input(PyObject *object, const char *name, const char *shape, core_dims *dims);
/* The same for an array that will be written: it must be writeable. */
PyObject *core_inout(PyObject *object, const char *name, const char *shape, core_dims *dims);
/* None gives NULL with *ok = 1. */
PyObject *core_optional(PyObject *object, const char *name, const char *shape, core_dims *dims, int *ok);
/* Any strides; the caller checks them. */
PyObject *core_strided(PyObject *object, const char *name, const char *shape, core_dims *dims);
int core_ndim(PyObject *array);
int64_t core_size(PyObject *array, int axis);
/* A new array of these sizes (all letters known) where the others are; new reference. zeroed: filled with 0. */
PyObject *core_new(const char *shape, const core_dims *dims, int zeroed);
PyObject *core_new_like(PyObject *array, int zeroed);
/* A list of `n` such arrays, and where each one's data lies. */
PyObject *core_new_list(Py_ssize_t n, const char *shape, const core_dims *dims, ladd_act **data);
/* The result: a new array like core_new when `out` is None or NULL, else `out` checked and with a new reference. */
PyObject *core_output(PyObject *out, const char *shape, core_dims *dims);
PyObject *core_output_like(PyObject *out, PyObject *array);
/* ValueError if `out` shares memory with `input`, except exactly the same memory when in_place. 0 or -1. */
int core_no_overlap(PyObject *out, PyObject *input, const char *name, int in_place);
/* `object` must be an array of the shape of `like`. */
PyObject *core_same_shape(PyObject *object, const char *name, PyObject *like, const char *like_name);
/* A sequence (list or tuple) of exactly `n` items; NULL and an exception, or a PySequence_Fast (new reference). */
PyObject *core_sequence(PyObject *object, const char *name, Py_ssize_t n, const char *meaning);
/* The same, each item checked by core_input and its data put into data[n]; a tuple that keeps them alive (new reference). */
PyObject *core_input_list(PyObject *object, const char *name, Py_ssize_t n, const char *meaning, const char *shape, core_dims *dims,
                          const ladd_act **data);
PyObject *core_int_tuple(const int *values, Py_ssize_t n);
/* Integers of a sequence into out[room], each in [low, high]; returns their number or -1. */
Py_ssize_t core_int_list(PyObject *object, const char *name, int *out, Py_ssize_t room, long low, long high);
int core_int(PyObject *object, const char *name, long low, long high, int *out); /* no bool, no float */
int core_bool(PyObject *object, const char *name, int *out);                     /* True or False only; NULL (not given) leaves *out */
int core_uint64(PyObject *object, const char *name, uint64_t *out);
int core_finite(double value, const char *name);
int core_in_range(double value, const char *name, double low, double high);

/* An '@' array [B] of times. Those of the host must lie in [0, 1]; a device's are not looked at. */
PyObject *core_times(PyObject *object, const char *name, core_dims *dims);

static inline float *core_data(void *array) {
    if (!array) return NULL;
    return core_is_array(array) ? ((core_array *)array)->data : (float *)PyArray_DATA((PyArrayObject *)array);
}

/* An '@' array where a call computes, between core_begin and core_end: its own memory, or a copy on the device that core_numbers_end gives back. */
typedef struct core_numbers {
    const float *data;
    void *block;
} core_numbers;
ladd_status core_numbers_begin(const core_call *call, core_numbers *numbers, PyObject *array);
void core_numbers_end(const core_call *call, core_numbers *numbers);

/* CORE_KERNEL with `array` as an '@' argument: among the arguments it is CORE_NUMBERS. */
#define CORE_NUMBERS (numbers_.data)
#define CORE_KERNEL_NUMBERS(result, dims, array, name, ...)                                     \
    do {                                                                                        \
        core_call call_;                                                                        \
        result = core_begin(&call_, NULL, (dims)->device, (dims)->act);                         \
        if (result == 0) {                                                                      \
            core_numbers numbers_;                                                              \
            ladd_status status_ = core_numbers_begin(&call_, &numbers_, array);                 \
            if (status_ == LADD_OK) status_ = call_.ctx.backend->name(&call_.ctx, __VA_ARGS__); \
            core_numbers_end(&call_, &numbers_);                                                \
            result = core_end(&call_, status_);                                                 \
        }                                                                                       \
    } while (0)

/* float64 numbers that stay where a call computes, in pairs of a float32 array: `count` of them (0: any number), NULL for None. Their number, or -1
 * and an exception. */
int core_doubles(PyObject *object, const char *name, Py_ssize_t count, const core_dims *dims, double **data);
/* The key from seed, purpose and step, an integer, NULL (0), or a counter that stays where a call computes: a pair of a float32 array with the bits
 * of a uint64. 0 or -1. */
int core_rng_key(ladd_rng_key *key, PyObject *seed, PyObject *purpose, PyObject *step, const core_dims *dims);
/* Up to three float64 results of a call: in `out`, where nobody waits for them, or (NULL) in values[] after core_result_end, which waits. Zero at
 * first where `out` is NULL. */
typedef struct core_result {
    double *data, values[3];
    void *block;
} core_result;
ladd_status core_result_begin(const core_call *call, core_result *result, double *out);
ladd_status core_result_end(const core_call *call, core_result *result, ladd_status status);

/* Keys of a configuration mapping: every key is taken once, and core_config_done says which one nobody took. */
typedef struct core_config {
    PyObject *dict; /* a copy; keys are removed as they are read */
    const char *model;
} core_config;
int core_config_begin(core_config *config, const char *model, PyObject *mapping);
/* Each: absent key = *out keeps its default unless required. 0 or -1. core_config_take gives a new reference, or NULL with *ok. */
PyObject *core_config_take(core_config *config, const char *key, int required, int *ok);
int core_config_int(core_config *config, const char *key, int required, long low, long high, int *out);
int core_config_bool(core_config *config, const char *key, int required, int *out);
Py_ssize_t core_config_ints(core_config *config, const char *key, int required, int *out, Py_ssize_t room, long low, long high); /* -2: absent */
int core_config_done(core_config *config); /* ValueError for keys that are left */
void core_config_end(core_config *config);

/* ---- models: model.c ------------------------------------------------------------------------------------------------- */

typedef union core_any_config {
    ladd_mmdit_config mmdit;
    ladd_vae_config vae;
    ladd_disc_config disc;
} core_any_config;

/* What one model differs in; everything else about its two types is in model.c. CORE_KIND writes the functions on void pointers. */
typedef struct core_kind {
    int index; /* in core_state */
    const char *name, *type_name, *saved_type_name, *doc, *saved_doc;
    PyMethodDef *methods, *saved_methods;
    newfunc type_new;
    int (*read_config)(void *config, PyObject *mapping);
    PyObject *(*config_dict)(const void *model);
    ladd_status (*create)(void **model, const void *config);
    void (*model_free)(void *model);
    ladd_status (*init)(void *model, uint64_t seed);
    ladd_params *(*params)(void *model);
    void (*saved_free)(const ladd_context *ctx, void *saved);
} core_kind;

/* Defines `kind` from ladd_<prefix>_create and its fellows and from the file's own read_config, config_dict, model_methods and saved_methods. */
#define CORE_KIND(kind, prefix, index, name, doc, saved_doc)                                                    \
    static int read_config_(void *config, PyObject *mapping) { return read_config(config, mapping); }           \
    static PyObject *config_dict_(const void *model) { return config_dict(ladd_##prefix##_get_config(model)); } \
    static ladd_status create_(void **model, const void *config) {                                              \
        ladd_##prefix *made = NULL;                                                                             \
        ladd_status status = ladd_##prefix##_create(&made, config);                                             \
        *model = made;                                                                                          \
        return status;                                                                                          \
    }                                                                                                           \
    static void free_(void *model) { ladd_##prefix##_free(model); }                                             \
    static ladd_status init_(void *model, uint64_t seed) { return ladd_##prefix##_init(model, seed); }          \
    static ladd_params *params_(void *model) { return ladd_##prefix##_params(model); }                          \
    static void saved_free_(const ladd_context *ctx, void *saved) { ladd_##prefix##_saved_free(ctx, saved); }   \
    static PyObject *new_(PyTypeObject *type, PyObject *args, PyObject *kwargs);                                \
    static const core_kind kind = {index,                                                                       \
                                   name,                                                                        \
                                   "ladd._core." name,                                                          \
                                   "ladd._core." name "Saved",                                                  \
                                   doc,                                                                         \
                                   saved_doc,                                                                   \
                                   model_methods,                                                               \
                                   saved_methods,                                                               \
                                   new_,                                                                        \
                                   read_config_,                                                                \
                                   config_dict_,                                                                \
                                   create_,                                                                     \
                                   free_,                                                                       \
                                   init_,                                                                       \
                                   params_,                                                                     \
                                   saved_free_};                                                                \
    static PyObject *new_(PyTypeObject *type, PyObject *args, PyObject *kwargs) { return core_model_new(type, args, kwargs, &kind); }

/* A model object. It holds no Python reference: config is made from the core's own struct. */
typedef struct core_model {
    PyObject_HEAD const core_kind *kind;
    core_lock lock;
    void *model; /* ladd_mmdit, ladd_vae or ladd_disc */
    ladd_params *params;
    core_device *device; /* NULL: the CPU */
    ladd_dtype compute;  /* the dtype that was asked for */
    ladd_dtype act;      /* of its arrays: the same on a device; on the CPU LADD_F32, there only products are computed in bfloat16 */
} core_model;

/* Sizes of which nothing is known yet, of arrays where the model is. */
static inline core_dims core_place(const core_model *self) { return (core_dims){.device = self->device, .act = self->act, .placed = 1}; }

PyObject *core_model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs, const core_kind *kind);

/* What a forward kept. */
typedef struct core_saved {
    PyObject_HEAD core_model *owner;
    void *saved;    /* NULL: used up */
    core_dims dims; /* of the forward, to check cotangents */
    int n_outputs;  /* 0: one array, else a list of as many */
} core_saved;

core_saved *core_saved_new(core_model *owner, const core_dims *dims, int n_outputs); /* saved is NULL until core_forward_end */
/* Ends the call of a forward: (output, saved or None), or NULL with the exception. `kept` goes to `saved` in either case. */
PyObject *core_forward_end(core_call *call, ladd_status status, PyObject *output, core_saved *saved, void *kept);
/* core_begin for a backward: what was kept, or NULL and an exception. once: it is the caller's own from now on, to be freed, and any further call is
 * refused. params: parameter gradients are made; *status is what that came to. */
void *core_backward_begin(core_call *call, core_saved *self, int once, int params, ladd_status *status);

/* Makes the model's type and the type of what its forward keeps, and adds them to the module. */
int core_add_kind(PyObject *module, core_state *state, const core_kind *kind);

#endif
