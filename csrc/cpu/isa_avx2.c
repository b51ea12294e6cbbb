/* The kernels compiled for AVX2 and FMA. See cpu.h. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LADD_PLAIN_ONLY)
#pragma GCC target("arch=x86-64-v3")
#define LADD_ISA avx2
#define LADD_ISA_NAME "avx2"
#include "kernels.inc"
#else
typedef int ladd_isa_avx2_not_built; /* a translation unit may not be empty */
#endif
