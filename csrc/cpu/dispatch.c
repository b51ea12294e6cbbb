/* Which instruction set's table serves this process, and the CPU's memory. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

extern const ladd_backend ladd_cpu_plain_backend;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LADD_PLAIN_ONLY)
extern const ladd_backend ladd_cpu_avx2_backend, ladd_cpu_avx512_backend;

static const ladd_backend *best_supported(const char *wanted) {
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wanted) {
        if (strcmp(wanted, "avx512") == 0) return avx512 ? &ladd_cpu_avx512_backend : NULL;
        if (strcmp(wanted, "avx2") == 0) return avx2 ? &ladd_cpu_avx2_backend : NULL;
        return strcmp(wanted, "plain") == 0 ? &ladd_cpu_plain_backend : NULL;
    }
    return avx512 ? &ladd_cpu_avx512_backend : (avx2 ? &ladd_cpu_avx2_backend : &ladd_cpu_plain_backend);
}
#else
static const ladd_backend *best_supported(const char *wanted) { return !wanted || strcmp(wanted, "plain") == 0 ? &ladd_cpu_plain_backend : NULL; }
#endif

const ladd_backend *ladd_cpu_backend(void) {
    static const ladd_backend *chosen; /* every thread would compute the same pointer */
    if (!chosen) {
        const char *wanted = getenv("LADD_CPU");
        chosen = best_supported(wanted && *wanted ? wanted : NULL);
        if (!chosen) ladd_fail(LADD_ERR_VALUE, "LADD_CPU is %s; expected avx512, avx2 or plain, supported by this processor", wanted);
    }
    return chosen;
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
