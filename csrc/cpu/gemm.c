/* Matrix products: OpenBLAS on one thread for a tile, our pool over the tiles. */
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

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* The cut into about `want` tiles that packs least: every tile packs its own copy of its rows and columns, so packing grows as 1/tm + 1/tn a flop. */
static ladd_cut best_cut(int M, int N, int want) {
    ladd_cut cut = {.tm = M, .tn = N, .n_m = 1, .n_n = 1};
    double best = 1e300;
    for (int n_n = 1; n_n <= want; n_n++) {
        int n_m = (want + n_n - 1) / n_n;
        if ((n_n > 1 && N / n_n < 32) || (n_m > 1 && M / n_m < 16)) continue;
        double packed = (double)M * n_n + (double)N * n_m;
        if (packed >= best) continue;
        best = packed;
        cut.tm = (int)(n_m == 1 ? M : round_up((M + n_m - 1) / n_m, 8)); /* whole register tiles of the product's inner kernel */
        cut.tn = (int)(n_n == 1 ? N : round_up((N + n_n - 1) / n_n, 16));
    }
    cut.n_m = (M + cut.tm - 1) / cut.tm;
    cut.n_n = (N + cut.tn - 1) / cut.tn;
    return cut;
}

/* Tiles of some 0.4 milliseconds, at least four of them to keep two threads even, but no more than four where that makes tiles so narrow that packing
 * costs more than a tenth of the product. */
ladd_cut ladd_gemm_cut(int M, int N, int K) {
    double flops = 2.0 * M * N * K;
    if (flops < 4e6) return best_cut(M, N, 1); /* some 20 microseconds: waking the pool would cost as much as it saves */
    if (flops < 16e6) return best_cut(M, N, 2);
    int want = flops < 64 * 96e6 ? (int)(flops / 96e6) : 64;
    for (; want > 4; want /= 2) {
        ladd_cut cut = best_cut(M, N, (want + 1) & ~1);
        if (1.0 / cut.tm + 1.0 / cut.tn <= 0.008) return cut;
    }
    return best_cut(M, N, 4);
}

typedef struct gemm_job {
    int ta, tb, M, N, K;
    float alpha, beta;
    const float *A, *B;
    float *C;
    ptrdiff_t lda, ldb, ldc;
    ladd_cut cut;
} gemm_job;

static void gemm_task(void *argument, int64_t i) {
    const gemm_job *j = argument;
    int m, n, m0, n0;
    ladd_cut_tile(&j->cut, i, j->M, j->N, &m0, &n0, &m, &n);
    ladd_sgemm(j->ta, j->tb, m, n, j->K, j->alpha, j->A + (j->ta ? m0 : m0 * j->lda), j->lda, j->B + (j->tb ? n0 * j->ldb : n0), j->ldb, j->beta,
               j->C + m0 * j->ldc + n0, j->ldc);
}

void ladd_sgemm_parallel(int ta, int tb, int M, int N, int K, float alpha, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta,
                         float *C, ptrdiff_t ldc) {
    if (M <= 0 || N <= 0) return;
    gemm_job job = {ta, tb, M, N, K, alpha, beta, A, B, C, lda, ldb, ldc, ladd_gemm_cut(M, N, K)};
    ladd_parallel((int64_t)job.cut.n_m * job.cut.n_n, gemm_task, &job);
}
