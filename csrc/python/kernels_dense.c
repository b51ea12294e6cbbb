/* Kernels on arrays: linear layers, activations, attention. */
#include <math.h>

#include "binding.h"

/* ---- linear ---------------------------------------------------------------------------------------------------------- */

static PyObject *linear_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "w", "bias", "out", NULL};
    PyObject *x, *w, *bias_given = NULL, *out = NULL;
    core_dims d = {0};
    int ok, result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$O:linear_forward", names, &x, &w, &bias_given, &out)) return NULL;
    if (!core_input(x, "x", "MK", &d) || !core_input(w, "w", "NK", &d)) return NULL;
    PyObject *bias = core_optional(bias_given, "bias", "N", &d, &ok);
    if (!ok) return NULL;
    PyObject *y = core_output(out, "MN", &d);
    if (core_no_overlap(y, x, "x", 0) < 0 || core_no_overlap(y, w, "w", 0) < 0 || core_no_overlap(y, bias, "bias", 0) < 0) Py_CLEAR(y);
    if (!y) return NULL;
    CORE_KERNEL(result, &d, linear_forward, core_data(y), core_data(x), core_data(w), core_data(bias), IDIM(&d, 'M'), IDIM(&d, 'N'), IDIM(&d, 'K'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *linear_gelu_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "w", "bias", "out", NULL};
    PyObject *x, *w, *bias_given = NULL, *out = NULL;
    core_dims d = {0};
    int ok, result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$O:linear_gelu_forward", names, &x, &w, &bias_given, &out)) return NULL;
    if (!core_input(x, "x", "MK", &d) || !core_input(w, "w", "NK", &d)) return NULL;
    PyObject *bias = core_optional(bias_given, "bias", "N", &d, &ok);
    if (!ok) return NULL;
    PyObject *h = core_new("MN", &d, 0), *y = core_output(out, "MN", &d);
    if (core_no_overlap(y, x, "x", 0) < 0 || core_no_overlap(y, w, "w", 0) < 0 || core_no_overlap(y, bias, "bias", 0) < 0) Py_CLEAR(y);
    result = h && y ? 0 : -1;
    if (result == 0)
        CORE_KERNEL(result, &d, linear_gelu_forward, core_data(y), core_data(h), core_data(x), core_data(w), core_data(bias), IDIM(&d, 'M'),
                    IDIM(&d, 'N'), IDIM(&d, 'K'));
    PyObject *pair = result == 0 ? PyTuple_Pack(2, y, h) : NULL;
    Py_XDECREF(y);
    Py_XDECREF(h);
    return pair;
}

static PyObject *linear_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "w", "input", "weight", "bias", NULL};
    static const char *const shapes[3] = {"MK", "=NK", "=N"};
    PyObject *dy, *x, *w, *flags[3] = {NULL}, *grads[3] = {NULL}, *triple = NULL;
    int wanted[3] = {1, 1, 1}, result;
    core_dims d = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$OOO:linear_backward", names, &dy, &x, &w, &flags[0], &flags[1], &flags[2])) return NULL;
    for (int i = 0; i < 3; i++)
        if (core_bool(flags[i], names[i + 3], &wanted[i]) < 0) return NULL;
    if (!core_input(x, "x", "MK", &d) || !core_input(w, "w", "NK", &d) || !core_input(dy, "dy", "MN", &d)) return NULL;
    for (int i = 0; i < 3; i++) {
        grads[i] = wanted[i] ? core_new(shapes[i], &d, i > 0) : Py_NewRef(Py_None); /* the kernel adds to parameter gradients */
        if (!grads[i]) goto done;
    }
    CORE_KERNEL(result, &d, linear_backward, wanted[0] ? core_data(grads[0]) : NULL, wanted[1] ? core_data(grads[1]) : NULL,
                wanted[2] ? core_data(grads[2]) : NULL, core_data(dy), core_data(x), core_data(w), IDIM(&d, 'M'), IDIM(&d, 'N'), IDIM(&d, 'K'));
    if (result == 0) triple = PyTuple_Pack(3, grads[0], grads[1], grads[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(grads[i]);
    return triple;
}

/* ---- activations ----------------------------------------------------------------------------------------------------- */

typedef ladd_status (*unary_kernel)(LADD_CTX, ladd_act *, const ladd_act *, int64_t);
typedef ladd_status (*binary_kernel)(LADD_CTX, ladd_act *, const ladd_act *, const ladd_act *, int64_t);

/* y = f(x), f the kernel at this offset of the table, or with `sloped` the leaky ReLU. In place allowed. */
static PyObject *activation_forward(PyObject *args, PyObject *kwargs, const char *format, size_t kernel, int sloped) {
    static char *names[] = {"x", "out", NULL}, *sloped_names[] = {"x", "slope", "out", NULL};
    PyObject *x, *out = NULL;
    double slope = 0.2;
    core_dims d = {0};
    core_call call;
    int parsed = sloped ? PyArg_ParseTupleAndKeywords(args, kwargs, format, sloped_names, &x, &slope, &out)
                        : PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &x, &out);
    if (!parsed || core_finite(slope, "slope") < 0 || !core_input(x, "x", "*", &d)) return NULL;
    PyObject *y = core_output_like(out, x);
    if (!y) return NULL;
    if (core_no_overlap(y, x, "x", 1) < 0 || core_begin(&call, NULL, d.device, d.act) < 0) goto failed;
    const char *table = (const char *)call.ctx.backend;
    ladd_status status = sloped ? call.ctx.backend->leaky_relu_forward(&call.ctx, core_data(y), core_data(x), (float)slope, DIM(&d, '*'))
                                : (*(const unary_kernel *)(table + kernel))(&call.ctx, core_data(y), core_data(x), DIM(&d, '*'));
    if (core_end(&call, status) == 0) return y;
failed:
    Py_DECREF(y);
    return NULL;
}

/* dx = f'(x) dy. In place on dy allowed. */
static PyObject *activation_backward(PyObject *args, PyObject *kwargs, const char *format, size_t kernel, int sloped) {
    static char *names[] = {"dy", "x", "out", NULL}, *sloped_names[] = {"dy", "x", "slope", "out", NULL};
    PyObject *dy, *x, *out = NULL;
    double slope = 0.2;
    core_dims d = {0};
    core_call call;
    int parsed = sloped ? PyArg_ParseTupleAndKeywords(args, kwargs, format, sloped_names, &dy, &x, &slope, &out)
                        : PyArg_ParseTupleAndKeywords(args, kwargs, format, names, &dy, &x, &out);
    if (!parsed || core_finite(slope, "slope") < 0 || !core_input(x, "x", "*", &d)) return NULL;
    if (!core_same_shape(dy, "dy", x, "x")) return NULL;
    PyObject *dx = core_output_like(out, x);
    if (!dx) return NULL;
    if (core_no_overlap(dx, dy, "dy", 1) < 0 || core_no_overlap(dx, x, "x", 0) < 0) goto failed;
    if (core_begin(&call, NULL, d.device, d.act) < 0) goto failed;
    const char *table = (const char *)call.ctx.backend;
    ladd_status status =
        sloped ? call.ctx.backend->leaky_relu_backward(&call.ctx, core_data(dx), core_data(dy), core_data(x), (float)slope, DIM(&d, '*'))
               : (*(const binary_kernel *)(table + kernel))(&call.ctx, core_data(dx), core_data(dy), core_data(x), DIM(&d, '*'));
    if (core_end(&call, status) == 0) return dx;
failed:
    Py_DECREF(dx);
    return NULL;
}

static PyObject *gelu_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_forward(args, kwargs, "O|$O:gelu_forward", offsetof(ladd_backend, gelu_forward), 0);
}
static PyObject *gelu_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_backward(args, kwargs, "OO|$O:gelu_backward", offsetof(ladd_backend, gelu_backward), 0);
}
static PyObject *silu_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_forward(args, kwargs, "O|$O:silu_forward", offsetof(ladd_backend, silu_forward), 0);
}
static PyObject *silu_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_backward(args, kwargs, "OO|$O:silu_backward", offsetof(ladd_backend, silu_backward), 0);
}
static PyObject *leaky_relu_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_forward(args, kwargs, "O|d$O:leaky_relu_forward", 0, 1);
}
static PyObject *leaky_relu_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return activation_backward(args, kwargs, "OO|d$O:leaky_relu_backward", 0, 1);
}

/* ---- attention ------------------------------------------------------------------------------------------------------- */

enum { MAX_STREAMS = 2 };

/* Sizes of a joint attention: B, h (heads), d (dh) hold for all streams, n differs. */
typedef struct joint {
    core_dims dims[MAX_STREAMS];
    ladd_stream streams[MAX_STREAMS];
    PyObject *items[MAX_STREAMS]; /* tuples of q, k, v: new references */
    int n_streams, S;
    float scale;
    ladd_dtype products; /* what the factors of its products are rounded to */
} joint;

/* The last two axes dense, the others at any positive stride. */
static int strides_of(PyObject *array, const char *name, ptrdiff_t *row, ptrdiff_t *batch) {
    if (core_is_array(array)) {
        *row = (ptrdiff_t)(core_size(array, 2) * core_size(array, 3));
        *batch = *row * (ptrdiff_t)core_size(array, 1);
        return 0;
    }
    const npy_intp *s = PyArray_STRIDES((PyArrayObject *)array), *n = PyArray_DIMS((PyArrayObject *)array);
    npy_intp dense = (npy_intp)sizeof(float), heads_row = n[2] * n[3] * dense;
    /* A stride along an axis of size 1 is never used, and NumPy leaves it arbitrary. */
    npy_intp row_bytes = n[1] > 1 ? s[1] : heads_row, batch_bytes = n[0] > 1 ? s[0] : row_bytes * n[1];
    if ((n[3] > 1 && s[3] != dense) || (n[2] > 1 && s[2] != n[3] * dense) || row_bytes < heads_row || batch_bytes < 0 || row_bytes % dense ||
        batch_bytes % dense) {
        PyErr_Format(PyExc_ValueError, "%s: expected dense heads and head_dim axes and positive strides, got another layout", name);
        return -1;
    }
    *row = row_bytes / dense;
    *batch = batch_bytes / dense;
    return 0;
}

static int read_streams(joint *j, PyObject *given, PyObject *scale, PyObject *dtype) {
    static const char *const parts[3] = {"q", "k", "v"};
    if ((!PyList_Check(given) && !PyTuple_Check(given)) || PySequence_Size(given) < 1 || PySequence_Size(given) > MAX_STREAMS) {
        PyErr_Format(PyExc_TypeError, "streams: expected a list of one or two (q, k, v), got %.200R", given);
        return -1;
    }
    j->n_streams = (int)PySequence_Size(given);
    for (int i = 0; i < j->n_streams; i++) {
        core_dims *d = &j->dims[i];
        PyObject *stream = PySequence_GetItem(given, i);
        if (!stream) return -1;
        j->items[i] = core_sequence(stream, "stream", 3, "q, k, v");
        Py_DECREF(stream);
        if (!j->items[i]) return -1;
        if (i > 0) { /* the same batch, heads and place */
            const core_dims *first = &j->dims[0];
            *d = (core_dims){.device = first->device, .act = first->act, .placed = 1};
            DIM(d, 'B') = DIM(first, 'B'), DIM(d, 'h') = DIM(first, 'h'), DIM(d, 'd') = DIM(first, 'd');
        }
        ladd_stream *s = &j->streams[i];
        for (int k = 0; k < 3; k++) {
            PyObject *array = core_strided(PyTuple_GET_ITEM(j->items[i], k), parts[k], "Bnhd", d);
            ptrdiff_t row, batch;
            if (!array || strides_of(array, parts[k], &row, &batch) < 0) return -1;
            if (k > 0 && (row != s->row || batch != s->batch)) {
                PyErr_Format(PyExc_ValueError, "%s: expected the strides of q, got others", parts[k]);
                return -1;
            }
            s->row = row;
            s->batch = batch;
            *(k == 0 ? &s->q : k == 1 ? &s->k : &s->v) = core_data(array);
        }
        s->n = IDIM(d, 'n');
        s->o_row = (ptrdiff_t)(DIM(d, 'h') * DIM(d, 'd'));
        s->o_batch = s->o_row * s->n;
        if (j->S > 2147483647 - s->n) {
            PyErr_SetString(PyExc_ValueError, "streams: expected fewer than 2**31 tokens together");
            return -1;
        }
        j->S += s->n;
    }
    double value = scale && scale != Py_None ? PyFloat_AsDouble(scale) : 1.0 / sqrt((double)DIM(&j->dims[0], 'd'));
    if ((value == -1.0 && PyErr_Occurred()) || core_finite(value, "scale") < 0) return -1;
    j->scale = (float)value;
    j->products = j->dims[0].act;
    if (!dtype || dtype == Py_None) return 0;
    if (j->dims[0].device) {
        PyErr_SetString(PyExc_ValueError, "dtype: expected None for arrays on a device, which have their own");
        return -1;
    }
    return core_dtype(dtype, "dtype", &j->products);
}

static void drop_streams(joint *j) {
    for (int i = 0; i < MAX_STREAMS; i++) Py_XDECREF(j->items[i]);
}

static PyObject *attention_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"streams", "scale", "dtype", NULL};
    PyObject *given, *scale = NULL, *dtype = NULL, *outs = NULL, *lse = NULL, *pair = NULL;
    joint j = {0};
    int result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:attention_forward", names, &given, &scale, &dtype)) return NULL;
    if (read_streams(&j, given, scale, dtype) < 0) goto done;
    core_dims *d = &j.dims[0];
    DIM(d, 'S') = j.S;
    lse = core_new("=BhS", d, 0);
    outs = PyList_New(j.n_streams);
    if (!lse || !outs) goto done;
    for (int i = 0; i < j.n_streams; i++) {
        PyObject *o = core_new("Bnhd", &j.dims[i], 0);
        if (!o) goto done;
        PyList_SET_ITEM(outs, i, o);
        j.streams[i].o = core_data(o);
    }
    CORE_KERNEL_IN(result, d, j.products, attention_forward, j.streams, j.n_streams, core_data(lse), IDIM(d, 'B'), IDIM(d, 'h'), IDIM(d, 'd'),
                   j.scale);
    if (result == 0) pair = PyTuple_Pack(2, outs, lse);
done:
    drop_streams(&j);
    Py_XDECREF(outs);
    Py_XDECREF(lse);
    return pair;
}

static PyObject *attention_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"douts", "streams", "outs", "lse", "scale", "dtype", NULL};
    PyObject *given_douts, *given, *given_outs, *lse, *scale = NULL, *dtype = NULL, *douts = NULL, *outs = NULL, *grads = NULL;
    ladd_stream_grad pointers[MAX_STREAMS] = {{0}};
    joint j = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OO:attention_backward", names, &given_douts, &given, &given_outs, &lse, &scale, &dtype))
        return NULL;
    if (read_streams(&j, given, scale, dtype) < 0) goto done;
    core_dims *d = &j.dims[0];
    DIM(d, 'S') = j.S;
    if (!core_input(lse, "lse", "=BhS", d)) goto done;
    douts = core_sequence(given_douts, "douts", j.n_streams, "one a stream");
    outs = douts ? core_sequence(given_outs, "outs", j.n_streams, "one a stream") : NULL;
    grads = PyList_New(j.n_streams);
    if (!outs || !grads) goto done;
    for (int i = 0; i < j.n_streams; i++) {
        PyObject *dout = core_input(PyTuple_GET_ITEM(douts, i), "dout", "Bnhd", &j.dims[i]);
        PyObject *out = dout ? core_input(PyTuple_GET_ITEM(outs, i), "out", "Bnhd", &j.dims[i]) : NULL;
        if (!out) goto done;
        /* The kernel writes dq, dk, dv at the strides of q, k, v: dense gradients want them dense. */
        ladd_stream *s = &j.streams[i];
        if (s->row != s->o_row || s->batch != s->o_batch) {
            PyErr_SetString(PyExc_ValueError, "q, k, v: expected C-contiguous arrays for backward, got strided views");
            goto done;
        }
        PyObject *dq = core_new("Bnhd", &j.dims[i], 0), *dk = core_new("Bnhd", &j.dims[i], 0), *dv = core_new("Bnhd", &j.dims[i], 0);
        PyObject *triple = dq && dk && dv ? PyTuple_Pack(3, dq, dk, dv) : NULL;
        if (triple) {
            pointers[i] = (ladd_stream_grad){.dq = core_data(dq), .dk = core_data(dk), .dv = core_data(dv), .d_o = core_data(dout)};
            s->o = core_data(out);
            PyList_SET_ITEM(grads, i, triple);
        }
        Py_XDECREF(dq);
        Py_XDECREF(dk);
        Py_XDECREF(dv);
        if (!triple) goto done;
    }
    CORE_KERNEL_IN(result, d, j.products, attention_backward, pointers, j.streams, j.n_streams, core_data(lse), IDIM(d, 'B'), IDIM(d, 'h'),
                   IDIM(d, 'd'), j.scale);
done:
    drop_streams(&j);
    Py_XDECREF(douts);
    Py_XDECREF(outs);
    if (result < 0) Py_CLEAR(grads);
    return grads;
}

static PyMethodDef functions[] = {
    CORE_METHOD("linear_forward", linear_forward, "linear_forward(x, w, bias=None, *, out=None) -> x w^T + bias"),
    CORE_METHOD("linear_gelu_forward", linear_gelu_forward, "linear_gelu_forward(x, w, bias=None, *, out=None) -> (gelu(h), h)"),
    CORE_METHOD("linear_backward", linear_backward, "linear_backward(dy, x, w, *, input=True, weight=True, bias=True) -> (dx, dw, dbias)"),
    CORE_METHOD("gelu_forward", gelu_forward, "gelu_forward(x, *, out=None)"),
    CORE_METHOD("gelu_backward", gelu_backward, "gelu_backward(dy, x, *, out=None)"),
    CORE_METHOD("silu_forward", silu_forward, "silu_forward(x, *, out=None)"),
    CORE_METHOD("silu_backward", silu_backward, "silu_backward(dy, x, *, out=None)"),
    CORE_METHOD("leaky_relu_forward", leaky_relu_forward, "leaky_relu_forward(x, slope=0.2, *, out=None)"),
    CORE_METHOD("leaky_relu_backward", leaky_relu_backward, "leaky_relu_backward(dy, x, slope=0.2, *, out=None)"),
    CORE_METHOD("attention_forward", attention_forward, "attention_forward([(q, k, v), ...], scale=None, dtype=None) -> (list of o, lse)"),
    CORE_METHOD("attention_backward", attention_backward,
                "attention_backward(douts, streams, outs, lse, scale=None, dtype=None) -> list of (dq, dk, dv)"),
    {NULL, NULL, 0, NULL},
};

int core_add_dense(PyObject *module) { return PyModule_AddFunctions(module, functions); }
