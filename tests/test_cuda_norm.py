"""The device's norms, gates, transposes and optimizer beyond the case table: modulations and heads inside of wider rows, sums that
are added to, gradients that nobody asks for, results in the place of inputs, the CPU's numbers to the bit where they are
promised.
"""

from __future__ import annotations

import shutil

import cuda_core
import numpy as np
import pytest
from cuda_core import Core, device, rounded
from oracle import autodiff as ad
from support import assert_close, leaves, normal, same_bits

from ladd import _core

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

FORWARD = {"float32": 3e-6, "bfloat16": 1.05 * 2.0**-8, "float16": 1.05 * 2.0**-11}
BACKWARD = {"float32": 1e-5, "bfloat16": 1.1 * 2.0**-8, "float16": 1.1 * 2.0**-11}
ODD, EVEN = (2, 19, 37), (2, 33, 64)  # one kernel for any size, one with 16-byte accesses; more tokens than a block takes


def in_wide_rows(dtype: str, b: int, d: int, seed: int) -> np.ndarray:
    """Six modulations [B, 6, D] of which the kernels use two: rows of 6 D elements."""
    return rounded(normal(seed, b, 6, d), dtype)


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize("shape", [ODD, EVEN])
def test_layer_norm_with_modulations_in_wider_rows(dtype: str, shape: tuple[int, int, int]) -> None:
    b, n, d = shape
    mod, x, dy, before = in_wide_rows(dtype, b, d, 1), *(rounded(normal(seed, *shape), dtype) for seed in (2, 3, 4))
    size = 4 if dtype == "float32" else 2
    with Core(device(), dtype).call() as c:
        wide, dwide, y, dx = c.up(mod), c.new(mod.shape), c.new(shape), c.up(before)
        mean, rstd = c.new((b, n), "float32"), c.new((b, n), "float32")
        assert wide is not None and dwide.address is not None and wide.address is not None and dx is not None
        shift, scale, dshift, dscale = (a.address + i * d * size for a in (wide, dwide) for i in (2, 3))
        c("layer_norm_modulate_forward", y, mean, rstd, c.up(x), shift, scale, 6 * d, *shape, 1e-6)
        c("layer_norm_modulate_backward", dx, dshift, dscale, c.up(dy), c.up(x), mean, rstd, scale, 6 * d, *shape)
        got = {"y": c.down(y), "x": c.down(dx), "mod": c.down(dwide)}
        again = c.up(before.copy())
        c("layer_norm_modulate_backward", again, None, None, c.up(dy), c.up(x), mean, rstd, scale, 6 * d, *shape)
        assert same_bits(c.down(again), got["x"]), "dx without the modulations' gradients"
    t = leaves({"x": x, "shift": mod[:, 2], "scale": mod[:, 3]})
    wanted = ad.layer_norm(t["x"], 1e-6) * (t["scale"].reshape(b, 1, d) + 1.0) + t["shift"].reshape(b, 1, d)
    wanted.backward(dy)
    assert_close(got["y"], wanted.data, FORWARD[dtype], "y")
    assert_close(got["x"], before + t["x"].grad, BACKWARD[dtype], "dx, added to")
    assert_close(got["mod"][:, 2], t["shift"].grad, BACKWARD[dtype], "dshift")
    assert_close(got["mod"][:, 3], t["scale"].grad, BACKWARD[dtype], "dscale")
    assert np.isnan(got["mod"][:, [0, 1, 4, 5]]).all(), "modulations of others were written"


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize("shape", [ODD, EVEN])
def test_gate_in_wider_rows(dtype: str, shape: tuple[int, int, int]) -> None:
    b, _, d = shape
    mod, x, y, dout = in_wide_rows(dtype, b, d, 5), *(rounded(normal(seed, *shape), dtype) for seed in (6, 7, 8))
    size = 4 if dtype == "float32" else 2
    with Core(device(), dtype).call() as c:
        wide, dwide, out, dy = c.up(mod), c.new(mod.shape), c.up(x), c.new(shape)
        assert wide is not None and dwide.address is not None and wide.address is not None and out is not None
        gate, dgate = wide.address + 5 * d * size, dwide.address + 5 * d * size
        c("gate_residual_forward", out, out, c.up(y), gate, 6 * d, *shape)
        c("gate_residual_backward", dy, dgate, c.up(dout), c.up(y), gate, 6 * d, *shape)
        got = {"out": c.down(out), "y": c.down(dy), "mod": c.down(dwide)}
        alone = c.new(shape)
        c("gate_residual_backward", alone, None, c.up(dout), c.up(y), gate, 6 * d, *shape)
        assert same_bits(c.down(alone), got["y"]), "dy without the gate's gradient"
    g = mod[:, 5, None].astype(np.float64)
    assert_close(got["out"], x + g * y, FORWARD[dtype], "out")
    assert_close(got["y"], g * dout, FORWARD[dtype], "dy")
    assert_close(got["mod"][:, 5], (dout.astype(np.float64) * y).sum(axis=1), BACKWARD[dtype], "dgate")
    assert np.isnan(got["mod"][:, :5]).all(), "modulations of others were written"


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize(("rows", "heads", "dh"), [(70, 3, 64), (9, 2, 128), (40, 5, 20), (3, 1, 127)])
def test_heads_in_packed_rows(dtype: str, rows: int, heads: int, dh: int) -> None:
    """q of rows that hold q, k and v, two gaps wide; y in rows of its own; dx takes the place of dy; dw is added to."""
    row, d = 3 * heads * dh + 16, heads * dh
    packed, w, dy = rounded(normal(9, rows, row), dtype), rounded(normal(10, dh), dtype), rounded(normal(11, rows, d + 8), dtype)
    with Core(device(), dtype).call() as c:
        x, y, rstd, dw = c.up(packed), c.new((rows, d)), c.new((rows, heads), "float32"), c.new((dh,), "float32", 1.0)
        dx = c.up(dy)
        c("rms_norm_heads_forward", y, rstd, x, c.up(w), rows, heads, dh, row, d, 1e-6)
        c("rms_norm_heads_backward", dx, dw, dx, x, rstd, c.up(w), rows, heads, dh, row, d + 8, d + 8)
        got = {"y": c.down(y), "x": c.down(dx), "w": c.down(dw) - 1}
        alone = c.up(dy.copy())
        c("rms_norm_heads_backward", alone, None, alone, x, rstd, c.up(w), rows, heads, dh, row, d + 8, d + 8)
        assert same_bits(c.down(alone), got["x"]), "dx without dw"
    t = leaves({"x": packed[:, :d].reshape(rows, heads, dh), "w": w})
    wanted = ad.rms_norm(t["x"], t["w"], 1e-6)
    wanted.backward(dy[:, :d].reshape(rows, heads, dh))
    assert_close(got["y"], wanted.data.reshape(rows, d), FORWARD[dtype], "y")
    assert_close(got["x"][:, :d], t["x"].grad.reshape(rows, d), BACKWARD[dtype], "dx")
    assert_close(got["w"], t["w"].grad, 1e-5, "dw")
    assert same_bits(got["x"][:, d:], dy[:, d:]), "behind the heads"


def test_sizes_that_are_refused() -> None:
    core = Core(device())
    with pytest.raises(RuntimeError, match="a head size from 1 to 128 expected, got 129"):
        core.rms_norm_heads_forward(normal(1, 2, 1, 129), normal(2, 129))
    with pytest.raises(RuntimeError, match="a patch size between 1 and the image's 4 x 5 expected, got 6"):
        core.patch_gather(normal(1, 1, 1, 4, 5), 6)
    with pytest.raises(RuntimeError, match=r"at most 3 x 3 .*got 4 x 1"):
        core.add_position(normal(1, 1, 4, 8), normal(2, 3, 3, 8), (4, 1))
    with pytest.raises(RuntimeError, match="an even number of timestep features expected, got 7"):
        core.timestep_features(np.float32([0.5]), 7)
    flat = [normal(i, 5) for i in range(4)]
    for index, bad, message in ((0, np.nan, "finite lr"), (1, 1.0, "betas"), (3, 0.0, "positive eps"), (5, 0, "step of at least 1")):
        numbers = [1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0]
        numbers[index] = bad
        with pytest.raises(RuntimeError, match=message):
            core.adamw(*flat, *numbers)
    with pytest.raises(RuntimeError, match=r"a decay in \[0, 1\]"):
        core.ema(flat[0], flat[1], 1.5)


def test_the_optimizer_gives_the_cpus_bits() -> None:
    for shift in (0, 1):
        core = Core(device(), "float32", shift)
        here = [normal(i, 10_007) for i in range(4)]
        here[2] = np.square(here[2])
        there = [x.copy() for x in here]
        for step in (1, 2, 1000):
            numbers = (3e-4, 0.9, 0.999, 1e-8, 0.01, step, 0.3)
            _core.adamw(*here, *numbers)
            core.adamw(*there, *numbers)
            assert all(same_bits(a, b) for a, b in zip(here, there, strict=True)), step
            numbers = (3e-4, 0.0, *numbers[2:])
            _core.adamw(here[0], None, *here[2:], *numbers)
            core.adamw(there[0], None, *there[2:], *numbers)
            assert all(same_bits(a, b) for a, b in zip(here, there, strict=True)), step
        _core.ema(here[0], here[3], 0.9995)
        core.ema(there[0], there[3], 0.9995)
        assert same_bits(here[0], there[0])


def test_timestep_features_are_the_cpus_to_a_rounding() -> None:
    sigma = np.linspace(0, 1, 9).astype(np.float32)
    wanted = _core.timestep_features(sigma, 256)
    assert np.abs(Core(device()).timestep_features(sigma, 256) - wanted).max() <= 6e-8
    assert np.abs(Core(device(), "float16").timestep_features(sigma, 256) - wanted).max() <= 2.0**-12


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize("shape", [(2, 72, 136), (1, 8, 64), (3, 128, 8)])
def test_transpose_of_whole_vectors(dtype: str, shape: tuple[int, int, int]) -> None:
    x = rounded(normal(13, *shape), dtype)
    assert same_bits(Core(device(), dtype).transpose(x), x.transpose(0, 2, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sum_squares_shows_what_is_not_finite(bad: float) -> None:
    x = normal(12, 40_003)
    x[40_002] = bad
    assert not np.isfinite(Core(device()).sum_squares(x))


def test_timestep_features_of_more_samples_than_a_grids_second_axis_takes() -> None:
    """It ends at 65,535, and the emulator refuses a grid beyond as a device does."""
    sigma = np.linspace(0, 1, 70_000).astype(np.float32)
    assert np.abs(Core(device()).timestep_features(sigma, 6) - _core.timestep_features(sigma, 6)).max() <= 6e-8
