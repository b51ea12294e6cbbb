/* CHECK(condition): on failure says where and what the core's last sentence was, and ends the program with status 1. */
#ifndef LADD_TEST_CHECK_H
#define LADD_TEST_CHECK_H
#include <stdio.h>
#include <stdlib.h>

#include "../../csrc/backend.h"

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, ladd_last_error()); \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)
#define CHECK_OK(call) CHECK((call) == LADD_OK)

/* Arrays of exactly the asked size, so that the sanitizer sees the first element read or written outside. Filled with numbers in [-1, 1). */
static inline float *test_array(int64_t count, uint32_t seed) {
    float *x = malloc((size_t)(count ? count : 1) * sizeof *x);
    CHECK(x != NULL);
    for (int64_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(int32_t)seed / 2147483648.0f;
    }
    return x;
}

/* Whether all are numbers: poison that stayed, or garbage, shows as NaN or as something huge. */
static inline int test_finite(const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!(x[i] > -1e6f && x[i] < 1e6f)) return 0;
    return 1;
}

static inline float *test_poison(int64_t count) {
    float *x = malloc((size_t)(count ? count : 1) * sizeof *x);
    CHECK(x != NULL);
    for (int64_t i = 0; i < count; i++) x[i] = 1e30f;
    return x;
}

void test_core(void);
void test_kernels(void);
void test_mmdit(void);
void test_autoencoder(void);
void test_discriminator(void);
#endif
