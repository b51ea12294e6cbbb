/* The kernels compiled for AVX-512 (F, BW, CD, DQ, VL). See cpu.h. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LADD_PLAIN_ONLY)
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define LADD_ISA avx512
#define LADD_ISA_NAME "avx512"
#include "kernels.inc"
#else
typedef int ladd_isa_avx512_not_built; /* a translation unit may not be empty */
#endif
