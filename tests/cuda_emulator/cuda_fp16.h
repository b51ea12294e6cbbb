/* Half precision on the emulator: conversions round to nearest even, with subnormal numbers, as the device's do. */
#ifndef LADD_EMULATED_CUDA_FP16_H
#define LADD_EMULATED_CUDA_FP16_H
#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half half;
typedef __half2 half2;

static inline float __half2float(__half x) {
    const unsigned sign = (unsigned)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float small = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24 */
    return sign ? -small : small;
}
static inline __half __float2half_rn(float x) {
    const unsigned u = __float_as_uint(x), magnitude = u & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00)}; /* from 65520 on the nearest is infinity */
    if (magnitude < 0x38800000u) {                                    /* below 2^-14: a multiple of 2^-24; the sum rounds it to the last place */
        const float rounded = __uint_as_float(magnitude) + 0.5f;
        return {(uint16_t)(sign | (__float_as_uint(rounded) - 0x3f000000u))};
    }
    const unsigned even = (magnitude >> 13 & 1) + 0xfffu;
    return {(uint16_t)(sign | (magnitude + even - 0x38000000u) >> 13)};
}
static inline __half __float2half(float x) { return __float2half_rn(x); }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
static inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
static inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
static inline uint16_t __half_as_ushort(__half x) { return x.bits; }
static inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

#endif
