/* What the CPU kernels share: prototypes of the table's functions, the thread pool, single-threaded matrix products, run-time dispatch. */
#ifndef LADD_CPU_H
#define LADD_CPU_H
#include "../backend.h"

/* Every kernel file here is compiled once per instruction set: isa_plain.c, isa_avx2.c and isa_avx512.c each set the target and LADD_ISA, then
 * include all kernel files. So a kernel is plain C with loops that vectorise (or intrinsics beside their plain loop, under #if defined(__AVX512F__)
 * or __AVX2__), defines `ladd_status LADD_CPU(name)(...)` for each of its rows, and names its static helpers after its family, for the files share one
 * translation unit. dispatch.c picks the table at run time by CPUID, or by the environment variable LADD_CPU=avx512|avx2|plain. */
#define LADD_PASTE_(a, b, c) a##b##_##c
#define LADD_PASTE(a, b, c) LADD_PASTE_(a, b, c)
#ifdef LADD_ISA
#define LADD_CPU(name) LADD_PASTE(ladd_cpu_, LADD_ISA, name)
#define LADD_PROTOTYPE(name, arguments) ladd_status LADD_CPU(name) arguments;
LADD_KERNELS(LADD_PROTOTYPE)
#undef LADD_PROTOTYPE
#endif

/* dispatch.c: aligned blocks for the table's alloc and release. */
ladd_status ladd_cpu_alloc(void **block, size_t bytes);
void ladd_cpu_release(void *block);

/* Runs task(argument, i) for i in [0, n) on the pool and returns when all are done. How work is cut into tasks must depend on shapes only, never on
 * the number of threads, and no two tasks may write the same element: that is what makes results the same bits for any number of threads.
 * Tasks may not call ladd_parallel. */
void ladd_parallel(int64_t n, void (*task)(void *argument, int64_t i), void *argument);

/* Scratch of the calling thread, at least `bytes`, 64-byte aligned, kept until the thread ends and overwritten by the next call in the same
 * thread with the same slot (0..3). NULL when out of memory. Usable inside tasks. */
void *ladd_scratch(int slot, size_t bytes);

/* C[M,N] = alpha op(A) op(B) + beta C on the calling thread (OpenBLAS). ta/tb: 1 = transposed. Leading dimensions in elements, row-major. */
void ladd_sgemm(int ta, int tb, int M, int N, int K, float alpha, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta,
                float *C, ptrdiff_t ldc);
/* The same over the pool, cut by shape only. */
void ladd_sgemm_parallel(int ta, int tb, int M, int N, int K, float alpha, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta,
                         float *C, ptrdiff_t ldc);

/* exp for vector loops: within 2 ulp of expf on [-87, 88], clamped outside; plain arithmetic, so that it vectorises. */
static inline float ladd_expf(float x) {
    union { float f; int32_t i; } s;
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* round to nearest */
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666672f + r * (0.0416664146f + r * (0.00833337f + r * 0.00138965f)))));
    s.i = ((int32_t)n + 127) << 23;
    return p * s.f;
}

#endif
