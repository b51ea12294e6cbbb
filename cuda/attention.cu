/* The table's two attention kernels: which kernels, or cuDNN, serve a call. */
#include "attention.cuh"

namespace {

/* delta[b,head,i] = sum over dh of d_o o, by eight lanes a row of a head, V elements a lane and step. */
template <typename T, int V>
__global__ void __launch_bounds__(LADD_BLOCK) attention_delta_kernel(const attention_args<T> a, uint32_t rows) {
    const uint32_t i = blockIdx.x * (LADD_BLOCK / 8) + threadIdx.x / 8,
                   of = i / (uint32_t)a.heads; /* heads run fastest: neighbours read neighbours */
    const int lane = threadIdx.x % 8, head = (int)(i % (uint32_t)a.heads), token = (int)(of % (uint32_t)a.S), b = (int)(of / (uint32_t)a.S);
    float sum = 0.0f;
    if (i < rows) {
        const T *o = o_rows_of(a, &attention_part<T>::o, b, head)(token), *d_o = o_rows_of(a, &attention_part<T>::d_o, b, head)(token);
        for (int at = lane * V; at < a.dh; at += 8 * V) {
            float x[V], y[V];
            ladd_load(x, o + at);
            ladd_load(y, d_o + at);
#pragma unroll
            for (int e = 0; e < V; e++) sum = fmaf(x[e], y[e], sum);
        }
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (i < rows && lane == 0) a.delta[((int64_t)b * a.heads + head) * a.S + token] = sum;
}

template <typename T>
ladd_status attention_arguments(attention_args<T> *a, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, float *lse, int B,
                                int heads, int dh, float scale) {
    *a = {};
    for (int i = 0; i < n_streams; i++) {
        const ladd_stream *s = &streams[i];
        attention_part<T> *p = &a->part[i];
        if (s->row > INT32_MAX || s->o_row > INT32_MAX)
            return ladd_fail(LADD_ERR_VALUE, "attention: strides of a row below 2**31 expected, got %lld and %lld", (long long)s->row,
                             (long long)s->o_row);
        p->q = (const T *)s->q;
        p->k = (const T *)s->k;
        p->v = (const T *)s->v;
        p->o = (T *)s->o;
        p->row = (int)s->row;
        p->o_row = (int)s->o_row;
        p->batch = s->batch;
        p->o_batch = s->o_batch;
        if (grads) {
            p->d_o = (const T *)grads[i].d_o;
            p->dq = (T *)grads[i].dq;
            p->dk = (T *)grads[i].dk;
            p->dv = (T *)grads[i].dv;
        }
        a->S += s->n;
    }
    a->first = streams[0].n;
    a->B = B;
    a->heads = heads;
    a->dh = dh;
    a->scale = scale;
    a->lse = lse;
    const int64_t rows = (int64_t)B * heads * a->S; /* counted in 32 bits: it would be 8 GB of lse */
    if (rows > INT32_MAX) return ladd_fail(LADD_ERR_VALUE, "attention: fewer than 2**31 tokens of heads expected, got %lld", (long long)rows);
    return LADD_OK;
}

/* Whether every row that is there starts on 16 bytes. */
template <typename T>
bool attention_aligned(const attention_args<T> &a) {
    bool aligned = a.dh % LADD_VEC<T> == 0;
    for (int i = 0; i < 2; i++) {
        const attention_part<T> &p = a.part[i];
        aligned =
            aligned && ladd_aligned16(p.q, p.k, p.v, p.o, p.d_o, p.dq, p.dk, p.dv) && (p.row | p.batch | p.o_row | p.o_batch) % LADD_VEC<T> == 0;
    }
    return aligned;
}

/* The tensor cores' kernels take the maximum of the scores before they are scaled, which a scale of zero or below would turn round. */
template <typename T>
bool attention_fits_mma(const attention_args<T> &a, int most) {
    return sizeof(T) == 2 && a.dh <= most && a.scale > 0.0f && attention_aligned(a);
}

template <typename T>
ladd_status forward(const ladd_context *ctx, const ladd_stream *streams, int n_streams, float *lse, int B, int heads, int dh, float scale) {
    attention_args<T> a;
    LADD_TRY(attention_arguments(&a, NULL, streams, n_streams, lse, B, heads, dh, scale));
    if (B <= 0 || heads <= 0 || dh <= 0 || a.S <= 0) return LADD_OK;
    if constexpr (sizeof(T) == 2)
        if (attention_fits_mma(a, 512)) {
            bool done;
            LADD_TRY(attention_by_cudnn(ctx, a, false, &done));
            return done ? LADD_OK : attention_forward_mma(ctx, a);
        }
    return attention_forward_plain(ctx, a);
}

template <typename T>
ladd_status backward(const ladd_context *ctx, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, const float *lse, int B,
                     int heads, int dh, float scale) {
    attention_args<T> a;
    LADD_TRY(attention_arguments(&a, grads, streams, n_streams, const_cast<float *>(lse), B, heads, dh, scale));
    if (B <= 0 || heads <= 0 || dh <= 0 || a.S <= 0) return LADD_OK;
    const bool mma = attention_fits_mma(a, 128);
    if constexpr (sizeof(T) == 2)
        if (mma) {
            bool done;
            LADD_TRY(attention_by_cudnn(ctx, a, true, &done));
            if (done) return LADD_OK;
        }
    const int64_t rows = (int64_t)B * heads * a.S;
    void *delta;
    LADD_TRY(ladd_cuda_scratch(ctx, &delta, 0, (size_t)rows * sizeof(float)));
    a.delta = (float *)delta;
    const unsigned blocks = (unsigned)ladd_ceil_div(rows, LADD_BLOCK / 8);
    if (attention_aligned(a))
        LADD_TRY(LADD_LAUNCH(ctx, (attention_delta_kernel<T, LADD_VEC<T>>), blocks, LADD_BLOCK, 0, a, (uint32_t)rows));
    else
        LADD_TRY(LADD_LAUNCH(ctx, (attention_delta_kernel<T, 1>), blocks, LADD_BLOCK, 0, a, (uint32_t)rows));
    if constexpr (sizeof(T) == 2)
        if (mma) return attention_backward_mma(ctx, a);
    return attention_backward_plain(ctx, a);
}

}  // namespace

ladd_status LADD_CUDA(attention_forward)(LADD_CTX, const ladd_stream *streams, int n_streams, float *lse, int B, int heads, int dh, float scale) {
    LADD_CUDA_DISPATCH(ctx, T, return forward<T>(ctx, streams, n_streams, lse, B, heads, dh, scale));
}

ladd_status LADD_CUDA(attention_backward)(LADD_CTX, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, const float *lse, int B,
                                          int heads, int dh, float scale) {
    LADD_CUDA_DISPATCH(ctx, T, return backward<T>(ctx, grads, streams, n_streams, lse, B, heads, dh, scale));
}
