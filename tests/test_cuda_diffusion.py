"""The device's random numbers, sampler steps, losses, spectral norm and heads' last layer beyond the case table: the CPU's
numbers to the bit, more samples than a launch takes, what NaN and a zero weight do, gradients that are skipped or added to.
Run by the emulator.
"""

from __future__ import annotations

import shutil

import cuda_core
import numpy as np
import pytest
from cuda_core import Core, device, rounded
from support import assert_close, normal, same_bits

from ladd import _core

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


@pytest.mark.parametrize("shape", [(3, 4099), (2, 4, 32, 32), (1, 1)])
def test_normal_numbers_are_the_cpus_to_the_bit(shape: tuple[int, ...]) -> None:
    key, samples = (2**63 + 5, 7, 2**40 + 1), (np.arange(shape[0]) * 1_000_003 + 2**35)[::-1].copy()
    wanted = _core.normal(shape, *key, samples)
    assert same_bits(Core(device()).normal(shape, *key, samples), wanted)
    for dtype in ("bfloat16", "float16"):
        assert same_bits(Core(device(), dtype).normal(shape, *key, samples), rounded(wanted, dtype))


def test_renoised_latents_are_the_cpus_to_the_bit() -> None:
    x0, t = normal(1, 3, 4, 16, 16), np.float32([0.1, 0.75, 1])
    for got, wanted in zip(Core(device()).renoise(x0, t, 3, 2, 1, None, True), _core.renoise(x0, t, 3, 2, 1, None, True), strict=True):
        assert same_bits(got, wanted)


def test_more_samples_than_a_launch_takes() -> None:
    """Row 64 and those behind it are another launch; they have their own times and sample numbers."""
    core, t = Core(device()), np.linspace(0, 1, 131).astype(np.float32)
    x, y = normal(1, 131, 8), normal(2, 131, 8)
    column = t[:, None]
    assert same_bits(core.normal((131, 8), 1, 2), _core.normal((131, 8), 1, 2))
    assert same_bits(core.renoise(x, t, 1, 2), _core.renoise(x, t, 1, 2))
    assert_close(core.interpolate(x, y, t), (1 - column) * x.astype(np.float64) + column * y, 2e-7)
    assert_close(core.predict_x0(x, y, t), x - column.astype(np.float64) * y, 2e-7)
    assert same_bits(core.row_scale(x, t), x * column)


@pytest.mark.parametrize("loss", ["hinge", "logistic", "lsgan", "bce"])
@pytest.mark.parametrize("role", ["real", "fake", "generator"])
def test_losses_are_the_cpus(loss: str, role: str) -> None:
    """Several blocks' partial sums; logits on which softplus and its slope would overflow or vanish."""
    logits = np.concatenate([normal(3, 2500) * 3, np.float32([0, 1, -1, 90, -90, 1e4, -1e4])])
    value, dlogits = Core(device()).adversarial_loss(logits, loss, role, 0.7)
    wanted, dwanted = _core.adversarial_loss(logits, loss, role, 0.7)
    assert_close(np.float64([value]), np.float64([wanted]), 1e-12)
    assert_close(dlogits, dwanted, 2e-7)


def test_a_loss_of_nan_is_nan() -> None:
    logits = normal(3, 300)
    logits[299] = np.nan
    for loss in ("hinge", "logistic", "lsgan", "bce"):
        for role in ("real", "fake"):
            value, dlogits = Core(device()).adversarial_loss(logits, loss, role, 1.0)
            assert np.isnan(value) and np.isnan(dlogits[299]) and np.isfinite(dlogits[:299]).all()


def test_impossible_losses_are_errors() -> None:
    with Core(device()).call() as c:
        value, logits = c.new((3,), "float64"), c.up(normal(1, 4))
        for loss, role, n, words in ((4, 0, 4, "got 4 and 0"), (0, 3, 4, "got 0 and 3"), (0, 0, 0, "at least 1 logit expected, got 0")):
            with pytest.raises(RuntimeError, match=words):
                c("adversarial_loss", value, None, logits, loss, role, 1.0, n)


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
def test_spectral_norm_is_the_cpus(dtype: str) -> None:
    """Rows and columns beyond one block and one warp, several iterations, a gradient that is added to."""
    w, u = normal(1, 70, 144), normal(2, 70)
    u /= np.linalg.norm(u)
    core, wanted_u = Core(device(), dtype), u.copy()
    wanted, v, sigma = _core.spectral_norm_forward(w, wanted_u, 4)
    with core.call() as c:
        w_hat, got_u, got_v, got_sigma = c.new(w.shape), c.up(u, "float32"), c.new((144,), "float32"), c.new((1,), "float32")
        c("spectral_norm_forward", w_hat, got_u, got_v, got_sigma, c.up(w, "float32"), 70, 144, 4)
        half = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        assert_close(c.down(w_hat), wanted, 5e-6 + half)
        assert_close(c.down(got_u), wanted_u, 5e-6)
        assert_close(c.down(got_v), v, 5e-6)
        assert_close(c.down(got_sigma), np.float32([sigma]), 2e-6)
        dw, dw_hat = c.new(w.shape, "float32", 1.0), normal(3, 70, 144)
        c("spectral_norm_backward", dw, c.up(dw_hat, "float32"), w_hat, got_u, got_v, got_sigma, 70, 144)
        assert_close(c.down(dw) - 1, _core.spectral_norm_backward(dw_hat, wanted, wanted_u, v, sigma), 1e-5 + half)


def test_a_weight_without_a_direction_becomes_nan() -> None:
    """The CPU refuses it; the device does not wait to find out, and the losses show it."""
    core, u = Core(device()), np.full(5, 5**-0.5, np.float32)
    for w in (np.zeros((5, 12), np.float32), np.full((5, 12), np.inf, np.float32)):
        for iterations in (0, 1):
            assert np.isnan(core.spectral_norm_forward(w, u.copy(), iterations)[0]).all()
    with core.call() as c, pytest.raises(RuntimeError, match="at least 1 x 1 and iterations of at least 0 expected, got 5 x 12 and -1"):
        c("spectral_norm_forward", *(c.new((60,)) for _ in range(4)), c.up(w), 5, 12, -1)


def test_channel_dot_skips_what_nobody_wants_and_adds_the_bias() -> None:
    core, x, e, dy = Core(device(), "bfloat16"), normal(1, 2, 9, 40), normal(2, 2, 9), normal(3, 2, 40)
    dx, de, dbias = core.channel_dot_backward(dy, x, e)
    with core.call() as c:
        given = c.up(dy), c.up(x), c.up(e), 2, 9, 40
        only_x, only_e, only_bias = c.new(x.shape), c.new(e.shape), c.new((1,), "float32", 10.0)
        c("channel_dot_backward", only_x, None, None, *given)
        c("channel_dot_backward", None, only_e, None, *given)
        c("channel_dot_backward", None, None, only_bias, *given)
        assert same_bits(c.down(only_x), dx) and same_bits(c.down(only_e), de)
        assert_close(c.down(only_bias) - 10, dbias, 1e-5)
