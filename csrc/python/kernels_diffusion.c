/* Kernels on arrays: random numbers, the steps between noise and picture, adversarial losses. */
#include <limits.h>

#include "binding.h"

/* ---- random numbers -------------------------------------------------------------------------------------------------- */

int core_rng_key(ladd_rng_key *key, PyObject *seed, PyObject *purpose, PyObject *step, const core_dims *dims) {
    int number;
    double *at;
    *key = (ladd_rng_key){0};
    if (core_uint64(seed, "seed", &key->seed) < 0 || core_int(purpose, "purpose", 0, INT_MAX, &number) < 0) return -1;
    key->purpose = (uint32_t)number;
    if (!step) return 0;
    if (!core_is_array(step) && !PyArray_Check(step)) return core_uint64(step, "step", &key->step);
    if (core_doubles(step, "step", 1, dims, &at) < 0) return -1;
    key->step_at = (const uint64_t *)at;
    return 0;
}

/* Sample numbers int64[B], new reference: the given array, or 0, 1, ... for None. */
static PyArrayObject *read_samples(PyObject *samples, int64_t B) {
    if (!samples || samples == Py_None) return (PyArrayObject *)PyArray_Arange(0, (double)B, 1, NPY_INT64);
    PyArrayObject *array = (PyArrayObject *)samples;
    if (!PyArray_Check(samples) || PyArray_TYPE(array) != NPY_INT64 || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "samples: expected an int64 array of shape (B=%lld,), got %.100s", (long long)B, Py_TYPE(samples)->tp_name);
        return NULL;
    }
    if (PyArray_NDIM(array) != 1 || PyArray_DIM(array, 0) != B || !PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "samples: expected a contiguous array of shape (B=%lld,), got another shape or layout", (long long)B);
        return NULL;
    }
    return (PyArrayObject *)Py_NewRef(samples);
}

static PyObject *normal(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"shape", "seed", "purpose", "step", "samples", "out", NULL};
    PyObject *shape, *seed, *purpose, *step = NULL, *samples_given = NULL, *out_given = NULL;
    int sizes[16], result = -1;
    npy_intp dims[16];
    ladd_rng_key key;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OO$O:normal", names, &shape, &seed, &purpose, &step, &samples_given, &out_given)) return NULL;
    Py_ssize_t ndim = core_int_list(shape, "shape", sizes, 16, 1, INT_MAX);
    if (ndim < 0) return NULL;
    if (ndim == 0) {
        PyErr_SetString(PyExc_ValueError, "shape: expected (B, ...), got ()");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < ndim; i++) dims[i] = sizes[i];
    PyObject *out = out_given == Py_None || !out_given ? PyArray_EMPTY((int)ndim, dims, NPY_FLOAT32, 0) : Py_NewRef(out_given);
    PyArrayObject *samples = out ? read_samples(samples_given, sizes[0]) : NULL;
    if (!samples) {
        Py_XDECREF(out);
        return NULL;
    }
    core_dims d = {0};
    PyObject *array = core_inout(out, "out", "B*", &d);
    if (array && core_rng_key(&key, seed, purpose, step, &d) < 0) array = NULL;
    int same = array && core_ndim(array) == (int)ndim;
    for (int i = 0; same && i < (int)ndim; i++) same = core_size(array, i) == dims[i];
    if (array && !same)
        PyErr_Format(PyExc_ValueError, "out: expected an array of shape %R, got another shape", shape);
    else if (array)
        CORE_KERNEL(result, &d, normal, core_data(out), key, (const int64_t *)PyArray_DATA(samples), IDIM(&d, 'B'), DIM(&d, '*'));
    Py_DECREF(samples);
    if (result < 0) Py_CLEAR(out);
    return out;
}

static PyObject *renoise(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x0", "t", "seed", "purpose", "step", "samples", "return_noise", "out", NULL};
    PyObject *x0, *t, *seed, *purpose, *step = NULL, *samples_given = NULL, *return_flag = NULL, *out_given = NULL;
    core_dims d = {0};
    int return_noise = 0, result = -1;
    ladd_rng_key key;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOO$O:renoise", names, &x0, &t, &seed, &purpose, &step, &samples_given, &return_flag,
                                     &out_given))
        return NULL;
    if (core_bool(return_flag, "return_noise", &return_noise) < 0) return NULL;
    if (!core_input(x0, "x0", "B*", &d) || !core_input(t, "t", "@B", &d) || core_rng_key(&key, seed, purpose, step, &d) < 0) return NULL;
    PyArrayObject *samples = read_samples(samples_given, DIM(&d, 'B'));
    if (!samples) return NULL;
    PyObject *out = core_output_like(out_given, x0), *noise = return_noise ? core_new_like(x0, 0) : Py_NewRef(Py_None);
    if (out && noise && core_no_overlap(out, x0, "x0", 1) == 0 && core_no_overlap(out, t, "t", 0) == 0)
        CORE_KERNEL_NUMBERS(result, &d, t, renoise, core_data(out), return_noise ? core_data(noise) : NULL, core_data(x0), CORE_NUMBERS, key,
                            (const int64_t *)PyArray_DATA(samples), IDIM(&d, 'B'), DIM(&d, '*'));
    PyObject *answer = result < 0 ? NULL : (return_noise ? PyTuple_Pack(2, out, noise) : Py_NewRef(out));
    Py_DECREF(samples);
    Py_XDECREF(out);
    Py_XDECREF(noise);
    return answer;
}

/* ---- steps ----------------------------------------------------------------------------------------------------------- */

static PyObject *interpolate(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x0", "noise", "t", "out", NULL};
    PyObject *x0, *noise, *t, *out_given = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$O:interpolate", names, &x0, &noise, &t, &out_given)) return NULL;
    if (!core_input(x0, "x0", "B*", &d) || !core_same_shape(noise, "noise", x0, "x0") || !core_input(t, "t", "@B", &d)) return NULL;
    PyObject *out = core_output_like(out_given, x0);
    if (out && core_no_overlap(out, x0, "x0", 1) == 0 && core_no_overlap(out, noise, "noise", 1) == 0 && core_no_overlap(out, t, "t", 0) == 0)
        CORE_KERNEL_NUMBERS(result, &d, t, interpolate, core_data(out), core_data(x0), core_data(noise), CORE_NUMBERS, IDIM(&d, 'B'), DIM(&d, '*'));
    if (result < 0) Py_CLEAR(out);
    return out;
}

static PyObject *predict_x0(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "v", "t", "out", NULL};
    PyObject *x, *v, *t, *out_given = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$O:predict_x0", names, &x, &v, &t, &out_given)) return NULL;
    if (!core_input(x, "x", "B*", &d) || !core_same_shape(v, "v", x, "x") || !core_input(t, "t", "@B", &d)) return NULL;
    PyObject *out = core_output_like(out_given, x);
    if (out && core_no_overlap(out, x, "x", 1) == 0 && core_no_overlap(out, v, "v", 1) == 0 && core_no_overlap(out, t, "t", 0) == 0)
        CORE_KERNEL_NUMBERS(result, &d, t, predict_x0, core_data(out), core_data(x), core_data(v), CORE_NUMBERS, IDIM(&d, 'B'), DIM(&d, '*'));
    if (result < 0) Py_CLEAR(out);
    return out;
}

static PyObject *row_scale(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "factor", "out", NULL};
    PyObject *x, *factor, *out_given = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O:row_scale", names, &x, &factor, &out_given)) return NULL;
    if (!core_input(x, "x", "B*", &d) || !core_input(factor, "factor", "@B", &d)) return NULL;
    PyObject *out = core_output_like(out_given, x);
    if (out && core_no_overlap(out, x, "x", 1) == 0 && core_no_overlap(out, factor, "factor", 0) == 0)
        CORE_KERNEL_NUMBERS(result, &d, factor, row_scale, core_data(out), core_data(x), CORE_NUMBERS, IDIM(&d, 'B'), DIM(&d, '*'));
    if (result < 0) Py_CLEAR(out);
    return out;
}

static PyObject *euler_step(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "v", "sigma", "sigma_next", "out", NULL};
    PyObject *x, *v, *out_given = NULL;
    double sigma, sigma_next;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOdd|$O:euler_step", names, &x, &v, &sigma, &sigma_next, &out_given)) return NULL;
    if (core_finite(sigma, "sigma") < 0 || core_finite(sigma_next, "sigma_next") < 0) return NULL;
    if (!core_input(x, "x", "*", &d) || !core_same_shape(v, "v", x, "x")) return NULL;
    PyObject *out = core_output_like(out_given, x);
    if (out && core_no_overlap(out, x, "x", 1) == 0 && core_no_overlap(out, v, "v", 1) == 0)
        CORE_KERNEL(result, &d, euler_step, core_data(out), core_data(x), core_data(v), (float)sigma, (float)sigma_next, DIM(&d, '*'));
    if (result < 0) Py_CLEAR(out);
    return out;
}

/* ---- losses ---------------------------------------------------------------------------------------------------------- */

/* The position of `given` in `choices`, which the message lists. */
static int choose(const char *given, const char *name, const char *const *choices, const char *listed) {
    for (int i = 0; choices[i]; i++)
        if (strcmp(given, choices[i]) == 0) return i;
    PyErr_Format(PyExc_ValueError, "%s: expected %s, got '%.100s'", name, listed, given);
    return -1;
}

static PyObject *adversarial_loss(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"logits", "loss", "role", "weight", "values", NULL};
    static const char *const losses[] = {"hinge", "logistic", "lsgan", "bce", NULL}, *const roles[] = {"real", "fake", "generator", NULL};
    PyObject *logits, *values = NULL;
    const char *loss_given, *role_given;
    double weight = 1.0, *kept;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oss|d$O:adversarial_loss", names, &logits, &loss_given, &role_given, &weight, &values))
        return NULL;
    int loss = choose(loss_given, "loss", losses, "'hinge', 'logistic', 'lsgan' or 'bce'");
    int role = loss < 0 ? -1 : choose(role_given, "role", roles, "'real', 'fake' or 'generator'");
    if (role < 0 || core_finite(weight, "weight") < 0 || !core_input(logits, "logits", "*", &d)) return NULL;
    if (core_doubles(values, "values", 3, &d, &kept) < 0) return NULL;
    PyObject *dlogits = core_new_like(logits, 0);
    core_call call;
    core_result computed;
    if (dlogits) result = core_begin(&call, NULL, d.device, d.act);
    if (result == 0) {
        ladd_status status = core_result_begin(&call, &computed, kept);
        if (status == LADD_OK)
            status = call.ctx.backend->adversarial_loss(&call.ctx, computed.data, core_data(dlogits), core_data(logits), (ladd_loss)loss,
                                                        (ladd_role)role, (float)weight, DIM(&d, '*'));
        result = core_end(&call, core_result_end(&call, &computed, status));
    }
    if (result < 0) Py_CLEAR(dlogits);
    if (!dlogits) return NULL;
    return kept ? Py_BuildValue("ON", Py_None, dlogits) : Py_BuildValue("dN", computed.values[0], dlogits);
}

static PyMethodDef functions[] = {
    CORE_METHOD("normal", normal, "(shape, seed, purpose, step=0, samples=None, *, out=None) -> standard normal numbers"),
    CORE_METHOD("renoise", renoise, "(x0, t, seed, purpose, step=0, samples=None, return_noise=False, *, out=None) -> (1 - t) x0 + t noise"),
    CORE_METHOD("interpolate", interpolate, "(x0, noise, t, *, out=None) -> (1 - t) x0 + t noise"),
    CORE_METHOD("predict_x0", predict_x0, "(x, v, t, *, out=None) -> x - t v"),
    CORE_METHOD("row_scale", row_scale, "(x, factor, *, out=None) -> factor x"),
    CORE_METHOD("euler_step", euler_step, "(x, v, sigma, sigma_next, *, out=None) -> x + (sigma_next - sigma) v"),
    CORE_METHOD("adversarial_loss", adversarial_loss,
                "(logits, loss, role, weight=1.0, *, values=None) -> (mean loss, dlogits); or mean loss, mean logit and share beyond the margin into "
                "values, and (None, dlogits)"),
    {NULL, NULL, 0, NULL},
};

int core_add_diffusion(PyObject *module) { return PyModule_AddFunctions(module, functions); }
