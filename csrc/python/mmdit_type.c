/* The types MMDiT and MMDiTSaved. */
#include <limits.h>
#include <string.h>

#include "binding.h"

/* ---- configuration --------------------------------------------------------------------------------------------------- */

static int read_config(ladd_mmdit_config *c, PyObject *mapping) {
    core_config config;
    int ok = 0, outs = 0, dual[LADD_MAX_LAYERS];
    PyObject *qk_norm = NULL, *out_channels = NULL;
    memset(c, 0, sizeof *c);
    /* diffusers' defaults */
    c->sample_size = 128, c->patch_size = 2, c->in_channels = 16, c->num_layers = 18, c->attention_head_dim = 64, c->num_attention_heads = 18;
    c->joint_attention_dim = 4096, c->caption_projection_dim = 1152, c->pooled_projection_dim = 2048, c->pos_embed_max_size = 96;
    if (core_config_begin(&config, "MMDiT", mapping) < 0) return -1;
    const struct {
        const char *key;
        int *value;
        long high;
    } numbers[] = {
        {"sample_size", &c->sample_size, INT_MAX},
        {"patch_size", &c->patch_size, INT_MAX},
        {"in_channels", &c->in_channels, INT_MAX},
        {"num_layers", &c->num_layers, LADD_MAX_LAYERS},
        {"attention_head_dim", &c->attention_head_dim, INT_MAX},
        {"num_attention_heads", &c->num_attention_heads, INT_MAX},
        {"joint_attention_dim", &c->joint_attention_dim, INT_MAX},
        {"caption_projection_dim", &c->caption_projection_dim, INT_MAX},
        {"pooled_projection_dim", &c->pooled_projection_dim, INT_MAX},
        {"pos_embed_max_size", &c->pos_embed_max_size, INT_MAX},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (core_config_int(&config, numbers[i].key, 0, 1, numbers[i].high, numbers[i].value) < 0) goto done;
    out_channels = core_config_take(&config, "out_channels", 0, &ok);
    if (!ok) goto done;
    c->out_channels = out_channels ? c->in_channels : 16; /* diffusers: null means as many as come in, absent means 16 */
    if (out_channels && out_channels != Py_None && core_int(out_channels, "out_channels", 1, INT_MAX, &c->out_channels) < 0) goto done;
    qk_norm = core_config_take(&config, "qk_norm", 0, &ok);
    if (!ok) goto done;
    if (qk_norm && qk_norm != Py_None) {
        if (!PyUnicode_Check(qk_norm) || PyUnicode_CompareWithASCIIString(qk_norm, "rms_norm") != 0) {
            PyErr_Format(PyExc_ValueError, "qk_norm: expected None or 'rms_norm', got %R", qk_norm);
            goto done;
        }
        c->qk_rms_norm = 1;
    }
    Py_ssize_t n = core_config_ints(&config, "dual_attention_layers", 0, dual, LADD_MAX_LAYERS, 0, c->num_layers - 1);
    if (n == -1) goto done;
    for (Py_ssize_t i = 0; i < n; i++) c->dual[dual[i]] = 1;
    outs = core_config_done(&config) == 0;
done:
    Py_XDECREF(qk_norm);
    Py_XDECREF(out_channels);
    core_config_end(&config);
    return outs ? 0 : -1;
}

static PyObject *config_dict(const ladd_mmdit_config *c) {
    int layers[LADD_MAX_LAYERS], n = 0;
    for (int i = 0; i < c->num_layers; i++)
        if (c->dual[i]) layers[n++] = i;
    PyObject *dual = core_int_tuple(layers, n);
    if (!dual) return NULL;
    return Py_BuildValue("{si si si si si si si si si si si sN sz}", "sample_size", c->sample_size, "patch_size", c->patch_size, "in_channels",
                         c->in_channels, "num_layers", c->num_layers, "attention_head_dim", c->attention_head_dim, "num_attention_heads",
                         c->num_attention_heads, "joint_attention_dim", c->joint_attention_dim, "caption_projection_dim", c->caption_projection_dim,
                         "pooled_projection_dim", c->pooled_projection_dim, "out_channels", c->out_channels, "pos_embed_max_size",
                         c->pos_embed_max_size, "dual_attention_layers", dual, "qk_norm", c->qk_rms_norm ? "rms_norm" : NULL);
}

/* ---- forward --------------------------------------------------------------------------------------------------------- */

/* Room for what a ladd_mmdit_call points to. */
typedef struct mmdit_call {
    ladd_mmdit_call call;
    unsigned char skip[LADD_MAX_LAYERS];
    int taps[LADD_MAX_LAYERS];
} mmdit_call;

/* skip_layers, taps, keep and params, for a model of `layers` blocks. */
static int read_call(mmdit_call *c, int layers, PyObject *skip_layers, PyObject *taps, PyObject *keep, PyObject *params) {
    int skipped[LADD_MAX_LAYERS], kept = 0, all = 1;
    memset(c, 0, sizeof *c);
    if (core_bool(keep, "keep", &kept) < 0 || core_bool(params, "params", &all) < 0) return -1;
    c->call.keep = !kept ? LADD_KEEP_NONE : all ? LADD_KEEP_ALL : LADD_KEEP_INPUTS;
    if (skip_layers && skip_layers != Py_None) {
        Py_ssize_t n = core_int_list(skip_layers, "skip_layers", skipped, LADD_MAX_LAYERS, 0, layers - 1);
        if (n < 0) return -1;
        for (Py_ssize_t i = 0; i < n; i++) c->skip[skipped[i]] = 1;
        if (n) c->call.skip = c->skip;
    }
    if (taps && taps != Py_None) {
        Py_ssize_t n = core_int_list(taps, "taps", c->taps, LADD_MAX_LAYERS, 0, layers - 1);
        int ascending = n != 0;
        for (Py_ssize_t i = 1; i < n; i++) ascending &= c->taps[i] > c->taps[i - 1];
        if (n < 0) return -1;
        if (!ascending) {
            PyErr_Format(PyExc_ValueError, "taps: expected None or ascending block indices, each once, got %R", taps);
            return -1;
        }
        c->call.n_taps = (int)n;
        c->call.taps = c->taps;
    }
    return 0;
}

static PyObject *mmdit_plan(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"batch", "height", "width", "text_tokens", "skip_layers", "taps", "keep", "params", NULL};
    core_model *self = (core_model *)object;
    PyObject *sizes[4], *skip_layers = NULL, *taps = NULL, *keep = NULL, *params = NULL;
    mmdit_call c;
    core_call call;
    size_t bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOOO:plan", names, &sizes[0], &sizes[1], &sizes[2], &sizes[3], &skip_layers, &taps, &keep,
                                     &params))
        return NULL;
    if (read_call(&c, ladd_mmdit_get_config(self->model)->num_layers, skip_layers, taps, keep, params) < 0) return NULL;
    int *fields[4] = {&c.call.batch, &c.call.height, &c.call.width, &c.call.text_tokens};
    for (int i = 0; i < 4; i++)
        if (core_int(sizes[i], names[i], 1, INT_MAX, fields[i]) < 0) return NULL;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) return NULL;
    if (core_end(&call, ladd_mmdit_plan(&call.ctx, &bytes, self->model, &c.call)) < 0) return NULL;
    return PyLong_FromSize_t(bytes);
}

static PyObject *mmdit_forward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"latents", "sigma", "context", "pooled", "skip_layers", "taps", "keep", "params", NULL};
    core_model *self = (core_model *)object;
    const ladd_mmdit_config *config = ladd_mmdit_get_config(self->model);
    PyObject *latents, *sigma, *context, *pooled, *skip_layers = NULL, *taps = NULL, *keep = NULL, *params = NULL;
    PyObject *result = NULL, *output = NULL;
    core_saved *saved = NULL;
    ladd_mmdit_saved *kept = NULL;
    ladd_act *features[LADD_MAX_LAYERS];
    core_dims dims = core_place(self);
    mmdit_call c;
    core_call call;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOOO:forward", names, &latents, &sigma, &context, &pooled, &skip_layers, &taps, &keep,
                                     &params))
        return NULL;
    if (read_call(&c, config->num_layers, skip_layers, taps, keep, params) < 0) return NULL;
    DIM(&dims, 'C') = config->in_channels;
    DIM(&dims, 'J') = config->joint_attention_dim;
    DIM(&dims, 'P') = config->pooled_projection_dim;
    if (!core_input(latents, "latents", "BCHW", &dims) || !core_times(sigma, "sigma", &dims)) return NULL;
    if (!core_input(context, "context", "BTJ", &dims) || !core_input(pooled, "pooled", "BP", &dims)) return NULL;
    int p = config->patch_size, limit = config->pos_embed_max_size;
    int64_t h = DIM(&dims, 'H') / p, w = DIM(&dims, 'W') / p;
    if (h < 1 || w < 1 || h > limit || w > limit) {
        PyErr_Format(PyExc_ValueError,
                     "latents: expected height and width from %d to %lld (patch_size to pos_embed_max_size patches), got %lld x %lld", p,
                     (long long)p * limit + p - 1, (long long)DIM(&dims, 'H'), (long long)DIM(&dims, 'W'));
        return NULL;
    }
    c.call.batch = IDIM(&dims, 'B');
    c.call.height = IDIM(&dims, 'H');
    c.call.width = IDIM(&dims, 'W');
    c.call.text_tokens = IDIM(&dims, 'T');

    /* Results: the velocity's or the features' sizes go into letters of their own. */
    DIM(&dims, 'K') = config->out_channels;
    DIM(&dims, 'Y') = h * p;
    DIM(&dims, 'X') = w * p;
    DIM(&dims, 'N') = h * w;
    DIM(&dims, 'D') = (int64_t)config->num_attention_heads * config->attention_head_dim;
    output = c.call.n_taps ? core_new_list(c.call.n_taps, "BND", &dims, features) : core_new("BKYX", &dims, 0);
    if (!output) goto done;
    if (c.call.keep && !(saved = core_saved_new(self, &dims, c.call.n_taps))) goto done;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) goto done;
    core_numbers times;
    ladd_status status = core_numbers_begin(&call, &times, sigma);
    if (status == LADD_OK)
        status = ladd_mmdit_forward(&call.ctx, c.call.n_taps ? NULL : core_data(output), c.call.n_taps ? features : NULL, &kept, self->model, &c.call,
                                    core_data(latents), times.data, core_data(context), core_data(pooled));
    core_numbers_end(&call, &times);
    result = core_forward_end(&call, status, output, saved, kept);
done:
    Py_XDECREF(output);
    Py_XDECREF(saved);
    return result;
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

static PyObject *saved_backward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"cotangent", "params", "latents", "context", "pooled", NULL};
    static const char *const shapes[3] = {"BCHW", "BTJ", "BP"};
    core_saved *self = (core_saved *)object;
    PyObject *cotangent, *given[4] = {NULL}, *outputs[3] = {NULL}, *items = NULL, *result = NULL;
    const ladd_act *dfeatures[LADD_MAX_LAYERS], *dvelocity = NULL;
    int wanted[4] = {1, 1, 1, 1};
    core_call call;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOOO:backward", names, &cotangent, &given[0], &given[1], &given[2], &given[3])) return NULL;
    for (int i = 0; i < 4; i++)
        if (core_bool(given[i], names[i + 1], &wanted[i]) < 0) return NULL;
    if (self->saved && (wanted[0] || wanted[3]) && !ladd_mmdit_saved_all(self->saved)) {
        PyErr_SetString(PyExc_ValueError, "params, pooled: expected False, for forward was called with params=False; got True");
        return NULL;
    }
    if (self->n_outputs == 0) {
        PyObject *array = core_input(cotangent, "cotangent", "BKYX", &self->dims);
        if (!array) return NULL;
        dvelocity = core_data(array);
    } else {
        items = core_input_list(cotangent, "cotangent", self->n_outputs, "one a tap", "BND", &self->dims, dfeatures);
        if (!items) return NULL;
    }
    for (int i = 0; i < 3; i++) {
        outputs[i] = wanted[i + 1] ? core_new(shapes[i], &self->dims, 0) : Py_NewRef(Py_None);
        if (!outputs[i]) goto done;
    }
    ladd_status status;
    ladd_mmdit_saved *saved = core_backward_begin(&call, self, 1, wanted[0], &status);
    if (!saved) goto done;
    if (status == LADD_OK)
        status = ladd_mmdit_backward(&call.ctx, wanted[1] ? core_data(outputs[0]) : NULL, wanted[2] ? core_data(outputs[1]) : NULL,
                                     wanted[3] ? core_data(outputs[2]) : NULL, saved, dvelocity, self->n_outputs ? dfeatures : NULL, wanted[0]);
    ladd_mmdit_saved_free(&call.ctx, saved);
    if (core_end(&call, status) < 0) goto done;
    result = PyTuple_Pack(3, outputs[0], outputs[1], outputs[2]);
done:
    for (int i = 0; i < 3; i++) Py_XDECREF(outputs[i]);
    Py_XDECREF(items);
    return result;
}

/* ---- types ----------------------------------------------------------------------------------------------------------- */

static PyMethodDef model_methods[] = {
    CORE_METHOD("plan", mmdit_plan,
                "plan(batch, height, width, text_tokens, skip_layers=(), taps=None, keep=False, params=True) -> bytes that such a forward takes"),
    CORE_METHOD(
        "forward", mmdit_forward,
        "forward(latents, sigma, context, pooled, skip_layers=(), taps=None, keep=False, params=True) -> (velocity or list of features, saved "
        "or None)"),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef saved_methods[] = {
    CORE_METHOD("backward", saved_backward,
                "backward(cotangent, params=True, latents=True, context=True, pooled=True) -> (dlatents, dcontext, dpooled); once"),
    {NULL, NULL, 0, NULL},
};

CORE_KIND(kind, mmdit, CORE_MMDIT, "MMDiT",
          "MMDiT(config): the transformer of Stable Diffusion 3 and 3.5. Weights are zero until init() or until they are written.",
          "What one forward of an MMDiT kept for its backward. Keeps the model alive.")

int core_add_mmdit(PyObject *module, core_state *state) { return core_add_kind(module, state, &kind); }
