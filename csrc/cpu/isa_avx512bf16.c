/* The kernels that are made of matrix products, compiled for AVX-512 with AVX512_BF16: factors are rounded to bf16 while they are packed, sums are
 * f32. All else of this table is the AVX-512 table's. See cpu.h and gemm.h. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(LADD_PLAIN_ONLY)
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#define LADD_ISA avx512bf16
#define LADD_BF16_PRODUCTS
#include "attention.c"
#include "conv2d.c"
#include "linear.c"

#define LADD_ELSEWHERE(name, arguments) ladd_status LADD_PASTE(ladd_cpu_, avx512, name) arguments;
LADD_KERNELS(LADD_ELSEWHERE)
#undef LADD_ELSEWHERE
#define LADD_ROW(name, arguments) .name = LADD_PASTE(ladd_cpu_, avx512, name),
#pragma GCC diagnostic ignored "-Woverride-init"
const ladd_backend ladd_cpu_avx512bf16_backend = {
    LADD_KERNELS(LADD_ROW) /* each of these is written over below where there is one here */
        .name = "avx512bf16",
    .attention_forward = LADD_CPU(attention_forward),
    .attention_backward = LADD_CPU(attention_backward),
    .conv2d_forward = LADD_CPU(conv2d_forward),
    .conv2d_backward = LADD_CPU(conv2d_backward),
    .linear_forward = LADD_CPU(linear_forward),
    .linear_gelu_forward = LADD_CPU(linear_gelu_forward),
    .linear_backward = LADD_CPU(linear_backward),
    .alloc = ladd_cpu_alloc,
    .release = ladd_cpu_release,
    .upload = ladd_cpu_move,
    .download = ladd_cpu_move,
    .to_act = ladd_cpu_convert,
    .to_float = ladd_cpu_convert,
};
#else
typedef int ladd_isa_avx512bf16_not_built; /* a translation unit may not be empty */
#endif
