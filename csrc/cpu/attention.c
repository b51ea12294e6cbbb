/* Joint attention, fused and tiled: o = softmax(scale q k^T) v over one or two token streams that stay in their own buffers.
 *
 * The score matrix is never stored: a panel of scores is used up while it is near the core, and in the very place where the inner kernel wrote it it
 * is the packed right operand of the next products. Forward computes panels S^T[keys][GEMM_NR queries], so that the softmax over keys runs down the
 * panel with one query a lane, without sums across lanes. It walks over blocks of keys with a running maximum m and sum l of each query (O^T is
 * rescaled when m grows) and keeps lse = m + log l:
 *
 *   S^T = K Q^T,   P^T = exp(scale S^T - m),   O^T = V^T P^T / l
 *
 * Backward needs no sums over keys, as sum_k dP P = sum_d dO O =: delta, and computes panels [queries][GEMM_NR keys], which serve two products as
 * they are and only one after turning dS:
 *
 *   P = exp(scale Q K^T - lse),   dP = dO V^T,   dS = scale P (dP - delta),   dV^T = dO^T P,   dK^T = Q^T dS,   dQ = dS K
 *
 * Tokens are numbered through both streams. Forward's tasks are blocks of queries of one head; backward's are heads, or groups of a head's blocks of
 * keys, whose shares of dQ are added in order afterwards. What is added to what depends on the tokens and heads only, so a sample's bits do not
 * depend on its batch.
 */
#include "gemm.h"

#include <math.h>

enum {
    ATTENTION_KEYS = 128,      /* keys of a block */
    ATTENTION_QUERIES = 128,   /* queries of a block of backward */
    ATTENTION_MOST = 384,      /* most queries of a forward task, each of which packs all keys and values anew */
    ATTENTION_BLOCK = 1 << 16, /* floats of packed queries and results of a forward task: they stay in the level-2 cache */
    ATTENTION_TASKS = 4        /* wanted tasks of backward for one sample */
};

/* Token i of one sample and head: its dh values start at base + i*row, in the second stream from n on. */
typedef struct attention_rows {
    float *base[2];
    ptrdiff_t row[2];
    int n;
} attention_rows;

static inline float *attention_row(const attention_rows *r, int i) {
    return i < r->n ? r->base[0] + i * r->row[0] : r->base[1] + (i - r->n) * r->row[1];
}

typedef struct attention_job {
    const ladd_stream *streams;
    const ladd_stream_grad *grads;
    float *lse;   /* [B,heads,S] */
    float *parts; /* [B,heads,groups,S,dh] shares of dQ, or NULL with one group */
    int B, heads, dh, S, n_streams;
    int chunk, chunks; /* forward: queries of a task, tasks of a head */
    int groups;        /* backward: tasks of a head */
    float scale;
    atomic_int failed; /* several tasks may set it */
} attention_job;

enum attention_what { ATTENTION_Q, ATTENTION_K, ATTENTION_V, ATTENTION_O, ATTENTION_DQ, ATTENTION_DK, ATTENTION_DV, ATTENTION_DO };

static attention_rows attention_rows_of(const attention_job *j, enum attention_what what, int b, int head) {
    attention_rows r = {.n = j->streams[0].n};
    for (int s = 0; s < j->n_streams; s++) {
        const ladd_stream *t = &j->streams[s];
        const ladd_stream_grad *g = j->grads ? &j->grads[s] : NULL;
        const float *base = what == ATTENTION_Q    ? t->q
                            : what == ATTENTION_K  ? t->k
                            : what == ATTENTION_V  ? t->v
                            : what == ATTENTION_O  ? t->o
                            : what == ATTENTION_DQ ? g->dq
                            : what == ATTENTION_DK ? g->dk
                            : what == ATTENTION_DV ? g->dv
                                                   : g->d_o;
        int output = what == ATTENTION_O || what == ATTENTION_DO;
        r.row[s] = output ? t->o_row : t->row;
        r.base[s] = (float *)base + b * (output ? t->o_batch : t->batch) + (ptrdiff_t)head * j->dh;
    }
    return r;
}

static inline void attention_copy_row(float *to, const float *from, int dh) {
#pragma GCC ivdep
    for (int d = 0; d < dh; d++) to[d] = from[d];
}

/* The rows of tokens first ... first + count - 1 at stride *row: where they are, or copied to `to` where the second stream begins among them. */
static const float *attention_block(ptrdiff_t *row, float *to, const attention_rows *r, int first, int count, int dh) {
    if (first + count <= r->n || first >= r->n) {
        *row = r->row[first >= r->n];
        return attention_row(r, first);
    }
    for (int i = 0; i < count; i++) attention_copy_row(to + (ptrdiff_t)i * dh, attention_row(r, first + i), dh);
    *row = dh;
    return to;
}

static void attention_scatter(const attention_rows *r, const float *from, int first, int count, int dh) {
    for (int i = 0; i < count; i++, from += dh) attention_copy_row(attention_row(r, first + i), from, dh);
}

/* Rows of tokens first ... first + count - 1 from a transposed panel[dh][GEMM_NR]; factor (NULL: 1): one number a row. */
static void attention_store_turned(const attention_rows *r, const float *panel, const float *factor, int first, int count, int dh) {
    int d = 0;
#if defined(__AVX2__)
    for (; d + GEMM_LANES <= dh; d += GEMM_LANES) {
        const float *p = panel + (ptrdiff_t)d * GEMM_NR;
        for (int i = 0; i < count; i += 4, p += 4) {
            gemm_vec v[4];
            gemm_store_turned(v, 1, gemm_load_quads(p, GEMM_NR, GEMM_LANES), gemm_load_quads(p + GEMM_NR, GEMM_NR, GEMM_LANES),
                              gemm_load_quads(p + 2 * GEMM_NR, GEMM_NR, GEMM_LANES), gemm_load_quads(p + 3 * GEMM_NR, GEMM_NR, GEMM_LANES));
            for (int t = 0; t < 4 && i + t < count; t++) gemm_store(attention_row(r, first + i + t) + d, factor ? v[t] * factor[i + t] : v[t]);
        }
    }
#endif
    for (; d < dh; d++)
        for (int i = 0; i < count; i++) attention_row(r, first + i)[d] = panel[(ptrdiff_t)d * GEMM_NR + i] * (factor ? factor[i] : 1.0f);
}

/* b > a ? b : a in each lane. */
static inline gemm_vec attention_max(gemm_vec a, gemm_vec b) {
#if defined(__AVX512F__)
    return (gemm_vec)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX2__)
    return (gemm_vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
    for (int i = 0; i < GEMM_LANES; i++) a[i] = b[i] > a[i] ? b[i] : a[i];
    return a;
#endif
}

static inline int attention_min(int a, int b) { return a < b ? a : b; }
/* Columns of a panel that are computed: whole vectors. What stands beyond `count` is never stored. */
static inline int attention_lanes(int count) { return (count + GEMM_LANES - 1) / GEMM_LANES * GEMM_LANES; }
/* A piece of a scratch block, counted first and then placed (block NULL: only counted). */
static void *attention_take(char *block, size_t *used, size_t bytes) {
    char *at = block ? block + *used : NULL;
    *used += (bytes + 63) & ~(size_t)63;
    return at;
}

/* A panel [k][GEMM_NR] of f32 as the right operand of a product: in f32 it is one already. */
static const gemm_packed *attention_operand(gemm_packed *packed, const float *panel, int k, int lanes) {
#if defined(LADD_BF16_PRODUCTS)
    gemm_pack_b(packed, panel, GEMM_NR, 1, k, lanes);
    return packed;
#else
    (void)packed, (void)k, (void)lanes;
    return panel;
#endif
}
static size_t attention_operand_size(int k) { return GEMM_PAIR > 1 ? gemm_b_size(k, GEMM_NR) : 0; }

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

typedef struct attention_forward_memory {
    float *rows, *P, *O, *m, *l;
    gemm_packed *K, *V, *Q, *P_packed;
} attention_forward_memory;

static size_t attention_forward_place(attention_forward_memory *a, char *block, const attention_job *j) {
    size_t used = 0, panels = (size_t)(j->chunk + GEMM_NR - 1) / GEMM_NR, dh = (size_t)j->dh;
    a->rows = attention_take(block, &used, ATTENTION_KEYS * dh * sizeof(float));
    a->P = attention_take(block, &used, ATTENTION_KEYS * GEMM_NR * sizeof(float));
    a->P_packed = attention_take(block, &used, attention_operand_size(ATTENTION_KEYS) * sizeof(gemm_packed));
    a->K = attention_take(block, &used, gemm_a_size(ATTENTION_KEYS, j->dh) * sizeof(gemm_packed));
    a->V = attention_take(block, &used, gemm_a_size(j->dh, ATTENTION_KEYS) * sizeof(gemm_packed));
    a->Q = attention_take(block, &used, panels * gemm_b_size(j->dh, GEMM_NR) * sizeof(gemm_packed));
    a->O = attention_take(block, &used, panels * dh * GEMM_NR * sizeof(float));
    a->m = attention_take(block, &used, panels * GEMM_NR * sizeof(float));
    a->l = attention_take(block, &used, panels * GEMM_NR * sizeof(float));
    return used;
}

/* P[keys][GEMM_NR]: products s become exp(scale s - m); m and l of each lane are brought up to date, and O^T[dh][GEMM_NR] to the new m. */
static void attention_softmax(float *P, float *m, float *l, float *O, int keys, int lanes, int dh, float scale, int start) {
    for (int c = 0; c < lanes; c += GEMM_LANES) {
        gemm_vec high = (start ? gemm_load(P + c) * scale : gemm_load(m + c)), other = high;
        for (int k = 0; k < keys; k++) {
            if (k % 2)
                high = attention_max(high, gemm_load(P + k * GEMM_NR + c) * scale);
            else
                other = attention_max(other, gemm_load(P + k * GEMM_NR + c) * scale);
        }
        float top[GEMM_LANES], sum[GEMM_LANES], shrink[GEMM_LANES];
        gemm_store(top, attention_max(high, other));
        for (int i = 0; i < GEMM_LANES; i++) sum[i] = 0.0f;
        for (int k = 0; k < keys; k++)
            for (int i = 0; i < GEMM_LANES; i++) {
                float p = ladd_expf(P[k * GEMM_NR + c + i] * scale - top[i]);
                P[k * GEMM_NR + c + i] = p;
                sum[i] += p;
            }
        int grew = 0;
        for (int i = 0; i < GEMM_LANES; i++) {
            shrink[i] = start ? 0.0f : ladd_expf(m[c + i] - top[i]);
            l[c + i] = start ? sum[i] : l[c + i] * shrink[i] + sum[i];
            m[c + i] = top[i];
            grew |= shrink[i] != 1.0f;
        }
        if (start || !grew) continue;
        const gemm_vec factor = gemm_load(shrink);
        for (int d = 0; d < dh; d++) gemm_store(O + d * GEMM_NR + c, gemm_load(O + d * GEMM_NR + c) * factor);
    }
}

static void attention_forward_task(void *argument, int64_t task) {
    attention_job *j = argument;
    const int dh = j->dh, head = (int)(task / j->chunks % j->heads), b = (int)(task / j->chunks / j->heads);
    const int q0 = (int)(task % j->chunks) * j->chunk, queries = attention_min(j->chunk, j->S - q0);
    attention_forward_memory a;
    char *block = ladd_scratch(0, attention_forward_place(&a, NULL, j));
    if (!block) {
        atomic_store(&j->failed, 1);
        return;
    }
    attention_forward_place(&a, block, j);
    const size_t q_size = gemm_b_size(dh, GEMM_NR), o_size = (size_t)dh * GEMM_NR;
    attention_rows q = attention_rows_of(j, ATTENTION_Q, b, head), k = attention_rows_of(j, ATTENTION_K, b, head);
    attention_rows v = attention_rows_of(j, ATTENTION_V, b, head), o = attention_rows_of(j, ATTENTION_O, b, head);
    ptrdiff_t row;
    for (int p = 0; p * GEMM_NR < queries; p++) {
        int count = attention_min(GEMM_NR, queries - p * GEMM_NR);
        const float *from = attention_block(&row, a.rows, &q, q0 + p * GEMM_NR, count, dh);
        gemm_pack_b(a.Q + p * q_size, from, 1, row, dh, count);
    }
    for (int k0 = 0; k0 < j->S; k0 += ATTENTION_KEYS) {
        int keys = attention_min(ATTENTION_KEYS, j->S - k0);
        const float *from = attention_block(&row, a.rows, &k, k0, keys, dh);
        gemm_pack_a(a.K, from, row, 1, keys, dh);
        from = attention_block(&row, a.rows, &v, k0, keys, dh);
        gemm_pack_a(a.V, from, 1, row, dh, keys);
        for (int p = 0; p * GEMM_NR < queries; p++) {
            int lanes = attention_lanes(attention_min(GEMM_NR, queries - p * GEMM_NR));
            float *O = a.O + p * o_size;
            gemm_packed_strip(a.P, GEMM_NR, a.K, a.Q + p * q_size, keys, lanes, dh, NULL, 0);
            attention_softmax(a.P, a.m + p * GEMM_NR, a.l + p * GEMM_NR, O, keys, lanes, dh, j->scale, k0 == 0);
            gemm_packed_strip(O, GEMM_NR, a.V, attention_operand(a.P_packed, a.P, keys, lanes), dh, lanes, keys, NULL, k0 > 0);
        }
    }
    float *lse = j->lse + ((int64_t)b * j->heads + head) * j->S + q0;
    for (int p = 0; p * GEMM_NR < queries; p++) {
        int count = attention_min(GEMM_NR, queries - p * GEMM_NR);
        float inverse[GEMM_NR], *l = a.l + p * GEMM_NR;
        for (int i = 0; i < GEMM_NR; i++) inverse[i] = i < count ? 1.0f / l[i] : 0.0f;
        for (int i = 0; i < count; i++) lse[p * GEMM_NR + i] = a.m[p * GEMM_NR + i] + logf(l[i]);
        attention_store_turned(&o, a.O + p * o_size, inverse, q0 + p * GEMM_NR, count, dh);
    }
}

static void attention_count_tokens(attention_job *j) {
    for (int s = 0; s < j->n_streams; s++) j->S += j->streams[s].n;
}

ladd_status LADD_CPU(attention_forward)(LADD_CTX, const ladd_stream *streams, int n_streams, float *lse, int B, int heads, int dh, float scale) {
    (void)ctx;
    attention_job job = {.streams = streams, .lse = lse, .B = B, .heads = heads, .dh = dh, .n_streams = n_streams, .scale = scale};
    attention_count_tokens(&job);
    int most = attention_min(ATTENTION_BLOCK / (2 * dh), ATTENTION_MOST);
    if (most < GEMM_NR) most = GEMM_NR;
    job.chunks = (job.S + most - 1) / most;
    job.chunk = ((job.S + job.chunks - 1) / job.chunks + GEMM_NR - 1) / GEMM_NR * GEMM_NR;
    job.chunks = (job.S + job.chunk - 1) / job.chunk;
    ladd_parallel_work((int64_t)B * heads * job.chunks, (int64_t)B * heads * job.S * job.S, attention_forward_task, &job);
    return atomic_load(&job.failed) ? ladd_fail(LADD_ERR_MEMORY, "out of memory for a block of attention scores") : LADD_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

/* Packed for the whole head, block by block: queries. For the block of keys at hand: keys, values and what becomes of their gradients. */
typedef struct attention_backward_memory {
    float *rows, *P, *dS, *dK, *dV, *delta, *dQ;
    gemm_packed *Q, *dO, *Q_turned, *dO_turned, *K, *K_turned, *V_turned, *P_packed, *dS_packed, *dS_turned;
} attention_backward_memory;

enum { ATTENTION_PANELS = (ATTENTION_KEYS + GEMM_NR - 1) / GEMM_NR };

static size_t attention_backward_place(attention_backward_memory *a, char *block, const attention_job *j) {
    const size_t dh = (size_t)j->dh, blocks = (size_t)(j->S + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
    size_t used = 0;
    a->rows = attention_take(block, &used, ATTENTION_KEYS * dh * sizeof(float)); /* at least as many as ATTENTION_QUERIES */
    a->P = attention_take(block, &used, ATTENTION_QUERIES * GEMM_NR * sizeof(float));
    a->dS = attention_take(block, &used, ATTENTION_QUERIES * GEMM_NR * sizeof(float));
    a->P_packed = attention_take(block, &used, attention_operand_size(ATTENTION_QUERIES) * sizeof(gemm_packed));
    a->dS_packed = attention_take(block, &used, attention_operand_size(ATTENTION_QUERIES) * sizeof(gemm_packed));
    a->dS_turned = attention_take(block, &used, gemm_a_size(ATTENTION_QUERIES, ATTENTION_KEYS) * sizeof(gemm_packed));
    a->dK = attention_take(block, &used, ATTENTION_PANELS * dh * GEMM_NR * sizeof(float));
    a->dV = attention_take(block, &used, ATTENTION_PANELS * dh * GEMM_NR * sizeof(float));
    a->K = attention_take(block, &used, gemm_b_size(ATTENTION_KEYS, j->dh) * sizeof(gemm_packed));
    a->K_turned = attention_take(block, &used, ATTENTION_PANELS * gemm_b_size(j->dh, GEMM_NR) * sizeof(gemm_packed));
    a->V_turned = attention_take(block, &used, ATTENTION_PANELS * gemm_b_size(j->dh, GEMM_NR) * sizeof(gemm_packed));
    a->Q = attention_take(block, &used, blocks * gemm_a_size(ATTENTION_QUERIES, j->dh) * sizeof(gemm_packed));
    a->dO = attention_take(block, &used, blocks * gemm_a_size(ATTENTION_QUERIES, j->dh) * sizeof(gemm_packed));
    a->Q_turned = attention_take(block, &used, blocks * gemm_a_size(j->dh, ATTENTION_QUERIES) * sizeof(gemm_packed));
    a->dO_turned = attention_take(block, &used, blocks * gemm_a_size(j->dh, ATTENTION_QUERIES) * sizeof(gemm_packed));
    a->delta = attention_take(block, &used, (size_t)j->S * sizeof(float));
    a->dQ = attention_take(block, &used, j->parts ? 0 : (size_t)j->S * dh * sizeof(float));
    return used;
}

/* P from products s, dS from dP: one panel[queries][GEMM_NR]. */
static void attention_softmax_backward(float *P, float *dS, const float *lse, const float *delta, int queries, int lanes, float scale) {
    for (int q = 0; q < queries; q++, P += GEMM_NR, dS += GEMM_NR) {
        const float shift = lse[q], d = delta[q];
#pragma GCC ivdep
        for (int i = 0; i < lanes; i++) {
            float p = ladd_expf(P[i] * scale - shift);
            P[i] = p;
            dS[i] = p * scale * (dS[i] - d);
        }
    }
}

/* Columns [at, at + count) of the left operand dS[queries, keys] from a panel[queries][GEMM_NR]. */
static void attention_turn_panel(gemm_packed *A, const float *panel, int queries, int keys, int at, int count) {
    for (int i = 0; i < queries; i += GEMM_MR, A += GEMM_AS * gemm_even(keys), panel += GEMM_MR * GEMM_NR) {
        const int rows = attention_min(GEMM_MR, queries - i);
#if defined(__AVX2__)
        gemm_pack_along(A + at * GEMM_AS, panel, GEMM_NR, rows, 1, count);
#else
        gemm_pack_plain(A + at * GEMM_AS, panel, GEMM_NR, 1, rows, 1, 0, count);
#endif
    }
}

/* What block n of the queries and the block of keys in `a` have to do with each other. */
static void attention_backward_block(const attention_job *j, const attention_backward_memory *a, const float *lse, float *dQ, int n, int keys,
                                     int first_keys) {
    const int dh = j->dh, q0 = n * ATTENTION_QUERIES, queries = attention_min(ATTENTION_QUERIES, j->S - q0);
    const size_t straight = n * gemm_a_size(ATTENTION_QUERIES, dh), turned = n * gemm_a_size(dh, ATTENTION_QUERIES);
    for (int p = 0; p * GEMM_NR < keys; p++) {
        const int count = attention_min(GEMM_NR, keys - p * GEMM_NR), lanes = attention_lanes(count);
        const size_t panel = p * gemm_b_size(dh, GEMM_NR), sum = (size_t)p * (size_t)dh * GEMM_NR;
        gemm_packed_strip(a->P, GEMM_NR, a->Q + straight, a->K_turned + panel, queries, lanes, dh, NULL, 0);
        gemm_packed_strip(a->dS, GEMM_NR, a->dO + straight, a->V_turned + panel, queries, lanes, dh, NULL, 0);
        attention_softmax_backward(a->P, a->dS, lse + q0, a->delta + q0, queries, lanes, j->scale);
        attention_turn_panel(a->dS_turned, a->dS, queries, keys, p * GEMM_NR, count);
        gemm_packed_strip(a->dV + sum, GEMM_NR, a->dO_turned + turned, attention_operand(a->P_packed, a->P, queries, lanes), dh, lanes, queries, NULL,
                          n > 0);
        gemm_packed_strip(a->dK + sum, GEMM_NR, a->Q_turned + turned, attention_operand(a->dS_packed, a->dS, queries, lanes), dh, lanes, queries,
                          NULL, n > 0);
    }
    gemm_packed_product(dQ + (ptrdiff_t)q0 * dh, dh, a->dS_turned, a->K, queries, dh, keys, NULL, !first_keys);
}

/* Turned right operands [dh, GEMM_NR] of `count` rows. */
static void attention_pack_turned(gemm_packed *B, const float *from, ptrdiff_t row, int count, int dh) {
    for (int p = 0; p < count; p += GEMM_NR, B += gemm_b_size(dh, GEMM_NR))
        gemm_pack_b(B, from + p * row, 1, row, dh, attention_min(GEMM_NR, count - p));
}

static void attention_backward_task(void *argument, int64_t task) {
    attention_job *j = argument;
    const int dh = j->dh, group = (int)(task % j->groups), head = (int)(task / j->groups % j->heads), b = (int)(task / j->groups / j->heads);
    const int blocks = (j->S + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    const int first = (int)((int64_t)blocks * group / j->groups), last = (int)((int64_t)blocks * (group + 1) / j->groups);
    attention_backward_memory a;
    char *block = ladd_scratch(0, attention_backward_place(&a, NULL, j));
    if (!block) {
        atomic_store(&j->failed, 1);
        return;
    }
    attention_backward_place(&a, block, j);
    float *dQ = j->parts ? j->parts + (size_t)task * (size_t)j->S * (size_t)dh : a.dQ;
    attention_rows q = attention_rows_of(j, ATTENTION_Q, b, head), k = attention_rows_of(j, ATTENTION_K, b, head);
    attention_rows v = attention_rows_of(j, ATTENTION_V, b, head), o = attention_rows_of(j, ATTENTION_O, b, head);
    attention_rows d_o = attention_rows_of(j, ATTENTION_DO, b, head), dq = attention_rows_of(j, ATTENTION_DQ, b, head);
    attention_rows dk = attention_rows_of(j, ATTENTION_DK, b, head), dv = attention_rows_of(j, ATTENTION_DV, b, head);
    const float *lse = j->lse + ((int64_t)b * j->heads + head) * j->S, *from;
    ptrdiff_t row;
    for (int i = 0; i < j->S; i++) a.delta[i] = ladd_dot(attention_row(&o, i), attention_row(&d_o, i), dh);
    for (int n = 0, q0 = 0; q0 < j->S; n++, q0 += ATTENTION_QUERIES) {
        int queries = attention_min(ATTENTION_QUERIES, j->S - q0);
        from = attention_block(&row, a.rows, &q, q0, queries, dh);
        gemm_pack_a(a.Q + n * gemm_a_size(ATTENTION_QUERIES, dh), from, row, 1, queries, dh);
        gemm_pack_a(a.Q_turned + n * gemm_a_size(dh, ATTENTION_QUERIES), from, 1, row, dh, queries);
        from = attention_block(&row, a.rows, &d_o, q0, queries, dh);
        gemm_pack_a(a.dO + n * gemm_a_size(ATTENTION_QUERIES, dh), from, row, 1, queries, dh);
        gemm_pack_a(a.dO_turned + n * gemm_a_size(dh, ATTENTION_QUERIES), from, 1, row, dh, queries);
    }
    for (int m = first; m < last; m++) {
        int k0 = m * ATTENTION_KEYS, keys = attention_min(ATTENTION_KEYS, j->S - k0);
        from = attention_block(&row, a.rows, &k, k0, keys, dh);
        gemm_pack_b(a.K, from, row, 1, keys, dh);
        attention_pack_turned(a.K_turned, from, row, keys, dh);
        from = attention_block(&row, a.rows, &v, k0, keys, dh);
        attention_pack_turned(a.V_turned, from, row, keys, dh);
        for (int n = 0; n * ATTENTION_QUERIES < j->S; n++) attention_backward_block(j, &a, lse, dQ, n, keys, m == first);
        for (int p = 0; p < keys; p += GEMM_NR) {
            attention_store_turned(&dk, a.dK + (ptrdiff_t)p * dh, NULL, k0 + p, attention_min(GEMM_NR, keys - p), dh);
            attention_store_turned(&dv, a.dV + (ptrdiff_t)p * dh, NULL, k0 + p, attention_min(GEMM_NR, keys - p), dh);
        }
    }
    if (!j->parts) attention_scatter(&dq, dQ, 0, j->S, dh);
}

/* dq of one head from its groups' shares. */
static void attention_backward_sum(void *argument, int64_t task) {
    const attention_job *j = argument;
    const int64_t n = (int64_t)j->S * j->dh;
    float *sum = j->parts + task * j->groups * n;
    for (int g = 1; g < j->groups; g++) {
        const float *part = sum + g * n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) sum[i] += part[i];
    }
    attention_rows dq = attention_rows_of(j, ATTENTION_DQ, (int)(task / j->heads), (int)(task % j->heads));
    attention_scatter(&dq, sum, 0, j->S, j->dh);
}

ladd_status LADD_CPU(attention_backward)(LADD_CTX, const ladd_stream_grad *grads, const ladd_stream *streams, int n_streams, const float *lse, int B,
                                         int heads, int dh, float scale) {
    (void)ctx;
    attention_job job = {
        .streams = streams, .grads = grads, .lse = (float *)lse, .B = B, .heads = heads, .dh = dh, .n_streams = n_streams, .scale = scale};
    attention_count_tokens(&job);
    int blocks = (job.S + ATTENTION_KEYS - 1) / ATTENTION_KEYS;
    job.groups = heads < ATTENTION_TASKS ? attention_min(ATTENTION_TASKS / heads, blocks) : 1;
    if (job.groups > 1) {
        job.parts = ladd_scratch(3, (size_t)B * (size_t)heads * (size_t)job.groups * (size_t)job.S * (size_t)dh * sizeof(float));
        if (!job.parts) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the shares of the gradient of the queries");
    }
    ladd_parallel_work((int64_t)B * heads * job.groups, (int64_t)B * heads * job.S * job.S, attention_backward_task, &job);
    if (job.parts && !atomic_load(&job.failed)) ladd_parallel((int64_t)B * heads, attention_backward_sum, &job);
    return atomic_load(&job.failed) ? ladd_fail(LADD_ERR_MEMORY, "out of memory for a block of attention scores") : LADD_OK;
}
