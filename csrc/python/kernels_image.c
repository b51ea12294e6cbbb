/* Kernels on arrays: convolution, resampling, patches, positions. */
#include <limits.h>

#include "binding.h"

/* ---- conv2d ---------------------------------------------------------------------------------------------------------- */

/* Fills `conv` from the letters b (Cin = C, Cout = K, kernel Y x X on H x W) and the options; sets the letters P and Q of the result's sides. */
static int read_conv(ladd_conv *conv, core_dims *d, PyObject *stride, PyObject *padding) {
    int pad[4] = {0};
    *conv = (ladd_conv){.stride = 1};
    if (stride && core_int(stride, "stride", 1, INT_MAX, &conv->stride) < 0) return -1;
    if (padding) {
        Py_ssize_t n = core_int_list(padding, "padding", pad, 4, 0, INT_MAX / 4);
        if (n < 0) return -1;
        if (n != 4) {
            PyErr_Format(PyExc_ValueError, "padding: expected (top, left, bottom, right), got %R", padding);
            return -1;
        }
    }
    conv->B = IDIM(d, 'B'), conv->Cin = IDIM(d, 'C'), conv->H = IDIM(d, 'H'), conv->W = IDIM(d, 'W');
    conv->Cout = IDIM(d, 'K'), conv->kh = IDIM(d, 'Y'), conv->kw = IDIM(d, 'X');
    conv->pad_top = pad[0], conv->pad_left = pad[1], conv->pad_bottom = pad[2], conv->pad_right = pad[3];
    int64_t tall = (int64_t)conv->H + pad[0] + pad[2], wide = (int64_t)conv->W + pad[1] + pad[3];
    if (conv->kh > tall || conv->kw > wide || tall > INT_MAX || wide > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "w: expected a kernel of at most the padded image, %lld x %lld, got %d x %d", (long long)tall, (long long)wide,
                     conv->kh, conv->kw);
        return -1;
    }
    DIM(d, 'P') = conv->Ho = (int)(tall - conv->kh) / conv->stride + 1;
    DIM(d, 'Q') = conv->Wo = (int)(wide - conv->kw) / conv->stride + 1;
    return 0;
}

static PyObject *conv2d_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "w", "bias", "stride", "padding", "out", NULL};
    PyObject *x, *w, *bias_given = NULL, *stride = NULL, *padding = NULL, *out = NULL;
    core_dims d = {0};
    ladd_conv conv;
    int ok, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OOO$O:conv2d_forward", names, &x, &w, &bias_given, &stride, &padding, &out)) return NULL;
    if (!core_input(x, "x", "BCHW", &d) || !core_input(w, "w", "KCYX", &d)) return NULL;
    PyObject *bias = core_optional(bias_given, "bias", "K", &d, &ok);
    if (!ok || read_conv(&conv, &d, stride, padding) < 0) return NULL;
    PyObject *y = core_output(out, "BKPQ", &d);
    if (y && core_no_overlap(y, x, "x", 0) == 0 && core_no_overlap(y, w, "w", 0) == 0 && core_no_overlap(y, bias, "bias", 0) == 0)
        CORE_KERNEL(result, &d, conv2d_forward, core_data(y), core_data(x), core_data(w), core_data(bias), &conv);
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *conv2d_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "w", "stride", "padding", "input", "weight", "bias", NULL};
    static const char *const shapes[3] = {"BCHW", "=KCYX", "=K"};
    PyObject *dy, *x, *w, *stride = NULL, *padding = NULL, *flags[3] = {NULL}, *grads[3] = {NULL}, *triple = NULL;
    int wanted[3] = {1, 1, 1}, result;
    core_dims d = {0};
    ladd_conv conv;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OO$OOO:conv2d_backward", names, &dy, &x, &w, &stride, &padding, &flags[0], &flags[1],
                                     &flags[2]))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (core_bool(flags[i], names[i + 5], &wanted[i]) < 0) return NULL;
    if (!core_input(x, "x", "BCHW", &d) || !core_input(w, "w", "KCYX", &d)) return NULL;
    if (read_conv(&conv, &d, stride, padding) < 0 || !core_input(dy, "dy", "BKPQ", &d)) return NULL;
    for (int i = 0; i < 3; i++) {
        grads[i] = wanted[i] ? core_new(shapes[i], &d, i > 0) : Py_NewRef(Py_None); /* the kernel adds to parameter gradients */
        if (!grads[i]) goto done;
    }
    CORE_KERNEL(result, &d, conv2d_backward, wanted[0] ? core_data(grads[0]) : NULL, wanted[1] ? core_data(grads[1]) : NULL,
                wanted[2] ? core_data(grads[2]) : NULL, core_data(dy), core_data(x), core_data(w), &conv);
    if (result == 0) triple = PyTuple_Pack(3, grads[0], grads[1], grads[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(grads[i]);
    return triple;
}

/* ---- resampling and layout ------------------------------------------------------------------------------------------- */

static PyObject *upsample2x_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "out", NULL};
    PyObject *x, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:upsample2x_forward", names, &x, &out) || !core_input(x, "x", "BCHW", &d)) return NULL;
    if (DIM(&d, 'H') > INT_MAX / 2 || DIM(&d, 'W') > INT_MAX / 2 || DIM(&d, 'B') > INT_MAX / DIM(&d, 'C')) {
        PyErr_Format(PyExc_ValueError, "x: expected sizes whose doubles fit 31 bits, got %lld x %lld", (long long)DIM(&d, 'H'),
                     (long long)DIM(&d, 'W'));
        return NULL;
    }
    DIM(&d, 'Y') = 2 * DIM(&d, 'H');
    DIM(&d, 'X') = 2 * DIM(&d, 'W');
    PyObject *y = core_output(out, "BCYX", &d);
    if (y && core_no_overlap(y, x, "x", 0) == 0)
        CORE_KERNEL(result, &d, upsample2x_forward, core_data(y), core_data(x), (int)(DIM(&d, 'B') * DIM(&d, 'C')), IDIM(&d, 'H'), IDIM(&d, 'W'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *upsample2x_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "out", NULL};
    PyObject *dy, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:upsample2x_backward", names, &dy, &out) || !core_input(dy, "dy", "BCYX", &d)) return NULL;
    if (DIM(&d, 'Y') % 2 || DIM(&d, 'X') % 2 || DIM(&d, 'B') > INT_MAX / DIM(&d, 'C')) {
        PyErr_Format(PyExc_ValueError, "dy: expected even height and width, got %lld x %lld", (long long)DIM(&d, 'Y'), (long long)DIM(&d, 'X'));
        return NULL;
    }
    DIM(&d, 'H') = DIM(&d, 'Y') / 2;
    DIM(&d, 'W') = DIM(&d, 'X') / 2;
    PyObject *dx = core_output(out, "BCHW", &d);
    if (dx && core_no_overlap(dx, dy, "dy", 0) == 0)
        CORE_KERNEL(result, &d, upsample2x_backward, core_data(dx), core_data(dy), (int)(DIM(&d, 'B') * DIM(&d, 'C')), IDIM(&d, 'H'), IDIM(&d, 'W'));
    if (result < 0) Py_CLEAR(dx);
    return dx;
}

static PyObject *transpose(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "out", NULL};
    PyObject *x, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:transpose", names, &x, &out) || !core_input(x, "x", "BRQ", &d)) return NULL;
    PyObject *y = core_output(out, "BQR", &d);
    if (y && core_no_overlap(y, x, "x", 0) == 0)
        CORE_KERNEL(result, &d, transpose, core_data(y), core_data(x), IDIM(&d, 'B'), IDIM(&d, 'R'), IDIM(&d, 'Q'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

/* Tokens N and their length L for an image C, H, W and patches of side p; -1 and an exception when they do not fit. */
static int patch_sizes(core_dims *d, int p) {
    int64_t h = DIM(d, 'H') / p, w = DIM(d, 'W') / p;
    if (h < 1 || w < 1 || h * w > INT_MAX || (int64_t)p * p > INT_MAX / DIM(d, 'C')) {
        PyErr_Format(PyExc_ValueError, "patch_size: expected 1 to %lld, the image's smaller side, got %d",
                     (long long)(DIM(d, 'H') < DIM(d, 'W') ? DIM(d, 'H') : DIM(d, 'W')), p);
        return -1;
    }
    DIM(d, 'N') = h * w;
    DIM(d, 'L') = DIM(d, 'C') * p * p;
    return 0;
}

static PyObject *patch_gather(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"image", "patch_size", "channel_last", NULL};
    PyObject *image, *p_given, *last_given = NULL;
    core_dims d = {0};
    int p, last = 0, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:patch_gather", names, &image, &p_given, &last_given)) return NULL;
    if (core_int(p_given, "patch_size", 1, 32768, &p) < 0 || core_bool(last_given, "channel_last", &last) < 0) return NULL;
    if (!core_input(image, "image", "BCHW", &d) || patch_sizes(&d, p) < 0) return NULL;
    PyObject *tokens = core_new("BNL", &d, 0);
    if (tokens)
        CORE_KERNEL(result, &d, patch_gather, core_data(tokens), core_data(image), IDIM(&d, 'B'), IDIM(&d, 'C'), IDIM(&d, 'H'), IDIM(&d, 'W'), p,
                    last);
    if (result < 0) Py_CLEAR(tokens);
    return tokens;
}

static PyObject *patch_scatter(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"tokens", "channels", "height", "width", "patch_size", "channel_last", NULL};
    PyObject *tokens, *given[4], *last_given = NULL;
    core_dims d = {0};
    int sizes[4], last = 0, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|O:patch_scatter", names, &tokens, &given[0], &given[1], &given[2], &given[3], &last_given))
        return NULL;
    for (int i = 0; i < 4; i++)
        if (core_int(given[i], names[i + 1], 1, i == 3 ? 32768 : INT_MAX, &sizes[i]) < 0) return NULL;
    if (core_bool(last_given, "channel_last", &last) < 0) return NULL;
    DIM(&d, 'C') = sizes[0], DIM(&d, 'H') = sizes[1], DIM(&d, 'W') = sizes[2];
    if (patch_sizes(&d, sizes[3]) < 0 || !core_input(tokens, "tokens", "BNL", &d)) return NULL;
    PyObject *image = core_new("BCHW", &d, 0);
    if (image)
        CORE_KERNEL(result, &d, patch_scatter, core_data(image), core_data(tokens), IDIM(&d, 'B'), sizes[0], sizes[1], sizes[2], sizes[3], last);
    if (result < 0) Py_CLEAR(image);
    return image;
}

static PyObject *add_position(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "table", "grid", NULL};
    PyObject *x, *table, *grid;
    core_dims d = {0};
    int sides[2], result;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:add_position", names, &x, &table, &grid)) return NULL;
    Py_ssize_t n = core_int_list(grid, "grid", sides, 2, 1, INT_MAX);
    if (n < 0 || !core_input(table, "table", "MMD", &d)) return NULL;
    if (n != 2 || sides[0] > DIM(&d, 'M') || sides[1] > DIM(&d, 'M') || (int64_t)sides[0] * sides[1] > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "grid: expected (h, w) of at most %lld each, got %R", (long long)DIM(&d, 'M'), grid);
        return NULL;
    }
    DIM(&d, 'N') = (int64_t)sides[0] * sides[1];
    PyObject *array = core_inout(x, "x", "BND", &d);
    if (!array || core_no_overlap(x, table, "table", 0) < 0) return NULL;
    CORE_KERNEL(result, &d, add_position, core_data(array), core_data(table), IDIM(&d, 'B'), sides[0], sides[1], IDIM(&d, 'M'), IDIM(&d, 'D'));
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *timestep_features(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"sigma", "dim", "out", NULL};
    PyObject *sigma, *dim_given, *out = NULL;
    core_dims d = {0};
    int dim, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O:timestep_features", names, &sigma, &dim_given, &out)) return NULL;
    if (core_int(dim_given, "dim", 2, INT_MAX, &dim) < 0 || !core_input(sigma, "sigma", "@B", &d)) return NULL;
    if (dim % 2) {
        PyErr_Format(PyExc_ValueError, "dim: expected an even number, got %d", dim);
        return NULL;
    }
    DIM(&d, 'D') = dim;
    PyObject *features = core_output(out, "BD", &d);
    if (features) CORE_KERNEL_NUMBERS(result, &d, sigma, timestep_features, core_data(features), CORE_NUMBERS, IDIM(&d, 'B'), dim);
    if (result < 0) Py_CLEAR(features);
    return features;
}

static PyMethodDef functions[] = {
    CORE_METHOD("conv2d_forward", conv2d_forward, "(x, w, bias=None, stride=1, padding=(0, 0, 0, 0), *, out=None) -> y"),
    CORE_METHOD("conv2d_backward", conv2d_backward,
                "(dy, x, w, stride=1, padding=(0, 0, 0, 0), *, input=True, weight=True, bias=True) -> (dx, dw, dbias)"),
    CORE_METHOD("upsample2x_forward", upsample2x_forward, "(x, *, out=None) -> y, nearest"),
    CORE_METHOD("upsample2x_backward", upsample2x_backward, "(dy, *, out=None) -> dx"),
    CORE_METHOD("transpose", transpose, "(x[B,R,Q], *, out=None) -> [B,Q,R]"),
    CORE_METHOD("patch_gather", patch_gather, "(image, patch_size, channel_last=False) -> tokens"),
    CORE_METHOD("patch_scatter", patch_scatter, "(tokens, channels, height, width, patch_size, channel_last=False) -> image"),
    CORE_METHOD("add_position", add_position, "(x, table, grid): x += the centre of the table"),
    CORE_METHOD("timestep_features", timestep_features, "(sigma, dim, *, out=None) -> [B,dim]"),
    {NULL, NULL, 0, NULL},
};

int core_add_image(PyObject *module) { return PyModule_AddFunctions(module, functions); }
