"""Writes tests/data/*.npz: what the installed diffusers and PyTorch compute, in float64, for the cases of support.py.

Weights and inputs come from seeds, so only results are stored: outputs, gradients of the inputs, and a fingerprint of the
gradient of each parameter.
Run with `python tests/make_reference.py`; it needs torch and diffusers, the tests that read the files do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import support

DATA = Path(__file__).parent / "data"


def build(kind: Any, config: dict[str, Any], seed: int, fixed: tuple[str, ...] = ()) -> Any:
    """A diffusers model in float64 with seeded weights; the names in `fixed` keep what diffusers put there."""
    import torch

    model = kind.from_config({**config, "_class_name": kind.__name__}).double()
    state = model.state_dict()
    weights = support.seeded_weights({name: value.shape for name, value in state.items() if name not in fixed}, seed)
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(torch.from_numpy(value).double())
    return model


def mmdit(name: str) -> Any:
    import diffusers

    config = dict(support.MMDIT_CASES[name][0])
    return build(diffusers.SD3Transformer2DModel, config, seed=1, fixed=("pos_embed.pos_embed",))


def vae(name: str) -> Any:
    import diffusers

    config = dict(support.VAE_CASES[name][0])
    levels = len(config["block_out_channels"])
    config["down_block_types"] = ("DownEncoderBlock2D",) * levels
    config["up_block_types"] = ("UpDecoderBlock2D",) * levels
    return build(diffusers.AutoencoderKL, config, seed=2)


def parameter_gradients(model: Any) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def run_mmdit(name: str) -> dict[str, Any]:
    import torch

    model, skip = mmdit(name), support.MMDIT_CASES[name][5]
    inputs = support.mmdit_inputs(name)
    given = {key: torch.from_numpy(inputs[key]).double().requires_grad_() for key in ("latents", "context", "pooled")}
    time = torch.from_numpy(inputs["sigma"] * np.float32(1000))
    velocity = model(given["latents"], given["context"], given["pooled"], time, skip_layers=list(skip) or None).sample
    velocity.backward(torch.from_numpy(inputs["cotangent"]).double())
    gradient = {"d" + key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in given.items()}
    return {
        "velocity": velocity.detach().numpy(),
        **{key: value.numpy() for key, value in gradient.items()},
        "position": model.state_dict()["pos_embed.pos_embed"].numpy()[0, ::17].astype(np.float32),
        "parameters": parameter_gradients(model),
    }


def run_vae(name: str) -> dict[str, Any]:
    import torch

    inputs = {key: torch.from_numpy(value).double() for key, value in support.vae_inputs(name).items()}
    model = vae(name)
    images = inputs["images"].requires_grad_()
    moments = model.encode(images).latent_dist.parameters
    moments.backward(inputs["dmoments"])
    z = inputs["z"].requires_grad_()
    decoded = model.decode(z).sample
    decoded.backward(inputs["dimages"])
    return {
        "moments": moments.detach().numpy(),
        "decoded": decoded.detach().numpy(),
        "dimages": images.grad.numpy(),
        "dz": z.grad.numpy(),
        "parameters": parameter_gradients(model),
    }


def run_schedule() -> dict[str, Any]:
    """Sigma lists of FlowMatchEulerDiscreteScheduler and the start of PyTorch's CPU normal stream."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    out = {}
    for shift in (1.0, 3.0):
        for steps in (1, 2, 3, 4, 8, 28, 50):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(steps)
            out[f"sigmas_{shift:g}_{steps}"] = scheduler.sigmas.numpy()
    for seed in (0, 1234, 2**33 + 5):
        for count in (1, 5, 15, 16, 17, 31, 64, 100):
            out[f"randn_{seed}_{count}"] = torch.randn(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return out


def flatten(result: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters' fingerprints as one array, in the order of their sorted names."""
    prints = support.fingerprint(result.pop("parameters"))
    return {
        **result,
        "parameter_names": np.array(sorted(prints)),
        "parameter_prints": np.stack([prints[n] for n in sorted(prints)]),
    }


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name in support.MMDIT_CASES:
        np.savez_compressed(DATA / f"mmdit_{name}.npz", **flatten(run_mmdit(name)))
    for name in support.VAE_CASES:
        np.savez_compressed(DATA / f"vae_{name}.npz", **flatten(run_vae(name)))
    np.savez_compressed(DATA / "schedule.npz", **run_schedule())


if __name__ == "__main__":
    main()
