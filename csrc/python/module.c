/* The module ladd._core: initialisation, the way into the core and back, and the functions that set or tell something about the process. */
#define LADD_IMPORTS_NUMPY
#include "binding.h"

/* From OpenBLAS's cblas.h, which pulls in C99 complex types that this file has no use for. */
extern char *scipy_openblas_get_config(void);

/* ---- calls into the core --------------------------------------------------------------------------------------------- */

int core_raise(ladd_status status) {
    PyObject *type = PyExc_RuntimeError;
    switch (status) {
        case LADD_OK:
            PyErr_SetString(PyExc_SystemError, "core_raise: expected a failure, got LADD_OK");
            return -1;
        case LADD_ERR_VALUE:
            type = PyExc_ValueError;
            break;
        case LADD_ERR_TYPE:
            type = PyExc_TypeError;
            break;
        case LADD_ERR_MEMORY:
            type = PyExc_MemoryError;
            break;
        case LADD_ERR_RUNTIME:
            break;
        case LADD_ERR_INTERRUPTED:
            if (PyErr_Occurred()) return -1; /* what the signal handler raised, KeyboardInterrupt as a rule */
            break;
    }
    PyErr_SetString(type, ladd_last_error());
    return -1;
}

/* Asked between layers. Taking the GIL can cost a switch interval of another busy thread, so signals are looked for at most every 50 ms. The thread
 * state is the one that this very thread left, so it is also right in threads and interpreters that PyGILState_Ensure does not know. */
static int signal_came(void *argument) {
    core_call *call = argument;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if ((now.tv_sec - call->checked.tv_sec) * 1000000000LL + (now.tv_nsec - call->checked.tv_nsec) < 50000000LL) return 0;
    call->checked = now;
    PyEval_RestoreThread(call->thread);
    int came = PyErr_CheckSignals() != 0; /* runs handlers in the main thread only */
    call->thread = PyEval_SaveThread();
    return came;
}

ladd_context core_context(const core_device *device, ladd_dtype compute) {
    if (!device) return ladd_cpu_context(compute);
    return (ladd_context){.backend = device->api->backend(compute), .state = device->state, .act = compute, .act_size = core_item_size(compute)};
}

int core_lock_init(core_lock *lock) {
    atomic_init(&lock->holder, 0);
    if ((lock->lock = PyThread_allocate_lock())) return 0;
    PyErr_NoMemory();
    return -1;
}

void core_lock_free(core_lock *lock) {
    if (lock->lock) PyThread_free_lock(lock->lock);
}

/* Another thread may change `holder` meanwhile, but only to its own number or 0. */
static int held_here(core_lock *lock) { return lock && atomic_load_explicit(&lock->holder, memory_order_relaxed) == PyThread_get_thread_ident(); }

static void acquire(core_lock *lock) {
    PyThread_acquire_lock(lock->lock, WAIT_LOCK);
    atomic_store_explicit(&lock->holder, PyThread_get_thread_ident(), memory_order_relaxed);
}

static void release(core_lock *lock) {
    atomic_store_explicit(&lock->holder, 0, memory_order_relaxed);
    PyThread_release_lock(lock->lock);
}

int core_begin(core_call *call, core_lock *lock, core_device *device, ladd_dtype compute) {
    call->ctx = core_context(device, compute);
    if (!call->ctx.backend) return core_raise(LADD_ERR_VALUE);
    if (held_here(lock) || (device && held_here(&device->lock))) {
        PyErr_Format(PyExc_RuntimeError, "expected a call when the %s is free, got one from a signal handler while it works for the same thread",
                     held_here(lock) ? "model" : "device");
        return -1;
    }
    call->ctx.interrupted = signal_came;
    call->ctx.interrupt_argument = call;
    call->lock = lock;
    call->device = device;
    clock_gettime(CLOCK_MONOTONIC, &call->checked);
    /* Locks are waited for without the GIL: their holders need the GIL to finish. */
    call->thread = PyEval_SaveThread();
    if (lock) acquire(lock);
    if (!device) return 0;
    acquire(&device->lock);
    ladd_status status = device->api->enter(device->state, &call->before);
    return status == LADD_OK ? 0 : core_end(call, status);
}

int core_end(core_call *call, ladd_status status) {
    if (call->device) {
        call->device->api->leave(call->before);
        release(&call->device->lock);
    }
    if (call->lock) release(call->lock);
    PyEval_RestoreThread(call->thread);
    return status == LADD_OK ? 0 : core_raise(status);
}

core_state *core_state_of(PyTypeObject *type) { return PyType_GetModuleState(type); }

/* ---- functions ------------------------------------------------------------------------------------------------------- */

static PyObject *set_num_threads(PyObject *module, PyObject *argument) {
    (void)module;
    int n;
    if (core_int(argument, "num_threads", 1, 1024, &n) < 0) return NULL;
    ladd_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = ladd_set_num_threads(n);
    Py_END_ALLOW_THREADS;
    if (status != LADD_OK) {
        core_raise(status);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(ladd_get_num_threads());
}

static PyObject *backend_name(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const ladd_backend *backend = ladd_cpu_backend(LADD_F32);
    if (!backend) {
        core_raise(LADD_ERR_VALUE);
        return NULL;
    }
    return PyUnicode_FromString(backend->name);
}

static PyObject *empty_cache(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    ladd_empty_cache();
    Py_RETURN_NONE;
}

static PyObject *memory_in_use(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromSize_t(ladd_memory_in_use());
}

static PyObject *openblas_config(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(scipy_openblas_get_config());
}

static PyMethodDef functions[] = {
    {"set_num_threads", set_num_threads, METH_O, "set_num_threads(n): threads of the CPU kernels. Results do not depend on it."},
    {"get_num_threads", get_num_threads, METH_NOARGS, "get_num_threads() -> int"},
    {"backend_name", backend_name, METH_NOARGS, "backend_name() -> \"avx512\", \"avx2\", \"plain\", or what LADD_CPU names"},
    {"empty_cache", empty_cache, METH_NOARGS, "empty_cache(): gives kept memory back to the system."},
    {"memory_in_use", memory_in_use, METH_NOARGS, "memory_in_use() -> bytes of activations that are alive"},
    {"openblas_config", openblas_config, METH_NOARGS, "openblas_config() -> str: version and build of the linked OpenBLAS"},
    {NULL, NULL, 0, NULL},
};

/* ---- module ---------------------------------------------------------------------------------------------------------- */

static int core_exec(PyObject *module) {
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    core_state *state = PyModule_GetState(module);
    if (core_add_dense(module) < 0 || core_add_norm(module) < 0 || core_add_image(module) < 0) return -1;
    if (core_add_diffusion(module) < 0 || core_add_flat(module) < 0) return -1;
    if (core_add_array(module, state) < 0 || core_add_device(module, state) < 0) return -1;
    if (core_add_model(module, state) < 0) return -1;
    if (core_add_mmdit(module, state) < 0 || core_add_vae(module, state) < 0 || core_add_disc(module, state) < 0) return -1;
    return 0;
}

static int core_traverse(PyObject *module, visitproc visit, void *arg) {
    core_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->device_type);
    Py_VISIT(state->array_type);
    Py_VISIT(state->guest_type);
    for (int i = 0; i < CORE_KINDS; i++) {
        Py_VISIT(state->types[i]);
        Py_VISIT(state->saved_types[i]);
    }
    return 0;
}

static int core_clear(PyObject *module) {
    core_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->device_type);
    Py_CLEAR(state->array_type);
    Py_CLEAR(state->guest_type);
    for (int i = 0; i < CORE_KINDS; i++) {
        Py_CLEAR(state->types[i]);
        Py_CLEAR(state->saved_types[i]);
    }
    return 0;
}

static void core_free(void *module) { core_clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, core_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* NumPy does not either */
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "ladd._core",
    .m_doc = "The C core of ladd. Its interface is described in _core.pyi; ladd.kernels and ladd.models are the documented layers above it.",
    .m_size = sizeof(core_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
