/* Normal numbers and renoising. Element e of a sample takes word e%4 of Philox block e/4 (philox.h): words 0 and 1 make elements 0 and 1 by
 * Box-Muller, words 2 and 3 make elements 2 and 3. */
#include <math.h>

#include "../philox.h"
#include "cpu.h"

/* Contracting a*b + c to one rounding would make the numbers depend on the instruction set; without it all three builds give the same bits (division
 * and square root are correctly rounded everywhere). */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

enum {
    RANDOM_LANES = 64,    /* Philox blocks computed side by side */
    RANDOM_CHUNK = 16384, /* elements of a sample in one task, a multiple of 4*RANDOM_LANES */
};

/* (x + 1/2) / 2^32, in (0, 1]. From two halves, for vector units convert signed integers only; the product is exact, so the sum rounds x once. */
static inline float random_uniform(uint32_t x) { return ((float)(int32_t)(x >> 16) * 65536.0f + (float)(int32_t)(x & 0xFFFFu) + 0.5f) * 0x1p-32f; }

/* sqrt(-2 ln u), u = random_uniform(x): the largest is 6.76. */
static inline float random_radius(uint32_t x) {
    union {
        float f;
        int32_t i;
    } m;
    m.f = random_uniform(x);
    float rest = random_uniform(~x);      /* 1 - u, exact where u is close to 1 and its own float is not */
    int32_t e = (m.i - 0x3F3504F3) >> 23; /* u = m 2^e with m in [sqrt(1/2), sqrt(2)) */
    m.i -= e * (1 << 23);
    float top = e ? m.f - 1.0f : -rest, bottom = e ? m.f + 1.0f : 2.0f - rest;
    float s = top / bottom, z = s * s; /* ln m = 2 artanh s = 2 s (1 + s^2/3 + s^4/5 ...), s = (m - 1)/(m + 1), |s| < 0.172 */
    float p = 2.0f + z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
    float n = (float)e;
    float ln = n * 0.693145752f + (n * 1.42860677e-6f + s * p);
    return sqrtf(-2.0f * ln);
}

/* cos and sin of the angle 2 pi x / 2^32, reduced to a quarter turn in integers, which is exact. */
static inline void random_turn(float *cosine, float *sine, uint32_t x) {
    uint32_t quadrant = (x + 0x20000000u) >> 30;                                /* nearest, 4 = 0 again by overflow */
    float a = (float)(int32_t)(x - (quadrant << 30)) * 1.46291807926715968e-9f; /* 2 pi / 2^32; |a| <= pi/4 */
    float z = a * a;
    float s = a + a * z * (-1.66666667e-1f + z * (8.33333333e-3f + z * (-1.98412698e-4f + z * 2.75573192e-6f)));
    float c = 1.0f + z * (-0.5f + z * (4.16666667e-2f + z * (-1.38888889e-3f + z * (2.48015873e-5f - z * 2.75573192e-7f))));
    float swap_c = quadrant & 1 ? s : c, swap_s = quadrant & 1 ? c : s;
    *cosine = (quadrant + 1) & 2 ? -swap_c : swap_c;
    *sine = quadrant & 2 ? -swap_s : swap_s;
}

/* z[4*RANDOM_LANES]: the elements of blocks first, first+1, ... of one sample. */
static void random_normals(float *restrict z, uint64_t first, uint64_t sample, uint32_t k0, uint32_t k1) {
    uint32_t x0[RANDOM_LANES], x1[RANDOM_LANES], x2[RANDOM_LANES], x3[RANDOM_LANES];
    uint32_t low = (uint32_t)first, high = (uint32_t)(first >> 32); /* first is a multiple of RANDOM_LANES: low + l never carries */
    uint32_t s_low = (uint32_t)sample, s_high = (uint32_t)(sample >> 32);
    for (int l = 0; l < RANDOM_LANES; l++) {
        ladd_philox_words w = ladd_philox(low + (uint32_t)l, high, s_low, s_high, k0, k1);
        x0[l] = w.x[0];
        x1[l] = w.x[1];
        x2[l] = w.x[2];
        x3[l] = w.x[3];
    }
    for (int l = 0; l < RANDOM_LANES; l++) {
        float r0 = random_radius(x0[l]), r1 = random_radius(x2[l]), c0, s0, c1, s1;
        random_turn(&c0, &s0, x1[l]);
        random_turn(&c1, &s1, x3[l]);
        z[4 * l] = r0 * c0;
        z[4 * l + 1] = r0 * s0;
        z[4 * l + 2] = r1 * c1;
        z[4 * l + 3] = r1 * s1;
    }
}

typedef struct random_job {
    float *out, *noise;
    const float *x0, *t; /* NULL for plain normal numbers */
    const int64_t *samples;
    int64_t n, chunks;
    uint32_t key[2];
} random_job;

static void random_task(void *argument, int64_t i) {
    const random_job *job = argument;
    int64_t b = i / job->chunks, start = i % job->chunks * RANDOM_CHUNK;
    int64_t end = start + RANDOM_CHUNK < job->n ? start + RANDOM_CHUNK : job->n;
    float z[4 * RANDOM_LANES];
    for (int64_t e = start; e < end; e += 4 * RANDOM_LANES) {
        random_normals(z, (uint64_t)e / 4, (uint64_t)job->samples[b], job->key[0], job->key[1]);
        int count = end - e < 4 * RANDOM_LANES ? (int)(end - e) : 4 * RANDOM_LANES;
        float *out = job->out + b * job->n + e;
        if (job->x0) { /* out may be x0 */
            const float *x0 = job->x0 + b * job->n + e;
            float t = job->t[b], rest = 1.0f - t;
            for (int j = 0; j < count; j++) out[j] = rest * x0[j] + t * z[j];
        } else {
            for (int j = 0; j < count; j++) out[j] = z[j];
        }
        if (job->noise) {
            float *noise = job->noise + b * job->n + e;
            for (int j = 0; j < count; j++) noise[j] = z[j];
        }
    }
}

static ladd_status random_run(random_job job, ladd_rng_key key, int B) {
    if (B < 0 || job.n < 0)
        return ladd_fail(LADD_ERR_VALUE, "random numbers: sizes of at least 0 expected, got B = %d, n = %lld", B, (long long)job.n);
    ladd_philox_key(job.key, key);
    job.chunks = (job.n + RANDOM_CHUNK - 1) / RANDOM_CHUNK;
    ladd_parallel_work(B * job.chunks, B * job.n * 4, random_task, &job);
    return LADD_OK;
}

ladd_status LADD_CPU(normal)(LADD_CTX, ladd_act *out, ladd_rng_key key, const int64_t *samples, int B, int64_t n) {
    (void)ctx;
    return random_run((random_job){.out = out, .samples = samples, .n = n}, key, B);
}

ladd_status LADD_CPU(renoise)(LADD_CTX, ladd_act *out, ladd_act *noise, const ladd_act *x0, const float *t, ladd_rng_key key, const int64_t *samples,
                              int B, int64_t n) {
    (void)ctx;
    return random_run((random_job){.out = out, .noise = noise, .x0 = x0, .t = t, .samples = samples, .n = n}, key, B);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
