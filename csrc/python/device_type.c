/* The type Device: one device of an extension that offers csrc/device.h, its stream, and the ways by which arrays of others come in. */
#include <stdio.h>
#include <string.h>

#include "binding.h"
#include "dlpack.h"

/* ---- what the device's extension asks of Python ----------------------------------------------------------------------- */

static ladd_status report(ladd_status code, const char *sentence) { return ladd_fail(code, "%s", sentence); }

/* ladd.device.locate_library(name) -> path. Called without the GIL, when a kernel first needs the library. */
static ladd_status locate(const char *library, char *path, size_t room) {
    ladd_status status = LADD_ERR_RUNTIME;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *module = PyImport_ImportModule("ladd.device");
    PyObject *found = module ? PyObject_CallMethod(module, "locate_library", "s", library) : NULL;
    const char *text = found && PyUnicode_Check(found) ? PyUnicode_AsUTF8(found) : NULL;
    if (text && snprintf(path, room, "%s", text) < (int)room) status = LADD_OK;
    PyErr_Clear();
    Py_XDECREF(found);
    Py_XDECREF(module);
    PyGILState_Release(gil);
    return status;
}

/* ---- arrays of others ------------------------------------------------------------------------------------------------ */

/* Memory that came in by a protocol. It is given back once the work that was queued before its last use here is done. */
typedef struct guest {
    PyObject_HEAD core_device *device;
    PyObject *owner;         /* a CUDA array interface's object, or NULL */
    DLManagedTensor *tensor; /* DLPack's, or NULL */
} guest;

typedef struct core_waiting {
    struct core_waiting *next;
    void *event;
    PyObject *owner;
    DLManagedTensor *tensor;
} core_waiting; /* event NULL: it ended while calls were recorded, and is marked when they no longer are */

static void give_back(PyObject *owner, DLManagedTensor *tensor) {
    Py_XDECREF(owner);
    if (tensor && tensor->deleter) tensor->deleter(tensor);
}

/* Gives back what is no longer read. */
static void sweep(core_device *device) {
    core_waiting **at = &device->waiting;
    void *before;
    if (!*at || device->recording) return;
    ladd_status usable = device->api->enter(device->state, &before);
    while (*at) {
        core_waiting *one = *at;
        if (!one->event && usable == LADD_OK && device->api->record(device->state, &one->event) != LADD_OK) one->event = NULL;
        if (one->event && !device->api->passed(one->event)) {
            at = &one->next;
            continue;
        }
        *at = one->next;
        give_back(one->owner, one->tensor);
        PyMem_Free(one);
        at = &device->waiting; /* a deleter may have run Python, which may have come here */
    }
    device->api->leave(before);
}

static void guest_dealloc(PyObject *object) {
    guest *self = (guest *)object;
    PyTypeObject *type = Py_TYPE(self);
    core_device *device = self->device;
    core_waiting *one = PyMem_Calloc(1, sizeof *one);
    void *before;
    ladd_status usable = device->api->enter(device->state, &before);
    if (one && usable == LADD_OK && (device->recording || device->api->record(device->state, &one->event) == LADD_OK)) {
        one->owner = self->owner;
        one->tensor = self->tensor;
        one->next = device->waiting;
        device->waiting = one;
    } else { /* no mark could be set: wait here */
        PyMem_Free(one);
        (void)device->api->wait(device->state);
        give_back(self->owner, self->tensor);
    }
    device->api->leave(before);
    sweep(device);
    Py_DECREF(device);
    type->tp_free(self);
    Py_DECREF(type);
}

static guest *guest_new(core_device *device) {
    guest *self = (guest *)device->guest_type->tp_alloc(device->guest_type, 0);
    if (self) self->device = (core_device *)Py_NewRef(device);
    return self;
}

static int is_dense(int ndim, const int64_t *shape, const int64_t *strides) {
    int64_t expected = 1;
    for (int i = ndim - 1; strides && i >= 0; i--) {
        if (shape[i] > 1 && strides[i] != expected) return 0;
        expected *= shape[i];
    }
    return 1;
}

/* What comes in is ordered behind its producer's work, which a recording cannot be. */
static int not_recording(const core_device *device, const char *name) {
    if (!device->recording) return 0;
    PyErr_Format(PyExc_RuntimeError, "%s: expected a DeviceArray made before the recording began, got another library's array", name);
    return -1;
}

static int is_aligned(const char *name, const void *data, ladd_dtype dtype) {
    if ((uintptr_t)data % core_item_size(dtype) == 0) return 1;
    PyErr_Format(PyExc_ValueError, "%s: expected an aligned array, got one at an odd address", name);
    return 0;
}

static PyObject *from_tensor(core_device *device, const char *name, guest *holder, const DLTensor *t) {
    ladd_dtype dtype;
    if (t->dtype.code == DL_FLOAT && t->dtype.bits == 32)
        dtype = LADD_F32;
    else if (t->dtype.code == DL_FLOAT && t->dtype.bits == 16)
        dtype = LADD_F16;
    else if (t->dtype.code == DL_BFLOAT && t->dtype.bits == 16)
        dtype = LADD_BF16;
    else {
        PyErr_Format(PyExc_TypeError, "%s: expected float32, bfloat16 or float16, got DLPack type (%d, %d bits)", name, t->dtype.code, t->dtype.bits);
        return NULL;
    }
    if (t->dtype.lanes != 1 || t->ndim > CORE_MAX_DIMS || !is_dense(t->ndim, t->shape, t->strides)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a dense row-major array of at most %d axes, got another layout (.contiguous() makes one)", name,
                     CORE_MAX_DIMS);
        return NULL;
    }
    char *data = (char *)t->data + t->byte_offset;
    return is_aligned(name, data, dtype) ? core_array_view(device, (PyObject *)holder, NULL, dtype, data, t->ndim, t->shape) : NULL;
}

static int same_device(core_device *device, const char *name, int type, int index) {
    if ((type == DL_CUDA || type == DL_CUDA_MANAGED) && index == device->index) return 0;
    PyErr_Format(PyExc_ValueError, "%s: expected an array on %s, got one on DLPack device (%d, %d)", name, device->label, type, index);
    return -1;
}

static PyObject *device_from_dlpack(PyObject *object, PyObject *args) {
    core_device *self = (core_device *)object;
    PyObject *value, *capsule = NULL, *array = NULL, *empty = NULL, *keywords = NULL, *method = NULL;
    const char *name;
    guest *holder = NULL;
    int type, index;
    if (!PyArg_ParseTuple(args, "Os:from_dlpack", &value, &name)) return NULL;
    PyObject *place = PyObject_CallMethod(value, "__dlpack_device__", NULL);
    int known = place && PyArg_ParseTuple(place, "ii", &type, &index);
    Py_XDECREF(place);
    if (!known || same_device(self, name, type, index) < 0 || not_recording(self, name) < 0) return NULL;
    sweep(self);
    void *stream = self->api->stream(self->state);
    /* The producer makes our stream wait for his work. */
    if (!(empty = PyTuple_New(0)) || !(keywords = Py_BuildValue("{sK}", "stream", (unsigned long long)(uintptr_t)(stream ? stream : (void *)1))))
        goto done;
    if (!(method = PyObject_GetAttrString(value, "__dlpack__")) || !(capsule = PyObject_Call(method, empty, keywords))) goto done;
    DLManagedTensor *tensor = PyCapsule_GetPointer(capsule, "dltensor");
    if (!tensor || !(holder = guest_new(self))) goto done;
    if (PyCapsule_SetName(capsule, "used_dltensor") < 0) goto done;
    holder->tensor = tensor;
    if (same_device(self, name, tensor->dl_tensor.device.device_type, tensor->dl_tensor.device.device_id) == 0)
        array = from_tensor(self, name, holder, &tensor->dl_tensor);
done:
    Py_XDECREF(holder);
    Py_XDECREF(capsule);
    Py_XDECREF(method);
    Py_XDECREF(keywords);
    Py_XDECREF(empty);
    return array;
}

/* From __cuda_array_interface__, whose parts Python has taken apart: (owner, name, pointer, shape, "<f4" or "<f2", stream or None). */
static PyObject *device_from_pointer(PyObject *object, PyObject *args) {
    core_device *self = (core_device *)object;
    PyObject *owner, *shape, *stream;
    const char *name, *kind;
    unsigned long long pointer;
    int sizes[CORE_MAX_DIMS], index = -1;
    int64_t dims[CORE_MAX_DIMS];
    core_call call;
    if (!PyArg_ParseTuple(args, "OsKOsO:from_pointer", &owner, &name, &pointer, &shape, &kind, &stream)) return NULL;
    Py_ssize_t ndim = core_int_list(shape, name, sizes, CORE_MAX_DIMS, 0, 2147483647);
    if (ndim < 0) return NULL;
    for (Py_ssize_t i = 0; i < ndim; i++) dims[i] = sizes[i];
    ladd_dtype dtype = strcmp(kind, "<f2") == 0 ? LADD_F16 : LADD_F32;
    if (strcmp(kind, "<f4") != 0 && strcmp(kind, "<f2") != 0) {
        PyErr_Format(PyExc_TypeError, "%s: expected float32 or float16 ('<f4', '<f2'), got '%s'", name, kind);
        return NULL;
    }
    if (not_recording(self, name) < 0 || !is_aligned(name, (const void *)(uintptr_t)pointer, dtype)) return NULL;
    unsigned long long from = stream == Py_None ? 0 : PyLong_AsUnsignedLongLong(stream);
    if (from == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    sweep(self);
    if (core_begin(&call, NULL, self, dtype) < 0) return NULL;
    ladd_status status = self->api->owner_of((const void *)(uintptr_t)pointer, &index);
    if (status == LADD_OK && index == self->index && from) status = self->api->wait_for(self->state, (void *)(uintptr_t)from);
    if (core_end(&call, status) < 0) return NULL;
    if (index != self->index) {
        PyErr_Format(PyExc_ValueError, index < 0 ? "%s: expected an array on %s, got host memory" : "%s: expected an array on %s, got one on cuda:%d",
                     name, self->label, index);
        return NULL;
    }
    guest *holder = guest_new(self);
    if (!holder) return NULL;
    holder->owner = Py_NewRef(owner);
    PyObject *array = core_array_view(self, (PyObject *)holder, NULL, dtype, (void *)(uintptr_t)pointer, (int)ndim, dims);
    Py_DECREF(holder);
    return array;
}

/* ---- life ------------------------------------------------------------------------------------------------------------ */

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"provider", "index", NULL};
    PyObject *capsule;
    int index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oi:Device", names, &capsule, &index)) return NULL;
    const ladd_device_api *api = PyCapsule_GetPointer(capsule, LADD_DEVICE_CAPSULE);
    if (!api) return NULL;
    if (api->version != LADD_DEVICE_API || api->kernels != sizeof(ladd_backend)) {
        PyErr_SetString(PyExc_ImportError, "the device's extension and ladd._core expected from one build, got two; build ladd again");
        return NULL;
    }
    core_state *state = core_state_of(type);
    core_device *self = (core_device *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->api = api;
    self->provider = Py_NewRef(capsule);
    self->index = index;
    self->array_type = (PyTypeObject *)Py_NewRef(state->array_type);
    self->guest_type = (PyTypeObject *)Py_NewRef(state->guest_type);
    snprintf(self->label, sizeof self->label, "cuda:%d", index);
    if (core_lock_init(&self->lock) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    ladd_status status;
    void *opened = NULL;
    Py_BEGIN_ALLOW_THREADS;
    api->connect(report, locate);
    status = api->open(&opened, index);
    Py_END_ALLOW_THREADS;
    self->state = opened;
    if (status == LADD_OK) return (PyObject *)self;
    core_raise(status);
    Py_DECREF(self);
    return NULL;
}

static void device_dealloc(PyObject *object) {
    core_device *self = (core_device *)object;
    PyTypeObject *type = Py_TYPE(self);
    if (self->state) {
        void *before;
        if (self->api->enter(self->state, &before) == LADD_OK) (void)self->api->wait(self->state);
        sweep(self);
        self->api->close(self->state);
        self->api->leave(before);
    }
    core_lock_free(&self->lock);
    Py_XDECREF(self->array_type);
    Py_XDECREF(self->guest_type);
    Py_XDECREF(self->provider);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- methods --------------------------------------------------------------------------------------------------------- */

static PyObject *device_info(PyObject *object, PyObject *unused) {
    (void)unused;
    core_device *self = (core_device *)object;
    ladd_device_info info;
    core_call call;
    if (core_begin(&call, NULL, self, LADD_F32) < 0 || core_end(&call, self->api->info(self->state, &info)) < 0) return NULL;
    return Py_BuildValue("{ss ss si si si sn sn}", "name", info.name, "architectures", info.architectures, "capability", info.capability, "driver",
                         info.driver, "runtime", info.runtime, "memory_free", (Py_ssize_t)info.memory_free, "memory_total",
                         (Py_ssize_t)info.memory_total);
}

static PyObject *device_wait(PyObject *object, PyObject *unused) {
    (void)unused;
    core_device *self = (core_device *)object;
    core_call call;
    if (core_begin(&call, NULL, self, LADD_F32) < 0 || core_end(&call, self->api->wait(self->state)) < 0) return NULL;
    sweep(self);
    Py_RETURN_NONE;
}

static PyObject *device_use_stream(PyObject *object, PyObject *handle) {
    core_device *self = (core_device *)object;
    unsigned long long stream = handle == Py_None ? 0 : PyLong_AsUnsignedLongLong(handle);
    core_call call;
    if (stream == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    if (core_begin(&call, NULL, self, LADD_F32) < 0) return NULL;
    void *before = self->api->stream(self->state);
    self->api->use_stream(self->state, (void *)(uintptr_t)stream, handle == Py_None);
    /* Work goes on in order: memory that was given back on the old stream may be handed out on the new one. */
    ladd_status status = self->api->wait_for(self->state, before);
    if (status != LADD_OK) self->api->use_stream(self->state, before, 0);
    if (core_end(&call, status) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *device_empty(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"shape", "dtype", "zeroed", NULL};
    PyObject *shape, *dtype_given = NULL, *zeroed_given = NULL;
    int sizes[CORE_MAX_DIMS], zeroed = 0;
    int64_t dims[CORE_MAX_DIMS];
    ladd_dtype dtype = LADD_F32;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:empty", names, &shape, &dtype_given, &zeroed_given)) return NULL;
    Py_ssize_t ndim = core_int_list(shape, "shape", sizes, CORE_MAX_DIMS, 0, 2147483647);
    if (ndim < 0 || (dtype_given && core_dtype(dtype_given, "dtype", &dtype) < 0) || core_bool(zeroed_given, "zeroed", &zeroed) < 0) return NULL;
    for (Py_ssize_t i = 0; i < ndim; i++) dims[i] = sizes[i];
    return core_array_new((core_device *)object, dtype, (int)ndim, dims, zeroed);
}

static void graph_capsule_end(PyObject *capsule) {
    core_device *device = PyCapsule_GetContext(capsule);
    void *before;
    (void)device->api->enter(device->state, &before);
    device->api->graph_free(PyCapsule_GetPointer(capsule, "ladd.graph"));
    device->api->leave(before);
    Py_DECREF(device);
}

static PyObject *device_capture_begin(PyObject *object, PyObject *unused) {
    (void)unused;
    core_device *self = (core_device *)object;
    core_call call;
    if (core_begin(&call, NULL, self, LADD_F32) < 0) return NULL;
    ladd_status status = self->api->capture_begin(self->state);
    if (status == LADD_OK) self->recording = 1;
    if (core_end(&call, status) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *device_capture_end(PyObject *object, PyObject *unused) {
    (void)unused;
    core_device *self = (core_device *)object;
    core_call call;
    void *graph = NULL;
    if (core_begin(&call, NULL, self, LADD_F32) < 0) return NULL;
    self->recording = 0;
    int ended = core_end(&call, self->api->capture_end(self->state, &graph));
    sweep(self);
    if (ended < 0) return NULL;
    PyObject *capsule = PyCapsule_New(graph, "ladd.graph", graph_capsule_end);
    if (!capsule)
        self->api->graph_free(graph);
    else
        PyCapsule_SetContext(capsule, Py_NewRef(self));
    return capsule;
}

static PyObject *device_replay(PyObject *object, PyObject *capsule) {
    core_device *self = (core_device *)object;
    core_call call;
    void *graph = PyCapsule_GetPointer(capsule, "ladd.graph");
    if (!graph || core_begin(&call, NULL, self, LADD_F32) < 0 || core_end(&call, self->api->replay(self->state, graph)) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *device_set_attention(PyObject *object, PyObject *given) {
    core_device *self = (core_device *)object;
    ladd_attention_rule rules[LADD_ATTENTION_RULES];
    core_call call;
    PyObject *list = PySequence_Fast(given, "attention rules: expected a sequence");
    Py_ssize_t n = list ? PySequence_Fast_GET_SIZE(list) : -1;
    if (n > LADD_ATTENTION_RULES) {
        PyErr_Format(PyExc_ValueError, "attention rules: at most %d for one device expected, got %zd", LADD_ATTENTION_RULES, n);
        n = -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        ladd_attention_rule *r = &rules[i];
        PyObject *row = PySequence_Fast_GET_ITEM(list, i), *dtype;
        if (!PyTuple_Check(row))
            PyErr_Format(PyExc_TypeError, "attention rules: tuples expected, got %.100s", Py_TYPE(row)->tp_name);
        else if (PyArg_ParseTuple(row, "Oipiip:set_attention", &dtype, &r->dh, &r->backward, &r->least, &r->most, &r->cudnn) &&
                 core_dtype(dtype, "dtype", &r->act) == 0)
            continue;
        n = -1;
    }
    Py_XDECREF(list);
    if (n < 0 || core_begin(&call, NULL, self, LADD_F32) < 0 || core_end(&call, self->api->attention_rules(self->state, rules, (int)n)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *device_index(PyObject *object, void *unused) {
    (void)unused;
    return PyLong_FromLong(((core_device *)object)->index);
}
static PyObject *device_stream(PyObject *object, void *unused) {
    (void)unused;
    core_device *self = (core_device *)object;
    return PyLong_FromVoidPtr(self->api->stream(self->state));
}
static PyObject *device_str(PyObject *object) { return PyUnicode_FromString(((core_device *)object)->label); }

static PyMethodDef methods[] = {
    {"info", device_info, METH_NOARGS, "info() -> dict: name, compute capability, versions, memory"},
    {"wait", device_wait, METH_NOARGS, "wait(): until all that was queued is done"},
    {"use_stream", device_use_stream, METH_O, "use_stream(handle): the CUDA stream that work goes to from now on; None: the device's own"},
    CORE_METHOD("empty", device_empty, "empty(shape, dtype='float32', zeroed=False) -> DeviceArray"),
    {"from_dlpack", device_from_dlpack, METH_VARARGS, "from_dlpack(value, name) -> DeviceArray on the same memory"},
    {"from_pointer", device_from_pointer, METH_VARARGS, "from_pointer(owner, name, pointer, shape, typestr, stream) -> DeviceArray on that memory"},
    {"set_attention", device_set_attention, METH_O,
     "set_attention([(dtype, head_dim, backward, least, most, cudnn)]): which engine serves attention; the first that fits decides"},
    {"capture_begin", device_capture_begin, METH_NOARGS, "capture_begin(): calls are recorded and not run until capture_end()"},
    {"capture_end", device_capture_end, METH_NOARGS, "capture_end() -> graph"},
    {"replay", device_replay, METH_O, "replay(graph): runs what was recorded, on the same memory"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"index", device_index, NULL, "number of the device", NULL},
    {"stream", device_stream, NULL, "handle of the CUDA stream in use", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int core_add_device(PyObject *module, core_state *state) {
    static char doc[] = "Device(provider, index): one device, opened. ladd.device.get() keeps one object a device.";
    PyType_Slot slots[] = {{Py_tp_doc, doc},       {Py_tp_new, device_new}, {Py_tp_dealloc, device_dealloc}, {Py_tp_methods, methods},
                           {Py_tp_getset, getset}, {Py_tp_str, device_str}, {Py_tp_repr, device_str},        {0, NULL}};
    PyType_Spec spec = {
        .name = "ladd._core.Device", .basicsize = sizeof(core_device), .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots};
    PyType_Slot guest_slots[] = {{Py_tp_dealloc, guest_dealloc}, {0, NULL}};
    PyType_Spec guest_spec = {.name = "ladd._core.Guest",
                              .basicsize = sizeof(guest),
                              .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                              .slots = guest_slots};
    state->device_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    state->guest_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &guest_spec, NULL);
    if (!state->device_type || !state->guest_type) return -1;
    return PyModule_AddType(module, state->device_type);
}
