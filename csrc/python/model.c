/* What MMDiT, AutoencoderKL and Discriminator share: the type Model with the parameter tables, and the objects that keep a forward for its backward.
 */
#include "binding.h"

/* ---- life ------------------------------------------------------------------------------------------------------------ */

core_model *core_model_new(PyTypeObject *type) {
    core_model *self = (core_model *)type->tp_alloc(type, 0); /* fields are zero */
    if (!self) return NULL;
    self->lock = PyThread_allocate_lock();
    if (self->lock) return self;
    Py_DECREF(self);
    return (core_model *)PyErr_NoMemory();
}

void core_model_dealloc(core_model *self, void (*model_free)(void *)) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->model) model_free(self->model);
    if (self->lock) PyThread_free_lock(self->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

core_saved *core_saved_new(PyTypeObject *type, core_model *owner, void (*saved_free)(const ladd_context *, void *)) {
    core_saved *self = (core_saved *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->owner = (core_model *)Py_NewRef(owner);
    self->saved_free = saved_free;
    return self;
}

void core_saved_release(core_saved *self) {
    void *saved = self->saved;
    if (!saved) return;
    self->saved = NULL;
    ladd_context ctx = ladd_cpu_context();
    self->saved_free(&ctx, saved);
}

void core_saved_dealloc(PyObject *object) {
    core_saved *self = (core_saved *)object;
    PyTypeObject *type = Py_TYPE(self);
    core_saved_release(self);
    Py_XDECREF(self->owner);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- views ----------------------------------------------------------------------------------------------------------- */

/* A writable array on the model's own memory, which keeps the model alive. */
static PyObject *view(core_model *self, float *data, int ndim, const int64_t *shape) {
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
    if (core_begin(&call, self->lock) < 0) return -1;
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

static PyObject *model_init(PyObject *object, PyObject *argument) {
    core_model *self = (core_model *)object;
    uint64_t seed;
    core_call call;
    if (core_uint64(argument, "seed", &seed) < 0 || core_begin(&call, self->lock) < 0) return NULL;
    if (core_end(&call, self->init(self->model, seed)) < 0) return NULL;
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
    return self->config(self->model);
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

static PyType_Slot model_slots[] = {
    {Py_tp_doc, "What all models share: parameter tables as views. Methods of one model exclude each other, so it may be used from several threads."},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {0, NULL},
};

static PyType_Spec model_spec = {
    .name = "ladd._core.Model",
    .basicsize = sizeof(core_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};

int core_add_model(PyObject *module, core_state *state) {
    state->model_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &model_spec, NULL);
    return state->model_type ? PyModule_AddType(module, state->model_type) : -1;
}
