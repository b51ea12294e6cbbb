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

static PyObject *config_dict(const ladd_vae_config *c) {
    PyObject *widths = core_int_tuple(c->block_out_channels, c->levels);
    if (!widths) return NULL;
    return Py_BuildValue("{si si si sN si si sO sO sO}", "in_channels", c->in_channels, "out_channels", c->out_channels, "latent_channels",
                         c->latent_channels, "block_out_channels", widths, "layers_per_block", c->layers_per_block, "norm_num_groups",
                         c->norm_num_groups, "use_quant_conv", c->use_quant_conv ? Py_True : Py_False, "use_post_quant_conv",
                         c->use_post_quant_conv ? Py_True : Py_False, "mid_block_add_attention", c->mid_block_add_attention ? Py_True : Py_False);
}

/* ---- forward, either direction --------------------------------------------------------------------------------------- */

/* Sizes by letter: input CHW (channels C), output KYX. */
static PyObject *run(core_model *self, PyObject *input, PyObject *keep_flag, int encode) {
    const ladd_vae_config *config = ladd_vae_get_config(self->model);
    int keep = 0, f = 1 << (config->levels - 1);
    core_dims dims = core_place(self);
    core_call call;
    core_saved *saved = NULL;
    ladd_vae_saved *kept = NULL;
    PyObject *output = NULL, *result = NULL;

    if (core_bool(keep_flag, "keep", &keep) < 0) return NULL;
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
    if (keep && !(saved = core_saved_new(self, &dims, 0))) goto done;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) goto done;
    ladd_status (*direction)(const ladd_context *, ladd_act *, ladd_vae_saved **, ladd_vae *, const ladd_act *, int, int, int) =
        encode ? ladd_vae_encode : ladd_vae_decode;
    ladd_status status = direction(&call.ctx, core_data(output), keep ? &kept : NULL, self->model, core_data(input), IDIM(&dims, 'B'),
                                   IDIM(&dims, 'H'), IDIM(&dims, 'W'));
    result = core_forward_end(&call, status, output, saved, kept);
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

static PyObject *vae_plan(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"batch", "height", "width", "decode", "keep", NULL};
    core_model *self = (core_model *)object;
    PyObject *sizes[3], *decode_flag = NULL, *keep_flag = NULL;
    int numbers[3], decode = 0, keep = 0;
    core_call call;
    size_t bytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|OO:plan", names, &sizes[0], &sizes[1], &sizes[2], &decode_flag, &keep_flag)) return NULL;
    for (int i = 0; i < 3; i++)
        if (core_int(sizes[i], names[i], 1, INT_MAX, &numbers[i]) < 0) return NULL;
    if (core_bool(decode_flag, "decode", &decode) < 0 || core_bool(keep_flag, "keep", &keep) < 0) return NULL;
    if (core_begin(&call, &self->lock, self->device, self->compute) < 0) return NULL;
    if (core_end(&call, ladd_vae_plan(&call.ctx, &bytes, self->model, decode, numbers[0], numbers[1], numbers[2], keep)) < 0) return NULL;
    return PyLong_FromSize_t(bytes);
}

/* ---- backward -------------------------------------------------------------------------------------------------------- */

static PyObject *saved_backward(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dout", "params", "input", NULL};
    core_saved *self = (core_saved *)object;
    PyObject *dout, *params_flag = NULL, *input_flag = NULL;
    int params = 1, input = 1;
    core_call call;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:backward", names, &dout, &params_flag, &input_flag)) return NULL;
    if (core_bool(params_flag, "params", &params) < 0) return NULL;
    if (core_bool(input_flag, "input", &input) < 0) return NULL;
    if (!core_input(dout, "dout", "BKYX", &self->dims)) return NULL;
    PyObject *dinput = input ? core_new("BCHW", &self->dims, 0) : Py_NewRef(Py_None);
    if (!dinput) return NULL;
    ladd_status status;
    ladd_vae_saved *saved = core_backward_begin(&call, self, 1, params, &status);
    if (!saved) {
        Py_DECREF(dinput);
        return NULL;
    }
    if (status == LADD_OK) status = ladd_vae_backward(&call.ctx, input ? core_data(dinput) : NULL, saved, core_data(dout), params);
    ladd_vae_saved_free(&call.ctx, saved);
    if (core_end(&call, status) < 0) Py_CLEAR(dinput);
    return dinput;
}

/* ---- types ----------------------------------------------------------------------------------------------------------- */

static PyMethodDef model_methods[] = {
    CORE_METHOD("encode", vae_encode, "encode(images, keep=False) -> (moments, saved or None)"),
    CORE_METHOD("decode", vae_decode, "decode(z, keep=False) -> (images, saved or None)"),
    CORE_METHOD("plan", vae_plan, "plan(batch, height, width, decode=False, keep=False) -> bytes of activations, for images of that size"),
    {NULL, NULL, 0, NULL},
};

static PyMethodDef saved_methods[] = {
    CORE_METHOD("backward", saved_backward, "backward(dout, params=True, input=True) -> dinput or None; once"),
    {NULL, NULL, 0, NULL},
};

CORE_KIND(kind, vae, CORE_VAE, "AutoencoderKL",
          "AutoencoderKL(config): images to latents and back. Weights are zero until init() or until they are written.",
          "What one encode or decode kept for its backward. Keeps the model alive.")

int core_add_vae(PyObject *module, core_state *state) { return core_add_kind(module, state, &kind); }
