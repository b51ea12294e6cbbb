"""`ladd.kernels`: each backward is the gradient of its forward, through the shapes and names of the public functions.

The kernels' own precision is test_kernels.py's subject; here a directional difference quotient tells a forgotten term, a swapped result
or a wrong reshape, all of which are off by far more than its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from ladd import kernels as k

Array = np.ndarray
STEP = 1e-2


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


Inputs = dict[str, Array]
Gradients = Sequence[Array | None]
Q = {name: normal(2, 5, 3, 4, seed=i) for i, name in enumerate("qkv")}
JOINT = {**Q, **{name + "2": normal(2, 3, 3, 4, seed=i + 3) for i, name in enumerate("qkv")}}
X, W, B = normal(2, 3, 4), normal(5, 4), normal(5)
IMAGE = normal(2, 4, 5, 6)


def joint_forward(q: Array, k2: Array, v: Array, **others: Array) -> list[Array]:
    return k.joint_attention_forward([(q, others["k"], v), (others["q2"], k2, others["v2"])])[0]


def joint_backward(d: Sequence[Array], i: Inputs) -> Gradients:
    streams = [(i["q"], i["k"], i["v"]), (i["q2"], i["k2"], i["v2"])]
    outs, lse = k.joint_attention_forward(streams)
    first, second = k.joint_attention_backward(d, streams, outs, lse)
    return [*first, *second]


# name -> (inputs, forward of them, backward: (cotangent, inputs) -> gradients in the inputs' order)
CASES: dict[str, tuple[Inputs, Callable[..., Any], Callable[[Any, Inputs], Gradients]]] = {
    "attention": (
        Q,
        lambda **i: k.attention_forward(**i, scale=0.7)[0],
        lambda d, i: k.attention_backward(d, *i.values(), *k.attention_forward(**i, scale=0.7), scale=0.7),
    ),
    "joint_attention": (JOINT, joint_forward, joint_backward),
    "layer_norm_modulate": (
        {"x": X, "shift": normal(2, 4), "scale": normal(2, 4, seed=1)},
        lambda **i: k.layer_norm_modulate_forward(**i)[0],
        lambda d, i: k.layer_norm_modulate_backward(d, i["x"], *k.layer_norm_modulate_forward(**i)[1:], i["scale"]),
    ),
    "layer_norm": (
        {"x": X},
        lambda x: k.layer_norm_modulate_forward(x)[0],
        lambda d, i: k.layer_norm_modulate_backward(d, i["x"], *k.layer_norm_modulate_forward(i["x"])[1:])[:1],
    ),
    "gate_residual": (
        {"x": X, "y": normal(2, 3, 4, seed=1), "gate": normal(2, 4)},
        k.gate_residual_forward,
        lambda d, i: k.gate_residual_backward(d, i["y"], i["gate"]),
    ),
    "rms_norm": (
        {"x": X, "weight": normal(4)},
        lambda **i: k.rms_norm_forward(**i)[0],
        lambda d, i: k.rms_norm_backward(d, i["x"], k.rms_norm_forward(**i)[1], i["weight"]),
    ),
    "group_norm": (
        {"x": IMAGE, "weight": normal(4), "bias": normal(4, seed=1)},
        lambda **i: k.group_norm_forward(**i, groups=2)[0],
        lambda d, i: k.group_norm_backward(d, i["x"], *k.group_norm_forward(**i, groups=2)[1:], i["weight"], i["bias"]),
    ),
    "group_norm_silu": (
        {"x": IMAGE, "weight": normal(4), "bias": normal(4, seed=1)},
        lambda **i: k.group_norm_forward(**i, groups=1, silu=True)[0],
        lambda d, i: k.group_norm_backward(d, i["x"], *k.group_norm_forward(**i, groups=1, silu=True)[1:], i["weight"], i["bias"], silu=True),
    ),
    "spectral_norm": (
        {"weight": normal(3, 2, 2)},
        lambda weight: k.spectral_norm_forward(weight, np.array([0.6, 0.0, 0.8]), iterations=0)[0],
        lambda d, i: [k.spectral_norm_backward(d, *k.spectral_norm_forward(i["weight"], np.array([0.6, 0.0, 0.8]), iterations=0))],
    ),
    "linear": ({"x": X, "weight": W, "bias": B}, k.linear_forward, lambda d, i: k.linear_backward(d, i["x"], i["weight"])),
    "linear_gelu": (
        {"x": X, "weight": W, "bias": B},
        lambda **i: k.linear_gelu_forward(**i)[0],
        lambda d, i: k.linear_gelu_backward(d, k.linear_gelu_forward(**i)[1], i["x"], i["weight"]),
    ),
    "gelu": ({"x": X}, k.gelu_forward, lambda d, i: [k.gelu_backward(d, i["x"])]),
    "silu": ({"x": X}, k.silu_forward, lambda d, i: [k.silu_backward(d, i["x"])]),
    "conv2d": (
        {"x": IMAGE, "weight": normal(3, 4, 3, 2), "bias": normal(3)},
        lambda **i: k.conv2d_forward(**i, stride=2, padding=(1, 0, 2, 1)),
        lambda d, i: k.conv2d_backward(d, i["x"], i["weight"], stride=2, padding=(1, 0, 2, 1)),
    ),
    "renoise": (
        {"x0": X},
        lambda x0: k.renoise_forward(x0, [0.2, 0.7], seed=3)[0],
        lambda d, i: [k.renoise_backward(d, [0.2, 0.7])],
    ),
}


def parts(value: Any) -> list[Array]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("name", CASES)
def test_backward_is_the_gradient(name: str) -> None:
    inputs, forward, backward = CASES[name]
    outputs = parts(forward(**inputs))
    cotangents = [normal(*out.shape, seed=9) for out in outputs]
    gradients = backward(cotangents if len(outputs) > 1 else cotangents[0], inputs)
    assert len(gradients) == len(inputs)
    for (key, value), gradient in zip(inputs.items(), gradients, strict=True):
        assert gradient is not None and gradient.shape == value.shape, key
        direction = normal(*value.shape, seed=5)

        def along(step: float, key: str = key, value: Array = value, direction: Array = direction) -> float:
            moved = parts(forward(**{**inputs, key: (value + np.float32(step) * direction)}))
            return sum(float((c.astype(np.float64) * m).sum()) for c, m in zip(cotangents, moved, strict=True))

        # Fourth order, so that what remains is rounding.
        quotient = (8 * (along(STEP) - along(-STEP)) - (along(2 * STEP) - along(-2 * STEP))) / (12 * STEP)
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
        assert abs(quotient - float((gradient.astype(np.float64) * direction).sum())) < 2e-3 * scale, key


def test_forward_formulas() -> None:
    """The definitions in the doc strings, in float64."""
    x = X.astype(np.float64)
    mean, centred = x.mean(-1, keepdims=True), x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    y, m, r = k.layer_norm_modulate_forward(X, np.full((2, 4), 0.5), np.full((2, 4), 2.0))
    assert np.allclose(y, 3 * normed + 0.5, atol=1e-5) and np.allclose(m[..., None], mean, atol=1e-6)
    assert np.allclose(r[..., None] * centred, normed, atol=1e-5)
    assert np.allclose(k.rms_norm_forward(X, np.ones(4))[0], x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), atol=1e-5)
    assert np.allclose(k.linear_forward(X, W, B), x @ W.T.astype(np.float64) + B, atol=1e-5)
    assert np.allclose(k.linear_forward(X, W), x @ W.T.astype(np.float64), atol=1e-5)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    assert np.allclose(k.gelu_forward(X), 0.5 * x * (1 + np.tanh(inner)), atol=1e-6)
    assert np.allclose(k.silu_forward(X), x / (1 + np.exp(-x)), atol=1e-6)
    weight = normal(6, 2, 4)
    u = np.full(6, 6**-0.5, np.float32)
    w_hat, new_u, v, sigma = k.spectral_norm_forward(weight, u, iterations=200)
    assert np.isclose(sigma, np.linalg.svd(weight.reshape(6, 8).astype(np.float64))[1][0], rtol=1e-5)
    assert np.allclose(w_hat * sigma, weight, atol=1e-5) and np.isclose(new_u @ weight.reshape(6, 8) @ v, sigma, rtol=1e-5)
    assert np.allclose(u, 6**-0.5)
    noisy, noise = k.renoise_forward(X, 0.25, seed=7, purpose=3, step=2, samples=[5, 9])
    assert np.allclose(noisy, 0.75 * x + 0.25 * noise, atol=1e-6)
    assert noise.tobytes() == k.normal(X.shape, seed=7, purpose=3, step=2, samples=[5, 9]).tobytes()


@pytest.mark.parametrize(
    ("width", "kernel", "stride"),
    [(34, (1, 36), 2), (34, (3, 35), 2), (20, (5, 2), 3), (600, (1, 7), 2)],  # of the first two a patch with its margins is as wide as dx
)
def test_kernels_of_unequal_sides(width: int, kernel: tuple[int, int], stride: int) -> None:
    """The forward against the definition, and <dy, conv(x)> = <dx, x> = <dw, w>: a convolution is linear in each."""
    x, w = normal(2, 3, 6, width), normal(4, 3, *kernel)
    top, left, bottom, right = padding = (1, 3, 0, 4)
    y = k.conv2d_forward(x, w, stride=stride, padding=padding)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, ::stride, ::stride]
    wanted = np.einsum("bcijhw,mchw->bmij", seen, w.astype(np.float64))
    assert np.allclose(y, wanted, rtol=0, atol=1e-4)
    dy = normal(*y.shape, seed=1)
    dx, dw, _ = k.conv2d_backward(dy, x, w, stride=stride, padding=padding)
    product = float((dy * wanted).sum())
    room = 1e-5 * float(np.linalg.norm(dy) * np.linalg.norm(wanted))
    assert float((dx.astype(np.float64) * x).sum()) == pytest.approx(product, abs=room)
    assert float((dw.astype(np.float64) * w).sum()) == pytest.approx(product, abs=room)


@pytest.mark.parametrize("loss", ["hinge", "logistic", "lsgan", "bce"])
@pytest.mark.parametrize("role", ["real", "fake", "generator"])
def test_adversarial_loss_formulas(loss: Any, role: Any) -> None:
    logits = normal(3, 2, 2)
    x = logits.astype(np.float64)

    def softplus(z: Array) -> Array:
        return np.logaddexp(0, z)

    values = {
        "hinge": {"real": np.maximum(0, 1 - x), "fake": np.maximum(0, 1 + x), "generator": -x},
        "logistic": {"real": softplus(-x), "fake": softplus(x), "generator": softplus(-x)},
        "lsgan": {"real": (x - 1) ** 2 / 2, "fake": x**2 / 2, "generator": (x - 1) ** 2 / 2},
    }
    wanted = values["logistic" if loss == "bce" else loss][role].mean()
    value, gradient = k.adversarial_loss(logits, loss, role)
    assert np.isclose(value, wanted, rtol=1e-6) and gradient.shape == logits.shape
    ahead, _ = k.adversarial_loss(x + 1e-3, loss, role)
    behind, _ = k.adversarial_loss(x - 1e-3, loss, role)
    assert np.isclose(gradient.sum(), (ahead - behind) / 2e-3, rtol=2e-3, atol=2e-3)
    assert np.allclose(k.adversarial_loss(logits, loss, role, weight=3.0)[1], 3 * gradient)
