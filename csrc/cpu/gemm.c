/* OpenBLAS, on the calling thread. */
#include <pthread.h>

#include "cblas.h"
#include "cpu.h"

static pthread_once_t gemm_once = PTHREAD_ONCE_INIT;
static void gemm_setup(void) { scipy_openblas_set_num_threads(1); }

void ladd_sgemm(int ta, int tb, int M, int N, int K, float alpha, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta, float *C,
                ptrdiff_t ldc) {
    pthread_once(&gemm_once, gemm_setup);
    scipy_cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, alpha, A, (int)lda, B, (int)ldb, beta,
                      C, (int)ldc);
}
