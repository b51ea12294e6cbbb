/* The module ladd._cuda: nothing but a capsule with the functions of csrc/device.h, which ladd._core's Device takes. It needs neither a GPU nor a
 * driver to be imported. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../../device.h"

extern const ladd_device_api ladd_cuda_api;

static int cuda_exec(PyObject *module) {
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)&ladd_cuda_api, LADD_DEVICE_CAPSULE, NULL);
    int result = capsule ? PyModule_AddObjectRef(module, "provider", capsule) : -1;
    Py_XDECREF(capsule);
    return result;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, cuda_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "ladd._cuda", .m_doc = "The CUDA kernels, for ladd.device.", .m_size = 0,
                                        .m_slots = slots};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&definition); }
