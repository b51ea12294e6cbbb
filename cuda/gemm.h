/* Matrix products: cuBLASLt on a device, the reference product in gemm_reference.h on the tests' emulator. */
#ifndef LADD_CUDA_GEMM_H
#define LADD_CUDA_GEMM_H
#include "device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What is done to the product before it is stored. */
typedef enum {
    LADD_EPILOGUE_NONE = 0,
    LADD_EPILOGUE_BIAS,     /* c = product + bias */
    LADD_EPILOGUE_GELU,     /* h = product, c = gelu_tanh(h) */
    LADD_EPILOGUE_BIAS_GELU /* h = product + bias, c = gelu_tanh(h) */
} ladd_epilogue;

/* c[M,N] (+)= op(a)[M,K] op(b)[K,N], all dense and row-major. A transposed operand is stored [K,M] or [N,K]. */
typedef struct ladd_product {
    void *c;
    const void *a, *b;
    int M, N, K;
    int a_transposed, b_transposed;
    ladd_dtype c_type; /* the compute type, or LADD_F32; a and b are in the compute type */
    int accumulate;    /* 1: added to c */
    ladd_epilogue epilogue;
    const void *bias; /* [N], in the compute type */
    void *h;          /* [M,N] */
} ladd_product;

/* Queues the product. *applied: whether the epilogue is in it; where the library has none for this shape or alignment the plain product was stored,
 * for the caller to finish. Uses the last scratch slot. */
ladd_status ladd_cuda_gemm(const ladd_context *ctx, const ladd_product *product, int *applied);

#ifdef __cplusplus
}
#endif
#endif
