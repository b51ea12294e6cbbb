/* Matrix products by cuBLASLt. What the library finds for a shape (an algorithm, its workspace) is kept in a table of the device's state, so a
 * product costs one lookup and one call. Under the tests' emulator the product is the reference's.
 *
 * cuBLASLt counts columns first: to it our row-major c[M,N] is c^T[N,M] = op(b)^T op(a)^T, so b is its first operand, and a bias along our columns
 * lies along its rows, as its epilogues want.
 */
#include "gemm.h"

#include "common.cuh"

#ifdef __CUDACC__
#include <cublasLt.h>

#include <new>

namespace {

constexpr int SLOT = LADD_CUDA_SLOTS - 1, ROOM = 1024;
constexpr size_t WORKSPACE = (size_t)32 << 20; /* what NVIDIA advises for Hopper, and plenty for others */

/* Everything that the choice of an algorithm depends on. Only ints: compared byte by byte. */
struct gemm_key {
    int M, N, K, a_transposed, b_transposed, act, c_type, accumulate, epilogue, tf32;
    int a_aligned, b_aligned, c_aligned; /* bytes, a power of two, at most 256 */
};

struct gemm_plan {
    gemm_key key;
    int used, supported;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t first, second, result;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;
};

/* The library's functions by name, with the types that its header gives them. */
struct gemm_library {
    cublasLtHandle_t handle;
    /* clang-format off */
#define LADD_GEMM_FUNCTIONS(F) \
    F(Create) F(Destroy) F(GetStatusName) F(Matmul) F(MatmulAlgoGetHeuristic) F(MatmulDescCreate) F(MatmulDescDestroy) F(MatmulDescSetAttribute) \
    F(MatrixLayoutCreate) F(MatrixLayoutDestroy) F(MatmulPreferenceCreate) F(MatmulPreferenceDestroy) F(MatmulPreferenceSetAttribute)
/* clang-format on */
#define F(name) decltype(&cublasLt##name) name;
    LADD_GEMM_FUNCTIONS(F)
#undef F
    gemm_plan plans[ROOM];
};

ladd_status gemm_check(const gemm_library *lib, cublasStatus_t status, const char *what, const ladd_product *p) {
    if (status == CUBLAS_STATUS_SUCCESS) return LADD_OK;
    return ladd_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? LADD_ERR_MEMORY : LADD_ERR_RUNTIME, "cuBLASLt, %s of a product [%d,%d]x[%d,%d]: %s", what,
                     p->M, p->K, p->K, p->N, lib->GetStatusName(status));
}

void gemm_drop(gemm_library *lib, gemm_plan *plan) {
    if (plan->operation) lib->MatmulDescDestroy(plan->operation);
    if (plan->first) lib->MatrixLayoutDestroy(plan->first);
    if (plan->second) lib->MatrixLayoutDestroy(plan->second);
    if (plan->result) lib->MatrixLayoutDestroy(plan->result);
    *plan = gemm_plan{};
}

void gemm_free(void *plans) {
    gemm_library *lib = (gemm_library *)plans;
    for (gemm_plan &plan : lib->plans) gemm_drop(lib, &plan);
    if (lib->handle) lib->Destroy(lib->handle);
    delete lib;
}

ladd_status gemm_open(const ladd_context *ctx, gemm_library **library) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    *library = (gemm_library *)state->plans[LADD_CUDA_PLANS_LINEAR];
    if (*library) return LADD_OK;
    gemm_library *lib = new (std::nothrow) gemm_library{};
    if (!lib) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a table of %d plans of matrix products", ROOM);
#define F(name)                                                                                 \
    lib->name = (decltype(lib->name))ladd_cuda_symbol(LADD_LIBRARY_CUBLASLT, "cublasLt" #name); \
    if (!lib->name) {                                                                           \
        delete lib;                                                                             \
        return LADD_ERR_RUNTIME; /* ladd_cuda_symbol left the sentence */                       \
    }
    LADD_GEMM_FUNCTIONS(F)
#undef F
    const cublasStatus_t status = lib->Create(&lib->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        const char *name = lib->GetStatusName(status);
        delete lib;
        return ladd_fail(LADD_ERR_RUNTIME, "cuBLASLt could not be started: %s", name);
    }
    state->plans[LADD_CUDA_PLANS_LINEAR] = *library = lib;
    state->plans_free[LADD_CUDA_PLANS_LINEAR] = gemm_free;
    return LADD_OK;
}

int alignment_of(const void *pointer) {
    const uintptr_t bits = (uintptr_t)pointer | 256;
    return (int)(bits & (~bits + 1));
}

cudaDataType_t data_type(ladd_dtype type) { return type == LADD_F32 ? CUDA_R_32F : type == LADD_BF16 ? CUDA_R_16BF : CUDA_R_16F; }

ladd_status gemm_describe(const ladd_context *ctx, gemm_library *lib, gemm_plan *plan, const ladd_product *p) {
    const gemm_key &key = plan->key;
    const cudaDataType_t act = data_type(ctx->act), c_type = data_type(p->c_type);
#define TRY(what, call) LADD_TRY(gemm_check(lib, lib->call, what, p))
#define SET(attribute, value) TRY("description", MatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_##attribute, &(value), sizeof(value)))
    TRY("description", MatmulDescCreate(&plan->operation, key.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t first = p->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, second = p->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    SET(TRANSA, first);
    SET(TRANSB, second);
    TRY("layout", MatrixLayoutCreate(&plan->first, act, p->b_transposed ? p->K : p->N, p->b_transposed ? p->N : p->K, p->b_transposed ? p->K : p->N));
    TRY("layout",
        MatrixLayoutCreate(&plan->second, act, p->a_transposed ? p->M : p->K, p->a_transposed ? p->K : p->M, p->a_transposed ? p->M : p->K));
    TRY("layout", MatrixLayoutCreate(&plan->result, c_type, p->N, p->M, p->N));
    if (p->epilogue != LADD_EPILOGUE_NONE) {
        const cublasLtEpilogue_t epilogue = p->epilogue == LADD_EPILOGUE_BIAS   ? CUBLASLT_EPILOGUE_BIAS
                                            : p->epilogue == LADD_EPILOGUE_GELU ? CUBLASLT_EPILOGUE_GELU_AUX
                                                                                : CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
        SET(EPILOGUE, epilogue);
        if (p->bias) SET(BIAS_POINTER, p->bias);
        if (p->h) {
            const int64_t ld = p->N;
            SET(EPILOGUE_AUX_POINTER, p->h);
            SET(EPILOGUE_AUX_LD, ld);
        }
    }
    return LADD_OK;
}

/* Partial sums, where an algorithm splits K, may meet in float only: 16-bit ones would lose digits. */
ladd_status gemm_choose(gemm_library *lib, gemm_plan *plan, const ladd_product *p) {
    cublasLtMatmulPreference_t preference;
    TRY("preferences", MatmulPreferenceCreate(&preference));
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t a = (uint32_t)plan->key.b_aligned, b = (uint32_t)plan->key.a_aligned, c = (uint32_t)plan->key.c_aligned;
    const size_t workspace = WORKSPACE;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
#define PREFER(attribute, value)         \
    if (status == CUBLAS_STATUS_SUCCESS) \
    status = lib->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_##attribute, &(value), sizeof(value))
    PREFER(MAX_WORKSPACE_BYTES, workspace);
    PREFER(REDUCTION_SCHEME_MASK, reductions);
    PREFER(MIN_ALIGNMENT_A_BYTES, a);
    PREFER(MIN_ALIGNMENT_B_BYTES, b);
    PREFER(MIN_ALIGNMENT_C_BYTES, c);
    PREFER(MIN_ALIGNMENT_D_BYTES, c);
#undef PREFER
    cublasLtMatmulHeuristicResult_t found = {};
    int n = 0;
    if (status == CUBLAS_STATUS_SUCCESS)
        status = lib->MatmulAlgoGetHeuristic(lib->handle, plan->operation, plan->first, plan->second, plan->result, plan->result, preference, 1,
                                             &found, &n);
    lib->MatmulPreferenceDestroy(preference);
    plan->supported = status == CUBLAS_STATUS_SUCCESS && n > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    plan->algorithm = found.algo;
    plan->workspace = found.workspaceSize;
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? LADD_OK : gemm_check(lib, status, "choice of an algorithm", p);
}

/* The plan of a key: from its place in the table, one of the three behind it, or made anew, then instead of what was first there. */
ladd_status gemm_find(const ladd_context *ctx, gemm_library *lib, gemm_plan **found, const gemm_key &key, const ladd_product *p) {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < sizeof key; i++) hash = (hash ^ ((const unsigned char *)&key)[i]) * 1099511628211u;
    gemm_plan *home = &lib->plans[hash % ROOM], *empty = nullptr;
    for (size_t i = 0; i < 4; i++) {
        gemm_plan *plan = &lib->plans[(hash + i) % ROOM];
        if (plan->used && memcmp(&plan->key, &key, sizeof key) == 0) {
            *found = plan;
            return LADD_OK;
        }
        if (!plan->used && !empty) empty = plan;
    }
    gemm_plan *plan = empty ? empty : home;
    gemm_drop(lib, plan);
    plan->key = key;
    ladd_status status = gemm_describe(ctx, lib, plan, p);
    if (status == LADD_OK) status = gemm_choose(lib, plan, p);
    if (status != LADD_OK) {
        gemm_drop(lib, plan);
        return status;
    }
    plan->used = 1;
    *found = plan;
    return LADD_OK;
}

/* Epilogues read the bias and write h in vectors; an h of another stride than a multiple of 8 they refuse. */
bool epilogue_fits(const ladd_product *p) { return ladd_aligned16(p->c, p->bias, p->h) && (!p->h || p->N % 8 == 0); }

}  // namespace

ladd_status ladd_cuda_gemm(const ladd_context *ctx, const ladd_product *product, int *applied) {
    gemm_library *lib;
    LADD_TRY(gemm_open(ctx, &lib));
    ladd_product plain = *product;
    plain.epilogue = LADD_EPILOGUE_NONE;
    plain.bias = plain.h = nullptr;
    const ladd_product *p = product->epilogue != LADD_EPILOGUE_NONE && epilogue_fits(product) ? product : &plain;
    ladd_cuda_state *state = ladd_cuda(ctx);
    gemm_key key = {p->M,
                    p->N,
                    p->K,
                    p->a_transposed,
                    p->b_transposed,
                    ctx->act,
                    p->c_type,
                    p->accumulate,
                    p->epilogue,
                    ctx->act == LADD_F32 && state->tf32,
                    alignment_of(p->a),
                    alignment_of(p->b),
                    alignment_of(p->c)};
    gemm_plan *plan;
    LADD_TRY(gemm_find(ctx, lib, &plan, key, p));
    if (!plan->supported && p != &plain) {
        p = &plain;
        key.epilogue = LADD_EPILOGUE_NONE;
        LADD_TRY(gemm_find(ctx, lib, &plan, key, p));
    }
    if (!plan->supported) return gemm_check(lib, CUBLAS_STATUS_NOT_SUPPORTED, "choice of an algorithm", p);
    *applied = p->epilogue == product->epilogue;
    if (p->bias) SET(BIAS_POINTER, p->bias);
    if (p->h) SET(EPILOGUE_AUX_POINTER, p->h);
    void *workspace = nullptr;
    if (plan->workspace) LADD_TRY(ladd_cuda_scratch(ctx, &workspace, SLOT, plan->workspace));
    const float alpha = 1.0f, beta = p->accumulate ? 1.0f : 0.0f;
    return gemm_check(lib,
                      lib->Matmul(lib->handle, plan->operation, &alpha, p->b, plan->first, p->a, plan->second, &beta, p->c, plan->result, p->c,
                                  plan->result, &plan->algorithm, workspace, plan->workspace, state->stream),
                      "call", p);
}

#else
#include "gemm_reference.h"
#endif
