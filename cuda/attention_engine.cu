/* cuDNN's attention as the second engine, and which of the two serves a call: LADD_CUDA_ATTENTION=cudnn or ladd in the environment, else the rules
 * that ladd.attention took from the measured table, else ours, which needs no second library and joins no streams.
 *
 * cuDNN takes one stream of tokens, so two are brought into one buffer first and their results back: the copy is small beside S^2 dh operations where
 * images are large.
 */
#include <cstdlib>
#include <cstring>

#include "attention.cuh"

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
ladd_status joint_part(const ladd_context *ctx, attention_part<T> *joint, const attention_args<T> &a, bool backward) {
    const int width = a.heads * a.dh;
    const size_t one = (size_t)a.B * a.S * width;
    void *block;
    LADD_TRY(ladd_cuda_scratch(ctx, &block, 2, one * (backward ? 8 : 4) * sizeof(T)));
    T *q = (T *)block, *o = q + 3 * one, *dq = o + one, *d_o = dq + 3 * one;
    const ptrdiff_t batch = 3 * (ptrdiff_t)width * a.S, o_batch = (ptrdiff_t)width * a.S;
    *joint = {q, q + width, q + 2 * width, o, nullptr, nullptr, nullptr, nullptr, 3 * width, width, batch, o_batch};
    if (!backward) return LADD_OK;
    joint->d_o = d_o;
    joint->dq = dq;
    joint->dk = dq + width;
    joint->dv = dq + 2 * width;
    return LADD_OK;
}

/* One field of both streams to (GATHER) or from one buffer. */
template <bool GATHER, typename T, typename P>
ladd_status move(const ladd_context *ctx, const attention_args<T> &a, const attention_part<T> &joint, P *attention_part<T>::*field, bool is_o) {
    const attention_part<T> &x = a.part[0], &y = a.part[1];
    const attention_move<T> m = {{const_cast<T *>(x.*field), const_cast<T *>(y.*field)},
                                 {is_o ? x.o_row : x.row, is_o ? y.o_row : y.row},
                                 {is_o ? x.o_batch : x.batch, is_o ? y.o_batch : y.batch},
                                 const_cast<T *>(joint.*field),
                                 is_o ? joint.o_row : joint.row,
                                 is_o ? joint.o_batch : joint.batch,
                                 a.first,
                                 a.S,
                                 a.heads * a.dh};
    const int64_t chunks = (int64_t)a.B * a.S * m.width / LADD_VEC<T>;
    return LADD_LAUNCH(ctx, (attention_move_kernel<T, GATHER>), (unsigned)ladd_ceil_div(chunks, LADD_BLOCK), LADD_BLOCK, 0, m, chunks);
}

/* The call as cuDNN takes it: one stream. */
template <typename T>
ladd_status attention_cudnn(const ladd_context *ctx, const attention_args<T> &a, bool backward, bool *planned) {
    typedef attention_part<T> part;
    const bool joined = a.first > 0 && a.first < a.S;
    attention_args<T> one = a;
    one.first = a.S;
    one.part[0] = a.part[a.first == 0];
    one.part[1] = {};
    if (joined) LADD_TRY(joint_part(ctx, &one.part[0], a, backward));
    LADD_TRY(attention_cudnn_plan(ctx, one, backward));
    *planned = true;
    const part &p = one.part[0];
    if (joined) {
        LADD_TRY(move<true>(ctx, a, p, &part::q, false));
        LADD_TRY(move<true>(ctx, a, p, &part::k, false));
        LADD_TRY(move<true>(ctx, a, p, &part::v, false));
        if (backward) LADD_TRY(move<true>(ctx, a, p, &part::o, true));
        if (backward) LADD_TRY(move<true>(ctx, a, p, &part::d_o, true));
    }
    LADD_TRY(attention_cudnn_run(ctx, one, backward));
    if (!joined) return LADD_OK;
    if (!backward) return move<false>(ctx, a, p, &part::o, true);
    LADD_TRY(move<false>(ctx, a, p, &part::dq, false));
    LADD_TRY(move<false>(ctx, a, p, &part::dk, false));
    return move<false>(ctx, a, p, &part::dv, false);
}

/* Whether a rule of the measured table gives the call to cuDNN, and cuDNN is there. */
template <typename T>
bool by_rule(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    for (int i = 0; i < state->attention_rules; i++) {
        const ladd_attention_rule *r = &state->attention[i];
        if (r->act != ctx->act || r->dh != a.dh || (r->backward != 0) != backward || a.S < r->least || a.S > r->most) continue;
        if (r->cudnn && state->cudnn == 0) state->cudnn = attention_cudnn_there() ? 1 : -1;
        return r->cudnn && state->cudnn > 0;
    }
    return false;
}

}  // namespace

/* cuDNN's backward refuses a single token, and some versions fail at such sizes: there is nothing to win with few tokens anyway. Who asks for cuDNN
 * by name gets its errors; where a rule chose it, ours takes what it cannot plan. */
template <typename T>
ladd_status attention_by_cudnn(const ladd_context *ctx, const attention_args<T> &a, bool backward, bool *done) {
    *done = false;
    const char *wanted = getenv("LADD_CUDA_ATTENTION");
    const bool named = wanted && strcmp(wanted, "cudnn") == 0;
    if (wanted && !named && strcmp(wanted, "ladd") != 0)
        return ladd_fail(LADD_ERR_VALUE, "LADD_CUDA_ATTENTION: cudnn or ladd expected, got %.100s", wanted);
    if (a.S < 16 || a.dh > 128 || !(wanted ? named : by_rule(ctx, a, backward))) return LADD_OK;
    bool planned = false;
    const ladd_status status = attention_cudnn(ctx, a, backward, &planned);
    *done = planned || named;
    return *done || status == LADD_ERR_MEMORY ? status : LADD_OK;
}
template ladd_status attention_by_cudnn(const ladd_context *, const attention_args<__nv_bfloat16> &, bool, bool *);
template ladd_status attention_by_cudnn(const ladd_context *, const attention_args<__half> &, bool, bool *);
