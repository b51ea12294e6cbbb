/* Which instruction set's table serves this process, and the CPU's memory. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

extern const ladd_backend ladd_cpu_plain_backend;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LADD_PLAIN_ONLY)
extern const ladd_backend ladd_cpu_avx2_backend, ladd_cpu_avx512_backend, ladd_cpu_avx512bf16_backend;

/* wanted: by LADD_CPU; NULL: the best for `products`. */
static const ladd_backend *supported(const char *wanted, ladd_dtype products) {
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (wanted) {
        if (strcmp(wanted, "avx512bf16") == 0) return bf16 ? &ladd_cpu_avx512bf16_backend : NULL;
        if (products == LADD_BF16) return NULL;
        if (strcmp(wanted, "avx512") == 0) return avx512 ? &ladd_cpu_avx512_backend : NULL;
        if (strcmp(wanted, "avx2") == 0) return avx2 ? &ladd_cpu_avx2_backend : NULL;
        return strcmp(wanted, "plain") == 0 ? &ladd_cpu_plain_backend : NULL;
    }
    if (products == LADD_BF16) return bf16 ? &ladd_cpu_avx512bf16_backend : NULL;
    return avx512 ? &ladd_cpu_avx512_backend : (avx2 ? &ladd_cpu_avx2_backend : &ladd_cpu_plain_backend);
}
#else
static const ladd_backend *supported(const char *wanted, ladd_dtype products) {
    return products == LADD_F32 && (!wanted || strcmp(wanted, "plain") == 0) ? &ladd_cpu_plain_backend : NULL;
}
#endif

const ladd_backend *ladd_cpu_backend(ladd_dtype products) {
    static const ladd_backend *chosen[2]; /* every thread would compute the same pointers */
    if (products != LADD_F32 && products != LADD_BF16) {
        ladd_fail(LADD_ERR_VALUE, "the CPU computes in float32, or with products in bfloat16; got another dtype");
        return NULL;
    }
    const ladd_backend **place = &chosen[products == LADD_BF16];
    if (!*place) {
        const char *wanted = getenv("LADD_CPU");
        if (wanted && !*wanted) wanted = NULL;
        *place = supported(wanted, products);
        if (!*place && products == LADD_BF16)
            ladd_fail(LADD_ERR_VALUE,
                      "dtype bfloat16 on the CPU: expected a processor with AVX512_BF16 and LADD_CPU unset or avx512bf16, got %s; use float32",
                      wanted ? wanted : "one without");
        else if (!*place)
            ladd_fail(LADD_ERR_VALUE, "LADD_CPU is %s; expected avx512bf16, avx512, avx2 or plain, supported by this processor", wanted);
    }
    return *place;
}

ladd_status ladd_cpu_alloc(LADD_CTX, void **block, size_t bytes) {
    (void)ctx;
    size_t rounded = (bytes + 63) & ~(size_t)63;
    *block = rounded < bytes ? NULL : aligned_alloc(64, rounded ? rounded : 64);
    return *block ? LADD_OK : ladd_fail(LADD_ERR_MEMORY, "out of memory: expected %zu bytes, the system has none left", bytes);
}

void ladd_cpu_release(LADD_CTX, void *block) {
    (void)ctx;
    free(block);
}

ladd_status ladd_cpu_move(LADD_CTX, void *to, const void *from, size_t bytes) {
    (void)ctx;
    memcpy(to, from, bytes);
    return LADD_OK;
}

ladd_status ladd_cpu_convert(LADD_CTX, float *y, const float *x, int64_t n) { return ladd_cpu_move(ctx, y, x, (size_t)n * sizeof *y); }
