/* What mmdit_params.c (the table of tensors, initialisation) and mmdit.c (forward, backward) share. */
#ifndef LADD_MMDIT_INTERNAL_H
#define LADD_MMDIT_INTERNAL_H
#include "../layers/transformer.h"

enum { LADD_TIME_FEATURES = 256 };

/* Modulation vectors of all blocks come from one product s W^T + b, [B, modulation_rows]; these are rows of that product. Each chunk is D wide. */
typedef struct ladd_mod_rows {
    int shift1, scale1, gate1, shift2, scale2, gate2; /* attention, then MLP */
    int dual_shift, dual_scale, dual_gate;
} ladd_mod_rows;

typedef struct ladd_mmdit_stream_params {
    ladd_mod_rows mod;
    ladd_qkv_params qkv;
    ladd_linear_params out; /* -1 in the last block's context */
    ladd_ff_params ff;      /* likewise */
} ladd_mmdit_stream_params;

typedef struct ladd_mmdit_block_params {
    ladd_mmdit_stream_params x, y; /* image, text */
    ladd_qkv_params dual_qkv;      /* image-only second attention */
    ladd_linear_params dual_out;
    int modulation_end; /* rows of the modulation product that blocks up to and including this one need */
} ladd_mmdit_block_params;

struct ladd_mmdit {
    ladd_mmdit_config config;
    ladd_params params;
    int D, modulation_rows;
    int64_t modulation_weight, modulation_bias; /* [modulation_rows,D], [modulation_rows] */
    int final_scale, final_shift;               /* rows of the modulation product */
    int64_t position;                           /* [max,max,D] */
    ladd_linear_params patch, context, proj_out;
    ladd_embedder_params time, pooled;
    ladd_mmdit_block_params *blocks; /* [num_layers] */
};
#endif
