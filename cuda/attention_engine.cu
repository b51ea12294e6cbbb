/* cuDNN's attention as the second engine, and which of the two serves a call: LADD_CUDA_ATTENTION=cudnn or ladd in the environment, else ours, until
 * both have been timed on a device.
 *
 * cuDNN takes one stream of tokens, so two are brought into one buffer first and their results back: the copy is small beside S^2 dh operations where
 * images are large.
 */
#include <cstdlib>

#include "attention.cuh"
#include "attention_cudnn.h"

namespace {

/* Rows of `width` elements between two streams and one buffer [B,S,..]; 16 bytes a thread. */
template <typename T>
struct attention_move {
    T *part[2];
    ptrdiff_t row[2], batch[2];
    T *joint;
    ptrdiff_t joint_row, joint_batch;
    int first, S, width;
};

template <typename T, bool GATHER>
__global__ void __launch_bounds__(LADD_BLOCK) attention_move_kernel(const attention_move<T> m, int64_t chunks) {
    const int64_t i = (int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x;
    if (i >= chunks) return;
    const int per_row = m.width / LADD_VEC<T>, chunk = (int)(i % per_row), token = (int)(i / per_row % m.S), b = (int)(i / per_row / m.S);
    const bool second = token >= m.first; /* selected, not indexed: an index known at run time only would put the arguments into local memory */
    T *part =
        (second ? m.part[1] + b * m.batch[1] + (token - m.first) * m.row[1] : m.part[0] + b * m.batch[0] + token * m.row[0]) + chunk * LADD_VEC<T>;
    T *joint = m.joint + b * m.joint_batch + token * m.joint_row + chunk * LADD_VEC<T>;
    if (GATHER)
        *reinterpret_cast<uint4 *>(joint) = *reinterpret_cast<const uint4 *>(part);
    else
        *reinterpret_cast<uint4 *>(part) = *reinterpret_cast<const uint4 *>(joint);
}

/* One buffer for all tokens: [B,S,3,heads,dh] of q, k, v, [B,S,heads,dh] of o, and in backward the same again for the gradients. */
template <typename T>
struct attention_joint {
    const attention_args<T> &a;
    T *qkv, *o, *dqkv, *d_o;
    int width;

    static size_t elements(const attention_args<T> &a, bool backward) { return (size_t)a.B * a.S * a.heads * a.dh * (backward ? 8 : 4); }

    attention_joint(const attention_args<T> &args, void *block, bool backward) : a(args), width(args.heads * args.dh) {
        const size_t one = (size_t)a.B * a.S * width;
        qkv = (T *)block;
        o = qkv + 3 * one;
        dqkv = backward ? o + one : nullptr;
        d_o = backward ? dqkv + 3 * one : nullptr;
    }

    template <bool GATHER, typename P>
    ladd_status move(const ladd_context *ctx, P *attention_part<T>::*field, T *joint, bool is_o) const {
        const attention_part<T> &x = a.part[0], &y = a.part[1];
        const ptrdiff_t row = (is_o ? 1 : 3) * (ptrdiff_t)width;
        const attention_move<T> m = {{const_cast<T *>(x.*field), const_cast<T *>(y.*field)},
                                     {is_o ? x.o_row : x.row, is_o ? y.o_row : y.row},
                                     {is_o ? x.o_batch : x.batch, is_o ? y.o_batch : y.batch},
                                     joint,
                                     row,
                                     row * a.S,
                                     a.first,
                                     a.S,
                                     width};
        const int64_t chunks = (int64_t)a.B * a.S * width / LADD_VEC<T>;
        return LADD_LAUNCH(ctx, (attention_move_kernel<T, GATHER>), (unsigned)ladd_ceil_div(chunks, LADD_BLOCK), LADD_BLOCK, 0, m, chunks);
    }
};

template <typename T>
ladd_status attention_cudnn(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    ladd_cudnn_attention call = {};
    call.B = a.B;
    call.heads = a.heads;
    call.S = a.S;
    call.dh = a.dh;
    call.scale = a.scale;
    call.lse = a.lse;
    if (a.first == 0 || a.first == a.S) {
        const attention_part<T> &p = a.part[a.first == 0];
        call.q = p.q;
        call.k = p.k;
        call.v = p.v;
        call.o = p.o;
        call.d_o = p.d_o;
        call.dq = p.dq;
        call.dk = p.dk;
        call.dv = p.dv;
        call.row = p.row;
        call.batch = p.batch;
        call.o_row = p.o_row;
        call.o_batch = p.o_batch;
        return ladd_cudnn_attention_run(ctx, &call);
    }
    typedef attention_part<T> part;
    void *block;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, 2, attention_joint<T>::elements(a, backward) * sizeof(T)));
    const attention_joint<T> joint(a, block, backward);
    const int width = joint.width;
    call.q = joint.qkv;
    call.k = joint.qkv + width;
    call.v = joint.qkv + 2 * width;
    call.o = joint.o;
    call.row = 3 * width;
    call.batch = call.row * a.S;
    call.o_row = width;
    call.o_batch = call.o_row * a.S;
    LADD_TRY(joint.template move<true>(ctx, &part::q, joint.qkv, false));
    LADD_TRY(joint.template move<true>(ctx, &part::k, joint.qkv + width, false));
    LADD_TRY(joint.template move<true>(ctx, &part::v, joint.qkv + 2 * width, false));
    if (!backward) {
        LADD_TRY(ladd_cudnn_attention_run(ctx, &call));
        return joint.template move<false>(ctx, &part::o, joint.o, true);
    }
    call.d_o = joint.d_o;
    call.dq = joint.dqkv;
    call.dk = joint.dqkv + width;
    call.dv = joint.dqkv + 2 * width;
    LADD_TRY(joint.template move<true>(ctx, &part::o, joint.o, true));
    LADD_TRY(joint.template move<true>(ctx, &part::d_o, joint.d_o, true));
    LADD_TRY(ladd_cudnn_attention_run(ctx, &call));
    LADD_TRY(joint.template move<false>(ctx, &part::dq, joint.dqkv, false));
    LADD_TRY(joint.template move<false>(ctx, &part::dk, joint.dqkv + width, false));
    return joint.template move<false>(ctx, &part::dv, joint.dqkv + 2 * width, false);
}

}  // namespace

/* cuDNN's backward refuses a single token, and some versions fail at such sizes: there is nothing to win with few tokens anyway. */
template <typename T>
ladd_status attention_by_cudnn(const ladd_context *ctx, const attention_args<T> &a, bool backward, bool *done) {
    *done = false;
    const char *wanted = getenv("LADD_CUDA_ATTENTION");
    if (!wanted || strcmp(wanted, "ladd") == 0) return LADD_OK;
    if (strcmp(wanted, "cudnn") != 0) return ladd_fail(LADD_ERR_VALUE, "LADD_CUDA_ATTENTION: cudnn or ladd expected, got %.100s", wanted);
    if (a.S < 16 || a.dh > 128) return LADD_OK;
    *done = true;
    return attention_cudnn(ctx, a, backward);
}
template ladd_status attention_by_cudnn(const ladd_context *, const attention_args<__nv_bfloat16> &, bool, bool *);
template ladd_status attention_by_cudnn(const ladd_context *, const attention_args<__half> &, bool, bool *);
