"""AutoencoderKL against float64 oracle and stored diffusers values: encode, decode, every gradient, threads, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from oracle import autodiff as ad
from oracle import vae
from support import VAE_CASES, normal, same_bits, vae_config

import ladd
from ladd import _core

DATA = Path(__file__).parent / "data"
Array = np.ndarray


def core_model(name: str) -> tuple[Any, dict[str, Array]]:
    config = VAE_CASES[name][0]
    model = _core.AutoencoderKL(config)
    weights = support.seeded_weights(vae.parameter_shapes(config), 2)
    assert set(model.trainable_names()) == set(model.tensors()) == set(weights)
    support.load(model, weights)
    return model, weights


def run(model: Any, side: str, x: Array, keep: bool = False) -> tuple[Array, Any]:
    result: tuple[Array, Any] = model.encode(x, keep=keep) if side == "encode" else model.decode(x, keep=keep)
    return result


SIDES = {"encode": ("images", "dmoments"), "decode": ("z", "dimages")}
CASES = [(name, side) for name in VAE_CASES for side in SIDES]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_forward_and_all_gradients(name: str, side: str) -> None:
    model, weights = core_model(name)
    inputs = support.vae_inputs(name)
    x, cotangent = (inputs[key] for key in SIDES[side])
    out, saved = run(model, side, x, keep=True)
    leaves, leaf = support.leaves(weights), ad.Tensor(x)
    wanted = getattr(vae, side)(VAE_CASES[name][0], leaves, leaf)
    support.assert_close(out, wanted.data, support.FORWARD, side)
    wanted.backward(cotangent)
    found = saved.backward(cotangent)
    floor = 1e-3 * max(np.abs(t.grad).max() for t in leaves.values() if t.grad is not None)
    support.assert_close(found, leaf.grad, support.BACKWARD, "gradient of the input", floor)
    for key, value in model.gradients().items():
        reference = leaves[key].grad if leaves[key].grad is not None else np.zeros(leaves[key].shape)
        support.assert_close(value, reference, support.BACKWARD, f"gradient of {key}", floor)
    with pytest.raises(RuntimeError):
        saved.backward(cotangent)


@pytest.mark.parametrize("name", VAE_CASES)
def test_equals_diffusers(name: str) -> None:
    with np.load(DATA / f"vae_{name}.npz") as file:
        reference = dict(file)
    model, _ = core_model(name)
    inputs = support.vae_inputs(name)
    for side, out, gradient in (("encode", "moments", "dimages"), ("decode", "decoded", "dz")):
        x, cotangent = (inputs[key] for key in SIDES[side])
        value, saved = run(model, side, x, keep=True)
        support.assert_close(value, reference[out], support.FORWARD, out)
        support.assert_close(saved.backward(cotangent), reference[gradient], support.BACKWARD, gradient)
    names = [str(n) for n in reference["parameter_names"]]
    prints = support.fingerprint(model.gradients())
    assert sorted(prints) == names
    floor = 1e-3 * reference["parameter_prints"].max()
    for n, wanted in zip(names, reference["parameter_prints"], strict=True):
        support.assert_close(prints[n], wanted, support.BACKWARD, f"gradient of {n}", floor)


@pytest.mark.parametrize(("name", "side"), CASES)
def test_same_bits_for_any_threads_and_without_keeping(name: str, side: str) -> None:
    inputs = support.vae_inputs(name)
    x, cotangent = (inputs[key] for key in SIDES[side])
    results = []
    before = _core.get_num_threads()
    try:
        for threads in (1, 2):
            _core.set_num_threads(threads)
            model, _ = core_model(name)
            out, saved = run(model, side, x, keep=True)
            assert same_bits(out, run(model, side, x)[0]), "keep=False computes something else"
            results.append((out, saved.backward(cotangent), model.flat_grad.copy()))
    finally:
        _core.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_backward_computes_what_is_asked_for() -> None:
    model, _ = core_model("two_levels")
    inputs = support.vae_inputs("two_levels")
    whole = model.decode(inputs["z"], keep=True)[1].backward(inputs["dimages"])
    gradient = model.flat_grad.copy()
    model.flat_grad[...] = 0
    assert same_bits(model.decode(inputs["z"], keep=True)[1].backward(inputs["dimages"], params=False), whole)
    assert not model.flat_grad.any()
    assert model.decode(inputs["z"], keep=True)[1].backward(inputs["dimages"], input=False) is None
    assert same_bits(model.flat_grad, gradient)


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    config = {**VAE_CASES["two_levels"][0], "scaling_factor": 1.7, "shift_factor": 0.1}
    model = ladd.AutoencoderKL(config, seed=4)
    model.save_pretrained(tmp_path)
    again = ladd.AutoencoderKL.from_pretrained(tmp_path)
    assert again.config == model.config
    images = np.clip(normal(1, 2, 3, 8, 8), -1, 1)
    latents = model.encode(images)
    assert same_bits(again.encode(images), latents)
    assert same_bits(again.decode(latents), model.decode(latents))


def test_latents_are_scaled_and_shifted() -> None:
    config = {**VAE_CASES["two_levels"][0], "scaling_factor": 1.5305, "shift_factor": 0.0609}
    model = ladd.AutoencoderKL(config, seed=4)
    core = _core.AutoencoderKL(VAE_CASES["two_levels"][0])
    support.load(core, model.state_dict())
    images = np.clip(normal(1, 2, 3, 8, 8), -1, 1)
    moments = core.encode(images)[0].astype(np.float64)
    mean, logvar = moments[:, :4], np.clip(moments[:, 4:], -30, 20)
    support.assert_close(model.encode(images), (mean - 0.0609) * 1.5305, 1e-6, "the mode")
    one, two, other = (model.encode(images, sample=True, seed=seed) for seed in (7, 7, 8))
    assert same_bits(one, two) and not np.any(one == other)
    drawn = (one.astype(np.float64) / 1.5305 + 0.0609 - mean) / np.exp(0.5 * logvar)
    assert abs(drawn.mean()) < 0.4 and 0.6 < drawn.std() < 1.4
    latents = normal(2, 1, 4, 4, 4)
    z = (latents.astype(np.float64) / 1.5305 + 0.0609).astype(np.float32)
    support.assert_close(model.decode(latents), core.decode(z)[0], 1e-5, "decoded")


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 3},
        {"block_out_channels": ()},
        {"block_out_channels": (8,) * 9},
        {"layers_per_block": 0},
        {"latent_channels": -4},
        {"act_fn": "relu"},
        {"width": 3},
    ],
    ids=str,
)
def test_impossible_configs_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        _core.AutoencoderKL({**vae_config(), **change})
    assert any(word in str(caught.value) for word in change), "the message does not name the setting"


def test_bad_calls_are_errors_and_change_nothing() -> None:
    model, _ = core_model("two_levels")
    inputs = support.vae_inputs("two_levels")
    good, _ = model.encode(inputs["images"])
    bad: list[Any] = [normal(1, 2, 4, 8, 8), normal(1, 2, 3, 7, 8), normal(1, 3, 8, 8), inputs["images"].astype(np.float64), None]
    for images in bad:
        with pytest.raises((ValueError, TypeError)):
            model.encode(images)
    for z in (normal(1, 2, 3, 4, 4), normal(1, 2, 4, 0, 4), inputs["z"].astype(np.float16)):
        with pytest.raises((ValueError, TypeError)):
            model.decode(z)
    _, saved = model.encode(inputs["images"], keep=True)
    with pytest.raises((ValueError, TypeError)):
        saved.backward(inputs["dmoments"][:1].copy())
    assert saved.backward(inputs["dmoments"]) is not None
    assert same_bits(model.encode(inputs["images"])[0], good)
