/* Joint attention, fused and tiled: o = softmax(scale q k^T) v over one or two token streams that stay in their own buffers.
 *
 * The score matrix is never stored: forward walks over tiles of keys with a running maximum m and sum l of each row (o is rescaled when m grows) and
 * keeps lse = m + log l. Backward recomputes each tile P = exp(scale q k^T - lse) and uses sum_k dP P = sum_d dO O =: delta:
 *   dV = P^T dO,   dS = P (dO V^T - delta) scale,   dQ = dS K,   dK = dS^T Q.
 * Tiles never straddle streams. Forward's tasks are tiles of queries; backward's are heads, each the only writer of its dQ, dK, dV.
 */
#include "cpu.h"

#include <math.h>

enum { ATTENTION_TILE = 128 };

typedef struct attention_tile {
    int stream, first, count; /* tokens of one stream */
    int at;                   /* place of the first in the joint order */
} attention_tile;

typedef struct attention_job {
    const ladd_stream *streams;
    const ladd_stream_grad *grads;
    float *lse;
    int B, heads, dh, S, tiles, n_streams;
    float scale;
    int failed;
} attention_job;

static int attention_count_tiles(const ladd_stream *streams, int n_streams, int *tokens) {
    int tiles = 0;
    *tokens = 0;
    for (int s = 0; s < n_streams; s++) {
        tiles += (streams[s].n + ATTENTION_TILE - 1) / ATTENTION_TILE;
        *tokens += streams[s].n;
    }
    return tiles;
}

static attention_tile attention_nth_tile(const attention_job *j, int tile) {
    attention_tile t = {0, 0, 0, 0};
    for (int s = 0; s < j->n_streams; s++) {
        int here = (j->streams[s].n + ATTENTION_TILE - 1) / ATTENTION_TILE;
        if (tile < here) {
            t.stream = s;
            t.first = tile * ATTENTION_TILE;
            t.count = j->streams[s].n - t.first < ATTENTION_TILE ? j->streams[s].n - t.first : ATTENTION_TILE;
            t.at += t.first;
            return t;
        }
        tile -= here;
        t.at += j->streams[s].n;
    }
    return t;
}

static ptrdiff_t attention_offset(const ladd_stream *s, int b, int head, int dh, int first) {
    return (ptrdiff_t)b * s->batch + (ptrdiff_t)first * s->row + (ptrdiff_t)head * dh;
}
static ptrdiff_t attention_o_offset(const ladd_stream *s, int b, int head, int dh, int first) {
    return (ptrdiff_t)b * s->o_batch + (ptrdiff_t)first * s->o_row + (ptrdiff_t)head * dh;
}

static float attention_row_max(const float *s, int n, float start) {
    float lanes[16], m = start;
    int i = 0;
    if (n >= 16) {
        for (int l = 0; l < 16; l++) lanes[l] = s[l];
        for (i = 16; i + 16 <= n; i += 16)
            for (int l = 0; l < 16; l++) lanes[l] = s[i + l] > lanes[l] ? s[i + l] : lanes[l];
        for (int l = 0; l < 16; l++) m = lanes[l] > m ? lanes[l] : m;
    }
    for (; i < n; i++) m = s[i] > m ? s[i] : m;
    return m;
}

static void attention_forward_task(void *argument, int64_t task) {
    attention_job *j = argument;
    int dh = j->dh, tile = (int)(task % j->tiles), head = (int)(task / j->tiles % j->heads), b = (int)(task / j->tiles / j->heads);
    attention_tile q = attention_nth_tile(j, tile);
    const ladd_stream *qs = &j->streams[q.stream];
    float *scores = ladd_scratch(0, sizeof(float) * ATTENTION_TILE * (ATTENTION_TILE + 2));
    if (!scores) {
        j->failed = 1;
        return;
    }
    float *m = scores + ATTENTION_TILE * ATTENTION_TILE, *l = m + ATTENTION_TILE;
    const float *Q = qs->q + attention_offset(qs, b, head, dh, q.first);
    float *O = qs->o + attention_o_offset(qs, b, head, dh, q.first);
    for (int t = 0; t < j->tiles; t++) {
        attention_tile k = attention_nth_tile(j, t);
        const ladd_stream *ks = &j->streams[k.stream];
        ptrdiff_t at = attention_offset(ks, b, head, dh, k.first);
        ladd_sgemm(0, 1, q.count, k.count, dh, j->scale, Q, qs->row, ks->k + at, ks->row, 0.0f, scores, k.count);
        for (int r = 0; r < q.count; r++) {
            float *s = scores + (ptrdiff_t)r * k.count, *o = O + r * qs->o_row;
            float old = t ? m[r] : -INFINITY, top = attention_row_max(s, k.count, old);
            for (int i = 0; i < k.count; i++) s[i] = ladd_expf(s[i] - top);
            float sum = ladd_sum(s, k.count);
            if (t) {
                float shrink = ladd_expf(old - top);
                l[r] = l[r] * shrink + sum;
                if (shrink != 1.0f)
                    for (int i = 0; i < dh; i++) o[i] *= shrink;
            } else {
                l[r] = sum;
            }
            m[r] = top;
        }
        ladd_sgemm(0, 0, q.count, dh, k.count, 1.0f, scores, k.count, ks->v + at, ks->row, t ? 1.0f : 0.0f, O, qs->o_row);
    }
    float *lse = j->lse + ((int64_t)b * j->heads + head) * j->S + q.at;
    for (int r = 0; r < q.count; r++) {
        float inverse = 1.0f / l[r], *o = O + r * qs->o_row;
        for (int i = 0; i < dh; i++) o[i] *= inverse;
        lse[r] = m[r] + logf(l[r]);
    }
}

ladd_status LADD_CPU(attention_forward)(LADD_CTX, const ladd_stream *streams, int n_streams, float *lse, int B, int heads, int dh, float scale) {
    (void)ctx;
    attention_job job = {.streams = streams, .lse = lse, .B = B, .heads = heads, .dh = dh, .n_streams = n_streams, .scale = scale};
    job.tiles = attention_count_tiles(streams, n_streams, &job.S);
    ladd_parallel_work((int64_t)B * heads * job.tiles, (int64_t)B * heads * job.S * job.S, attention_forward_task, &job);
    return job.failed ? ladd_fail(LADD_ERR_MEMORY, "out of memory for a tile of attention scores") : LADD_OK;
}

static void attention_backward_task(void *argument, int64_t task) {
    attention_job *j = argument;
    int dh = j->dh, head = (int)(task % j->heads), b = (int)(task / j->heads);
    const int area = ATTENTION_TILE * ATTENTION_TILE;
    float *P = ladd_scratch(0, sizeof(float) * (2 * (size_t)area + (size_t)j->S));
    if (!P) {
        j->failed = 1;
        return;
    }
    float *dS = P + area, *delta = dS + area;
    const float *lse = j->lse + ((int64_t)b * j->heads + head) * j->S;
    for (int t = 0; t < j->tiles; t++) {
        attention_tile q = attention_nth_tile(j, t);
        const ladd_stream *qs = &j->streams[q.stream];
        ptrdiff_t at = attention_o_offset(qs, b, head, dh, q.first);
        for (int r = 0; r < q.count; r++) delta[q.at + r] = ladd_dot(qs->o + at + r * qs->o_row, j->grads[q.stream].d_o + at + r * qs->o_row, dh);
    }
    for (int kt = 0; kt < j->tiles; kt++) {
        attention_tile k = attention_nth_tile(j, kt);
        const ladd_stream *ks = &j->streams[k.stream];
        const ladd_stream_grad *kg = &j->grads[k.stream];
        ptrdiff_t k_at = attention_offset(ks, b, head, dh, k.first);
        for (int qt = 0; qt < j->tiles; qt++) {
            attention_tile q = attention_nth_tile(j, qt);
            const ladd_stream *qs = &j->streams[q.stream];
            const ladd_stream_grad *qg = &j->grads[q.stream];
            ptrdiff_t q_at = attention_offset(qs, b, head, dh, q.first), o_at = attention_o_offset(qs, b, head, dh, q.first);
            float add = qt ? 1.0f : 0.0f;
            ladd_sgemm(0, 1, q.count, k.count, dh, j->scale, qs->q + q_at, qs->row, ks->k + k_at, ks->row, 0.0f, P, k.count);
            ladd_sgemm(0, 1, q.count, k.count, dh, 1.0f, qg->d_o + o_at, qs->o_row, ks->v + k_at, ks->row, 0.0f, dS, k.count);
            for (int r = 0; r < q.count; r++) {
                float *p = P + (ptrdiff_t)r * k.count, *ds = dS + (ptrdiff_t)r * k.count, shift = lse[q.at + r], d = delta[q.at + r];
                for (int i = 0; i < k.count; i++) p[i] = ladd_expf(p[i] - shift);
                for (int i = 0; i < k.count; i++) ds[i] = p[i] * (ds[i] - d) * j->scale;
            }
            ladd_sgemm(1, 0, k.count, dh, q.count, 1.0f, P, k.count, qg->d_o + o_at, qs->o_row, add, kg->dv + k_at, ks->row);
            ladd_sgemm(1, 0, k.count, dh, q.count, 1.0f, dS, k.count, qs->q + q_at, qs->row, add, kg->dk + k_at, ks->row);
            ladd_sgemm(0, 0, q.count, dh, k.count, 1.0f, dS, k.count, ks->k + k_at, ks->row, kt ? 1.0f : 0.0f, qg->dq + q_at, qs->row);
        }
    }
}

ladd_status LADD_CPU(attention_backward)(LADD_CTX, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, const float *lse, int B,
                                         int heads, int dh, float scale) {
    (void)ctx;
    attention_job job = {
        .streams = streams, .grads = grads, .lse = (float *)lse, .B = B, .heads = heads, .dh = dh, .n_streams = n_streams, .scale = scale};
    job.tiles = attention_count_tiles(streams, n_streams, &job.S);
    ladd_parallel_work((int64_t)B * heads, (int64_t)B * heads * job.S * job.S, attention_backward_task, &job);
    return job.failed ? ladd_fail(LADD_ERR_MEMORY, "out of memory for a tile of attention scores") : LADD_OK;
}
