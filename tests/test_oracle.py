"""The float64 oracles against what diffusers computed in float64 (stored in tests/data): the other tests trust the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from oracle import autodiff as ad
from oracle import mmdit, vae

DATA = Path(__file__).parent / "data"


def stored(name: str) -> Any:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def check_prints(reference: dict[str, Any], leaves: dict[str, ad.Tensor], tolerance: float) -> None:
    found = support.fingerprint({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    names = [str(name) for name in reference["parameter_names"]]
    assert sorted(found) == names
    floor = 1e-6 * np.abs(reference["parameter_prints"]).max()
    for name, wanted in zip(names, reference["parameter_prints"], strict=True):
        support.assert_close(found[name], wanted, tolerance, name, floor)


@pytest.mark.parametrize("name", support.MMDIT_CASES)
def test_mmdit_equals_diffusers(name: str) -> None:
    config, *_, skip = support.MMDIT_CASES[name]
    reference, inputs = stored(f"mmdit_{name}"), support.mmdit_inputs(name)
    names = [str(n) for n in reference["parameter_names"]]
    leaves = support.leaves(support.seeded_weights(mmdit.parameter_shapes(config), 1))
    leaves["pos_embed.pos_embed"] = table = ad.Tensor(mmdit.position_table(config))
    np.testing.assert_array_equal(table.data[0, ::17], reference["position"])
    latents, context, pooled = (ad.Tensor(inputs[key]) for key in ("latents", "context", "pooled"))
    velocity = mmdit.forward(config, leaves, latents, inputs["sigma"], context, pooled, skip)
    velocity.backward(inputs["cotangent"])
    # PyTorch's own float32 exp in the timestep features is what remains between the two.
    support.assert_close(velocity.data, reference["velocity"], 1e-5, "velocity")
    for key, leaf in (("dlatents", latents), ("dcontext", context), ("dpooled", pooled)):
        support.assert_close(leaf.grad if leaf.grad is not None else np.zeros(leaf.shape), reference[key], 1e-5, key)
    del leaves["pos_embed.pos_embed"]
    assert set(names) <= set(leaves)
    check_prints(reference, leaves, 3e-5)


@pytest.mark.parametrize("name", support.VAE_CASES)
def test_vae_equals_diffusers(name: str) -> None:
    config = support.VAE_CASES[name][0]
    reference, inputs = stored(f"vae_{name}"), support.vae_inputs(name)
    leaves = support.leaves(support.seeded_weights(vae.parameter_shapes(config), 2))
    images, z = ad.Tensor(inputs["images"]), ad.Tensor(inputs["z"])
    moments, decoded = vae.encode(config, leaves, images), vae.decode(config, leaves, z)
    ad.backward([(moments, inputs["dmoments"]), (decoded, inputs["dimages"])])
    for key, value in (("moments", moments.data), ("decoded", decoded.data), ("dimages", images.grad), ("dz", z.grad)):
        support.assert_close(value, reference[key], 1e-10, key)
    check_prints(reference, leaves, 1e-9)


def test_autodiff_against_finite_differences() -> None:
    """What diffusers' models do not use: concatenation, leaky ReLU, ReLU, softplus, clip, log, broadcasting."""
    rng = np.random.default_rng(0)
    a, b = ad.Tensor(rng.standard_normal((3, 4)) + 0.05), ad.Tensor(rng.standard_normal((4,)))

    def value() -> ad.Tensor:
        x = ad.concat([ad.leaky_relu(a, 0.2), ad.relu(a * b), ad.softplus(a - b), ad.clip(a, -0.5, 0.5)], 1)
        return (ad.log(ad.exp(x) + 1.0) / (a.sum(axis=0, keepdims=True) ** 2.0).mean()).sum()

    value().backward()
    gradients = [np.array(leaf.grad) for leaf in (a, b)]
    for leaf, gradient in zip((a, b), gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            slope = 0.0
            for sign in (1, -1):
                leaf.data[index] += sign * 1e-6
                slope += sign * float(value().data) / 2e-6
                leaf.data[index] -= sign * 1e-6
            assert abs(slope - gradient[index]) < 1e-6 * np.abs(gradient).max() + 1e-7
