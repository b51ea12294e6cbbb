/* The kernels compiled for any processor. See cpu.h. */
#define LADD_ISA plain
#define LADD_ISA_NAME "plain"
#include "kernels.inc"
