/* What every device's convolution derives from a ladd_conv: whether it can be, and how the gradient of its input falls apart into phases. */
#ifndef LADD_CONV_H
#define LADD_CONV_H
#include "backend.h"

static inline ladd_status ladd_conv_check(const ladd_conv *c) {
    if (c->B < 1 || c->Cin < 1 || c->H < 1 || c->W < 1 || c->Cout < 1 || c->kh < 1 || c->kw < 1 || c->stride < 1 || c->pad_top < 0 ||
        c->pad_left < 0 || c->pad_bottom < 0 || c->pad_right < 0)
        return ladd_fail(LADD_ERR_VALUE,
                         "convolution: positive sizes and stride expected, got B %d, Cin %d, H %d, W %d, Cout %d, kernel %d by %d, stride %d", c->B,
                         c->Cin, c->H, c->W, c->Cout, c->kh, c->kw, c->stride);
    if (c->upsample && (c->kh != 3 || c->kw != 3 || c->stride != 1 || c->pad_top != 1 || c->pad_left != 1 || c->pad_bottom != 1 || c->pad_right != 1))
        return ladd_fail(LADD_ERR_VALUE, "convolution: a 3 by 3 kernel of stride 1 and padding 1 expected after upsampling, got %d by %d, stride %d",
                         c->kh, c->kw, c->stride);
    int64_t scale = c->upsample ? 2 : 1;
    int64_t room_h = scale * c->H + c->pad_top + c->pad_bottom - c->kh, room_w = scale * c->W + c->pad_left + c->pad_right - c->kw;
    if (room_h < 0 || room_w < 0 || c->Ho != room_h / c->stride + 1 || c->Wo != room_w / c->stride + 1)
        return ladd_fail(LADD_ERR_VALUE, "convolution: a kernel of %d by %d with stride %d cannot turn a padded %lld by %lld image into %d by %d",
                         c->kh, c->kw, c->stride, (long long)(room_h + c->kh), (long long)(room_w + c->kw), c->Ho, c->Wo);
    if ((int64_t)c->kh * c->kw > 1 << 12)
        return ladd_fail(LADD_ERR_VALUE, "convolution: a kernel of at most 4096 taps expected, got %d by %d", c->kh, c->kw);
    return LADD_OK;
}

/* Taps k of one axis that reach the inputs phase, phase + s, ...: those with k = (phase + pad) mod s. The input number m of the phase reads output
 * m + (phase + pad - k)/s; the largest such tap comes first in the window. */
typedef struct ladd_conv_axis {
    int taps, last_tap, origin, grid;
} ladd_conv_axis;

static inline ladd_conv_axis ladd_conv_phase(int phase, int pad, int k, int s, int size) {
    int first = (phase + pad) % s;
    ladd_conv_axis a;
    a.taps = first < k ? (k - 1 - first) / s + 1 : 0;
    a.grid = phase < size ? (size - phase - 1) / s + 1 : 0;
    a.last_tap = first + (a.taps - 1) * s;
    a.origin = a.taps ? (phase + pad - a.last_tap) / s : 0; /* exact, may be negative */
    return a;
}

#endif
