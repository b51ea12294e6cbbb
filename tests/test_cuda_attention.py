"""The device's attention beyond the case table: q, k and v side by side in one buffer as the models keep them, sizes around the
tiles, streams of no tokens, head sizes of the tensor cores' kernels and of the plain ones. Run by the emulator.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import cuda_emulator
import numpy as np
import pytest
from cuda_core import Core, Stream, StreamGrad, device, rounded
from support import normal

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

GUARD = 8  # elements behind each row's q, k and v that no kernel may touch
TOLERANCE = {"float32": 3e-6, "bfloat16": 2.0**-6, "float16": 2.0**-9}


def attend(dtype: str, heads: int, dh: int, inputs: Sequence[np.ndarray], douts: Sequence[np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """Forward and backward over streams [B, n, 3*heads*dh + GUARD]; results in the joint order of tokens."""
    core = Core(device(), dtype)
    size, b, width = core.context.act_size, inputs[0].shape[0], inputs[0].shape[2]
    tokens = sum(x.shape[1] for x in inputs)
    streams, grads = [], []
    with core.call() as c:
        kept = []
        for x, dout in zip(inputs, douts, strict=True):
            n = x.shape[1]
            qkv, dqkv, d_o, o = c.up(x), c.new(x.shape), c.up(dout), c.new((b, n, heads * dh))
            assert qkv is not None and d_o is not None and qkv.address is not None and dqkv.address is not None
            part = [heads * dh * size * i for i in range(3)]
            streams.append((*(qkv.address + p for p in part), width, n * width, o.address, heads * dh, n * heads * dh, n))
            grads.append((*(dqkv.address + p for p in part), d_o.address))
            kept.append((o, dqkv))
        lse = c.new((b, heads, tokens), "float32")
        given, wanted = (Stream * len(streams))(*streams), (StreamGrad * len(streams))(*grads)
        c("attention_forward", given, len(streams), lse, b, heads, dh, scale)
        c("attention_backward", wanted, given, len(streams), lse, b, heads, dh, scale)
        o = np.concatenate([c.down(o).reshape(b, -1, heads, dh) for o, _ in kept], axis=1)
        dqkv = np.concatenate([c.down(g) for _, g in kept], axis=1)
        assert np.isnan(dqkv[..., width - GUARD :]).all(), "elements behind dv were written"
        dq, dk, dv = (dqkv[..., i * heads * dh : (i + 1) * heads * dh].reshape(b, -1, heads, dh) for i in range(3))
        return {"o": o, "lse": c.down(lse), "dq": dq, "dk": dk, "dv": dv}


def float64(heads: int, dh: int, inputs: Sequence[np.ndarray], douts: Sequence[np.ndarray], scale: float) -> dict[str, np.ndarray]:
    x = np.concatenate(inputs, axis=1).astype(np.float64)
    b = x.shape[0]
    q, k, v = (x[..., i * heads * dh : (i + 1) * heads * dh].reshape(b, -1, heads, dh) for i in range(3))
    do = np.concatenate(douts, axis=1).astype(np.float64).reshape(b, -1, heads, dh)
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    top = s.max(axis=-1, keepdims=True)
    lse = top + np.log(np.exp(s - top).sum(axis=-1, keepdims=True))
    p = np.exp(s - lse)
    dp = np.einsum("bqhd,bkhd->bhqk", do, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
    return {
        "o": np.einsum("bhqk,bkhd->bqhd", p, v),
        "lse": lse[..., 0],
        "dq": np.einsum("bhqk,bkhd->bqhd", ds, k),
        "dk": np.einsum("bhqk,bqhd->bkhd", ds, q),
        "dv": np.einsum("bhqk,bqhd->bkhd", p, do),
    }


def drawn(dtype: str, b: int, heads: int, dh: int, tokens: Sequence[int], size: float = 1.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    width = 3 * heads * dh + GUARD
    inputs = [rounded(normal(30 + i, b, n, width), dtype) for i, n in enumerate(tokens)]
    for x in inputs:
        x[..., : heads * dh] = rounded(x[..., : heads * dh] * size, dtype)
    return inputs, [rounded(normal(40 + i, b, n, heads * dh), dtype) for i, n in enumerate(tokens)]


def check(dtype: str, b: int, heads: int, dh: int, tokens: Sequence[int], scale: float | None = None, size: float = 1.0) -> None:
    inputs, douts = drawn(dtype, b, heads, dh, tokens, size)
    scale = dh**-0.5 if scale is None else scale
    wanted = float64(heads, dh, inputs, douts, scale)
    for name, value in attend(dtype, heads, dh, inputs, douts, scale).items():
        allowed = 3e-6 if name == "lse" else TOLERANCE[dtype]
        yardstick = max(np.abs(wanted[name]).max(), 1.0)  # one token has gradients of 0, which are differences of ones
        error = np.abs(value - wanted[name]).max() / yardstick
        assert error <= allowed, f"{name}: {error:.2e} of the largest value, {allowed:.2e} allowed"


@pytest.mark.parametrize("dh", [8, 40, 64, 96, 128])
@pytest.mark.parametrize("tokens", [(1,), (17, 3), (64, 16)])
def test_head_sizes(dh: int, tokens: tuple[int, ...]) -> None:
    check("bfloat16", 1, 1, dh, tokens)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dh", [40, 64, 128])
def test_other_types(dtype: str, dh: int) -> None:
    check(dtype, 1, 2, dh, (17, 3))


@pytest.mark.parametrize("dh", [64, 128])
def test_several_tiles(dh: int) -> None:
    check("bfloat16", 1, 1, dh, (129, 77))


@pytest.mark.parametrize("tokens", [(0, 20), (70, 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_of_no_tokens(dtype: str, tokens: tuple[int, int]) -> None:
    check(dtype, 2, 1, 16, tokens)


@pytest.mark.parametrize("dh", [1, 20, 520])
def test_heads_that_fit_no_tensor_core_tile(dh: int) -> None:
    check("bfloat16", 1, 1, dh, (33, 5))


@pytest.mark.parametrize(("dh", "tokens"), [(136, (33, 5)), (264, (70,)), (512, (10,)), (200, (129, 1))])
def test_wide_heads(dh: int, tokens: tuple[int, ...]) -> None:
    check("bfloat16", 1, 1, dh, tokens)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scales_of_zero_and_below(scale: float) -> None:
    check("bfloat16", 1, 1, 16, (70, 9), scale)


def test_scores_far_beyond_what_exp_can_hold() -> None:
    check("float16", 1, 1, 64, (130,), size=30.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_streams_meet_does_not_change_a_bit(dtype: str) -> None:
    inputs, douts = drawn(dtype, 1, 1, 64, (90,))
    whole = attend(dtype, 1, 64, inputs, douts, 0.125)
    for cut in (1, 64):
        parts = [[np.ascontiguousarray(part) for part in np.split(x[0], [cut], axis=1)] for x in (inputs, douts)]
        split = attend(dtype, 1, 64, *parts, 0.125)
        for name, value in whole.items():
            assert np.array_equal(value, split[name]), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    inputs, douts = drawn("bfloat16", 3, 1, 64, (65, 2))
    together = attend("bfloat16", 1, 64, inputs, douts, 0.125)
    alone = attend("bfloat16", 1, 64, [x[1:2].copy() for x in inputs], [x[1:2].copy() for x in douts], 0.125)
    for name, value in alone.items():
        assert np.array_equal(together[name][1:2], value), name


def test_rows_too_far_apart_are_refused() -> None:
    core = Core(device(), "float32")
    with core.call() as c:
        x = c.up(np.zeros((1, 4), np.float32))
        assert x is not None
        stream = (Stream * 1)((x.address, x.address, x.address, 2**31, 0, x.address, 4, 4, 1))
        with pytest.raises(RuntimeError, match=r"strides of a row below 2\*\*31 expected, got 2147483648 and 4"):
            c("attention_forward", stream, 1, c.new((1, 1, 1), "float32"), 1, 1, 4, 1.0)


@pytest.mark.parametrize("tokens", [(20, 13), (40,), (0, 17), (33, 0)])
def test_the_second_engine_gets_one_stream_and_gives_two(monkeypatch: pytest.MonkeyPatch, tokens: tuple[int, ...]) -> None:
    """cuDNN's place is taken by our kernels, so nothing but the copies to one stream and back may differ: not a bit does."""
    if ctypes.addressof(device().api) != cuda_emulator.api("kernels"):
        pytest.skip("cuDNN itself would answer")
    inputs, douts = drawn("bfloat16", 2, 3, 24, tokens)
    wanted = attend("bfloat16", 3, 24, inputs, douts, 0.2)
    calls = ctypes.c_int.in_dll(cuda_emulator.library("kernels"), "ladd_emulator_cudnn_calls")
    before = calls.value
    monkeypatch.setenv("LADD_CUDA_ATTENTION", "cudnn")
    for name, value in attend("bfloat16", 3, 24, inputs, douts, 0.2).items():
        assert np.array_equal(value, wanted[name]), name
    assert calls.value == before + 2


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, douts = drawn("bfloat16", 1, 1, 8, (20,))
    monkeypatch.setenv("LADD_CUDA_ATTENTION", "flash")
    with pytest.raises(RuntimeError, match="LADD_CUDA_ATTENTION: cudnn or ladd expected, got flash"):
        attend("bfloat16", 1, 8, inputs, douts, 1.0)
