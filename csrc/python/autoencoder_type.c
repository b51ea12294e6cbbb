/* The types AutoencoderKL and AutoencoderKLSaved. */
#include <limits.h>
#include <string.h>

#include "binding.h"

/* ---- configuration --------------------------------------------------------------------------------------------------- */

/* down_block_types and up_block_types: only one kind is built, so all that can be right is `levels` times its name. One name alone is diffusers'
 * class default and stands for any number of levels. */
static int check_blocks(core_config *config, const char *key, const char *only, int levels) {
    int ok, good = 0;
    PyObject *value = core_config_take(config, key, 0, &ok);
    if (!value) return ok - 1;
    PyObject *items = PyUnicode_Check(value) ? NULL : PySequence_Tuple(value);
    if (items) {
        Py_ssize_t n = PyTuple_GET_SIZE(items);
        good = n == levels || n == 1;
        for (Py_ssize_t i = 0; i < n; i++) {
            PyObject *item = PyTuple_GET_ITEM(items, i);
            good &= PyUnicode_Check(item) && PyUnicode_CompareWithASCIIString(item, only) == 0;
        }
        Py_DECREF(items);
    }
    if (!good) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: expected %d times '%s', got %R", key, levels, only, value);
    }
    Py_DECREF(value);
    return good - 1;
}

static int read_config(ladd_vae_config *c, PyObject *mapping) {
    /* For the Python layer; they do not shape the network. */
    static const char *const elsewhere[] = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"};
    core_config config;
    int ok, result = -1;
    memset(c, 0, sizeof *c);
    /* diffusers' defaults */
    c->in_channels = 3, c->out_channels = 3, c->latent_channels = 4, c->levels = 1, c->block_out_channels[0] = 64, c->layers_per_block = 1;
    c->norm_num_groups = 32, c->use_quant_conv = 1, c->use_post_quant_conv = 1, c->mid_block_add_attention = 1;
    if (core_config_begin(&config, "AutoencoderKL", mapping) < 0) return -1;
    if (core_config_int(&config, "in_channels", 0, 1, INT_MAX, &c->in_channels) < 0) goto done;
    if (core_config_int(&config, "out_channels", 0, 1, INT_MAX, &c->out_channels) < 0) goto done;
    if (core_config_int(&config, "latent_channels", 0, 1, INT_MAX / 2, &c->latent_channels) < 0) goto done;
    if (core_config_int(&config, "layers_per_block", 0, 1, LADD_MAX_LAYERS, &c->layers_per_block) < 0) goto done;
    if (core_config_int(&config, "norm_num_groups", 0, 1, INT_MAX, &c->norm_num_groups) < 0) goto done;
    if (core_config_bool(&config, "use_quant_conv", 0, &c->use_quant_conv) < 0) goto done;
    if (core_config_bool(&config, "use_post_quant_conv", 0, &c->use_post_quant_conv) < 0) goto done;
    if (core_config_bool(&config, "mid_block_add_attention", 0, &c->mid_block_add_attention) < 0) goto done;
    Py_ssize_t levels = core_config_ints(&config, "block_out_channels", 0, c->block_out_channels, LADD_VAE_MAX_LEVELS, 1, INT_MAX);
    if (levels == -1) goto done;
    if (levels == 0) {
        PyErr_Format(PyExc_ValueError, "block_out_channels: expected 1 to %d widths, got none", LADD_VAE_MAX_LEVELS);
        goto done;
    }
    if (levels > 0) c->levels = (int)levels;
    if (check_blocks(&config, "down_block_types", "DownEncoderBlock2D", c->levels) < 0) goto done;
    if (check_blocks(&config, "up_block_types", "UpDecoderBlock2D", c->levels) < 0) goto done;
    PyObject *act_fn = core_config_take(&config, "act_fn", 0, &ok);
    if (!ok) goto done;
    if (act_fn && (!PyUnicode_Check(act_fn) || PyUnicode_CompareWithASCIIString(act_fn, "silu") != 0)) {
        PyErr_Format(PyExc_ValueError, "act_fn: expected 'silu', got %R", act_fn);
        Py_DECREF(act_fn);
        goto done;
    }
    Py_XDECREF(act_fn);
    for (size_t i = 0; i < sizeof elsewhere / sizeof *elsewhere; i++) {
        Py_XDECREF(core_config_take(&config, elsewhere[i], 0, &ok));
        if (!ok) goto done;
    }
    result = core_config_done(&config);
done:
    core_config_end(&config);
    return result;
}

static PyObject *config_dict(const void *model) {
    const ladd_vae_config *c = ladd_vae_get_config(model);
    PyObject *widths = PyTuple_New(c->levels);
    for (int i = 0; widths && i < c->levels; i++) {
        PyObject *width = PyLong_FromLong(c->block_out_channels[i]);
        if (width)
            PyTuple_SET_ITEM(widths, i, width);
        else
            Py_CLEAR(widths);
    }
    if (!widths) return NULL;
    return Py_BuildValue("{si si si sN si si sO sO sO}", "in_channels", c->in_channels, "out_channels", c->out_channels, "latent_channels",
                         c->latent_channels, "block_out_channels", widths, "layers_per_block", c->layers_per_block, "norm_num_groups",
                         c->norm_num_groups, "use_quant_conv", c->use_quant_conv ? Py_True : Py_False, "use_post_quant_conv",
                         c->use_post_quant_conv ? Py_True : Py_False, "mid_block_add_attention", c->mid_block_add_attention ? Py_True : Py_False);
}

/* ---- life ------------------------------------------------------------------------------------------------------------ */

static ladd_status init_weights(void *model, uint64_t seed) { return ladd_vae_init(model, seed); }
static void free_model(void *model) { ladd_vae_free(model); }
static void free_saved(const ladd_context *ctx, void *saved) { ladd_vae_saved_free(ctx, saved); }

static PyObject *vae_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"config", NULL};
    PyObject *mapping;
    ladd_vae_config config;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:AutoencoderKL", names, &mapping) || read_config(&config, mapping) < 0) return NULL;
    core_model *self = core_model_new(type);
    if (!self) return NULL;
    self->init = init_weights;
    self->config = config_dict;
    ladd_vae *model = NULL;
    ladd_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = ladd_vae_create(&model, &config);
    Py_END_ALLOW_THREADS;
    if (status != LADD_OK) {
        core_raise(status);
        Py_DECREF(self);
        return NULL;
    }
    self->model = model;
    self->params = ladd_vae_params(model);
    return (PyObject *)self;
}

static void vae_dealloc(PyObject *object) { core_model_dealloc((core_model *)object, free_model); }

/* ---- forward, either direction --------------------------------------------------------------------------------------- */

/* Sizes by letter: input CHW (channels C), output KYX. */
static PyObject *run(core_model *self, PyObject *input, PyObject *keep_flag, int encode) {
    const ladd_vae_config *config = ladd_vae_get_config(self->model);
    int keep = 0, f = 1 << (config->levels - 1);
    core_dims dims = {0};
    core_call call;
    core_saved *saved = NULL;
    ladd_vae_saved *kept = NULL;
    PyObject *output = NULL, *result = NULL;

    if (keep_flag && core_bool(keep_flag, "keep", &keep) < 0) return NULL;
    DIM(&dims, 'C') = encode ? config->in_channels : config->latent_channels;
    if (!core_input(input, encode ? "images" : "z", "BCHW", &dims)) return NULL;
    if (encode && (DIM(&dims, 'H') % f || DIM(&dims, 'W') % f)) {
        PyErr_Format(PyExc_ValueError, "images: expected height and width that are multiples of %d, got %lld x %lld", f, (long long)DIM(&dims, 'H'),
                     (long long)DIM(&dims, 'W'));
        return NULL;
    }
    if (!encode && (DIM(&dims, 'H') > INT_MAX / f || DIM(&dims, 'W') > INT_MAX / f)) {
        PyErr_Format(PyExc_ValueError, "z: expected height and width of at most %d, got %lld x %lld", INT_MAX / f, (long long)DIM(&dims, 'H'),
                     (long long)DIM(&dims, 'W'));
        return NULL;
    }
    DIM(&dims, 'K') = encode ? 2 * config->latent_channels : config->out_channels;
    DIM(&dims, 'Y') = encode ? DIM(&dims, 'H') / f : DIM(&dims, 'H') * f;
    DIM(&dims, 'X') = encode ? DIM(&dims, 'W') / f : DIM(&dims, 'W') * f;
    if (!(output = core_new("BKYX", &dims, 0))) goto done;
    if (keep) {
        saved = core_saved_new(core_state_of(Py_TYPE(self))->vae_saved_type, self, free_saved);
        if (!saved) goto done;
        saved->dims = dims;
    }
    if (core_begin(&call, self->lock) < 0) goto done;
    ladd_status (*direction)(const ladd_context *, ladd_act *, ladd_vae_saved **, ladd_vae *, const ladd_act *, int, int, int) =
        encode ? ladd_vae_encode : ladd_vae_decode;
    ladd_status status = direction(&call.ctx, core_data(output), keep ? &kept : NULL, self->model, core_data(input), IDIM(&dims, 'B'),
                                   IDIM(&dims, 'H'), IDIM(&dims, 'W'));
    int failed = core_end(&call, status);
    if (saved) saved->saved = kept;
    if (failed < 0) goto done;
    result = PyTuple_Pack(2, output, saved ? (PyObject *)saved : Py_None);
done:
    Py_XDECREF(output);
    Py_XDECREF(saved);
    return result;
}

static PyObject *vae_encode(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"images", "keep", NULL};
    PyObject *images, *keep = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:encode", names, &images, &keep)) return NULL;
    return run((core_model *)self, images, keep, 1);
}

static PyObject *vae_decode(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"z", "keep", NULL};
    PyObject *z, *keep = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:decode", names, &z, &keep)) return NULL;
    return run((core_model *)self, z, keep, 0);
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

static PyObject *saved_backward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dout", "params", "input", NULL};
    core_saved *self = (core_saved *)object;
    core_model *owner = self->owner;
    PyObject *dout, *params_flag = NULL, *input_flag = NULL;
    int params = 1, input = 1;
    core_call call;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:backward", names, &dout, &params_flag, &input_flag)) return NULL;
    if (params_flag && core_bool(params_flag, "params", &params) < 0) return NULL;
    if (input_flag && core_bool(input_flag, "input", &input) < 0) return NULL;
    if (!core_input(dout, "dout", "BKYX", &self->dims)) return NULL;
    PyObject *dinput = input ? core_new("BCHW", &self->dims, 0) : Py_NewRef(Py_None);
    if (!dinput) return NULL;
    /* From here on the saved memory is ours alone: another thread's call finds it used up. */
    ladd_vae_saved *saved = self->saved;
    if (!saved) {
        PyErr_SetString(PyExc_RuntimeError, "backward: expected the first call for this forward, got a second one; its memory was reused");
        goto failed;
    }
    self->saved = NULL;
    if (core_begin(&call, owner->lock) < 0) goto failed;
    ladd_status status = params ? ladd_params_need_grad(owner->params) : LADD_OK;
    if (status == LADD_OK) status = ladd_vae_backward(&call.ctx, input ? core_data(dinput) : NULL, saved, core_data(dout), params);
    ladd_vae_saved_free(&call.ctx, saved);
    if (core_end(&call, status) == 0) return dinput;
failed:
    Py_DECREF(dinput);
    return NULL;
}

/* ---- types ----------------------------------------------------------------------------------------------------------- */

static PyMethodDef vae_methods[] = {
    CORE_METHOD("encode", vae_encode, "encode(images, keep=False) -> (moments, saved or None)"),
    CORE_METHOD("decode", vae_decode, "decode(z, keep=False) -> (images, saved or None)"),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot vae_slots[] = {
    {Py_tp_doc, "AutoencoderKL(config): images to latents and back. Weights are zero until init() or until they are written."},
    {Py_tp_new, vae_new},
    {Py_tp_dealloc, vae_dealloc},
    {Py_tp_methods, vae_methods},
    {0, NULL},
};

static PyType_Spec vae_spec = {
    .name = "ladd._core.AutoencoderKL",
    .basicsize = sizeof(core_model),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = vae_slots,
};

static PyMethodDef saved_methods[] = {
    CORE_METHOD("backward", saved_backward, "backward(dout, params=True, input=True) -> dinput or None; once"),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot saved_slots[] = {
    {Py_tp_doc, "What one encode or decode kept for its backward. Keeps the model alive."},
    {Py_tp_dealloc, core_saved_dealloc},
    {Py_tp_methods, saved_methods},
    {0, NULL},
};

static PyType_Spec saved_spec = {
    .name = "ladd._core.AutoencoderKLSaved",
    .basicsize = sizeof(core_saved),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = saved_slots,
};

int core_add_vae(PyObject *module, core_state *state) {
    state->vae_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &vae_spec, (PyObject *)state->model_type);
    state->vae_saved_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &saved_spec, NULL);
    if (!state->vae_type || !state->vae_saved_type) return -1;
    return PyModule_AddType(module, state->vae_type) < 0 ? -1 : PyModule_AddType(module, state->vae_saved_type);
}
