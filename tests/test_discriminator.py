"""Discriminator heads against the float64 oracle: logits, every gradient, spectral norm's buffers, threads, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from oracle import autodiff as ad
from oracle import discriminator as oracle
from support import normal, same_bits

import ladd
from ladd import _core

Array = np.ndarray


def disc_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "feature_dim": 12,
        "taps": (0, 2),
        "pooled_dim": 7,
        "width": 8,
        "kernel_size": 3,
        "norm": "group",
        "num_groups": 4,
        "spectral_norm": True,
        "condition_sigma": True,
        "condition_pooled": True,
        "condition_dim": 6,
    }
    return {**config, **changes}


# name -> (config, batch, token grid)
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "default": (disc_config(), 2, (4, 3)),
    "no_norm": (disc_config(norm="none", taps=(1,)), 2, (5, 2)),
    "no_spectral_norm": (disc_config(spectral_norm=False, kernel_size=5), 1, (3, 3)),
    "sigma_only": (disc_config(condition_pooled=False, pooled_dim=0, width=6, num_groups=3), 3, (2, 4)),
    "pooled_only": (disc_config(condition_sigma=False, kernel_size=1, taps=(0, 1, 5)), 2, (3, 5)),
    "unconditional": (disc_config(condition_sigma=False, condition_pooled=False, width=5, num_groups=1), 2, (4, 4)),
    "wide_condition": (disc_config(condition_dim=40, num_groups=2), 2, (1, 1)),
    "plain": (disc_config(norm="none", spectral_norm=False, condition_sigma=False, condition_pooled=False), 1, (2, 2)),
}


def core_model(name: str) -> tuple[Any, dict[str, Array]]:
    model = _core.Discriminator(CASES[name][0])
    model.init(3)
    for key, value in model.tensors().items():
        if not key.endswith("weight_u"):  # where init leaves zeros and ones an error would not show
            value += np.float32(0.1) * normal(len(key), *value.shape)
    return model, {key: value.copy() for key, value in model.tensors().items()}


def make_inputs(name: str) -> dict[str, Any]:
    config, batch, (h, w) = CASES[name]
    taps = len(config["taps"])
    return {
        "features": [normal(10 + i, batch, h * w, config["feature_dim"]) for i in range(taps)],
        "sigma": np.linspace(0.2, 0.9, batch).astype(np.float32),
        "pooled": normal(20, batch, config["pooled_dim"]) if config["condition_pooled"] else None,
        "dlogits": [normal(30 + i, batch, h, w) for i in range(taps)],
    }


def forward(model: Any, name: str, x: dict[str, Any], **options: Any) -> tuple[list[Array], Any]:
    result: tuple[list[Array], Any] = model.forward(x["features"], x["sigma"], x["pooled"], grid=CASES[name][2], **options)
    return result


@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients(name: str) -> None:
    config, _, grid = CASES[name]
    model, weights = core_model(name)
    x = make_inputs(name)
    logits, saved = forward(model, name, x, keep=True)
    leaves, features = support.leaves(weights), [ad.Tensor(feature) for feature in x["features"]]
    pooled = None if x["pooled"] is None else ad.Tensor(x["pooled"])
    wanted = oracle.forward(config, leaves, features, x["sigma"], pooled, grid)
    for value, reference in zip(logits, wanted, strict=True):
        support.assert_close(value, reference.data, support.FORWARD, "logits")
    ad.backward(list(zip(wanted, x["dlogits"], strict=True)))
    trainable = model.trainable_names()
    assert set(trainable) == {key for key in weights if not key.endswith("weight_u")}
    floor = 1e-4 * max(np.abs(leaves[key].grad).max() for key in trainable)
    for calls in (1, 2):  # backward may be called again; it adds once more
        for value, leaf in zip(saved.backward(x["dlogits"]), features, strict=True):
            support.assert_close(value, leaf.grad, support.BACKWARD, "gradient of features")
        for key, value in model.gradients().items():
            reference = leaves[key].grad
            assert reference is not None
            support.assert_close(value, calls * reference, support.BACKWARD, f"gradient of {key}", floor)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_threads_and_without_keeping(name: str) -> None:
    x = make_inputs(name)
    results = []
    before = _core.get_num_threads()
    try:
        for threads in (1, 2):
            _core.set_num_threads(threads)
            model, _ = core_model(name)
            logits, saved = forward(model, name, x, keep=True)
            assert all(same_bits(a, b) for a, b in zip(logits, forward(model, name, x)[0], strict=True))
            results.append([*logits, *saved.backward(x["dlogits"]), model.flat_grad.copy()])
    finally:
        _core.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_power_iteration_only_when_asked_for() -> None:
    model, weights = core_model("default")
    x = make_inputs("default")
    forward(model, "default", x)
    assert all(same_bits(value, weights[key]) for key, value in model.tensors().items())
    _, saved = forward(model, "default", x, update_u=True, keep=True)
    for key, value in model.tensors().items():
        if key.endswith("weight_u"):
            reference = oracle.power_iteration(weights[key.removesuffix("_u")].astype(np.float64), weights[key].astype(np.float64))
            support.assert_close(value, reference, 1e-5, key)
        else:
            assert same_bits(value, weights[key])
    first, gradient = saved.backward(x["dlogits"]), model.flat_grad.copy()
    forward(model, "default", x, update_u=True)  # moves u again: what was saved must not care, and the weights' gradients read u
    model.flat_grad[:] = 0
    assert all(same_bits(a, b) for a, b in zip(first, saved.backward(x["dlogits"]), strict=True))
    assert same_bits(gradient, model.flat_grad)


def test_initial_weights_have_unit_spectral_norm() -> None:
    model = _core.Discriminator(disc_config(width=16))
    model.init(1)
    for key, u in model.tensors().items():
        if key.endswith("weight_u"):
            weight = model.tensors()[key.removesuffix("_u")].astype(np.float64)
            largest = np.linalg.norm(weight.reshape(weight.shape[0], -1), 2)
            assert abs(np.linalg.norm(weight.reshape(weight.shape[0], -1).T @ u) / largest - 1) < 0.02, key


def test_what_was_saved_outlives_a_change_of_the_inputs() -> None:
    model, _ = core_model("default")
    x = make_inputs("default")
    _, saved = forward(model, "default", x, keep=True)
    wanted = saved.backward(x["dlogits"])
    gradient = model.flat_grad.copy()
    for value in (*x["features"], x["pooled"], x["sigma"]):
        value[...] = 0.5
    model.flat_grad[...] = 0
    assert all(same_bits(a, b) for a, b in zip(wanted, saved.backward(x["dlogits"]), strict=True))
    assert same_bits(model.flat_grad, gradient)
    model.flat_grad[...] = 0
    assert all(same_bits(a, b) for a, b in zip(wanted, saved.backward(x["dlogits"], params=False), strict=True))
    assert not model.flat_grad.any()
    assert saved.backward(x["dlogits"], features=False) is None
    assert same_bits(model.flat_grad, gradient)


def test_public_discriminator_equals_the_core() -> None:
    model, weights = core_model("default")
    x = make_inputs("default")
    public = ladd.Discriminator(ladd.DiscriminatorConfig(**CASES["default"][0]))
    public.load_state_dict(weights)
    wanted, saved = forward(model, "default", x, keep=True)
    logits, pullback = public.vjp(x["features"], x["sigma"], x["pooled"], grid=(4, 3))
    assert all(same_bits(a, b) for a, b in zip(logits, wanted, strict=True))
    assert all(same_bits(a, b) for a, b in zip(pullback(x["dlogits"]), saved.backward(x["dlogits"]), strict=True))
    assert all(same_bits(value, model.gradients()[key]) for key, value in public.gradients().items())
    assert all(same_bits(a, b) for a, b in zip(public(x["features"], x["sigma"], x["pooled"], grid=(4, 3)), wanted, strict=True))


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    model = ladd.Discriminator(ladd.DiscriminatorConfig(**CASES["default"][0]), seed=9)
    model.save_pretrained(tmp_path)
    again = ladd.Discriminator.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(same_bits(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"taps": ()},
        {"taps": (2, 1)},
        {"taps": (-1,)},
        {"kernel_size": 4},
        {"num_groups": 3},
        {"width": 0},
        {"norm": "batch"},
        {"pooled_dim": 0},
        {"condition_dim": 0},
        {"heads": 2},
    ],
    ids=str,
)
def test_impossible_configs_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        _core.Discriminator({**disc_config(), **change})
    assert any(word in str(caught.value) for word in change), "the message does not name the setting"


def test_bad_calls_are_errors_and_change_nothing() -> None:
    model, weights = core_model("default")
    x = make_inputs("default")
    good, saved = forward(model, "default", x, keep=True)
    features, sigma, pooled = x["features"], x["sigma"], x["pooled"]
    calls: list[tuple[Any, ...]] = [
        (features[:1], sigma, pooled, (4, 3)),
        (features, sigma[:1].copy(), pooled, (4, 3)),
        (features, sigma + 1, pooled, (4, 3)),
        (features, sigma, None, (4, 3)),
        (features, sigma, pooled[:, :3].copy(), (4, 3)),
        (features, sigma, pooled, (4, 4)),
        (features, sigma, pooled, (-4, -3)),
        ([f.astype(np.float64) for f in features], sigma, pooled, (4, 3)),
        ([f[:, :, :5].copy() for f in features], sigma, pooled, (4, 3)),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            model.forward(*call, update_u=True)
    for dlogits in (x["dlogits"][:1], [d[:1].copy() for d in x["dlogits"]], None):
        with pytest.raises((ValueError, TypeError)):
            saved.backward(dlogits)
    assert all(same_bits(value, weights[key]) for key, value in model.tensors().items())
    assert all(same_bits(a, b) for a, b in zip(good, forward(model, "default", x)[0], strict=True))


# ---- R1 --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"norm": "none"}, {"condition_sigma": False, "condition_pooled": False, "spectral_norm": False}])
@pytest.mark.parametrize(("batch", "side"), [(1, 3), (3, 4), (8, 6)])
def test_r1_and_its_gradient(batch: int, side: int, changes: dict[str, Any]) -> None:
    """Against float64: the oracle's parameter gradients at two near points, so near that no leaky ReLU changes its side between them."""
    config = ladd.DiscriminatorConfig(
        **{"feature_dim": 16, "taps": (0, 2), "pooled_dim": 10, "width": 8, "num_groups": 2, "condition_dim": 6, **changes}
    )
    core = ladd.Discriminator(config, seed=5)._core
    core.flat_trainable[:] += 0.1 * normal(6, core.flat_trainable.size)
    features = [normal(10 + i, batch, side * side, 16) for i in range(2)]
    sigma, pooled = np.linspace(0.1, 0.9, batch, dtype=np.float32), normal(9, batch, 10)
    weights = {name: value.copy() for name, value in core.tensors().items()}

    def slopes(points: list[Array]) -> tuple[list[Array], dict[str, Array]]:
        leaves, given = support.leaves(weights), [ad.Tensor(point) for point in points]
        ad.backward([(x, 1.0) for x in oracle.forward(config.to_dict(), leaves, given, sigma, ad.Tensor(pooled), (side, side))])
        grads = {name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        return [np.asarray(x.grad) for x in given], grads

    exact = [x.astype(np.float64) for x in features]
    g, _ = slopes(exact)
    squares = sum(float((x**2).sum()) for x in g)
    h = 1e-8 * np.sqrt(sum((x**2).sum() for x in exact) / squares)
    ends = [slopes([f + sign * h * x for f, x in zip(exact, g, strict=True)])[1] for sign in (1, -1)]

    _, saved = core.forward(features, sigma, pooled if config.condition_pooled else None, (side, side), keep=True)
    core.flat_grad[:] = 0
    assert saved.r1(0.3, 1e-4) == pytest.approx(squares / batch, rel=1e-5)
    once = core.flat_grad.copy()
    assert saved.r1(0.3, 1e-4) > 0  # any number of times, added to what is there
    assert np.linalg.norm(core.flat_grad - 2 * once) < 1e-3 * np.linalg.norm(once)
    names = core.trainable_names()
    expected = np.concatenate([0.3 * ((ends[0][n] - ends[1][n]) / (h * batch)).ravel() for n in names])
    error = np.linalg.norm(once - expected) / np.linalg.norm(expected)
    assert error < 1e-3, f"off by {error:.1e} of the gradient's length"


def test_r1_needs_float32() -> None:
    try:
        core = ladd.Discriminator({"feature_dim": 4, "taps": (0,), "condition_pooled": False}, dtype="bfloat16")._core
    except ValueError:
        pytest.skip("this processor has no products in bfloat16")
    _, saved = core.forward([normal(1, 2, 6, 4)], np.float32([0.5, 0.5]), None, (2, 3), keep=True)
    with pytest.raises(ValueError, match="expected a discriminator of dtype float32"):
        saved.r1(1.0, 1e-4)


def test_r1_of_a_flat_head_and_bad_steps() -> None:
    core = ladd.Discriminator(ladd.DiscriminatorConfig(feature_dim=4, taps=(0,), width=8, condition_pooled=False, spectral_norm=False))._core
    core.flat[:] = 0
    _, saved = core.forward([normal(1, 2, 6, 4)], np.float32([0.5, 0.5]), None, (2, 3), keep=True)
    core.flat_grad[:] = 0
    assert saved.r1(1.0, 1e-4) == 0 and not core.flat_grad.any()
    for weight, epsilon, message in ((1.0, 0.0, "epsilon above 0"), (np.nan, 1e-4, "weight"), (1.0, np.inf, "epsilon")):
        with pytest.raises(ValueError, match=message):
            saved.r1(weight, epsilon)
