/* The part of the DLPack protocol (version 0.8, the unversioned capsule that every consumer takes) that DeviceArray speaks: the data layout is fixed
 * by https://dmlc.github.io/dlpack/latest/c_api.html. */
#ifndef LADD_DLPACK_H
#define LADD_DLPACK_H
#include <stdint.h>

enum { DL_CUDA = 2, DL_CUDA_MANAGED = 13 }; /* DLDevice.device_type */
enum { DL_FLOAT = 2, DL_BFLOAT = 4 };       /* DLDataType.code */

typedef struct DLDevice {
    int32_t device_type, device_id;
} DLDevice;
typedef struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;
typedef struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides; /* strides in elements; NULL: dense, row-major */
    uint64_t byte_offset;
} DLTensor;
typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;
#endif
