"""dtype="bfloat16" on the CPU: matrix products of factors rounded to bfloat16, everything else float32.

The case table runs on it too (test_kernels.py), with tolerances of its own; here the products are held to float64 products of rounded
factors, and models and a training step to what they give in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import support
import test_kernels
from numpy.typing import NDArray
from oracle import autodiff as ad
from support import MMDIT_CASES, mmdit_inputs, same_bits
from test_kernels import instruction_sets

import ladd
from ladd import _core, kernels

Array = NDArray[Any]
needs_bf16 = pytest.mark.skipif("avx512bf16" not in instruction_sets(), reason="this processor has no AVX512_BF16")


def rounded(x: Array) -> Array:
    """To the nearest bfloat16, ties to even, as float64."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def check_products() -> None:
    assert _core.backend_name() == "avx512bf16"
    for m, n, k in ((1, 1, 1), (2, 3, 5), (37, 65, 129), (130, 48, 64), (257, 100, 31), (300, 384, 1025), (80, 256, 256)):
        x, w, bias, dy = support.normal(1, m, k), support.normal(2, n, k), support.normal(3, n), support.normal(4, m, n)
        y, (dx, dw, dbias) = _core.linear_forward(x, w, bias), _core.linear_backward(dy, x, w)
        bound = 1e-6 * (1 + max(k, m, n) ** 0.5)
        support.assert_close(y, rounded(x) @ rounded(w).T + bias, bound, f"y {m}x{n}x{k}")
        support.assert_close(dx, rounded(dy) @ rounded(w), bound, f"dx {m}x{n}x{k}")
        support.assert_close(dw, rounded(dy).T @ rounded(x), bound, f"dw {m}x{n}x{k}")
        support.assert_close(dbias, dy.sum(0, dtype=np.float64), bound, f"dbias {m}x{n}x{k}")


def check_convolutions() -> None:
    for b, c, h, w, n, kernel, stride in ((2, 5, 9, 7, 3, 3, 1), (1, 70, 34, 40, 33, 3, 1), (3, 8, 8, 8, 64, 3, 2), (2, 200, 9, 21, 40, 1, 1)):
        pad, what = (kernel // 2,) * 4, f"{b}x{c}x{h}x{w} to {n}, kernel {kernel}, stride {stride}"
        x, weight, bias = support.normal(5, b, c, h, w), support.normal(6, n, c, kernel, kernel), support.normal(7, n)
        y = _core.conv2d_forward(x, weight, bias, stride, pad)
        dy = support.normal(8, *y.shape)
        leaves = support.leaves({"x": rounded(x), "w": rounded(weight), "bias": bias})
        wanted = ad.conv2d(leaves["x"], leaves["w"], leaves["bias"], stride, pad)
        wanted.backward(rounded(dy))
        support.assert_close(y, wanted.data, 1e-5, f"y {what}")
        dx, dw, dbias = _core.conv2d_backward(dy, x, weight, stride, pad)
        support.assert_close(dx, leaves["x"].grad, 1e-5, f"dx {what}")
        support.assert_close(dw, leaves["w"].grad, 1e-5, f"dw {what}")
        support.assert_close(dbias, dy.sum((0, 2, 3), dtype=np.float64), 1e-5, f"dbias {what}")


@needs_bf16
def test_products_are_those_of_rounded_factors() -> None:
    environment = {**os.environ, "LADD_CPU": "avx512bf16"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_bf16
@pytest.mark.parametrize("name", ["sd3", "sd35_medium"])
def test_transformer_close_to_float32(name: str) -> None:
    config, inputs = MMDIT_CASES[name][0], mmdit_inputs(name)
    values = [inputs[part] for part in ("latents", "sigma", "context", "pooled")]
    results = {}
    for dtype in ("float32", "bfloat16"):
        model = ladd.MMDiT(config, seed=3, dtype=dtype)
        assert model.dtype == dtype and all(value.dtype == np.float32 for value in model.state_dict().values())
        model.load_state_dict(support.seeded_weights({key: value.shape for key, value in model.state_dict().items()}, 1))
        out, pullback = model.vjp(*values)
        g = pullback(inputs["cotangent"])
        results[dtype] = {"velocity": out, "latents": g.latents, "context": g.context, "pooled": g.pooled, **model.gradients()}
        assert all(value.dtype == np.float32 for value in results[dtype].values())
    assert not same_bits(results["float32"]["velocity"], results["bfloat16"]["velocity"])
    for key, value in results["float32"].items():
        distance = np.linalg.norm(results["bfloat16"][key] - value) / max(np.linalg.norm(value), 1e-6)
        assert distance < (0.15 if key in model.gradients() else 0.05), f"{key}: {distance:.3f} of its length"


@needs_bf16
def test_one_and_two_threads_give_the_same_bits() -> None:
    config, inputs = MMDIT_CASES["sd3"][0], mmdit_inputs("sd3")
    model = ladd.MMDiT(config, seed=3, dtype="bfloat16")
    before, results = ladd.get_num_threads(), []
    try:
        for threads in (1, 2):
            ladd.set_num_threads(threads)
            model.zero_grad()
            out, pullback = model.vjp(*(inputs[part] for part in ("latents", "sigma", "context", "pooled")))
            g = pullback(inputs["cotangent"])
            results.append([out, g.latents, g.context, g.pooled, *(value.copy() for value in model.gradients().values())])
    finally:
        ladd.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@needs_bf16
def test_attention_of_rounded_factors() -> None:
    q, k, v, d_o = (support.normal(seed, 2, 37, 3, 16) for seed in range(4))
    exact = [x.astype(np.float64) for x in kernels.attention_forward(*(rounded(x).astype(np.float32) for x in (q, k, v)))]
    o, lse = kernels.attention_forward(q, k, v, dtype="bfloat16")
    support.assert_close(lse, exact[1], 1e-5, "lse")  # scores are sums of rounded factors
    support.assert_close(o, exact[0], 2.0**-8, "o")  # the probabilities are rounded once more
    assert not same_bits(o, kernels.attention_forward(q, k, v)[0])
    gradients = kernels.attention_backward(d_o, q, k, v, o, lse, dtype="bfloat16")
    for got, want in zip(gradients, kernels.attention_backward(d_o, q, k, v, *kernels.attention_forward(q, k, v)), strict=True):
        assert 0 < np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_attention_knows_its_dtypes() -> None:
    q = support.normal(0, 1, 2, 1, 4)
    for dtype, message in (
        ("half", "dtype: expected 'float32', 'bfloat16' or 'float16', got 'half'"),
        ("float16", "the CPU computes in float32, or with products in bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attention_forward(q, q, q, dtype=dtype)


def test_without_the_instructions_it_is_an_error() -> None:
    code = "import ladd, support; ladd.MMDiT(support.mmdit_config(), dtype='bfloat16')"
    environment = {**os.environ, "LADD_CPU": "plain", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: dtype bfloat16 on the CPU: expected a processor with AVX512_BF16" in done.stderr


if __name__ == "__main__":
    check_products()
    check_convolutions()
    test_kernels.test_one_and_two_threads_give_the_same_bits()
