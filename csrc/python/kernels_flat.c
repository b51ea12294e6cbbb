/* Kernels on arrays without regard to their shape: optimizer, norms, averages, sums. */
#include "../adamw.h"
#include "binding.h"

/* `written` may share memory with none of the `n` others. */
static int apart(PyObject *written, PyObject *const *others, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (core_no_overlap(written, others[i], names[i], 0) < 0) return -1;
    return 0;
}

static PyObject *adamw(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"p", "m", "v", "g", "lr", "beta1", "beta2", "eps", "weight_decay", "step", "grad_scale", "control", "rounding", NULL};
    static const char *const array_names[] = {"p", "m", "v", "g"};
    PyObject *arrays[4], *step_given, *control = NULL, *rounding = NULL;
    ladd_rng_key key;
    double lr, beta1, beta2, eps, weight_decay, grad_scale = 1.0;
    core_dims d = {0};
    uint64_t step;
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOdddddO|d$OO:adamw", names, &arrays[0], &arrays[1], &arrays[2], &arrays[3], &lr, &beta1,
                                     &beta2, &eps, &weight_decay, &step_given, &grad_scale, &control, &rounding))
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
    core_dims four = {.device = d.device, .act = LADD_F32, .placed = 1};
    DIM(&four, 'n') = 4;
    if (control == Py_None) control = NULL;
    if (control && !core_input(control, "control", "=n", &four)) return NULL;
    if (rounding == Py_None) rounding = NULL;
    if (rounding) {
        PyObject *seed, *purpose, *counter;
        if (!PyTuple_Check(rounding) || !PyArg_ParseTuple(rounding, "OOO", &seed, &purpose, &counter)) {
            PyErr_Format(PyExc_TypeError, "rounding: expected None or (seed, purpose, step), got %R", rounding);
            return NULL;
        }
        if (core_rng_key(&key, seed, purpose, counter, &d) < 0) return NULL;
    }
    CORE_KERNEL(result, &d, adamw, core_data(arrays[0]), core_data(arrays[1]), core_data(arrays[2]), core_data(arrays[3]), DIM(&d, 'n'), (float)lr,
                (float)beta1, (float)beta2, (float)eps, (float)weight_decay, (int64_t)step, (float)grad_scale, core_data(control),
                rounding ? &key : NULL);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *r1_factors(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"factors", "penalty", "sums", "weight", "epsilon", "scale", NULL};
    PyObject *factors, *penalty_given, *sums_given;
    double *penalty, *sums, weight, epsilon, scale;
    core_dims d = {0};
    int result;
    DIM(&d, 'n') = 4;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOddd:r1_factors", names, &factors, &penalty_given, &sums_given, &weight, &epsilon, &scale))
        return NULL;
    if (core_finite(weight, "weight") < 0 || core_finite(epsilon, "epsilon") < 0 || core_finite(scale, "scale") < 0) return NULL;
    if (!core_inout(factors, "factors", "=n", &d) || core_doubles(penalty_given, "penalty", 1, &d, &penalty) < 0) return NULL;
    if (core_doubles(sums_given, "sums", 2, &d, &sums) < 0) return NULL;
    if (!penalty || !sums) {
        PyErr_SetString(PyExc_TypeError, "r1_factors: expected penalty and sums, got None for one of them");
        return NULL;
    }
    CORE_KERNEL(result, &d, r1_factors, core_data(factors), penalty, sums, (float)weight, (float)epsilon, (float)scale);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *adamw_control(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"lr", "weight_decay", "beta1", "beta2", "step", NULL};
    double lr, weight_decay, beta1, beta2, step;
    float control[3];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ddddd:adamw_control", names, &lr, &weight_decay, &beta1, &beta2, &step)) return NULL;
    ladd_adamw_control(control, (float)lr, (float)weight_decay, (float)beta1, (float)beta2, step);
    return Py_BuildValue("fff", control[0], control[1], control[2]);
}

static PyObject *sum_squares(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "out", NULL};
    PyObject *x, *out = NULL;
    core_dims d = {0};
    core_call call;
    core_result computed;
    double *kept;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:sum_squares", names, &x, &out) || !core_input(x, "x", "=*", &d)) return NULL;
    if (core_doubles(out, "out", 1, &d, &kept) < 0 || core_begin(&call, NULL, d.device, d.act) < 0) return NULL;
    ladd_status status = core_result_begin(&call, &computed, kept);
    if (status == LADD_OK) status = call.ctx.backend->sum_squares(&call.ctx, computed.data, core_data(x), DIM(&d, '*'));
    if (core_end(&call, core_result_end(&call, &computed, status)) < 0) return NULL;
    if (kept) Py_RETURN_NONE;
    return PyFloat_FromDouble(computed.values[0]);
}

static PyObject *clip_factor(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"factor", "norm", "failed", "done", "squares", "checked", "max_norm", "who", NULL};
    PyObject *factor, *given[5];
    double *numbers[5], max_norm;
    int counts[5], who, result;
    core_dims d = {0};
    DIM(&d, 'n') = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOdi:clip_factor", names, &factor, &given[0], &given[1], &given[2], &given[3], &given[4],
                                     &max_norm, &who))
        return NULL;
    if (!core_inout(factor, "factor", "=n", &d) || core_in_range(max_norm, "max_norm", 0, 1e300) < 0) return NULL;
    for (int i = 0; i < 5; i++)
        if ((counts[i] = core_doubles(given[i], names[i + 1], i == 1 ? 2 : i < 3, &d, &numbers[i])) < 0) return NULL;
    if (!numbers[0] || !numbers[1] || !numbers[2] || !numbers[3]) {
        PyErr_SetString(PyExc_TypeError, "clip_factor: expected norm, failed, done and squares, got None for one of them");
        return NULL;
    }
    CORE_KERNEL(result, &d, clip_factor, core_data(factor), numbers[0], numbers[1], numbers[2], numbers[3], counts[3], numbers[4], counts[4],
                max_norm, who);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *ema(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"e", "p", "decay", "control", NULL};
    PyObject *e, *p, *control = NULL;
    double decay;
    core_dims d = {0};
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOd|$O:ema", names, &e, &p, &decay, &control)) return NULL;
    if (core_in_range(decay, "decay", 0, 1) < 0 || !core_inout(e, "e", "=*", &d) || !core_same_shape(p, "p", e, "e")) return NULL;
    if (core_no_overlap(e, p, "p", 0) < 0) return NULL;
    core_dims two = {.device = d.device, .act = LADD_F32, .placed = 1};
    DIM(&two, 'n') = 2;
    if (control == Py_None) control = NULL;
    if (control && !core_input(control, "control", "=n", &two)) return NULL;
    CORE_KERNEL(result, &d, ema, core_data(e), core_data(p), (float)decay, DIM(&d, '*'), core_data(control));
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
    CORE_METHOD(
        "adamw", adamw,
        "(p, m, v, g, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0, *, control=None, rounding=None): one step in place; m may be None "
        "where beta1 is 0"),
    CORE_METHOD("sum_squares", sum_squares, "(x, *, out=None) -> float, or None with the sum in out"),
    CORE_METHOD("clip_factor", clip_factor,
                "(factor, norm, failed, done, squares, checked, max_norm, who): the factor of gradients, decided in place"),
    CORE_METHOD("r1_factors", r1_factors, "(factors, penalty, sums, weight, epsilon, scale): steps of R1's difference, decided in place"),
    CORE_METHOD("adamw_control", adamw_control, "(lr, weight_decay, beta1, beta2, step) -> the three numbers of a step"),
    CORE_METHOD("ema", ema, "(e, p, decay, *, control=None): e = decay e + (1 - decay) p"),
    {"zero", zero, METH_O, "zero(y)"},
    CORE_METHOD("copy", copy, "(x, *, out=None)"),
    CORE_METHOD("add", add, "(a, b, *, out=None)"),
    CORE_METHOD("axpy", axpy, "(y, x, alpha): y += alpha x"),
    CORE_METHOD("scale", scale, "(x, alpha, *, out=None)"),
    {NULL, NULL, 0, NULL},
};

int core_add_flat(PyObject *module) { return PyModule_AddFunctions(module, functions); }
