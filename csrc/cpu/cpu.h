/* What the CPU kernels share: prototypes of the table's functions, the thread pool, single-threaded matrix products, run-time dispatch. */
#ifndef LADD_CPU_H
#define LADD_CPU_H
#include "../backend.h"

/* Every kernel file here is compiled once per instruction set: isa_plain.c, isa_avx2.c and isa_avx512.c each set the target and LADD_ISA, then
 * include all kernel files; isa_avx512bf16.c those that are made of products, for dtype="bfloat16". So a kernel is plain C with loops that vectorise
 * (or intrinsics beside their plain loop, under #if defined(__AVX512F__) or __AVX2__), defines `ladd_status LADD_CPU(name)(...)` for each of its
 * rows, and names its static helpers after its family, for the files share one translation unit. dispatch.c picks the table at run time by CPUID, or
 * by the environment variable LADD_CPU=avx512bf16|avx512|avx2|plain. */
#ifdef __clang__
#pragma clang diagnostic ignored "-Wunknown-pragmas" /* GCC ivdep: a hint, clang checks for overlap as the loop runs */
#endif
#define LADD_PASTE_(a, b, c) a##b##_##c
#define LADD_PASTE(a, b, c) LADD_PASTE_(a, b, c)
#ifdef LADD_ISA
#define LADD_CPU(name) LADD_PASTE(ladd_cpu_, LADD_ISA, name)
#define LADD_PROTOTYPE(name, arguments) ladd_status LADD_CPU(name) arguments;
LADD_KERNELS(LADD_PROTOTYPE)
#undef LADD_PROTOTYPE
#endif

/* dispatch.c: aligned blocks for the table's alloc and release; its upload, download, to_act and to_float, which are copies here. */
ladd_status ladd_cpu_alloc(LADD_CTX, void **block, size_t bytes);
void ladd_cpu_release(LADD_CTX, void *block);
ladd_status ladd_cpu_move(LADD_CTX, void *to, const void *from, size_t bytes);
ladd_status ladd_cpu_convert(LADD_CTX, float *y, const float *x, int64_t n);

/* Runs task(argument, i) for i in [0, n) on the pool and returns when all are done. How work is cut into tasks must depend on shapes only, never on
 * the number of threads, and no two tasks may write the same element: that is what makes results the same bits for any number of threads.
 * Tasks may not call ladd_parallel. */
void ladd_parallel(int64_t n, void (*task)(void *argument, int64_t i), void *argument);

/* Scratch of the calling thread, at least `bytes`, 64-byte aligned, kept until the thread ends and overwritten by the next call in the same
 * thread with the same slot (0..3). NULL when out of memory. Usable inside tasks; but the caller of ladd_parallel runs tasks too, so what it took
 * for all tasks must lie in another slot than what tasks take. Slots 0..2 are for tasks, 3 for what the caller shares with its tasks. */
void *ladd_scratch(int slot, size_t bytes);

/* C[M,N] = alpha op(A) op(B) + beta C on the calling thread (OpenBLAS). ta/tb: 1 = transposed. Leading dimensions in elements, row-major. */
void ladd_sgemm(int ta, int tb, int M, int N, int K, float alpha, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta, float *C,
                ptrdiff_t ldc);
/* ladd_parallel where the work (elements read and written) pays for waking the pool, else the same tasks on this thread. */
static inline void ladd_parallel_work(int64_t n, int64_t work, void (*task)(void *argument, int64_t i), void *argument) {
    if (work >= 32768)
        ladd_parallel(n, task, argument);
    else
        for (int64_t i = 0; i < n; i++) task(argument, i);
}

/* condition ? a : b by bits. With ?: and a constant arm the compiler computes what follows once for each arm, also for lanes that need none of it:
 * that costs divisions, denormal results, or the vectorisation of the loop. */
static inline float ladd_select(int condition, float a, float b) {
    union {
        float f;
        uint32_t u;
    } x = {a}, y = {b};
    uint32_t mask = -(uint32_t)(condition != 0);
    x.u = (x.u & mask) | (y.u & ~mask);
    return x.f;
}

/* exp for vector loops: within 1 ulp of the true value on [-87, 88], clamped outside, NaN stays NaN; plain arithmetic, so that it vectorises. */
static inline float ladd_expf(float x) {
    union {
        float f;
        uint32_t u;
    } t, s;
    x = ladd_select(x < -87.0f, -87.0f, x);
    x = ladd_select(x > 88.0f, 88.0f, x);
    t.f = x * 1.44269504f + 12582912.0f; /* rounds to the nearest integer, which then stands in the low bits */
    float n = t.f - 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float q = 0.49999994f + r * (0.1666652f + r * (0.0416684f + r * (0.008368848f + r * 0.0013814328f))); /* minimax for (exp(r) - 1 - r) / r^2 */
    float p = 1.0f + (r + r * r * q); /* the small terms first: their rounding then hardly counts */
    s.u = (t.u + 127u) << 23;         /* 2^n */
    return p * s.f;
}

/* gelu_tanh(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3). Below -10 it is 0 to the last bit, and there x / exp(-2u) could fail. */
static inline float ladd_gelu(float x) {
    float y = x / (1.0f + ladd_expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
    return ladd_select(x < -10.0f, 0.0f, y);
}

/* ---- sums in a fixed order ------------------------------------------------------------------------------------------- */

/* Sixteen lanes, whatever the registers' width: sums come out the same on one thread and many, and vectorise without reordering flags. */
typedef float ladd_v16 __attribute__((vector_size(64), aligned(4), may_alias));
#define LADD_V16(pointer) (*(const ladd_v16 *)(pointer))

/* The upper half is added to the lower one until one number is left: in registers, where the compiler has them. */
static inline float ladd_fold16(const ladd_v16 *v) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    union {
        ladd_v16 whole;
        v8 half[2];
    } a = {*v};
    union {
        v8 whole;
        v4 half[2];
    } b = {a.half[0] + a.half[1]};
    v4 c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline float ladd_sum(const float *x, int64_t n) {
    ladd_v16 a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        a += LADD_V16(x + i);
        b += LADD_V16(x + i + 16);
    }
    if (i + 16 <= n) {
        a += LADD_V16(x + i);
        i += 16;
    }
    a += b;
    float sum = ladd_fold16(&a);
    for (; i < n; i++) sum += x[i];
    return sum;
}

static inline float ladd_dot(const float *x, const float *y, int64_t n) {
    ladd_v16 a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        a += LADD_V16(x + i) * LADD_V16(y + i);
        b += LADD_V16(x + i + 16) * LADD_V16(y + i + 16);
    }
    if (i + 16 <= n) {
        a += LADD_V16(x + i) * LADD_V16(y + i);
        i += 16;
    }
    a += b;
    float sum = ladd_fold16(&a);
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
}

#endif
