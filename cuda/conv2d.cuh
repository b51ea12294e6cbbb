/* What the convolution's two products share (conv2d.cu: results and input gradients; conv2d_weights.cu: weight gradients).
 *
 * Both multiply without im2col. A block takes a tile of 128 output pixels of one sample and copies the window of the image below it into shared
 * memory once for every chunk of channels, turned to [pixel][channel]: then the eight channels of a pixel are one row of an 8x8 fragment, and a
 * kernel tap is only another address of that row. So strides and taps cost no traffic, the image is read once a tile instead of once a tap, and the
 * NCHW arrays of the table need no staged copy in another layout.
 */
#ifndef LADD_CONV2D_CUH
#define LADD_CONV2D_CUH
#include "mma.cuh"

#include "../csrc/conv.h"

enum {
    CONV_THREADS = 256,
    CONV_PIXELS = 128, /* output pixels of a tile: 8 x 16 or 16 x 8 */
    CONV_SKEW = 8,     /* elements between two pixels of a patch beyond its channels: eight rows of a fragment then lie in different banks */
    CONV_MAX_PATCH = 2048,
    CONV_PACKED_SLOT = 0, /* scratch: packed weights, partial gradients */
    CONV_PARTS_SLOT = 1
};

/* How tiles lie on a grid of output pixels and what part of the image they see. */
struct conv_tiling {
    int log_tw, rows, cols; /* tile width 2^log_tw; tiles down and across */
    int Wq, patch;          /* columns and pixels of a patch */
    uint32_t divide;        /* q / Wq = q * divide >> 20 for q < CONV_MAX_PATCH: a patch has at least 8 rows, so Wq is at most 256 */
};

static inline conv_tiling conv_tile(int gh, int gw, int kh, int kw, int step) {
    conv_tiling t;
    t.log_tw = gw <= 8 ? 3 : 4;
    const int tw = 1 << t.log_tw, th = CONV_PIXELS / tw;
    t.rows = (int)ladd_ceil_div(gh, th);
    t.cols = (int)ladd_ceil_div(gw, tw);
    t.Wq = (tw - 1) * step + (kw > 0 ? kw : 1);
    const int64_t patch = (int64_t)((th - 1) * (int64_t)step + (kh > 0 ? kh : 1)) * t.Wq;
    t.patch = (int)(patch < 1 << 20 ? patch : 1 << 20);
    t.divide = (1u << 20) / (uint32_t)t.Wq + 1;
    return t;
}

/* Fills patches [pixel][CHUNK channels + skew] in rounds, in each of which a thread moves eight channels of one pixel: a warp has 32 neighbouring
 * pixels and one group of channels, so it reads runs of the image and writes rows of fragments, and nothing is divided. */
template <int CHUNK>
struct conv_patch {
    enum { PITCH = CHUNK + CONV_SKEW, GROUPS = CHUNK / 8, WARPS = CONV_THREADS / LADD_WARP, SETS = GROUPS > WARPS ? GROUPS / WARPS : 1 };
    enum { WIDE = GROUPS < WARPS ? WARPS / GROUPS * LADD_WARP : LADD_WARP }; /* pixels of a round */
    const uint16_t *x;                                                       /* the sample */
    int C, H, W, Wq, pixels, row, col;
    uint32_t divide;
    __device__ __forceinline__ int rounds() const { return (pixels + WIDE - 1) / WIDE * SETS; }
    __device__ __forceinline__ int group(int round) const {
        const int warp = threadIdx.x / LADD_WARP;
        return GROUPS < WARPS ? warp % GROUPS : round % SETS * WARPS + warp;
    }
    __device__ __forceinline__ int pixel(int round) const {
        const int lane = threadIdx.x % LADD_WARP;
        return round / SETS * WIDE + (GROUPS < WARPS ? (int)threadIdx.x / LADD_WARP / GROUPS * LADD_WARP : 0) + lane;
    }
    /* Zero where there is no pixel or channel. */
    __device__ __forceinline__ uint4 load(int round, int c0) const {
        const int c = c0 + group(round) * 8, q = pixel(round), down = (int)((uint32_t)q * divide >> 20);
        const int r = row + down, k = col + q - down * Wq, channels = C - c, plane = H * W;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (q >= pixels || r < 0 || r >= H || k < 0 || k >= W) return v;
        const uint16_t *p = x + (int64_t)(c * H + r) * W + k;
        uint32_t e[8];
#pragma unroll
        for (int i = 0; i < 8; i++, p += plane) e[i] = i < channels ? *p : 0u;
        v.x = e[0] | e[1] << 16;
        v.y = e[2] | e[3] << 16;
        v.z = e[4] | e[5] << 16;
        v.w = e[6] | e[7] << 16;
        return v;
    }
    __device__ __forceinline__ void store(uint16_t *patch, int round, uint4 v) const {
        const int q = pixel(round);
        if (q < pixels) *reinterpret_cast<uint4 *>(patch + q * PITCH + group(round) * 8) = v;
    }
    /* The rounds from `first` on. */
    __device__ __forceinline__ void fill(uint16_t *patch, int first, int c0) const {
#pragma unroll 1
        for (int i = first; i < rounds(); i++) store(patch, i, load(i, c0));
    }
};

/* dw[Cout,Cin,kh,kw] += and dbias[Cout] += (each NULL: skip) of dy[B,Cout,Ho,Wo] and x[B,Cin,H,W]. With conv->upsample the roles of dy and x in the
 * product are exchanged and the sixteen taps of the enlarging kernel are folded back to nine. */
template <typename T>
ladd_status conv_weight_gradients(const ladd_context *ctx, float *dw, float *dbias, const T *dy, const T *x, const ladd_conv *conv);

/* The convolution that carries dy of an enlarging one back to x: four taps an axis, stride 2. */
static inline ladd_conv conv_reversed(const ladd_conv *conv) {
    ladd_conv back = *conv;
    back.Cin = conv->Cout, back.H = conv->Ho, back.W = conv->Wo, back.Cout = conv->Cin, back.Ho = conv->H, back.Wo = conv->W;
    back.kh = back.kw = 4, back.stride = 2, back.upsample = 0;
    back.pad_top = back.pad_left = back.pad_bottom = back.pad_right = 1;
    return back;
}

#endif
