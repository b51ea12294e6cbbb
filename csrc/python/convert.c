/* Arguments in and results out: every check that stands between a Python object and a pointer of the core. Strict: nothing is converted here, for a
 * silent copy would make writes into a given array vanish; ladd.kernels and ladd.models convert before they call. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "binding.h"

/* ---- what arrays have in common ---------------------------------------------------------------------------------------- */

int core_ndim(PyObject *array) { return core_is_array(array) ? ((core_array *)array)->ndim : PyArray_NDIM((PyArrayObject *)array); }
int64_t core_size(PyObject *array, int axis) {
    return core_is_array(array) ? ((core_array *)array)->shape[axis] : (int64_t)PyArray_DIM((PyArrayObject *)array, axis);
}
static core_device *device_of(PyObject *array) { return core_is_array(array) ? ((core_array *)array)->device : NULL; }
static const char *label_of(const core_device *device) { return device ? device->label : "the CPU"; }
static size_t bytes_of(PyObject *array) {
    if (!core_is_array(array)) return (size_t)PyArray_NBYTES((PyArrayObject *)array);
    return (size_t)((core_array *)array)->count * core_item_size(((core_array *)array)->dtype);
}

/* ---- shapes in words ------------------------------------------------------------------------------------------------- */

enum { TEXT_MAX = 256 };

static const char *letters_of(const char *shape) { return shape + (*shape == '=' || *shape == '@'); }

/* "B, C=16, H, W": what is known of the sizes that `shape` names. */
static const char *expected_text(char text[TEXT_MAX], const char *shape, const core_dims *dims) {
    int used = 0;
    const char *first = letters_of(shape);
    text[0] = 0;
    for (const char *letter = first; *letter; letter++) {
        const char *comma = letter == first ? "" : ", ";
        int64_t known = *letter == '*' ? 0 : dims->of[(unsigned char)*letter];
        if (*letter == '*')
            used += snprintf(text + used, TEXT_MAX - used, "%s...", comma);
        else if (known)
            used += snprintf(text + used, TEXT_MAX - used, "%s%c=%lld", comma, *letter, (long long)known);
        else
            used += snprintf(text + used, TEXT_MAX - used, "%s%c", comma, *letter);
        if (used >= TEXT_MAX) break;
    }
    return text;
}

static const char *given_text(char text[TEXT_MAX], PyObject *array) {
    int used = 0;
    text[0] = 0;
    for (int i = 0; i < core_ndim(array) && used < TEXT_MAX; i++)
        used += snprintf(text + used, TEXT_MAX - used, "%s%lld", i ? ", " : "", (long long)core_size(array, i));
    return text;
}

static int wrong_shape(const char *name, const char *shape, const core_dims *dims, PyObject *array) {
    char expected[TEXT_MAX], given[TEXT_MAX];
    PyErr_Format(PyExc_ValueError, "%s: expected shape (%s), got (%s)", name, expected_text(expected, shape, dims), given_text(given, array));
    return 0;
}

/* ---- arrays in ------------------------------------------------------------------------------------------------------- */

static int on_device(PyObject *object, const char *name, const char *shape, core_dims *dims) {
    const core_array *array = (core_array *)object;
    if (dims->placed && dims->device != array->device) {
        PyErr_Format(PyExc_ValueError, "%s: expected an array on %s, got one on %s", name, label_of(dims->device), array->device->label);
        return 0;
    }
    int wide = *shape == '=' || *shape == '@';
    if (wide || (dims->placed && dims->act != array->dtype)) {
        ladd_dtype wanted = wide ? LADD_F32 : dims->act;
        if (wanted != array->dtype) {
            PyErr_Format(PyExc_TypeError, "%s: expected dtype %s, got %s", name, core_dtype_name(wanted), core_dtype_name(array->dtype));
            return 0;
        }
    }
    if (*shape == '@' || (*shape == '=' && dims->placed)) return 1; /* says nothing of the compute type */
    dims->device = array->device;
    dims->act = array->dtype;
    dims->placed = 1;
    return 1;
}

/* float32 in native byte order and aligned, or an array on a device; the layout is for the caller. */
static int is_usable(PyObject *object, const char *name, const char *shape, core_dims *dims) {
    char expected[TEXT_MAX];
    if (core_is_array(object)) return on_device(object, name, shape, dims);
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a float32 array of shape (%s), got %.100s", name, expected_text(expected, shape, dims),
                     Py_TYPE(object)->tp_name);
        return 0;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != NPY_FLOAT32 || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: expected dtype float32, got %S", name, (PyObject *)PyArray_DESCR(array));
        return 0;
    }
    if (!PyArray_ISALIGNED(array)) {
        PyErr_Format(PyExc_ValueError, "%s: expected an aligned array, got one at an odd address", name);
        return 0;
    }
    if (*shape == '@') return 1;
    if (dims->placed && dims->device) {
        PyErr_Format(PyExc_ValueError, "%s: expected an array on %s, got one on the CPU", name, dims->device->label);
        return 0;
    }
    dims->placed = 1;
    return 1;
}

/* Compares the sizes with `shape` and fills in the letters that were not known. */
static int match_dims(PyObject *array, const char *name, const char *shape, core_dims *dims) {
    core_dims found = *dims; /* apart, so that the message tells only what others have set */
    const char *letter = letters_of(shape);
    int letters = (int)strlen(letter), open = letters && letter[letters - 1] == '*', fixed = letters - open;
    int ndim = core_ndim(array);
    if (open ? ndim < fixed : ndim != fixed) return wrong_shape(name, shape, dims, array);
    int64_t rest = 1;
    for (int i = 0; i < ndim; i++) {
        int64_t size = core_size(array, i);
        if (size < 1 || size > INT_MAX) {
            char given[TEXT_MAX];
            PyErr_Format(PyExc_ValueError, "%s: expected sizes from 1 to %d, got (%s)", name, INT_MAX, given_text(given, array));
            return 0;
        }
        if (i >= fixed) {
            rest *= size;
            continue;
        }
        int64_t *known = &found.of[(unsigned char)letter[i]];
        if (*known && *known != size) return wrong_shape(name, shape, dims, array);
        *known = size;
    }
    if (open) {
        if (DIM(dims, '*') && DIM(dims, '*') != rest) {
            char given[TEXT_MAX];
            PyErr_Format(PyExc_ValueError, "%s: expected %lld elements a sample, got shape (%s)", name, (long long)DIM(dims, '*'),
                         given_text(given, array));
            return 0;
        }
        DIM(&found, '*') = rest;
    }
    *dims = found;
    return 1;
}

PyObject *core_strided(PyObject *object, const char *name, const char *shape, core_dims *dims) {
    return is_usable(object, name, shape, dims) && match_dims(object, name, shape, dims) ? object : NULL;
}

PyObject *core_input(PyObject *object, const char *name, const char *shape, core_dims *dims) {
    if (!core_strided(object, name, shape, dims)) return NULL;
    if (!core_is_array(object) && !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)object)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous array, got a strided view", name);
        return NULL;
    }
    return object;
}

/* A DeviceArray may always be written; what it shows of a model's weights is then newer than their working copy. */
static PyObject *writeable(PyObject *array, const char *name) {
    if (!array) return NULL;
    if (core_is_array(array))
        core_array_written((core_array *)array);
    else if (!PyArray_ISWRITEABLE((PyArrayObject *)array)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a writeable array, got a read-only one", name);
        return NULL;
    }
    return array;
}

PyObject *core_inout(PyObject *object, const char *name, const char *shape, core_dims *dims) {
    return writeable(core_input(object, name, shape, dims), name);
}

PyObject *core_optional(PyObject *object, const char *name, const char *shape, core_dims *dims, int *ok) {
    *ok = 1;
    if (!object || object == Py_None) return NULL;
    PyObject *array = core_input(object, name, shape, dims);
    *ok = array != NULL;
    return array;
}

PyObject *core_same_shape(PyObject *object, const char *name, PyObject *like, const char *like_name) {
    core_dims dims = {.device = device_of(like), .act = core_is_array(like) ? ((core_array *)like)->dtype : LADD_F32, .placed = 1};
    PyObject *array = core_input(object, name, "*", &dims);
    int same = array && core_ndim(array) == core_ndim(like);
    for (int i = 0; same && i < core_ndim(like); i++) same = core_size(array, i) == core_size(like, i);
    if (array && !same) {
        char expected[TEXT_MAX], given[TEXT_MAX];
        PyErr_Format(PyExc_ValueError, "%s: expected shape (%s) as %s, got (%s)", name, given_text(expected, like), like_name,
                     given_text(given, array));
        return NULL;
    }
    return array;
}

/* ---- arrays out ------------------------------------------------------------------------------------------------------ */

static PyObject *new_array(core_device *device, ladd_dtype act, int ndim, const int64_t *shape, int zeroed) {
    if (device) return core_array_new(device, act, ndim, shape, zeroed);
    npy_intp sizes[NPY_MAXDIMS];
    for (int i = 0; i < ndim; i++) sizes[i] = (npy_intp)shape[i];
    return zeroed ? PyArray_ZEROS(ndim, sizes, NPY_FLOAT32, 0) : PyArray_EMPTY(ndim, sizes, NPY_FLOAT32, 0);
}

PyObject *core_new(const char *shape, const core_dims *dims, int zeroed) {
    int64_t sizes[NPY_MAXDIMS];
    const char *letter = letters_of(shape);
    int ndim = (int)strlen(letter);
    for (int i = 0; i < ndim; i++) sizes[i] = dims->of[(unsigned char)letter[i]];
    return new_array(dims->device, *shape == '=' ? LADD_F32 : dims->act, ndim, sizes, zeroed);
}

PyObject *core_new_like(PyObject *array, int zeroed) {
    int64_t sizes[NPY_MAXDIMS];
    for (int i = 0; i < core_ndim(array); i++) sizes[i] = core_size(array, i);
    return new_array(device_of(array), core_is_array(array) ? ((core_array *)array)->dtype : LADD_F32, core_ndim(array), sizes, zeroed);
}

PyObject *core_output(PyObject *out, const char *shape, core_dims *dims) {
    if (!out || out == Py_None) return core_new(shape, dims, 0);
    return Py_XNewRef(core_inout(out, "out", shape, dims));
}

PyObject *core_output_like(PyObject *out, PyObject *array) {
    if (!out || out == Py_None) return core_new_like(array, 0);
    return Py_XNewRef(writeable(core_same_shape(out, "out", array, "the input"), "out"));
}

int core_no_overlap(PyObject *out, PyObject *input, const char *name, int in_place) {
    if (!out || !input) return 0;
    const char *a = (const char *)core_data(out), *b = (const char *)core_data(input);
    size_t a_bytes = bytes_of(out), b_bytes = bytes_of(input);
    if (in_place && a == b && a_bytes == b_bytes) return 0;
    if (a + a_bytes <= b || b + b_bytes <= a) return 0;
    PyErr_Format(PyExc_ValueError, "out: expected memory apart from %s%s, got an overlap", name, in_place ? " or exactly its own" : "");
    return -1;
}

/* ---- sequences and numbers ------------------------------------------------------------------------------------------- */

PyObject *core_sequence(PyObject *object, const char *name, Py_ssize_t n, const char *meaning) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a list of %zd arrays (%s), got %.100s", name, n, meaning, Py_TYPE(object)->tp_name);
        return NULL;
    }
    /* A tuple of its own: another thread may change the caller's list while the GIL is released. */
    PyObject *items = PySequence_Tuple(object);
    if (items && PyTuple_GET_SIZE(items) != n) {
        PyErr_Format(PyExc_ValueError, "%s: expected %zd arrays (%s), got %zd", name, n, meaning, PyTuple_GET_SIZE(items));
        Py_CLEAR(items);
    }
    return items;
}

PyObject *core_input_list(PyObject *object, const char *name, Py_ssize_t n, const char *meaning, const char *shape, core_dims *dims,
                          const ladd_act **data) {
    PyObject *items = core_sequence(object, name, n, meaning);
    for (Py_ssize_t i = 0; items && i < n; i++) {
        PyObject *array = core_input(PyTuple_GET_ITEM(items, i), name, shape, dims);
        if (array)
            data[i] = core_data(array);
        else
            Py_CLEAR(items);
    }
    return items;
}

PyObject *core_new_list(Py_ssize_t n, const char *shape, const core_dims *dims, ladd_act **data) {
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        PyObject *array = core_new(shape, dims, 0);
        if (array) {
            PyList_SET_ITEM(list, i, array);
            data[i] = core_data(array);
        } else
            Py_CLEAR(list);
    }
    return list;
}

PyObject *core_int_tuple(const int *values, Py_ssize_t n) {
    PyObject *tuple = PyTuple_New(n);
    for (Py_ssize_t i = 0; tuple && i < n; i++) {
        PyObject *value = PyLong_FromLong(values[i]);
        if (value)
            PyTuple_SET_ITEM(tuple, i, value);
        else
            Py_CLEAR(tuple);
    }
    return tuple;
}

int core_int(PyObject *object, const char *name, long low, long high, int *out) {
    /* NumPy's integers count as integers; True and 2.0 do not. */
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %.100s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(object);
    if (!number) return -1;
    int overflow = 0;
    long value = PyLong_AsLongAndOverflow(number, &overflow);
    if (value == -1 && !overflow && PyErr_Occurred()) {
        Py_DECREF(number);
        return -1;
    }
    if (overflow || value < low || value > high) {
        PyErr_Format(PyExc_ValueError, "%s: expected an integer from %ld to %ld, got %S", name, low, high, number);
        Py_DECREF(number);
        return -1;
    }
    Py_DECREF(number);
    *out = (int)value;
    return 0;
}

int core_bool(PyObject *object, const char *name, int *out) {
    if (!object) return 0;
    if (object != Py_True && object != Py_False && !PyArray_IsScalar(object, Bool)) {
        PyErr_Format(PyExc_TypeError, "%s: expected True or False, got %.100s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = PyObject_IsTrue(object);
    return *out < 0 ? -1 : 0;
}

int core_uint64(PyObject *object, const char *name, uint64_t *out) {
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %.100s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    PyObject *number = PyNumber_Index(object);
    if (!number) return -1;
    unsigned long long value = PyLong_AsUnsignedLongLong(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: expected an integer from 0 to 2**64 - 1, got %S", name, number);
        Py_DECREF(number);
        return -1;
    }
    Py_DECREF(number);
    *out = value;
    return 0;
}

int core_in_range(double value, const char *name, double low, double high) {
    if (value >= low && value <= high && isfinite(value)) return 0;
    PyObject *given = PyFloat_FromDouble(value), *from = PyFloat_FromDouble(low), *to = PyFloat_FromDouble(high);
    if (given && from && to) {
        if (high < HUGE_VAL)
            PyErr_Format(PyExc_ValueError, "%s: expected a number from %R to %R, got %R", name, from, to, given);
        else if (low > -HUGE_VAL)
            PyErr_Format(PyExc_ValueError, "%s: expected a finite number of at least %R, got %R", name, from, given);
        else
            PyErr_Format(PyExc_ValueError, "%s: expected a finite number, got %R", name, given);
    }
    Py_XDECREF(given);
    Py_XDECREF(from);
    Py_XDECREF(to);
    return -1;
}

int core_finite(double value, const char *name) { return core_in_range(value, name, -HUGE_VAL, HUGE_VAL); }

Py_ssize_t core_int_list(PyObject *object, const char *name, int *out, Py_ssize_t room, long low, long high) {
    PyObject *items = PyUnicode_Check(object) || PyBytes_Check(object) ? NULL : PySequence_Tuple(object);
    if (!items) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected a sequence of integers, got %.100s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    Py_ssize_t n = PyTuple_GET_SIZE(items);
    if (n > room) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most %zd integers, got %zd", name, room, n);
        n = -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (core_int(PyTuple_GET_ITEM(items, i), name, low, high, &out[i]) < 0) n = -1;
    Py_DECREF(items);
    return n;
}

/* ---- configurations -------------------------------------------------------------------------------------------------- */

int core_config_begin(core_config *config, const char *model, PyObject *mapping) {
    config->model = model;
    config->dict = NULL;
    if (!PyMapping_Check(mapping) || !PyObject_HasAttrString(mapping, "keys")) {
        PyErr_Format(PyExc_TypeError, "%s: expected a mapping of settings, got %.100s", model, Py_TYPE(mapping)->tp_name);
        return -1;
    }
    config->dict = PyDict_New();
    if (config->dict && PyDict_Update(config->dict, mapping) == 0) return 0;
    Py_CLEAR(config->dict);
    return -1;
}

PyObject *core_config_take(core_config *config, const char *key, int required, int *ok) {
    *ok = 0;
    PyObject *name = PyUnicode_FromString(key);
    if (!name) return NULL;
    PyObject *value = Py_XNewRef(PyDict_GetItemWithError(config->dict, name));
    if (value) {
        *ok = PyDict_DelItem(config->dict, name) == 0;
        if (!*ok) Py_CLEAR(value);
    } else if (required && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s: expected a setting %s, got none", config->model, key);
    else
        *ok = !PyErr_Occurred();
    Py_DECREF(name);
    return value;
}

int core_config_int(core_config *config, const char *key, int required, long low, long high, int *out) {
    int ok;
    PyObject *value = core_config_take(config, key, required, &ok);
    int result = value ? core_int(value, key, low, high, out) : ok - 1;
    Py_XDECREF(value);
    return result;
}

int core_config_bool(core_config *config, const char *key, int required, int *out) {
    int ok;
    PyObject *value = core_config_take(config, key, required, &ok);
    int result = value ? core_bool(value, key, out) : ok - 1;
    Py_XDECREF(value);
    return result;
}

Py_ssize_t core_config_ints(core_config *config, const char *key, int required, int *out, Py_ssize_t room, long low, long high) {
    int ok;
    PyObject *value = core_config_take(config, key, required, &ok);
    Py_ssize_t n = value ? core_int_list(value, key, out, room, low, high) : (ok ? -2 : -1);
    Py_XDECREF(value);
    return n;
}

int core_config_done(core_config *config) {
    if (PyDict_GET_SIZE(config->dict) == 0) return 0;
    PyObject *keys = PyDict_Keys(config->dict);
    if (keys) PyErr_Format(PyExc_ValueError, "%s: expected only known settings, got unknown ones: %R", config->model, keys);
    Py_XDECREF(keys);
    return -1;
}

void core_config_end(core_config *config) { Py_CLEAR(config->dict); }

/* ---- numbers of a sample or step --------------------------------------------------------------------------------------- */

PyObject *core_times(PyObject *object, const char *name, core_dims *dims) {
    PyObject *array = core_input(object, name, "@B", dims);
    if (!array || core_is_array(array)) return array;
    for (npy_intp b = 0; b < PyArray_DIM((PyArrayObject *)array, 0); b++) {
        float t = core_data(array)[b];
        if (t >= 0.0f && t <= 1.0f) continue;
        char number[32];
        snprintf(number, sizeof number, "%g", (double)t);
        PyErr_Format(PyExc_ValueError, "%s: expected numbers in [0, 1], got %s for sample %zd", name, number, (Py_ssize_t)b);
        return NULL;
    }
    return array;
}

ladd_status core_numbers_begin(const core_call *call, core_numbers *numbers, PyObject *array) {
    const ladd_context *ctx = &call->ctx;
    *numbers = (core_numbers){.data = core_data(array)};
    if (core_is_array(array) || !call->device) return LADD_OK;
    size_t bytes = (size_t)PyArray_NBYTES((PyArrayObject *)array);
    LADD_TRY(ctx->backend->alloc(ctx, &numbers->block, bytes));
    numbers->data = numbers->block;
    return ctx->backend->upload(ctx, numbers->block, PyArray_DATA((PyArrayObject *)array), bytes);
}

void core_numbers_end(const core_call *call, core_numbers *numbers) {
    if (numbers->block) call->ctx.backend->release(&call->ctx, numbers->block);
}

int core_doubles(PyObject *object, const char *name, Py_ssize_t count, const core_dims *dims, double **data) {
    *data = NULL;
    if (!object || object == Py_None) return 0;
    core_dims own = {.device = dims->device, .act = LADD_F32, .placed = dims->placed};
    if (count) DIM(&own, 'n') = 2 * count;
    if (!core_inout(object, name, "=n", &own)) return -1;
    if (DIM(&own, 'n') % 2 || (uintptr_t)core_data(object) % sizeof(double)) {
        PyErr_Format(PyExc_ValueError, "%s: expected pairs of float32 that hold float64 numbers on a multiple of 8 bytes, got other memory", name);
        return -1;
    }
    *data = (double *)core_data(object);
    return (int)(DIM(&own, 'n') / 2);
}

ladd_status core_result_begin(const core_call *call, core_result *result, double *out) {
    const ladd_context *ctx = &call->ctx;
    *result = (core_result){.data = out};
    if (out) return LADD_OK;
    result->data = result->values;
    if (!call->device) return LADD_OK;
    LADD_TRY(ctx->backend->alloc(ctx, &result->block, sizeof result->values));
    result->data = result->block;
    return ctx->backend->upload(ctx, result->block, result->values, sizeof result->values);
}

ladd_status core_result_end(const core_call *call, core_result *result, ladd_status status) {
    const ladd_context *ctx = &call->ctx;
    if (!result->block) return status;
    if (status == LADD_OK) status = ctx->backend->download(ctx, result->values, result->block, sizeof result->values);
    ctx->backend->release(ctx, result->block);
    return status;
}
