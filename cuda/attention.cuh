/* Joint attention on the device: what its kernels share.
 *
 * Two token streams stay in their own buffers. A kernel counts tokens in the joint order (streams[0], then streams[1]) and joint_rows turns such a
 * number into an address, so tiles may straddle the seam and only the last tile has a ragged end.
 *
 * Two families of kernels: attention_*_mma work on 16-bit types on the tensor cores, for heads of up to 128 elements (forward: 512) that are a
 * multiple of 8; attention_*_plain take everything else (f32, any head size, any alignment) with plain multiply-adds. attention.cu chooses.
 */
#ifndef LADD_ATTENTION_CUH
#define LADD_ATTENTION_CUH
#include "common.cuh"

template <typename T>
struct attention_part {
    const T *q, *k, *v;
    T *o;
    const T *d_o;
    T *dq, *dk, *dv;
    int row, o_row;
    ptrdiff_t batch, o_batch;
};

template <typename T>
struct attention_args {
    attention_part<T> part[2];
    int first, S; /* tokens of part[0]; tokens of both */
    int B, heads, dh;
    int tiles; /* of the side whose rows the blocks own */
    float scale;
    float *lse, *delta; /* [B,heads,S]; delta: sum over dh of d_o o, backward's */
};

/* The rows of one head of one sample, numbered in the joint order. */
template <typename T>
struct joint_rows {
    T *base[2];
    int row[2]; /* strides; 32 bits spare registers, the product has 64 */
    int first, S;
    __device__ __forceinline__ T *operator()(int i) const { /* by selection: a branch a row would cost more than the address */
        const bool second = i >= first;
        return (second ? base[1] : base[0]) + (int64_t)(i - (second ? first : 0)) * (second ? row[1] : row[0]);
    }
    __device__ __forceinline__ joint_rows from_column(int column) const { return {{base[0] + column, base[1] + column}, {row[0], row[1]}, first, S}; }
};

/* field: q, k, v, dq, dk or dv. P is T or const T. */
template <typename T, typename P>
__device__ __forceinline__ joint_rows<P> rows_of(const attention_args<T> &a, P *attention_part<T>::*field, int b, int head) {
    const attention_part<T> &x = a.part[0], &y = a.part[1];
    return {{x.*field + b * x.batch + head * a.dh, y.*field + b * y.batch + head * a.dh}, {x.row, y.row}, a.first, a.S};
}
/* field: o or d_o, which have strides of their own. */
template <typename T, typename P>
__device__ __forceinline__ joint_rows<P> o_rows_of(const attention_args<T> &a, P *attention_part<T>::*field, int b, int head) {
    const attention_part<T> &x = a.part[0], &y = a.part[1];
    return {{x.*field + b * x.o_batch + head * a.dh, y.*field + b * y.o_batch + head * a.dh}, {x.o_row, y.o_row}, a.first, a.S};
}

/* Which sample and head a block works for, and which tile of its rows; grid x: B heads tiles, a head's tiles next to each other. */
struct attention_place {
    int tile, head, b;
    int64_t statistics; /* where the head's rows of lse and delta begin */
    template <typename T>
    __device__ __forceinline__ explicit attention_place(const attention_args<T> &a)
        : tile(blockIdx.x % a.tiles),
          head(blockIdx.x / a.tiles % a.heads),
          b(blockIdx.x / a.tiles / a.heads),
          statistics((int64_t)(b * a.heads + head) * a.S) {}
};

constexpr float LOG2_E = 1.4426950408889634f;

/* attention_engine.cu: *done says whether cuDNN was chosen and has done it. */
template <typename T>
ladd_status attention_by_cudnn(const ladd_context *ctx, const attention_args<T> &a, bool backward, bool *done);
/* attention_cudnn.cu, for one stream of tokens, which is part[0]; gradients have the strides of what they are gradients of. Whether the library can
 * be opened (a sentence says why not); the plan of a call, made once a shape; the call, after its plan. */
bool attention_cudnn_there();
template <typename T>
ladd_status attention_cudnn_plan(const ladd_context *ctx, const attention_args<T> &a, bool backward);
template <typename T>
ladd_status attention_cudnn_run(const ladd_context *ctx, const attention_args<T> &a, bool backward);
template <typename T>
ladd_status attention_forward_mma(const ladd_context *ctx, attention_args<T> a);
template <typename T>
ladd_status attention_backward_mma(const ladd_context *ctx, attention_args<T> a);
template <typename T>
ladd_status attention_forward_plain(const ladd_context *ctx, attention_args<T> a);
template <typename T>
ladd_status attention_backward_plain(const ladd_context *ctx, attention_args<T> a);

#endif
