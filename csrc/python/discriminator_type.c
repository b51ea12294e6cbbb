/* The types Discriminator and DiscriminatorSaved. */
#include <limits.h>
#include <string.h>

#include "binding.h"

/* ---- configuration --------------------------------------------------------------------------------------------------- */

static int read_config(ladd_disc_config *c, PyObject *mapping) {
    core_config config;
    int ok, result = -1;
    memset(c, 0, sizeof *c);
    if (core_config_begin(&config, "Discriminator", mapping) < 0) return -1;
    if (core_config_int(&config, "feature_dim", 1, 1, INT_MAX, &c->feature_dim) < 0) goto done;
    if (core_config_int(&config, "pooled_dim", 1, 0, INT_MAX, &c->pooled_dim) < 0) goto done;
    if (core_config_int(&config, "width", 1, 1, INT_MAX, &c->width) < 0) goto done;
    if (core_config_int(&config, "kernel_size", 1, 1, INT_MAX, &c->kernel_size) < 0) goto done;
    if (core_config_int(&config, "num_groups", 1, 1, INT_MAX, &c->num_groups) < 0) goto done;
    if (core_config_int(&config, "condition_dim", 1, 1, INT_MAX, &c->condition_dim) < 0) goto done;
    if (core_config_bool(&config, "spectral_norm", 1, &c->spectral_norm) < 0) goto done;
    if (core_config_bool(&config, "condition_sigma", 1, &c->condition_sigma) < 0) goto done;
    if (core_config_bool(&config, "condition_pooled", 1, &c->condition_pooled) < 0) goto done;
    Py_ssize_t n = core_config_ints(&config, "taps", 1, c->taps, LADD_MAX_LAYERS, 0, INT_MAX);
    if (n < 0) goto done;
    c->n_taps = (int)n;
    PyObject *norm = core_config_take(&config, "norm", 1, &ok);
    if (!norm) goto done;
    int group = PyUnicode_Check(norm) && PyUnicode_CompareWithASCIIString(norm, "group") == 0;
    int none = PyUnicode_Check(norm) && PyUnicode_CompareWithASCIIString(norm, "none") == 0;
    if (!group && !none) PyErr_Format(PyExc_ValueError, "norm: expected 'group' or 'none', got %R", norm);
    Py_DECREF(norm);
    if (!group && !none) goto done;
    c->norm = group ? LADD_HEAD_NORM_GROUP : LADD_HEAD_NORM_NONE;
    result = core_config_done(&config);
done:
    core_config_end(&config);
    return result;
}

static PyObject *config_dict(const ladd_disc_config *c) {
    PyObject *taps = core_int_tuple(c->taps, c->n_taps);
    if (!taps) return NULL;
    return Py_BuildValue("{si sN si si si ss si sO sO sO si}", "feature_dim", c->feature_dim, "taps", taps, "pooled_dim", c->pooled_dim, "width",
                         c->width, "kernel_size", c->kernel_size, "norm", c->norm == LADD_HEAD_NORM_GROUP ? "group" : "none", "num_groups",
                         c->num_groups, "spectral_norm", c->spectral_norm ? Py_True : Py_False, "condition_sigma",
                         c->condition_sigma ? Py_True : Py_False, "condition_pooled", c->condition_pooled ? Py_True : Py_False, "condition_dim",
                         c->condition_dim);
}

/* ---- forward and backward -------------------------------------------------------------------------------------------- */

static PyObject *disc_forward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"features", "sigma", "pooled", "grid", "update_u", "keep", NULL};
    core_model *self = (core_model *)object;
    const ladd_disc_config *config = ladd_disc_get_config(self->model);
    PyObject *features, *sigma, *pooled, *grid, *update_flag = NULL, *keep_flag = NULL;
    PyObject *items = NULL, *logits = NULL, *result = NULL;
    const ladd_act *inputs[LADD_MAX_LAYERS];
    ladd_act *outputs[LADD_MAX_LAYERS];
    int sides[2], update_u = 0, keep = 0, ok;
    core_dims dims = core_place(self);
    core_call call;
    core_saved *saved = NULL;
    ladd_disc_saved *kept = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OO:forward", names, &features, &sigma, &pooled, &grid, &update_flag, &keep_flag))
        return NULL;
    if (core_bool(update_flag, "update_u", &update_u) < 0) return NULL;
    if (core_bool(keep_flag, "keep", &keep) < 0) return NULL;
    Py_ssize_t n_sides = core_int_list(grid, "grid", sides, 2, 1, INT_MAX);
    if (n_sides < 0) return NULL;
    if (n_sides != 2 || sides[0] > INT_MAX / sides[1]) {
        PyErr_Format(PyExc_ValueError, "grid: expected (h, w) with at most %d tokens, got %R", INT_MAX, grid);
        return NULL;
    }
    DIM(&dims, 'h') = sides[0];
    DIM(&dims, 'w') = sides[1];
    DIM(&dims, 'N') = sides[0] * sides[1];
    DIM(&dims, 'D') = config->feature_dim;
    DIM(&dims, 'P') = config->pooled_dim;
    if (!(config->condition_sigma ? core_times(sigma, "sigma", &dims) : core_input(sigma, "sigma", "@B", &dims))) return NULL;
    if (config->condition_pooled && pooled == Py_None) {
        PyErr_Format(PyExc_ValueError, "pooled: expected an array of shape (B=%lld, P=%d), got None", (long long)DIM(&dims, 'B'), config->pooled_dim);
        return NULL;
    }
    /* Heads without the pooled condition look at nothing of it, so any width may come. */
    if (!config->condition_pooled) DIM(&dims, 'P') = 0;
    PyObject *condition = core_optional(pooled, "pooled", "BP", &dims, &ok);
    if (!ok) return NULL;
    items = core_input_list(features, "features", config->n_taps, "one a tap", "BND", &dims, inputs);
    if (!items) return NULL;
    if (!(logits = core_new_list(config->n_taps, "Bhw", &dims, outputs))) goto done;
    if (keep && !(saved = core_saved_new(self, &dims, config->n_taps))) goto done;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) goto done;
    core_numbers times;
    ladd_status status = core_numbers_begin(&call, &times, sigma);
    if (status == LADD_OK)
        status = ladd_disc_forward(&call.ctx, outputs, keep ? &kept : NULL, self->model, inputs, times.data,
                                   config->condition_pooled ? core_data(condition) : NULL, IDIM(&dims, 'B'), sides[0], sides[1], update_u);
    core_numbers_end(&call, &times);
    result = core_forward_end(&call, status, logits, saved, kept);
done:
    Py_XDECREF(items);
    Py_XDECREF(logits);
    Py_XDECREF(saved);
    return result;
}

static PyObject *saved_backward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dlogits", "params", "features", NULL};
    core_saved *self = (core_saved *)object;
    PyObject *dlogits, *params_flag = NULL, *features_flag = NULL, *result = NULL;
    const ladd_act *inputs[LADD_MAX_LAYERS];
    ladd_act *outputs[LADD_MAX_LAYERS] = {NULL};
    int params = 1, features = 1;
    core_call call;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:backward", names, &dlogits, &params_flag, &features_flag)) return NULL;
    if (core_bool(params_flag, "params", &params) < 0) return NULL;
    if (core_bool(features_flag, "features", &features) < 0) return NULL;
    PyObject *items = core_input_list(dlogits, "dlogits", self->n_outputs, "one a tap", "Bhw", &self->dims, inputs);
    if (!items) return NULL;
    result = features ? core_new_list(self->n_outputs, "BND", &self->dims, outputs) : Py_NewRef(Py_None);
    ladd_status status;
    ladd_disc_saved *saved = result ? core_backward_begin(&call, self, 0, params, &status) : NULL;
    if (saved) {
        if (status == LADD_OK) status = ladd_disc_backward(&call.ctx, outputs, saved, inputs, params);
        if (core_end(&call, status) < 0) Py_CLEAR(result);
    } else
        Py_CLEAR(result);
    Py_DECREF(items);
    return result;
}

static PyObject *saved_r1(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weight", "epsilon", "out", NULL};
    core_saved *self = (core_saved *)object;
    PyObject *out = NULL;
    double weight, epsilon, *kept;
    core_result penalty = {.data = NULL};
    core_call call;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "dd|$O:r1", names, &weight, &epsilon, &out)) return NULL;
    if (core_finite(weight, "weight") < 0 || core_finite(epsilon, "epsilon") < 0) return NULL;
    if (self->owner->compute != LADD_F32) {
        PyErr_SetString(PyExc_ValueError, "r1: expected a discriminator of dtype float32, got one whose rounding hides a finite difference");
        return NULL;
    }
    core_dims place = core_place(self->owner);
    if (core_doubles(out, "out", 1, &place, &kept) < 0) return NULL;
    ladd_status status;
    ladd_disc_saved *saved = core_backward_begin(&call, self, 0, 1, &status);
    if (!saved) return NULL;
    if (status == LADD_OK) status = core_result_begin(&call, &penalty, kept);
    if (status == LADD_OK) status = ladd_disc_r1(&call.ctx, penalty.data, saved, (float)weight, (float)epsilon);
    if (core_end(&call, core_result_end(&call, &penalty, status)) < 0) return NULL;
    if (kept) Py_RETURN_NONE;
    return PyFloat_FromDouble(penalty.values[0]);
}

/* ---- types ----------------------------------------------------------------------------------------------------------- */

static PyMethodDef model_methods[] = {
    CORE_METHOD("forward", disc_forward, "forward(features, sigma, pooled, grid, update_u=False, keep=False) -> (list of logits, saved or None)"),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef saved_methods[] = {
    CORE_METHOD("backward", saved_backward, "backward(dlogits, params=True, features=True) -> list of dfeatures or None; any number of times"),
    CORE_METHOD("r1", saved_r1,
                "r1(weight, epsilon, *, out=None) -> mean of |d(sum of logits)/d(features)|^2, or None with it added to out; weight times its "
                "gradient is added to the parameters'"),
    {NULL, NULL, 0, NULL},
};

CORE_KIND(kind, disc, CORE_DISC, "Discriminator",
          "Discriminator(config): heads on tapped features. Weights are zero until init() or until they are written.",
          "What one forward of the heads kept for backward. Keeps the model alive.")

int core_add_disc(PyObject *module, core_state *state) { return core_add_kind(module, state, &kind); }
