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
    CONV_MAX_PATCH = 4096,
    CONV_PACKED_SLOT = 0, /* scratch: packed weights, partial gradients */
    CONV_PARTS_SLOT = 1
};

/* How tiles lie on a grid of output pixels and what part of the image they see. */
struct conv_tiling {
    int log_tw, rows, cols; /* tile width 2^log_tw; tiles down and across */
    int Wq, patch;          /* columns and pixels of a patch */
    uint32_t divide;        /* q / Wq = q * divide >> 20 for q < CONV_MAX_PATCH */
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

/* Channels c..c+7 of pixel (row, col) of a sample x[C,H,W] of two-byte elements; zero where there is none. */
__device__ __forceinline__ uint4 conv_gather(const uint16_t *x, int C, int H, int W, int c, int row, int col) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row < 0 || row >= H || col < 0 || col >= W) return v;
    const int64_t plane = (int64_t)H * W;
    const uint16_t *p = x + c * plane + (int64_t)row * W + col;
    uint32_t e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = c + i < C ? p[i * plane] : 0u;
    v.x = e[0] | e[1] << 16;
    v.y = e[2] | e[3] << 16;
    v.z = e[4] | e[5] << 16;
    v.w = e[6] | e[7] << 16;
    return v;
}

/* Fills patches [pixel][CHUNK channels + skew]: item i is eight channels of one pixel, and neighbouring threads take neighbouring pixels. */
template <int CHUNK>
struct conv_patch {
    enum { PITCH = CHUNK + CONV_SKEW, GROUPS = CHUNK / 8 };
    const uint16_t *x; /* the sample */
    int C, H, W, Wq, pixels, row, col;
    uint32_t divide;
    __device__ __forceinline__ int items() const { return pixels * GROUPS; }
    __device__ __forceinline__ uint4 load(int item, int c0) const {
        const int group = item / pixels, q = item - group * pixels, r = (int)((uint32_t)q * divide >> 20);
        return conv_gather(x, C, H, W, c0 + group * 8, row + r, col + q - r * Wq);
    }
    __device__ __forceinline__ void store(uint16_t *patch, int item, uint4 v) const {
        const int group = item / pixels, q = item - group * pixels;
        *reinterpret_cast<uint4 *>(patch + q * PITCH + group * 8) = v;
    }
    __device__ __forceinline__ void fill(uint16_t *patch, int first, int c0) const {
#pragma unroll 1
        for (int i = first + (int)threadIdx.x; i < items(); i += CONV_THREADS) store(patch, i, load(i, c0));
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
