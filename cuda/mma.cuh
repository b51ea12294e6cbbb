/* Tensor-core building blocks of the hand-written products: matrix fragments from shared memory, m16n8k16 products, asynchronous copies. PTX under
 * nvcc; the tests' emulator has the same functions, with the same layout of fragments over the lanes of a warp.
 *
 * m16n8k16, lane = 4 g + t (g 0..7, t 0..3), two elements a register, the lower column in the lower half:
 *   a[0] A[g][2t, 2t+1]   a[1] A[g+8][2t, 2t+1]   a[2] A[g][2t+8, 2t+9]   a[3] A[g+8][2t+8, 2t+9]     A[16][16], row by row
 *   b[0] B[2t, 2t+1][g]   b[1] B[2t+8, 2t+9][g]                                                       B[16][8], two rows a register
 *   d[0] D[g][2t]   d[1] D[g][2t+1]   d[2] D[g+8][2t]   d[3] D[g+8][2t+1]                             D[16][8], float
 * ldmatrix: matrices of 8x8 elements; lane 8 i + r gives the address of row r of matrix i (16 bytes, 16-byte aligned, in shared memory), and register
 * i of lane 4 g + t receives row g, elements 2t and 2t+1; with _trans elements (2t, g) and (2t+1, g).
 */
#ifndef LADD_MMA_CUH
#define LADD_MMA_CUH
#include "common.cuh"

#ifdef __CUDACC__

/* d += a b */
template <typename T>
__device__ __forceinline__ void ladd_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void ladd_mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void ladd_mma<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t ladd_shared_address(const void *pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void ladd_ldmatrix(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(ladd_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ladd_ldmatrix(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(ladd_shared_address(row)) : "memory");
}
__device__ __forceinline__ void ladd_ldmatrix_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(ladd_shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ladd_ldmatrix_trans(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(ladd_shared_address(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, or 16 zero bytes where `valid` is false (then `global` is not read but must be an address). They may be read
 * after ladd_cp_async_wait and a barrier. */
__device__ __forceinline__ void ladd_cp_async(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ladd_shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
/* Closes the group of this thread's copies since the last commit. */
__device__ __forceinline__ void ladd_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most the N newest groups of this thread are under way. */
template <int N>
__device__ __forceinline__ void ladd_cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "cuda_emulator_mma.h"
#endif

#endif
