/* Kernels on arrays: layer norm with modulation, gate, RMS norm, group norm, spectral norm. */
#include "binding.h"

/* Packs up to three owned references into a tuple, or drops them when the kernel failed. */
static PyObject *pack(int result, PyObject *a, PyObject *b, PyObject *c) {
    PyObject *tuple = NULL;
    if (result == 0) tuple = c ? PyTuple_Pack(3, a, b, c) : PyTuple_Pack(2, a, b);
    Py_XDECREF(a);
    Py_XDECREF(b);
    Py_XDECREF(c);
    return tuple;
}

/* ---- layer norm ------------------------------------------------------------------------------------------------------ */

static PyObject *layer_norm_modulate_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "shift", "scale", "eps", "out", NULL};
    PyObject *x, *shift, *scale, *out = NULL;
    double eps = 1e-6;
    core_dims d = {0};
    int ok, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|d$O:layer_norm_modulate_forward", names, &x, &shift, &scale, &eps, &out)) return NULL;
    if (core_in_range(eps, "eps", 0, 1) < 0 || !core_input(x, "x", "BND", &d)) return NULL;
    PyObject *shift_array = core_optional(shift, "shift", "BD", &d, &ok);
    if (!ok) return NULL;
    PyObject *scale_array = core_optional(scale, "scale", "BD", &d, &ok);
    if (!ok) return NULL;
    if (!shift_array != !scale_array) {
        PyErr_SetString(PyExc_ValueError, "shift, scale: expected both or neither, got one");
        return NULL;
    }
    PyObject *y = core_output(out, "BND", &d), *mean = core_new("=BN", &d, 0), *rstd = core_new("=BN", &d, 0);
    if (y && mean && rstd && core_no_overlap(y, x, "x", 0) == 0 && core_no_overlap(y, shift_array, "shift", 0) == 0 &&
        core_no_overlap(y, scale_array, "scale", 0) == 0)
        CORE_KERNEL(result, &d, layer_norm_modulate_forward, core_data(y), core_data(mean), core_data(rstd), core_data(x), core_data(shift_array),
                    core_data(scale_array), DIM(&d, 'D'), IDIM(&d, 'B'), IDIM(&d, 'N'), IDIM(&d, 'D'), (float)eps);
    return pack(result, y, mean, rstd);
}

static PyObject *layer_norm_modulate_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "mean", "rstd", "scale", NULL};
    PyObject *dy, *x, *mean, *rstd, *scale;
    core_dims d = {0};
    int ok, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO:layer_norm_modulate_backward", names, &dy, &x, &mean, &rstd, &scale)) return NULL;
    if (!core_input(x, "x", "BND", &d) || !core_input(dy, "dy", "BND", &d)) return NULL;
    if (!core_input(mean, "mean", "=BN", &d) || !core_input(rstd, "rstd", "=BN", &d)) return NULL;
    PyObject *scale_array = core_optional(scale, "scale", "BD", &d, &ok);
    if (!ok) return NULL;
    PyObject *dx = core_new("BND", &d, 1); /* the kernel adds to dx, as it joins a residual stream in the model */
    PyObject *dshift = scale_array ? core_new("BD", &d, 0) : Py_NewRef(Py_None), *dscale = scale_array ? core_new("BD", &d, 0) : Py_NewRef(Py_None);
    if (dx && dshift && dscale)
        CORE_KERNEL(result, &d, layer_norm_modulate_backward, core_data(dx), scale_array ? core_data(dshift) : NULL,
                    scale_array ? core_data(dscale) : NULL, core_data(dy), core_data(x), core_data(mean), core_data(rstd), core_data(scale_array),
                    DIM(&d, 'D'), IDIM(&d, 'B'), IDIM(&d, 'N'), IDIM(&d, 'D'));
    return pack(result, dx, dshift, dscale);
}

static PyObject *gate_residual_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "y", "gate", "out", NULL};
    PyObject *x, *y, *gate, *out = NULL;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$O:gate_residual_forward", names, &x, &y, &gate, &out)) return NULL;
    if (!core_input(x, "x", "BND", &d) || !core_input(y, "y", "BND", &d) || !core_input(gate, "gate", "BD", &d)) return NULL;
    PyObject *sum = core_output(out, "BND", &d);
    if (sum && core_no_overlap(sum, x, "x", 1) == 0 && core_no_overlap(sum, y, "y", 0) == 0 && core_no_overlap(sum, gate, "gate", 0) == 0)
        CORE_KERNEL(result, &d, gate_residual_forward, core_data(sum), core_data(x), core_data(y), core_data(gate), DIM(&d, 'D'), IDIM(&d, 'B'),
                    IDIM(&d, 'N'), IDIM(&d, 'D'));
    if (result < 0) Py_CLEAR(sum);
    return sum;
}

static PyObject *gate_residual_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dout", "y", "gate", NULL};
    PyObject *dout, *y, *gate;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:gate_residual_backward", names, &dout, &y, &gate)) return NULL;
    if (!core_input(y, "y", "BND", &d) || !core_input(dout, "dout", "BND", &d) || !core_input(gate, "gate", "BD", &d)) return NULL;
    PyObject *dy = core_new("BND", &d, 0), *dgate = core_new("BD", &d, 0);
    if (dy && dgate)
        CORE_KERNEL(result, &d, gate_residual_backward, core_data(dy), core_data(dgate), core_data(dout), core_data(y), core_data(gate), DIM(&d, 'D'),
                    IDIM(&d, 'B'), IDIM(&d, 'N'), IDIM(&d, 'D'));
    return pack(result, dy, dgate, NULL);
}

/* ---- RMS norm -------------------------------------------------------------------------------------------------------- */

static PyObject *rms_norm_heads_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "w", "eps", "out", NULL};
    PyObject *x, *w, *out = NULL;
    double eps = 1e-6;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|d$O:rms_norm_heads_forward", names, &x, &w, &eps, &out)) return NULL;
    if (core_in_range(eps, "eps", 0, 1) < 0 || !core_input(x, "x", "Rhd", &d) || !core_input(w, "w", "d", &d)) return NULL;
    PyObject *y = core_output(out, "Rhd", &d), *rstd = core_new("=Rh", &d, 0);
    ptrdiff_t row = (ptrdiff_t)(DIM(&d, 'h') * DIM(&d, 'd'));
    if (y && rstd && core_no_overlap(y, x, "x", 0) == 0 && core_no_overlap(y, w, "w", 0) == 0)
        CORE_KERNEL(result, &d, rms_norm_heads_forward, core_data(y), core_data(rstd), core_data(x), core_data(w), IDIM(&d, 'R'), IDIM(&d, 'h'),
                    IDIM(&d, 'd'), row, row, (float)eps);
    return pack(result, y, rstd, NULL);
}

static PyObject *rms_norm_heads_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "rstd", "w", NULL};
    PyObject *dy, *x, *rstd, *w;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:rms_norm_heads_backward", names, &dy, &x, &rstd, &w)) return NULL;
    if (!core_input(x, "x", "Rhd", &d) || !core_input(dy, "dy", "Rhd", &d) || !core_input(rstd, "rstd", "=Rh", &d) || !core_input(w, "w", "d", &d))
        return NULL;
    PyObject *dx = core_new("Rhd", &d, 0), *dw = core_new("=d", &d, 1);
    ptrdiff_t row = (ptrdiff_t)(DIM(&d, 'h') * DIM(&d, 'd'));
    if (dx && dw)
        CORE_KERNEL(result, &d, rms_norm_heads_backward, core_data(dx), core_data(dw), core_data(dy), core_data(x), core_data(rstd), core_data(w),
                    IDIM(&d, 'R'), IDIM(&d, 'h'), IDIM(&d, 'd'), row, row, row);
    return pack(result, dx, dw, NULL);
}

/* ---- group norm ------------------------------------------------------------------------------------------------------ */

static PyObject *group_norm_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "gamma", "beta", "groups", "eps", "silu", "out", NULL};
    PyObject *x, *gamma, *beta, *groups_given, *silu_given = NULL, *out = NULL;
    double eps = 1e-6;
    core_dims d = {0};
    int groups, silu = 0, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|dO$O:group_norm_forward", names, &x, &gamma, &beta, &groups_given, &eps, &silu_given, &out))
        return NULL;
    if (core_int(groups_given, "groups", 1, 2147483647, &groups) < 0 || core_in_range(eps, "eps", 0, 1) < 0) return NULL;
    if (core_bool(silu_given, "silu", &silu) < 0) return NULL;
    if (!core_input(x, "x", "BCL", &d) || !core_input(gamma, "gamma", "C", &d) || !core_input(beta, "beta", "C", &d)) return NULL;
    if (DIM(&d, 'C') % groups) {
        PyErr_Format(PyExc_ValueError, "groups: expected a divisor of the %lld channels, got %d", (long long)DIM(&d, 'C'), groups);
        return NULL;
    }
    DIM(&d, 'G') = groups;
    PyObject *y = core_output(out, "BCL", &d), *mean = core_new("=BG", &d, 0), *rstd = core_new("=BG", &d, 0);
    if (y && mean && rstd && core_no_overlap(y, x, "x", 0) == 0 && core_no_overlap(y, gamma, "gamma", 0) == 0 &&
        core_no_overlap(y, beta, "beta", 0) == 0)
        CORE_KERNEL(result, &d, group_norm_forward, core_data(y), core_data(mean), core_data(rstd), core_data(x), core_data(gamma), core_data(beta),
                    IDIM(&d, 'B'), IDIM(&d, 'C'), IDIM(&d, 'L'), groups, (float)eps, silu);
    return pack(result, y, mean, rstd);
}

static PyObject *group_norm_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "mean", "rstd", "gamma", "beta", "silu", NULL};
    PyObject *dy, *x, *mean, *rstd, *gamma, *beta, *silu_given = NULL;
    core_dims d = {0};
    int silu = 0, result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOO|O:group_norm_backward", names, &dy, &x, &mean, &rstd, &gamma, &beta, &silu_given))
        return NULL;
    if (core_bool(silu_given, "silu", &silu) < 0) return NULL;
    if (!core_input(x, "x", "BCL", &d) || !core_input(dy, "dy", "BCL", &d) || !core_input(mean, "mean", "=BG", &d) ||
        !core_input(rstd, "rstd", "=BG", &d))
        return NULL;
    if (!core_input(gamma, "gamma", "C", &d) || !core_input(beta, "beta", "C", &d)) return NULL;
    if (DIM(&d, 'C') % DIM(&d, 'G')) {
        PyErr_Format(PyExc_ValueError, "mean: expected a number of groups that divides the %lld channels, got %lld", (long long)DIM(&d, 'C'),
                     (long long)DIM(&d, 'G'));
        return NULL;
    }
    PyObject *dx = core_new("BCL", &d, 0), *dgamma = core_new("=C", &d, 1), *dbeta = core_new("=C", &d, 1);
    if (dx && dgamma && dbeta)
        CORE_KERNEL(result, &d, group_norm_backward, core_data(dx), core_data(dgamma), core_data(dbeta), core_data(dy), core_data(x), core_data(mean),
                    core_data(rstd), core_data(gamma), core_data(beta), IDIM(&d, 'B'), IDIM(&d, 'C'), IDIM(&d, 'L'), IDIM(&d, 'G'), silu);
    return pack(result, dx, dgamma, dbeta);
}

/* ---- spectral norm --------------------------------------------------------------------------------------------------- */

static PyObject *spectral_norm_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"w", "u", "iterations", NULL};
    PyObject *w, *u, *iterations_given = NULL, *result_tuple = NULL;
    core_dims d = {0};
    int iterations = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:spectral_norm_forward", names, &w, &u, &iterations_given)) return NULL;
    if (iterations_given && core_int(iterations_given, "iterations", 0, 1000000, &iterations) < 0) return NULL;
    if (!core_input(w, "w", "=RK", &d) || !core_inout(u, "u", "=R", &d) || core_no_overlap(u, w, "w", 0) < 0) return NULL;
    d.of['u'] = 1;
    PyObject *w_hat = core_new("RK", &d, 0), *v = core_new("=K", &d, 0), *sigma = core_new("=u", &d, 0);
    core_call call;
    if (w_hat && v && sigma && core_begin(&call, NULL, d.device, d.act) == 0) {
        float value = 0;
        ladd_status status = call.ctx.backend->spectral_norm_forward(&call.ctx, core_data(w_hat), core_data(u), core_data(v), core_data(sigma),
                                                                     core_data(w), IDIM(&d, 'R'), IDIM(&d, 'K'), iterations);
        if (status == LADD_OK) status = call.ctx.backend->download(&call.ctx, &value, core_data(sigma), sizeof value);
        if (core_end(&call, status) == 0) result_tuple = Py_BuildValue("OOd", w_hat, v, (double)value);
    }
    Py_XDECREF(sigma);
    Py_XDECREF(w_hat);
    Py_XDECREF(v);
    return result_tuple;
}

static PyObject *spectral_norm_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dw_hat", "w_hat", "u", "v", "sigma", NULL};
    PyObject *dw_hat, *w_hat, *u, *v;
    double sigma_given;
    core_dims d = {0};
    int result = -1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOd:spectral_norm_backward", names, &dw_hat, &w_hat, &u, &v, &sigma_given)) return NULL;
    if (core_finite(sigma_given, "sigma") < 0 || !core_input(w_hat, "w_hat", "RK", &d) || !core_input(dw_hat, "dw_hat", "=RK", &d)) return NULL;
    if (!core_input(u, "u", "=R", &d) || !core_input(v, "v", "=K", &d)) return NULL;
    const float sigma_value = (float)sigma_given;
    d.of['u'] = 1;
    PyObject *dw = core_new("=RK", &d, 1), *sigma = core_new("=u", &d, 0);
    core_call call;
    if (dw && sigma && core_begin(&call, NULL, d.device, d.act) == 0) {
        ladd_status status = call.ctx.backend->upload(&call.ctx, core_data(sigma), &sigma_value, sizeof sigma_value);
        if (status == LADD_OK)
            status = call.ctx.backend->spectral_norm_backward(&call.ctx, core_data(dw), core_data(dw_hat), core_data(w_hat), core_data(u),
                                                              core_data(v), core_data(sigma), IDIM(&d, 'R'), IDIM(&d, 'K'));
        result = core_end(&call, status);
    }
    Py_XDECREF(sigma);
    if (result < 0) Py_CLEAR(dw);
    return dw;
}

/* ---- one vector a sample against the channels of an image -------------------------------------------------------------- */

static PyObject *channel_dot_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"x", "e", "bias", "out", NULL};
    PyObject *x, *e, *bias, *out = NULL;
    core_dims d = {0};
    int result = -1;
    d.of['u'] = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|$O:channel_dot_forward", names, &x, &e, &bias, &out)) return NULL;
    if (!core_input(x, "x", "BCL", &d) || !core_input(e, "e", "BC", &d) || !core_input(bias, "bias", "u", &d)) return NULL;
    PyObject *y = core_output(out, "BL", &d);
    if (y && core_no_overlap(y, x, "x", 0) == 0 && core_no_overlap(y, e, "e", 0) == 0 && core_no_overlap(y, bias, "bias", 0) == 0)
        CORE_KERNEL(result, &d, channel_dot_forward, core_data(y), core_data(x), core_data(e), core_data(bias), IDIM(&d, 'B'), IDIM(&d, 'C'),
                    IDIM(&d, 'L'));
    if (result < 0) Py_CLEAR(y);
    return y;
}

static PyObject *channel_dot_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dy", "x", "e", NULL};
    PyObject *dy, *x, *e;
    core_dims d = {0};
    int result = -1;
    d.of['u'] = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:channel_dot_backward", names, &dy, &x, &e)) return NULL;
    if (!core_input(x, "x", "BCL", &d) || !core_input(dy, "dy", "BL", &d) || !core_input(e, "e", "BC", &d)) return NULL;
    PyObject *dx = core_new("BCL", &d, 0), *de = core_new("BC", &d, 0), *dbias = core_new("=u", &d, 1);
    if (dx && de && dbias)
        CORE_KERNEL(result, &d, channel_dot_backward, core_data(dx), core_data(de), core_data(dbias), core_data(dy), core_data(x), core_data(e),
                    IDIM(&d, 'B'), IDIM(&d, 'C'), IDIM(&d, 'L'));
    return pack(result, dx, de, dbias);
}

static PyMethodDef functions[] = {
    CORE_METHOD("layer_norm_modulate_forward", layer_norm_modulate_forward, "(x, shift, scale, eps=1e-6, *, out=None) -> (y, mean, rstd)"),
    CORE_METHOD("layer_norm_modulate_backward", layer_norm_modulate_backward, "(dy, x, mean, rstd, scale) -> (dx, dshift, dscale)"),
    CORE_METHOD("gate_residual_forward", gate_residual_forward, "(x, y, gate, *, out=None) -> x + gate y"),
    CORE_METHOD("gate_residual_backward", gate_residual_backward, "(dout, y, gate) -> (dy, dgate)"),
    CORE_METHOD("rms_norm_heads_forward", rms_norm_heads_forward, "(x, w, eps=1e-6, *, out=None) -> (y, rstd)"),
    CORE_METHOD("rms_norm_heads_backward", rms_norm_heads_backward, "(dy, x, rstd, w) -> (dx, dw)"),
    CORE_METHOD("group_norm_forward", group_norm_forward, "(x, gamma, beta, groups, eps=1e-6, silu=False, *, out=None) -> (y, mean, rstd)"),
    CORE_METHOD("group_norm_backward", group_norm_backward, "(dy, x, mean, rstd, gamma, beta, silu=False) -> (dx, dgamma, dbeta)"),
    CORE_METHOD("spectral_norm_forward", spectral_norm_forward, "(w, u, iterations=1) -> (w_hat, v, sigma); u is updated in place"),
    CORE_METHOD("spectral_norm_backward", spectral_norm_backward, "(dw_hat, w_hat, u, v, sigma) -> dw"),
    CORE_METHOD("channel_dot_forward", channel_dot_forward, "(x, e, bias, *, out=None) -> y[b,l] = sum of e[b,c] x[b,c,l] over c, plus bias"),
    CORE_METHOD("channel_dot_backward", channel_dot_backward, "(dy, x, e) -> (dx, de, dbias)"),
    {NULL, NULL, 0, NULL},
};

int core_add_norm(PyObject *module) { return PyModule_AddFunctions(module, functions); }
