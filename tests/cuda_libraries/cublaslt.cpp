/* A cuBLASLt for tests, on host memory: the functions that cuda/gemm.cu asks for, with the meaning that NVIDIA's documentation gives them (operands
 * count columns first). It refuses what the library refuses, so that gemm.cu's descriptions, alignments and plans can be proven without a GPU. */
#include <cublasLt.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "../../cuda/device.h"

namespace {

struct Operation {
    cublasComputeType_t compute;
    cublasOperation_t first = CUBLAS_OP_N, second = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void *bias = nullptr;
    void *aux = nullptr;
    int64_t aux_ld = 0;
};
struct Layout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t ld;
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK, aligned[4] = {256, 256, 256, 256}; /* A, B, C, D */
};
/* What the fake writes into an algorithm: it stands for the alignments it was chosen for. */
struct Algorithm {
    uint32_t magic, aligned[4];
};
constexpr uint32_t MAGIC = 0x1add;
constexpr size_t WORKSPACE = 1000;

int searches, made, without_epilogues, tf32_products;
char sentence[512];

double element(const void *x, cudaDataType type, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)x)[i];
    const uint16_t bits = ((const uint16_t *)x)[i];
    if (type == CUDA_R_16BF) {
        const uint32_t wide = (uint32_t)bits << 16;
        float y;
        memcpy(&y, &wide, 4);
        return y;
    }
    _Float16 y;
    memcpy(&y, &bits, 2);
    return (double)y;
}

void put(void *x, cudaDataType type, size_t i, double value) {
    const float y = (float)value;
    if (type == CUDA_R_32F) {
        ((float *)x)[i] = y;
    } else if (type == CUDA_R_16BF) {
        uint32_t bits;
        memcpy(&bits, &y, 4);
        ((uint16_t *)x)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        const _Float16 half = (_Float16)y;
        memcpy((uint16_t *)x + i, &half, 2);
    }
}

bool lies_on(const void *pointer, uint32_t bytes) { return (uintptr_t)pointer % bytes == 0; }

Operation &operation(cublasLtMatmulDesc_t desc) { return *(Operation *)desc; }
const Layout &layout(cublasLtMatrixLayout_t l) { return *(const Layout *)l; }

/* Rows and columns of op(x). */
uint64_t rows(cublasOperation_t op, const Layout &l) { return op == CUBLAS_OP_N ? l.rows : l.columns; }
uint64_t columns(cublasOperation_t op, const Layout &l) { return op == CUBLAS_OP_N ? l.columns : l.rows; }

bool fits(const Operation &o, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    const bool aux = o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX || o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    if (rows(o.first, a) != d.rows || columns(o.second, b) != d.columns || columns(o.first, a) != rows(o.second, b)) return false;
    if (a.ld < (int64_t)a.rows || b.ld < (int64_t)b.rows || d.ld < (int64_t)d.rows || memcmp(&c, &d, sizeof c) != 0 || a.type != b.type) return false;
    return !aux || (o.aux && o.aux_ld % 8 == 0 && o.aux_ld >= (int64_t)d.rows);
}

cublasStatus_t Create(cublasLtHandle_t *handle) {
    *handle = (cublasLtHandle_t)(uintptr_t)1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t Destroy(cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; }
const char *GetStatusName(cublasStatus_t status) {
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INVALID_VALUE";
}
cublasStatus_t MatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType scale) {
    if (scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
    Operation *o = new Operation;
    o->compute = compute;
    *desc = (cublasLtMatmulDesc_t)o;
    made++;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete (Operation *)desc;
    made--;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t size) {
    Operation &o = operation(desc);
#define FIELD(name, field)                                              \
    case CUBLASLT_MATMUL_DESC_##name:                                   \
        if (size != sizeof o.field) return CUBLAS_STATUS_INVALID_VALUE; \
        memcpy(&o.field, value, size);                                  \
        return CUBLAS_STATUS_SUCCESS
    switch (attribute) {
        FIELD(TRANSA, first);
        FIELD(TRANSB, second);
        FIELD(EPILOGUE, epilogue);
        FIELD(BIAS_POINTER, bias);
        FIELD(EPILOGUE_AUX_POINTER, aux);
        FIELD(EPILOGUE_AUX_LD, aux_ld);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}
cublasStatus_t MatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t r, uint64_t c, int64_t ld) {
    *l = (cublasLtMatrixLayout_t) new Layout{type, r, c, ld};
    made++;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete (Layout *)l;
    made--;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = (cublasLtMatmulPreference_t) new Preference;
    made++;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete (Preference *)preference;
    made--;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulPreferenceSetAttribute(cublasLtMatmulPreference_t given, cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                            size_t size) {
    Preference &preference = *(Preference *)given;
    void *to = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES     ? (void *)&preference.workspace
               : attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK ? &preference.reductions
               : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ? &preference.aligned[0]
               : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES ? &preference.aligned[1]
               : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES ? &preference.aligned[2]
               : attribute == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES ? &preference.aligned[3]
                                                                         : nullptr;
    if (!to || size != (to == &preference.workspace ? 8u : 4u)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t MatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                      cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t given, int wanted,
                                      cublasLtMatmulHeuristicResult_t *found, int *n) {
    const Preference &preference = *(const Preference *)given;
    const Operation &o = operation(desc);
    searches++;
    *n = 0;
    if (wanted < 1 || preference.reductions & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE || preference.workspace < WORKSPACE)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!fits(o, layout(a), layout(b), layout(c), layout(d))) return CUBLAS_STATUS_INVALID_VALUE;
    if (without_epilogues && o.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_NOT_SUPPORTED;
    Algorithm algorithm = {MAGIC, {}};
    memcpy(algorithm.aligned, preference.aligned, sizeof algorithm.aligned);
    memcpy(&found->algo, &algorithm, sizeof algorithm);
    found->workspaceSize = WORKSPACE;
    found->state = CUBLAS_STATUS_SUCCESS;
    *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t Matmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *A, cublasLtMatrixLayout_t la, const void *B,
                      cublasLtMatrixLayout_t lb, const void *beta, const void *C, cublasLtMatrixLayout_t lc, void *D, cublasLtMatrixLayout_t ld,
                      const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_size, cudaStream_t) {
    const Operation &o = operation(desc);
    const Layout &a = layout(la), &b = layout(lb), &d = layout(ld);
    Algorithm algorithm;
    memcpy(&algorithm, algo, sizeof algorithm);
    const void *pointers[4] = {A, B, C, D};
    for (int i = 0; i < 4; i++)
        if (algorithm.magic != MAGIC || !lies_on(pointers[i], algorithm.aligned[i])) return CUBLAS_STATUS_INVALID_VALUE;
    if (!fits(o, a, b, layout(lc), d) || !workspace || workspace_size < WORKSPACE) return CUBLAS_STATUS_INVALID_VALUE;
    const bool gelu = o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX || o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    const bool bias = o.epilogue == CUBLASLT_EPILOGUE_BIAS || o.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    if ((bias && (!o.bias || !lies_on(o.bias, 16))) || (gelu && !lies_on(o.aux, 16))) return CUBLAS_STATUS_INVALID_VALUE;
    tf32_products += o.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    for (uint64_t j = 0; j < d.columns; j++)
        for (uint64_t i = 0; i < d.rows; i++) {
            double sum = 0;
            for (uint64_t k = 0; k < columns(o.first, a); k++)
                sum += element(A, a.type, o.first == CUBLAS_OP_N ? i + k * a.ld : k + i * a.ld) *
                       element(B, b.type, o.second == CUBLAS_OP_N ? k + j * b.ld : j + k * b.ld);
            const size_t at = i + j * d.ld;
            sum *= *(const float *)alpha;
            if (*(const float *)beta != 0) sum += *(const float *)beta * element(C, d.type, at);
            if (bias) sum += element(o.bias, d.type, i);
            if (gelu) {
                put(o.aux, d.type, i + j * o.aux_ld, sum);
                sum *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
            }
            put(D, d.type, at, sum);
        }
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {
void *ladd_cuda_symbol(ladd_cuda_library library, const char *name) {
#define F(function)                                                                    \
    if (library == LADD_LIBRARY_CUBLASLT && strcmp(name, "cublasLt" #function) == 0) { \
        decltype(&cublasLt##function) checked = function;                              \
        return (void *)checked;                                                        \
    }
    F(Create)
    F(Destroy) F(GetStatusName) F(Matmul) F(MatmulAlgoGetHeuristic) F(MatmulDescCreate) F(MatmulDescDestroy) F(MatmulDescSetAttribute)
        F(MatrixLayoutCreate) F(MatrixLayoutDestroy) F(MatmulPreferenceCreate) F(MatmulPreferenceDestroy)
            F(MatmulPreferenceSetAttribute) return nullptr;
}
ladd_status ladd_fail(ladd_status code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return code;
}
const char *ladd_last_error(void) { return sentence; }
ladd_status ladd_cuda_scratch(const ladd_context *, void **block, int slot, size_t bytes) {
    static char room[WORKSPACE];
    if (slot != LADD_CUDA_SLOTS - 1 || bytes != WORKSPACE) return ladd_fail(LADD_ERR_RUNTIME, "the last slot expected, got slot %d", slot);
    *block = room;
    return LADD_OK;
}
/* For the tests: {searches for an algorithm, descriptions alive, TF32 products}. */
void ladd_test_counts(int *counts) {
    counts[0] = searches;
    counts[1] = made;
    counts[2] = tf32_products;
}
void ladd_test_without_epilogues(int yes) { without_epilogues = yes; }
ladd_cuda_state *ladd_test_state(int tf32) {
    ladd_cuda_state *state = new ladd_cuda_state{};
    state->tf32 = tf32;
    return state;
}
void ladd_test_state_free(ladd_cuda_state *state) {
    for (int i = 0; i < LADD_CUDA_PLANS; i++)
        if (state->plans[i]) state->plans_free[i](state->plans[i]);
    delete state;
}
}
