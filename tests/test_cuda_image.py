"""The device's convolutions, group norms and resampling beyond the case table: several tiles of pixels and channels, windows
of taps, strides, images enlarged on the way, gradients that are skipped or added to, groups of several slices. Run by the
emulator.
"""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

import cuda_core
import numpy as np
import pytest
from cuda_core import Conv, Core, device, rounded
from oracle import autodiff as ad
from support import assert_close, leaves, normal, same_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

TOLERANCE = {"float32": 5e-6, "bfloat16": 1.2 * 2.0**-8, "float16": 1.2 * 2.0**-11}


def sizes(x: np.ndarray, w: np.ndarray, stride: int, pad: tuple[int, int, int, int], upsample: int = 0) -> Conv:
    b, c_in, h, width = x.shape
    c_out, _, kh, kw = w.shape
    tall, wide = (1 + upsample) * h + pad[0] + pad[2], (1 + upsample) * width + pad[1] + pad[3]
    ho, wo = (tall - kh) // stride + 1, (wide - kw) // stride + 1
    return Conv(b, c_in, h, width, c_out, kh, kw, stride, *pad, ho, wo, upsample)


def convolve(dtype: str, x: np.ndarray, w: np.ndarray, bias: np.ndarray, dy: np.ndarray, conv: Conv) -> dict[str, np.ndarray]:
    """Forward and backward; parameter gradients start at 1."""
    core = Core(device(), dtype)
    with core.call() as c:
        y, dx, dw, db = c.new(dy.shape), c.new(x.shape), c.new(w.shape, "float32", 1.0), c.new(bias.shape, "float32", 1.0)
        c("conv2d_forward", y, c.up(x), c.up(w), c.up(bias), ctypes.byref(conv))
        c("conv2d_backward", dx, dw, db, c.up(dy), c.up(x), c.up(w), ctypes.byref(conv))
        return {"y": c.down(y), "x": c.down(dx), "w": c.down(dw) - 1, "bias": c.down(db) - 1}


def check(
    dtype: str, shape: tuple[int, ...], c_out: int, kernel: tuple[int, int], stride: int, pad: tuple[int, int, int, int], upsample: int = 0
) -> None:
    x, w = (
        rounded(normal(1, *shape), dtype),
        rounded(normal(2, c_out, shape[1], *kernel) / np.float32(np.sqrt(shape[1] * kernel[0] * kernel[1])), dtype),
    )
    bias, conv = rounded(normal(3, c_out), dtype), sizes(x, w, stride, pad, upsample)
    dy = rounded(normal(4, shape[0], c_out, conv.Ho, conv.Wo), dtype)
    t = leaves({"x": x, "w": w, "bias": bias})
    wanted = ad.conv2d(ad.upsample2x(t["x"]) if upsample else t["x"], t["w"], t["bias"], stride, pad)
    wanted.backward(dy)
    got = convolve(dtype, x, w, bias, dy, conv)
    # A folded kernel's taps are sums of weights, rounded once more; sums over all pixels are float32.
    tolerance = TOLERANCE[dtype] * (2 if upsample else 1)
    assert_close(got["y"], wanted.data, tolerance, "y")
    assert_close(got["x"], t["x"].grad, tolerance, "dx", 0.3)  # of one pixel all taps may cancel
    assert_close(got["w"], t["w"].grad, 1e-5, "dw")
    assert_close(got["bias"], t["bias"].grad, 1e-5, "dbias")


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize(
    ("shape", "c_out", "kernel", "stride", "pad"),
    [
        ((1, 40, 9, 24), 70, (3, 3), 1, (1, 1, 1, 1)),  # two chunks of channels, rows that are read 16 bytes at a time
        ((2, 7, 16, 17), 130, (1, 1), 1, (0, 0, 0, 0)),  # two tiles of output channels, two of columns
        ((1, 130, 5, 8), 9, (1, 1), 1, (0, 0, 0, 0)),  # five chunks, one tap
        ((1, 6, 13, 18), 20, (3, 3), 2, (0, 0, 1, 1)),  # the autoencoder's downsampling
        ((1, 9, 10, 12), 5, (4, 4), 2, (1, 1, 1, 1)),  # windows of two by four taps
        ((1, 3, 9, 11), 4, (5, 2), 3, (2, 0, 1, 1)),  # nine phases
        ((1, 2, 40, 40), 3, (17, 17), 8, (3, 3, 3, 3)),  # a patch that no shared memory holds
    ],
)
def test_convolution(
    dtype: str, shape: tuple[int, ...], c_out: int, kernel: tuple[int, int], stride: int, pad: tuple[int, int, int, int]
) -> None:
    check(dtype, shape, c_out, kernel, stride, pad)


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize(("shape", "c_out"), [((1, 1, 1, 1), 1), ((2, 5, 3, 9), 7), ((1, 34, 8, 16), 18)])
def test_convolution_of_an_enlarged_image(dtype: str, shape: tuple[int, ...], c_out: int) -> None:
    check(dtype, shape, c_out, (3, 3), 1, (1, 1, 1, 1), upsample=1)


def test_a_stride_beyond_the_kernel_leaves_zeros() -> None:
    x, w, dy = normal(1, 1, 2, 5, 6), normal(2, 3, 2, 1, 1), normal(3, 1, 3, 3, 3)
    got = convolve("bfloat16", x, w, normal(4, 3), dy, sizes(x, w, 2, (0, 0, 0, 0)))
    assert np.all(got["x"][:, :, 1::2] == 0) and np.all(got["x"][:, :, :, 1::2] == 0) and np.all(got["x"][:, :, ::2, ::2] != 0)


@pytest.mark.parametrize("upsample", [0, 1])
def test_gradients_that_nobody_wants_are_skipped(upsample: int) -> None:
    x, w, core = normal(1, 1, 3, 4, 8), normal(2, 2, 3, 3, 3), Core(device(), "bfloat16")
    conv = sizes(x, w, 1, (1, 1, 1, 1), upsample)
    dy = normal(3, 1, 2, conv.Ho, conv.Wo)
    whole = convolve("bfloat16", x, w, normal(4, 2), dy, conv)
    with core.call() as c:
        dx, dw, db = c.new(x.shape), c.new(w.shape, "float32", 1.0), c.new((2,), "float32", 1.0)
        for wanted in ((dx, None, None), (None, dw, None), (None, None, db), (None, None, None)):
            c("conv2d_backward", *wanted, c.up(dy), c.up(x), c.up(w), ctypes.byref(conv))
        assert same_bits(c.down(dx), whole["x"]) and same_bits(c.down(dw) - 1, whole["w"]) and same_bits(c.down(db) - 1, whole["bias"])
        y, unbiased = c.new(dy.shape), c.new(dy.shape)
        c("conv2d_forward", y, c.up(x), c.up(w), c.up(np.zeros(2, np.float32)), ctypes.byref(conv))
        c("conv2d_forward", unbiased, c.up(x), c.up(w), None, ctypes.byref(conv))
        assert same_bits(c.down(y), c.down(unbiased))


def test_impossible_convolutions_are_errors() -> None:
    x, w, core = normal(1, 1, 3, 4, 8), normal(2, 2, 3, 3, 3), Core(device())
    right = sizes(x, w, 1, (1, 1, 1, 1))
    for field, value in (("stride", 0), ("Ho", 5), ("Cin", 0), ("upsample", 1)):
        conv = Conv.from_buffer_copy(right)
        setattr(conv, field, value)
        with core.call() as c, pytest.raises(RuntimeError, match="convolution"):
            c("conv2d_forward", c.new((1, 2, 4, 8)), c.up(x), c.up(w), None, ctypes.byref(conv))


def group(dtype: str, x: np.ndarray, groups: int, silu: bool, in_place: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Forward and backward with gradients of parameters that start at 1, and what float64 says."""
    core, (b, channels, length) = Core(device(), dtype), x.shape
    gamma, beta, dy = rounded(normal(6, channels), dtype), rounded(normal(7, channels), dtype), rounded(normal(8, *x.shape), dtype)
    t = leaves({"x": x, "gamma": gamma, "beta": beta})
    wanted = ad.group_norm(t["x"], t["gamma"], t["beta"], groups, 1e-5)
    wanted = ad.silu(wanted) if silu else wanted
    wanted.backward(dy)
    with core.call() as c:
        y, mean, rstd = c.new(x.shape), c.new((b, groups), "float32"), c.new((b, groups), "float32")
        c("group_norm_forward", y, mean, rstd, c.up(x), c.up(gamma), c.up(beta), b, channels, length, groups, 1e-5, silu)
        dx = c.up(dy) if in_place else c.new(x.shape)
        dgamma, dbeta = c.new((channels,), "float32", 1.0), c.new((channels,), "float32", 1.0)
        c("group_norm_backward", dx, dgamma, dbeta, c.up(dy), c.up(x), mean, rstd, c.up(gamma), c.up(beta), b, channels, length, groups, silu)
        got = {"y": c.down(y), "x": c.down(dx), "gamma": c.down(dgamma) - 1, "beta": c.down(dbeta) - 1}
    return got, {"y": wanted.data, **{name: leaf.grad for name, leaf in t.items()}}


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "silu", "mean"),
    [
        ((2, 6, 5000), 2, True, 0),  # several parts of a channel
        ((1, 4, 9000), 1, True, 0),  # several slices of a group
        ((1, 3, 2741), 1, False, 20),  # slices without vectors, far from zero
        ((2, 64, 1), 32, False, 0),
    ],
)
def test_group_norm(dtype: str, shape: tuple[int, ...], groups: int, silu: bool, mean: float) -> None:
    x = rounded(normal(5, *shape) + np.float32(mean), dtype)
    got, wanted = group(dtype, x, groups, silu, in_place=False)
    for name, value in wanted.items():
        far = 1e-4 if mean else 0
        assert_close(got[name], value, {"y": TOLERANCE[dtype], "x": 2 * TOLERANCE[dtype]}.get(name, 2e-5) + far, name, 1e-2)
    again, _ = group(dtype, x, groups, silu, in_place=True)
    assert all(same_bits(again[name], got[name]) for name in got)


def test_groups_that_do_not_divide_the_channels_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="divisible by its 3 groups expected, got 4"):
        Core(device()).group_norm_forward(normal(1, 1, 4, 5), normal(2, 4), normal(3, 4), 3)


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (2, 1, 3, 5)])
def test_resampling(dtype: str, shape: tuple[int, ...]) -> None:
    core, x = Core(device(), dtype), rounded(normal(1, *shape), dtype)
    y = core.upsample2x_forward(x)
    assert same_bits(y, x.repeat(2, axis=2).repeat(2, axis=3))
    wanted = sum(y[:, :, i::2, j::2].astype(np.float64) for i in (0, 1) for j in (0, 1))
    assert_close(core.upsample2x_backward(y), wanted, TOLERANCE[dtype])
