/* Kernels on arrays without regard to their shape: optimizer, norms, averages, sums. */
#include "binding.h"

/* `written` may share memory with none of the `n` others. */
static int apart(PyObject *written, PyObject *const *others, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (core_no_overlap(written, others[i], names[i], 0) < 0) return -1;
    return 0;
}

static PyObject *adamw(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"p", "m", "v", "g", "lr", "beta1", "beta2", "eps", "weight_decay", "step", "grad_scale", NULL};
    static const char *const array_names[] = {"p", "m", "v", "g"};
    PyObject *arrays[4], *step_given;
    double lr, beta1, beta2, eps, weight_decay, grad_scale = 1.0;
    core_dims d = {0};
    uint64_t step;
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOdddddO|d:adamw", names, &arrays[0], &arrays[1], &arrays[2], &arrays[3], &lr, &beta1, &beta2,
                                     &eps, &weight_decay, &step_given, &grad_scale))
        return NULL;
    if (arrays[1] == Py_None) arrays[1] = NULL;
    for (int i = 0; i < 3; i++)
        if ((arrays[i] || i != 1) && !core_inout(arrays[i], array_names[i], "=n", &d)) return NULL;
    if (!core_input(arrays[3], "g", "=n", &d)) return NULL;
    for (int i = 0; i < 3; i++)
        if (apart(arrays[i], arrays + i + 1, array_names + i + 1, 3 - i) < 0) return NULL;
    const double below_one = 1.0 - 1e-12;
    if (core_in_range(lr, "lr", 0, 1e6) < 0 || core_in_range(beta1, "beta1", 0, below_one) < 0 || core_in_range(beta2, "beta2", 0, below_one) < 0)
        return NULL;
    if (core_in_range(eps, "eps", 0, 1e6) < 0 || core_in_range(weight_decay, "weight_decay", 0, 1e6) < 0 || core_finite(grad_scale, "grad_scale") < 0)
        return NULL;
    if (core_uint64(step_given, "step", &step) < 0) return NULL;
    if (step < 1 || step > INT64_MAX) {
        PyErr_Format(PyExc_ValueError, "step: expected an integer from 1 to 2**63 - 1, got %S", step_given);
        return NULL;
    }
    CORE_KERNEL(result, &d, adamw, core_data(arrays[0]), arrays[1] ? core_data(arrays[1]) : NULL, core_data(arrays[2]), core_data(arrays[3]),
                DIM(&d, 'n'), (float)lr, (float)beta1, (float)beta2, (float)eps, (float)weight_decay, (int64_t)step, (float)grad_scale);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *sum_squares(PyObject *module, PyObject *x) {
    (void)module;
    core_dims d = {0};
    double sum = 0;
    int result;
    if (!core_input(x, "x", "=*", &d)) return NULL;
    CORE_KERNEL(result, &d, sum_squares, &sum, core_data(x), DIM(&d, '*'));
    return result < 0 ? NULL : PyFloat_FromDouble(sum);
}

static PyObject *ema(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"e", "p", "decay", NULL};
    PyObject *e, *p;
    double decay;
    core_dims d = {0};
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOd:ema", names, &e, &p, &decay)) return NULL;
    if (core_in_range(decay, "decay", 0, 1) < 0 || !core_inout(e, "e", "=*", &d) || !core_same_shape(p, "p", e, "e")) return NULL;
    if (core_no_overlap(e, p, "p", 0) < 0) return NULL;
    CORE_KERNEL(result, &d, ema, core_data(e), core_data(p), (float)decay, DIM(&d, '*'));
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *zero(PyObject *module, PyObject *y) {
    (void)module;
    core_dims d = {0};
    int result;
    if (!core_inout(y, "y", "*", &d)) return NULL;
    CORE_KERNEL(result, &d, zero, core_data(y), DIM(&d, '*'));
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *copy(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "out", NULL};
    PyObject *x, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:copy", names, &x, &out) || !core_input(x, "x", "*", &d)) return NULL;
    PyObject *y = core_output_like(out, x);
    if (y && core_no_overlap(y, x, "x", 0) == 0) CORE_KERNEL(result, &d, copy, core_data(y), core_data(x), DIM(&d, '*'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *add(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"a", "b", "out", NULL};
    PyObject *a, *b, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O:add", names, &a, &b, &out)) return NULL;
    if (!core_input(a, "a", "*", &d) || !core_same_shape(b, "b", a, "a")) return NULL;
    PyObject *y = core_output_like(out, a);
    if (y && core_no_overlap(y, a, "a", 1) == 0 && core_no_overlap(y, b, "b", 1) == 0)
        CORE_KERNEL(result, &d, add, core_data(y), core_data(a), core_data(b), DIM(&d, '*'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *axpy(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"y", "x", "alpha", NULL};
    PyObject *y, *x;
    double alpha;
    core_dims d = {0};
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOd:axpy", names, &y, &x, &alpha)) return NULL;
    if (core_finite(alpha, "alpha") < 0 || !core_inout(y, "y", "*", &d) || !core_same_shape(x, "x", y, "y")) return NULL;
    if (core_no_overlap(y, x, "x", 1) < 0) return NULL;
    CORE_KERNEL(result, &d, axpy, core_data(y), core_data(x), (float)alpha, DIM(&d, '*'));
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *scale(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "alpha", "out", NULL};
    PyObject *x, *out = NULL;
    double alpha;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Od|$O:scale", names, &x, &alpha, &out)) return NULL;
    if (core_finite(alpha, "alpha") < 0 || !core_input(x, "x", "*", &d)) return NULL;
    PyObject *y = core_output_like(out, x);
    if (y && core_no_overlap(y, x, "x", 1) == 0) CORE_KERNEL(result, &d, scale, core_data(y), core_data(x), (float)alpha, DIM(&d, '*'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyMethodDef functions[] = {
    CORE_METHOD("adamw", adamw,
                "(p, m, v, g, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0): one step in place; m may be None where beta1 is 0"),
    {"sum_squares", sum_squares, METH_O, "sum_squares(x) -> float"},
    CORE_METHOD("ema", ema, "(e, p, decay): e = decay e + (1 - decay) p"),
    {"zero", zero, METH_O, "zero(y)"},
    CORE_METHOD("copy", copy, "(x, *, out=None)"),
    CORE_METHOD("add", add, "(a, b, *, out=None)"),
    CORE_METHOD("axpy", axpy, "(y, x, alpha): y += alpha x"),
    CORE_METHOD("scale", scale, "(x, alpha, *, out=None)"),
    {NULL, NULL, 0, NULL},
};

int core_add_flat(PyObject *module) { return PyModule_AddFunctions(module, functions); }
