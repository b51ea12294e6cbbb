/* What MMDiT, AutoencoderKL and Discriminator share: the type Model with the parameter tables, and the objects that keep a forward for its backward.
 */
#include "binding.h"

/* ---- life ------------------------------------------------------------------------------------------------------------ */

PyObject *core_model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs, const core_kind *kind) {
    static char *names[] = {"config", "device", "dtype", NULL};
    PyObject *mapping, *device = Py_None, *dtype = NULL;
    core_any_config config;
    ladd_dtype compute = LADD_F32;
    char format[64];
    snprintf(format, sizeof format, "O|OO:%s", kind->name);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &mapping, &device, &dtype) || kind->read_config(&config, mapping) < 0) return NULL;
    if (dtype && core_dtype(dtype, "dtype", &compute) < 0) return NULL;
    if (device != Py_None && !PyObject_TypeCheck(device, core_state_of(type)->device_type)) {
        PyErr_Format(PyExc_TypeError, "device: expected None or a Device, got %R", device);
        return NULL;
    }
    if (device == Py_None && !ladd_cpu_backend(compute)) {
        core_raise(LADD_ERR_VALUE);
        return NULL;
    }
    core_model *self = (core_model *)type->tp_alloc(type, 0); /* fields are zero */
    if (!self) return NULL;
    self->kind = kind;
    self->compute = compute;
    self->act = device == Py_None ? LADD_F32 : compute;
    if (device != Py_None) self->device = (core_device *)Py_NewRef(device);
    ladd_status status;
    if (core_lock_init(&self->lock) < 0) goto failed;
    Py_BEGIN_ALLOW_THREADS;
    status = kind->create(&self->model, &config);
    Py_END_ALLOW_THREADS;
    if (status != LADD_OK) {
        core_raise(status);
        goto failed;
    }
    self->params = kind->params(self->model);
    if (self->device) {
        core_call call;
        if (core_begin(&call, NULL, self->device, compute) < 0 || core_end(&call, ladd_params_place(&call.ctx, self->params)) < 0) goto failed;
    }
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

static void model_dealloc(PyObject *object) {
    core_model *self = (core_model *)object;
    PyTypeObject *type = Py_TYPE(self);
    if (self->model) self->kind->model_free(self->model);
    core_lock_free(&self->lock);
    Py_XDECREF(self->device);
    type->tp_free(self);
    Py_DECREF(type);
}

core_saved *core_saved_new(core_model *owner, const core_dims *dims, int n_outputs) {
    PyTypeObject *type = core_state_of(Py_TYPE(owner))->saved_types[owner->kind->index];
    core_saved *self = (core_saved *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->owner = (core_model *)Py_NewRef(owner);
    self->dims = *dims;
    self->n_outputs = n_outputs;
    return self;
}

static void saved_dealloc(PyObject *object) {
    core_saved *self = (core_saved *)object;
    PyTypeObject *type = Py_TYPE(self);
    if (self->saved) {
        ladd_context ctx = core_context(self->owner->device, self->owner->compute);
        self->owner->kind->saved_free(&ctx, self->saved);
    }
    Py_XDECREF(self->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- forward and backward -------------------------------------------------------------------------------------------- */

PyObject *core_forward_end(core_call *call, ladd_status status, PyObject *output, core_saved *saved, void *kept) {
    int failed = core_end(call, status);
    if (saved) saved->saved = kept;
    return failed < 0 ? NULL : PyTuple_Pack(2, output, saved ? (PyObject *)saved : Py_None);
}

void *core_backward_begin(core_call *call, core_saved *self, int once, int params, ladd_status *status) {
    void *saved = self->saved;
    if (!saved) {
        PyErr_SetString(PyExc_RuntimeError, "backward: expected the first call for this forward, got a second one; its memory was reused");
        return NULL;
    }
    if (once) self->saved = NULL; /* before the GIL goes: another thread's call finds it used up */
    if (core_begin(call, &self->owner->lock, self->owner->device, self->owner->compute) < 0) {
        self->saved = saved;
        return NULL;
    }
    *status = params ? ladd_params_need_grad(self->owner->params) : LADD_OK;
    return saved;
}

/* ---- views ----------------------------------------------------------------------------------------------------------- */

/* A writable array on the model's own memory, which keeps the model alive. */
static PyObject *view(core_model *self, float *data, int ndim, const int64_t *shape) {
    if (self->device) {
        int weights = data >= self->params->data && data < self->params->data + self->params->size;
        int *stale = weights ? &self->params->stale : NULL;
        return core_array_view(self->device, (PyObject *)self, stale, LADD_F32, data, ndim, shape);
    }
    npy_intp sizes[LADD_MAX_DIMS];
    for (int i = 0; i < ndim; i++) sizes[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNewFromData(ndim, sizes, NPY_FLOAT32, data);
    if (array && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(self)) < 0) Py_CLEAR(array);
    return array;
}

static PyObject *flat_view(core_model *self, float *data, int64_t count) { return view(self, data, 1, &count); }

/* Gradients exist from their first use on. Under the lock: a backward of another thread may make them too. */
static int need_grad(core_model *self) {
    core_call call;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) return -1;
    return core_end(&call, ladd_params_need_grad(self->params));
}

static PyObject *views_by_name(core_model *self, float *base, int trainable_only) {
    PyObject *dict = PyDict_New();
    if (!dict) return NULL;
    for (int i = 0; i < self->params->n; i++) {
        const ladd_param *entry = &self->params->table[i];
        if (trainable_only && !entry->trainable) continue;
        PyObject *array = view(self, base + entry->offset, entry->ndim, entry->shape);
        int status = array ? PyDict_SetItemString(dict, entry->name, array) : -1;
        Py_XDECREF(array);
        if (status < 0) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    return dict;
}

/* ---- methods --------------------------------------------------------------------------------------------------------- */

/* Initial values are drawn by the CPU, so that they do not depend on the device. */
typedef struct init_call {
    const core_kind *kind;
    void *model;
    uint64_t seed;
} init_call;
static ladd_status run_init(void *argument) {
    const init_call *task = argument;
    return task->kind->init(task->model, task->seed);
}

static PyObject *model_init(PyObject *object, PyObject *argument) {
    core_model *self = (core_model *)object;
    uint64_t seed;
    core_call call;
    if (core_uint64(argument, "seed", &seed) < 0 || core_begin(&call, &self->lock, self->device, self->compute) < 0) return NULL;
    init_call task = {self->kind, self->model, seed};
    if (core_end(&call, ladd_params_on_host(self->params, run_init, &task)) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *model_ready(PyObject *object, PyObject *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    core_call call;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) return NULL;
    if (core_end(&call, ladd_params_ready(&call.ctx, self->params)) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *model_tensors(PyObject *object, PyObject *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return views_by_name(self, self->params->data, 0);
}

static PyObject *model_gradients(PyObject *object, PyObject *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return need_grad(self) < 0 ? NULL : views_by_name(self, self->params->grad, 1);
}

static PyObject *model_trainable_names(PyObject *object, PyObject *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < self->params->n; i++) {
        if (!self->params->table[i].trainable) continue;
        PyObject *name = PyUnicode_FromString(self->params->table[i].name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *model_config(PyObject *object, void *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return self->kind->config_dict(self->model);
}

static PyObject *model_flat(PyObject *object, void *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return flat_view(self, self->params->data, self->params->size);
}

static PyObject *model_flat_trainable(PyObject *object, void *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return flat_view(self, self->params->data, self->params->trainable);
}

static PyObject *model_flat_grad(PyObject *object, void *unused) {
    (void)unused;
    core_model *self = (core_model *)object;
    return need_grad(self) < 0 ? NULL : flat_view(self, self->params->grad, self->params->trainable);
}

static PyMethodDef model_methods[] = {
    {"init", model_init, METH_O, "init(seed): the standard initialisation."},
    {"ready", model_ready, METH_NOARGS, "ready(): brings the working copy of the weights up to date, as every forward does first."},
    {"tensors", model_tensors, METH_NOARGS, "tensors() -> dict of writable views, one a parameter or buffer, by diffusers name"},
    {"gradients", model_gradients, METH_NOARGS, "gradients() -> dict of writable views, one a trainable parameter; zero on first use"},
    {"trainable_names", model_trainable_names, METH_NOARGS, "trainable_names() -> list of names in the order of flat_trainable"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_getset[] = {
    {"config", model_config, NULL, "dict of the settings that shape the model", NULL},
    {"flat", model_flat, NULL, "1-D view of all elements, trainable ones first", NULL},
    {"flat_trainable", model_flat_trainable, NULL, "1-D view of the trainable elements", NULL},
    {"flat_grad", model_flat_grad, NULL, "1-D view of their gradients", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define FLAGS (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE)

static PyTypeObject *make_type(PyObject *module, const char *name, size_t size, unsigned long flags, PyType_Slot *slots, PyTypeObject *base) {
    PyType_Spec spec = {.name = name, .basicsize = (int)size, .flags = (unsigned int)flags, .slots = slots};
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, (PyObject *)base);
    if (type && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
    return type;
}

int core_add_model(PyObject *module, core_state *state) {
    static char doc[] =
        "What all models share: parameter tables as views. Methods of one model exclude each other, so it may be used from several "
        "threads.";
    PyType_Slot slots[] = {{Py_tp_doc, doc}, {Py_tp_methods, model_methods}, {Py_tp_getset, model_getset}, {0, NULL}};
    state->model_type =
        make_type(module, "ladd._core.Model", sizeof(core_model), FLAGS | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots, NULL);
    return state->model_type ? 0 : -1;
}

int core_add_kind(PyObject *module, core_state *state, const core_kind *kind) {
    PyType_Slot slots[] = {{Py_tp_doc, (void *)(uintptr_t)kind->doc},
                           {Py_tp_new, (void *)kind->type_new},
                           {Py_tp_dealloc, (void *)model_dealloc},
                           {Py_tp_methods, kind->methods},
                           {0, NULL}};
    PyType_Slot saved_slots[] = {
        {Py_tp_doc, (void *)(uintptr_t)kind->saved_doc}, {Py_tp_dealloc, (void *)saved_dealloc}, {Py_tp_methods, kind->saved_methods}, {0, NULL}};
    PyTypeObject *type = make_type(module, kind->type_name, sizeof(core_model), FLAGS, slots, state->model_type);
    state->types[kind->index] = type;
    if (!type) return -1;
    type = make_type(module, kind->saved_type_name, sizeof(core_saved), FLAGS | Py_TPFLAGS_DISALLOW_INSTANTIATION, saved_slots, NULL);
    state->saved_types[kind->index] = type;
    return type ? 0 : -1;
}
