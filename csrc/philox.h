/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and how a ladd_rng_key becomes its key.
 *
 * Word j of block i of sample s is a pure function of (seed, purpose, step, s, i, j): no state, so numbers depend neither on threads nor on how a
 * batch is split, and any device computes the same ones. Seed, step, sample and block are 64 bits each, more than the 192 bits that key and counter
 * hold; so (purpose, step) go through one Philox of their own under the seed, and its first two words are the key of the numbers:
 *     key = Philox(counter = {purpose, step low, step high, 0}, key = seed)[0..1],  numbers = Philox(counter = {i low, i high, s low, s high}, key)
 */
#ifndef LADD_PHILOX_H
#define LADD_PHILOX_H
#include <string.h>

#include "ladd.h"

#ifdef __CUDACC__
#define LADD_PHILOX_FUNCTION static inline __host__ __device__
#else
#define LADD_PHILOX_FUNCTION static inline
#endif

typedef struct ladd_philox_words {
    uint32_t x[4];
} ladd_philox_words;

LADD_PHILOX_FUNCTION ladd_philox_words ladd_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    ladd_philox_words words = {{c0, c1, c2, c3}};
    return words;
}

/* The key of all numbers for this seed, purpose and step: two words. */
LADD_PHILOX_FUNCTION void ladd_philox_key(uint32_t key[2], ladd_rng_key rng) {
    uint64_t step = rng.step_at ? *rng.step_at : rng.step;
    ladd_philox_words w = ladd_philox(rng.purpose, (uint32_t)step, (uint32_t)(step >> 32), 0, (uint32_t)rng.seed, (uint32_t)(rng.seed >> 32));
    key[0] = w.x[0];
    key[1] = w.x[1];
}

/* x rounded to bfloat16, away from zero with the probability of its distance from the neighbour below, so that the mean is x: 16 random bits are
 * added under the kept ones. What is not finite stays as it is. */
LADD_PHILOX_FUNCTION float ladd_round_bfloat16(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7F800000u) == 0x7F800000u) return x;
    bits = (bits + (random & 0xFFFFu)) & 0xFFFF0000u;
    memcpy(&x, &bits, 4);
    return x;
}

#endif
