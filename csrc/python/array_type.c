/* The type DeviceArray: a dense block of a device's memory with shape and element type, what results on a device are. It computes nothing; it gives
 * its memory to whoever speaks DLPack or the CUDA array interface, takes views along the first axis, and copies to and from the host. */
#include <limits.h>
#include <string.h>

#include "binding.h"
#include "dlpack.h"

#define DEFAULT_STREAM ((void *)(intptr_t)1) /* CUDA's and DLPack's name of the legacy default stream */

static const char *const dtype_names[] = {"float32", "bfloat16", "float16"};

int core_is_array(PyObject *object) { return Py_TYPE(object)->tp_dealloc == core_array_dealloc; }
size_t core_item_size(ladd_dtype dtype) { return dtype == LADD_F32 ? 4 : 2; }
const char *core_dtype_name(ladd_dtype dtype) { return dtype_names[dtype]; }

int core_dtype(PyObject *object, const char *name, ladd_dtype *out) {
    for (int i = 0; i < 3; i++)
        if (PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, dtype_names[i]) == 0) {
            *out = (ladd_dtype)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "%s: expected 'float32', 'bfloat16' or 'float16', got %R", name, object);
    return -1;
}

/* ---- life ------------------------------------------------------------------------------------------------------------ */

static core_array *array_object(core_device *device, ladd_dtype dtype, int ndim, const int64_t *shape) {
    core_array *self = (core_array *)device->array_type->tp_alloc(device->array_type, 0);
    if (!self) return NULL;
    self->device = (core_device *)Py_NewRef(device);
    self->dtype = dtype;
    self->ndim = ndim;
    self->count = 1;
    for (int i = 0; i < ndim; i++) {
        self->shape[i] = shape[i];
        self->count *= shape[i];
    }
    return self;
}

PyObject *core_array_new(core_device *device, ladd_dtype dtype, int ndim, const int64_t *shape, int zeroed) {
    core_array *self = array_object(device, dtype, ndim, shape);
    core_call call;
    void *block = NULL;
    if (!self || core_begin(&call, NULL, device, dtype) < 0) goto failed;
    ladd_status status = call.ctx.backend->alloc(&call.ctx, &block, (size_t)self->count * core_item_size(dtype));
    if (status == LADD_OK && zeroed) status = call.ctx.backend->zero(&call.ctx, block, self->count);
    self->data = block;
    if (core_end(&call, status) == 0) return (PyObject *)self;
failed:
    Py_XDECREF(self);
    return NULL;
}

PyObject *core_array_view(core_device *device, PyObject *base, int *stale, ladd_dtype dtype, void *data, int ndim, const int64_t *shape) {
    core_array *self = array_object(device, dtype, ndim, shape);
    if (!self) return NULL;
    self->data = data;
    self->base = Py_NewRef(base);
    self->stale = stale;
    return (PyObject *)self;
}

/* What is queued from now on waits for what `stream` holds. For destructors: a failure shows at the device's next call. */
static void wait_for(const core_device *device, void *stream) {
    void *before;
    if (device->api->enter(device->state, &before) == LADD_OK) (void)device->api->wait_for(device->state, stream);
    device->api->leave(before);
}

void core_array_dealloc(PyObject *object) {
    core_array *self = (core_array *)object;
    PyTypeObject *type = Py_TYPE(self);
    /* The stream is not known: the default one waits for all that were made to wait for it. */
    if (self->lent) wait_for(self->device, DEFAULT_STREAM);
    if (self->data && !self->base) {
        const core_device *device = self->device;
        ladd_context ctx = core_context(device, self->dtype);
        ctx.backend->release(&ctx, self->data);
    }
    Py_XDECREF(self->base);
    Py_XDECREF(self->device);
    type->tp_free(self);
    Py_DECREF(type);
}

void core_array_written(core_array *self) {
    if (self->stale && *self->stale == 0) *self->stale = 1;
}

/* ---- to and from the host -------------------------------------------------------------------------------------------- */

static size_t bytes_of(const core_array *self) { return (size_t)self->count * core_item_size(self->dtype); }

/* As float32, whatever the element type: NumPy has no bfloat16. */
static PyObject *array_numpy(PyObject *object, PyObject *unused) {
    (void)unused;
    core_array *self = (core_array *)object;
    npy_intp sizes[CORE_MAX_DIMS];
    for (int i = 0; i < self->ndim; i++) sizes[i] = (npy_intp)self->shape[i];
    PyObject *result = PyArray_EMPTY(self->ndim, sizes, NPY_FLOAT32, 0);
    core_call call;
    if (!result || core_begin(&call, NULL, self->device, self->dtype) < 0) goto failed;
    const ladd_context *ctx = &call.ctx;
    size_t bytes = (size_t)self->count * sizeof(float);
    void *wide = self->data;
    ladd_status status = LADD_OK;
    if (self->dtype != LADD_F32) {
        status = ctx->backend->alloc(ctx, &wide, bytes);
        if (status == LADD_OK) status = ctx->backend->to_float(ctx, wide, self->data, self->count);
    }
    if (status == LADD_OK && bytes) status = ctx->backend->download(ctx, PyArray_DATA((PyArrayObject *)result), wide, bytes);
    if (wide && wide != self->data) ctx->backend->release(ctx, wide);
    if (core_end(&call, status) == 0) return result;
failed:
    Py_XDECREF(result);
    return NULL;
}

/* self = value, an array of the same shape: float32 of the host, or of this device with any element type. */
static int assign(core_array *self, PyObject *value) {
    core_call call;
    core_array *from = core_is_array(value) ? (core_array *)value : NULL;
    PyArrayObject *host = NULL;
    ladd_status status = LADD_OK;
    void *wide = NULL;
    int result = -1;
    if (from) {
        if (from->device != self->device) {
            PyErr_Format(PyExc_ValueError, "a value on %s expected, got one on %s", self->device->label, from->device->label);
            return -1;
        }
    } else {
        host = (PyArrayObject *)PyArray_FROMANY(value, NPY_FLOAT32, 0, 0, NPY_ARRAY_CARRAY_RO);
        if (!host) return -1;
    }
    int scalar = host && PyArray_NDIM(host) == 0, same = (from ? from->ndim : PyArray_NDIM(host)) == self->ndim;
    for (int i = 0; same && i < self->ndim; i++) same = (from ? from->shape[i] : (int64_t)PyArray_DIM(host, i)) == self->shape[i];
    if (!same && !(scalar && *(float *)PyArray_DATA(host) == 0.0f)) {
        PyErr_Format(PyExc_ValueError, "a value of the shape of %R, or 0, expected, got another shape or number", self);
        goto done;
    }
    if (self->count == 0) {
        result = 0;
        goto done;
    }
    /* Conversions go through float; the context's compute type is the narrow side. */
    ladd_dtype narrow = self->dtype != LADD_F32 ? self->dtype : (from ? from->dtype : LADD_F32);
    if (core_begin(&call, NULL, self->device, narrow) < 0) goto done;
    const ladd_context *ctx = &call.ctx;
    size_t wide_bytes = (size_t)self->count * sizeof(float);
    if (scalar) {
        ladd_context own = core_context(self->device, self->dtype);
        status = own.backend->zero(&own, self->data, self->count);
    } else if (from && from->dtype == self->dtype) {
        ladd_context own = core_context(self->device, self->dtype);
        status = own.backend->copy(&own, self->data, from->data, self->count);
    } else if (from && self->dtype == LADD_F32) {
        status = ctx->backend->to_float(ctx, self->data, from->data, self->count);
    } else if (from && from->dtype == LADD_F32) {
        status = ctx->backend->to_act(ctx, self->data, from->data, self->count);
    } else if (from) { /* bfloat16 <-> float16 */
        ladd_context source = core_context(self->device, from->dtype);
        status = ctx->backend->alloc(ctx, &wide, wide_bytes);
        if (status == LADD_OK) status = source.backend->to_float(&source, wide, from->data, self->count);
        if (status == LADD_OK) status = ctx->backend->to_act(ctx, self->data, wide, self->count);
    } else if (self->dtype == LADD_F32) {
        status = ctx->backend->upload(ctx, self->data, PyArray_DATA(host), wide_bytes);
    } else {
        status = ctx->backend->alloc(ctx, &wide, wide_bytes);
        if (status == LADD_OK) status = ctx->backend->upload(ctx, wide, PyArray_DATA(host), wide_bytes);
        if (status == LADD_OK) status = ctx->backend->to_act(ctx, self->data, wide, self->count);
    }
    if (wide) ctx->backend->release(ctx, wide);
    result = core_end(&call, status);
    core_array_written(self);
done:
    Py_XDECREF(host);
    return result;
}

/* ---- views and copies ------------------------------------------------------------------------------------------------ */

static Py_ssize_t array_length(PyObject *object) {
    core_array *self = (core_array *)object;
    if (self->ndim == 0) {
        PyErr_SetString(PyExc_TypeError, "an array with axes expected, a single number has no length");
        return -1;
    }
    return (Py_ssize_t)self->shape[0];
}

/* [...], [:] the whole; [a:b] rows; [i] one row. Always a view. */
static PyObject *array_part(PyObject *object, PyObject *key) {
    core_array *self = (core_array *)object;
    Py_ssize_t start = 0, stop = self->ndim ? (Py_ssize_t)self->shape[0] : 0, step = 1;
    if (key == Py_Ellipsis) return Py_NewRef(object);
    if (self->ndim == 0 || (!PySlice_Check(key) && !PyIndex_Check(key))) {
        PyErr_Format(
            PyExc_TypeError,
            "a slice or number of the first axis expected, got %R; a DeviceArray goes into torch or cupy by DLPack, or to the host by .numpy()", key);
        return NULL;
    }
    int64_t shape[CORE_MAX_DIMS], row = self->count && self->shape[0] ? self->count / self->shape[0] : 0;
    memcpy(shape, self->shape, sizeof shape);
    int drop = 0;
    if (PySlice_Check(key)) {
        if (PySlice_Unpack(key, &start, &stop, &step) < 0) return NULL;
        Py_ssize_t length = PySlice_AdjustIndices((Py_ssize_t)self->shape[0], &start, &stop, step);
        if (step != 1) {
            PyErr_SetString(PyExc_ValueError, "a slice of step 1 expected: a DeviceArray is dense");
            return NULL;
        }
        shape[0] = length;
    } else {
        start = PyNumber_AsSsize_t(key, PyExc_IndexError);
        if (start == -1 && PyErr_Occurred()) return NULL;
        if (start < 0) start += (Py_ssize_t)self->shape[0];
        if (start < 0 || start >= self->shape[0]) {
            PyErr_Format(PyExc_IndexError, "a row in [0, %lld) expected, got %R", (long long)self->shape[0], key);
            return NULL;
        }
        drop = 1;
    }
    char *data = (char *)self->data + (size_t)start * (size_t)row * core_item_size(self->dtype);
    return core_array_view(self->device, self->base ? self->base : object, self->stale, self->dtype, data, self->ndim - drop, shape + drop);
}

static int array_set_part(PyObject *object, PyObject *key, PyObject *value) {
    if (!value) {
        PyErr_SetString(PyExc_TypeError, "a DeviceArray's parts cannot be deleted");
        return -1;
    }
    PyObject *part = array_part(object, key);
    if (!part) return -1;
    int result = assign((core_array *)part, value);
    Py_DECREF(part);
    return result;
}

static PyObject *array_reshape(PyObject *object, PyObject *args) {
    core_array *self = (core_array *)object;
    int sizes[CORE_MAX_DIMS], open = -1;
    int64_t shape[CORE_MAX_DIMS], known = 1;
    PyObject *given = PyTuple_GET_SIZE(args) == 1 && PyTuple_Check(PyTuple_GET_ITEM(args, 0)) ? PyTuple_GET_ITEM(args, 0) : args;
    Py_ssize_t n = core_int_list(given, "shape", sizes, CORE_MAX_DIMS, -1, INT_MAX);
    if (n < 0) return NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        shape[i] = sizes[i];
        if (sizes[i] == -1 && open < 0)
            open = (int)i;
        else
            known *= sizes[i];
    }
    if (open >= 0) shape[open] = known > 0 ? self->count / known : 0;
    if (known < 0 || (open >= 0 ? known * shape[open] : known) != self->count) {
        PyErr_Format(PyExc_ValueError, "shape: expected sizes whose product is %lld, got %R", (long long)self->count, given);
        return NULL;
    }
    return core_array_view(self->device, self->base ? self->base : object, self->stale, self->dtype, self->data, (int)n, shape);
}

static PyObject *converted(core_array *self, ladd_dtype dtype) {
    PyObject *copy = core_array_new(self->device, dtype, self->ndim, self->shape, 0);
    if (copy && assign((core_array *)copy, (PyObject *)self) < 0) Py_CLEAR(copy);
    return copy;
}

static PyObject *array_copy(PyObject *object, PyObject *unused) {
    (void)unused;
    return converted((core_array *)object, ((core_array *)object)->dtype);
}

static PyObject *array_astype(PyObject *object, PyObject *argument) {
    ladd_dtype dtype;
    return core_dtype(argument, "dtype", &dtype) < 0 ? NULL : converted((core_array *)object, dtype);
}

/* ---- interchange ----------------------------------------------------------------------------------------------------- */

/* What a consumer of DLPack holds: the array stays alive until he lets go. */
typedef struct lease {
    DLManagedTensor tensor;
    int64_t shape[CORE_MAX_DIMS], strides[CORE_MAX_DIMS];
    PyObject *array;
    int ordered; /* 1: he said on which stream he works */
    void *stream;
} lease;

static void lease_end(DLManagedTensor *tensor) {
    lease *held = tensor->manager_ctx;
    PyGILState_STATE gil = PyGILState_Ensure();
    /* What he queued there may not be done yet, and the memory may be handed out again. */
    if (held->ordered) wait_for(((core_array *)held->array)->device, held->stream);
    Py_DECREF(held->array);
    PyMem_Free(held);
    PyGILState_Release(gil);
}

static void capsule_end(PyObject *capsule) { /* nobody took it */
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    DLManagedTensor *tensor = PyCapsule_GetPointer(capsule, "dltensor");
    tensor->deleter(tensor);
}

static DLDataType dl_type(ladd_dtype dtype) {
    return (DLDataType){.code = dtype == LADD_BF16 ? DL_BFLOAT : DL_FLOAT, .bits = (uint8_t)(8 * core_item_size(dtype)), .lanes = 1};
}

/* stream: None or 1 the legacy default stream, 2 the thread's default, -1 no ordering wanted, else a handle. */
static PyObject *array_dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    core_array *self = (core_array *)object;
    PyObject *stream = Py_None, *version = Py_None, *place = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &version, &place, &copy)) return NULL;
    int device_type, index;
    if (place != Py_None && (!PyArg_ParseTuple(place, "ii", &device_type, &index) || device_type != DL_CUDA || index != self->device->index)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_BufferError, "dl_device: expected None or (2, %d), got %R; .numpy() copies to the host", self->device->index, place);
        return NULL;
    }
    if (copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "copy: expected None or False, got True; .copy() makes one");
        return NULL;
    }
    long long handle = stream == Py_None ? 1 : PyLong_AsLongLong(stream);
    if (handle == -1 && PyErr_Occurred()) return NULL;
    if (handle == 0 || handle < -1) {
        PyErr_Format(PyExc_ValueError, "stream: expected None, 1, 2, -1 or a handle, got %lld%s", handle,
                     handle ? "" : ", which DLPack leaves without a meaning for CUDA");
        return NULL;
    }
    void *consumer = (void *)(intptr_t)handle; /* 1 and 2 are CUDA's own names of the default streams too */
    if (handle != -1) {
        core_call call;
        if (core_begin(&call, NULL, self->device, self->dtype) < 0) return NULL;
        if (core_end(&call, self->device->api->let_wait(self->device->state, consumer)) < 0) return NULL;
    }
    lease *held = PyMem_Calloc(1, sizeof *held);
    if (!held) return PyErr_NoMemory();
    int64_t stride = 1;
    for (int i = self->ndim - 1; i >= 0; i--) {
        held->shape[i] = self->shape[i];
        held->strides[i] = stride;
        stride *= self->shape[i];
    }
    held->array = Py_NewRef(object);
    held->ordered = handle != -1;
    held->stream = consumer;
    held->tensor = (DLManagedTensor){.dl_tensor = {.data = self->data,
                                                   .device = {DL_CUDA, self->device->index},
                                                   .ndim = self->ndim,
                                                   .dtype = dl_type(self->dtype),
                                                   .shape = held->shape,
                                                   .strides = held->strides,
                                                   .byte_offset = 0},
                                     .manager_ctx = held,
                                     .deleter = lease_end};
    if (self->stale) *self->stale = 2;
    PyObject *capsule = PyCapsule_New(&held->tensor, "dltensor", capsule_end);
    if (!capsule) lease_end(&held->tensor);
    return capsule;
}

static PyObject *array_dlpack_device(PyObject *object, PyObject *unused) {
    (void)unused;
    return Py_BuildValue("ii", DL_CUDA, ((core_array *)object)->device->index);
}

static PyObject *shape_tuple(const core_array *self) {
    PyObject *shape = PyTuple_New(self->ndim);
    for (int i = 0; shape && i < self->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(self->shape[i]);
        if (size)
            PyTuple_SET_ITEM(shape, i, size);
        else
            Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *array_interface(PyObject *object, void *unused) {
    (void)unused;
    core_array *self = (core_array *)object;
    if (self->dtype == LADD_BF16) { /* an AttributeError: then the attribute does not exist, as the protocol wants */
        PyErr_SetString(PyExc_AttributeError, "__cuda_array_interface__ has no bfloat16; DLPack has");
        return NULL;
    }
    if (self->stale) *self->stale = 2;
    self->lent = 1;
    void *stream = self->device->api->stream(self->device->state);
    return Py_BuildValue("{sN ss s(NO) sO si sK}", "shape", shape_tuple(self), "typestr", self->dtype == LADD_F32 ? "<f4" : "<f2", "data",
                         PyLong_FromVoidPtr(self->data), Py_False, "strides", Py_None, "version", 3, "stream",
                         (unsigned long long)(uintptr_t)(stream ? stream : (void *)1));
}

/* np.asarray(x) would otherwise make an array of one object: a silent mistake. */
static PyObject *array_no_numpy(PyObject *object, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    PyErr_Format(PyExc_TypeError, "an array in host memory expected, got one on %s; .numpy() copies it", ((core_array *)object)->device->label);
    return NULL;
}

/* ---- type ------------------------------------------------------------------------------------------------------------ */

static PyObject *array_shape(PyObject *object, void *unused) {
    (void)unused;
    return shape_tuple((core_array *)object);
}
static PyObject *array_dtype(PyObject *object, void *unused) {
    (void)unused;
    return PyUnicode_FromString(dtype_names[((core_array *)object)->dtype]);
}
static PyObject *array_device(PyObject *object, void *unused) {
    (void)unused;
    return Py_NewRef(((core_array *)object)->device);
}
static PyObject *array_ndim(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromLong(((core_array *)object)->ndim);
}
static PyObject *array_size(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromLongLong(((core_array *)object)->count);
}
static PyObject *array_nbytes(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(bytes_of((core_array *)object));
}

static PyObject *array_repr(PyObject *object) {
    core_array *self = (core_array *)object;
    PyObject *shape = shape_tuple(self);
    PyObject *text = shape ? PyUnicode_FromFormat("<ladd.DeviceArray %R %s on %s>", shape, dtype_names[self->dtype], self->device->label) : NULL;
    Py_XDECREF(shape);
    return text;
}

static PyMethodDef methods[] = {
    {"numpy", array_numpy, METH_NOARGS, "numpy() -> float32 ndarray, a copy; waits for the device"},
    {"copy", array_copy, METH_NOARGS, "copy() -> DeviceArray of its own memory"},
    {"astype", array_astype, METH_O, "astype(dtype) -> DeviceArray, a copy as 'float32', 'bfloat16' or 'float16'"},
    {"reshape", array_reshape, METH_VARARGS, "reshape(*shape) -> view"},
    CORE_METHOD("__dlpack__", array_dlpack, "__dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None) -> capsule"),
    {"__dlpack_device__", array_dlpack_device, METH_NOARGS, "__dlpack_device__() -> (2, index)"},
    CORE_METHOD("__array__", array_no_numpy, "refused: .numpy() says that it copies and waits"),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"shape", array_shape, NULL, "sizes", NULL},
    {"dtype", array_dtype, NULL, "'float32', 'bfloat16' or 'float16'", NULL},
    {"device", array_device, NULL, "the Device whose memory it is", NULL},
    {"ndim", array_ndim, NULL, "number of axes", NULL},
    {"size", array_size, NULL, "number of elements", NULL},
    {"nbytes", array_nbytes, NULL, "bytes", NULL},
    {"__cuda_array_interface__", array_interface, NULL, "version 3", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int core_add_array(PyObject *module, core_state *state) {
    static char doc[] = "An array on a device. Made by models and by Device; [a:b] and reshape are views, x[...] = y copies into it.";
    PyType_Slot slots[] = {{Py_tp_doc, doc},
                           {Py_tp_dealloc, core_array_dealloc},
                           {Py_tp_methods, methods},
                           {Py_tp_getset, getset},
                           {Py_tp_repr, array_repr},
                           {Py_mp_length, array_length},
                           {Py_mp_subscript, array_part},
                           {Py_mp_ass_subscript, array_set_part},
                           {0, NULL}};
    PyType_Spec spec = {.name = "ladd.DeviceArray",
                        .basicsize = sizeof(core_array),
                        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                        .slots = slots};
    state->array_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    return state->array_type ? PyModule_AddType(module, state->array_type) : -1;
}
