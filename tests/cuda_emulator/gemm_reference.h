/* The product of cuda/gemm.h on the emulator: sums in double, no epilogue, so the kernels that finish a plain product are what runs. Included by
 * gemm.cu. */
#ifndef LADD_EMULATED_GEMM_H
#define LADD_EMULATED_GEMM_H
#include <vector>

/* [rows][columns] as float, whatever the type and whether stored transposed. */
static std::vector<float> ladd_emulated_matrix(const ladd_context *ctx, const void *x, int rows, int columns, int transposed) {
    std::vector<float> y((size_t)rows * columns);
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)columns; c++) {
            const size_t from = transposed ? c * rows + r : r * columns + c;
            y[r * columns + c] = ctx->act == LADD_F32    ? ((const float *)x)[from]
                                 : ctx->act == LADD_BF16 ? ladd_to_float(((const __nv_bfloat16 *)x)[from])
                                                         : ladd_to_float(((const __half *)x)[from]);
        }
    return y;
}

static void ladd_emulated_product(const ladd_context *ctx, const ladd_product *p) {
    ladd_emulator::HostAccess access;
    const std::vector<float> a = ladd_emulated_matrix(ctx, p->a, p->M, p->K, p->a_transposed);
    const std::vector<float> b = ladd_emulated_matrix(ctx, p->b, p->N, p->K, !p->b_transposed);
    for (size_t m = 0; m < (size_t)p->M; m++)
        for (size_t n = 0; n < (size_t)p->N; n++) {
            double sum = 0.0;
            for (size_t k = 0; k < (size_t)p->K; k++) sum += (double)a[m * p->K + k] * b[n * p->K + k];
            const size_t at = m * p->N + n;
            if (p->c_type == LADD_F32)
                ((float *)p->c)[at] = (float)(p->accumulate ? ((float *)p->c)[at] + sum : sum);
            else if (p->c_type == LADD_BF16)
                ((__nv_bfloat16 *)p->c)[at] = ladd_from_float<__nv_bfloat16>((float)sum);
            else
                ((__half *)p->c)[at] = ladd_from_float<__half>((float)sum);
        }
}

/* Done at once, or kept for the graph that is being recorded. */
ladd_status ladd_cuda_gemm(const ladd_context *ctx, const ladd_product *p, int *applied) {
    *applied = p->epilogue == LADD_EPILOGUE_NONE;
    auto work = [context = *ctx, product = *p] {
        ladd_emulated_product(&context, &product);
        return cudaSuccess;
    };
    if (!ladd_emulator::captured(work)) work();
    return LADD_OK;
}

#endif
