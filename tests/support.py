"""What the test files share: reproducible weights and inputs, the yardstick, the model variants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from oracle.autodiff import Tensor

Array = np.ndarray

FORWARD = 3e-5  # of max|ref|: a float32 forward against float64
BACKWARD = 2e-4  # of max|ref|: float32 gradients against float64


def error(value: Any, reference: Any) -> float:
    """Largest difference, in units of the largest reference value. NaN anywhere gives infinity."""
    value, reference = np.asarray(value, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    assert value.shape == reference.shape, f"shape {reference.shape} expected, got {value.shape}"
    worst = np.abs(value - reference).max(initial=0.0) / max(np.abs(reference).max(initial=0.0), 1e-30)
    return float(worst) if np.isfinite(worst) else float("inf")


def assert_close(value: Any, reference: Any, tolerance: float, what: str = "value", floor: float = 0.0) -> None:
    """floor: the least size of the yardstick, for sums of cancelling terms (a bias in front of a norm, a key's bias)."""
    reference = np.asarray(reference, dtype=np.float64)
    yardstick = max(np.abs(reference).max(initial=0.0), floor, 1e-30)
    worst = error(value, reference) * max(np.abs(reference).max(initial=0.0), 1e-30) / yardstick
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of max|ref| = {yardstick:.3g}, {tolerance:.0e} allowed"


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class ByArray:
    """An array of another library: nothing but __array__."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.array.astype(dtype) if dtype else self.array


class ByDLPack:
    """An array of another library: nothing but DLPack."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def seeded_weights(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, Array]:
    """Float32 weights that depend on seed, names and shapes only: matrices of unit gain, norm weights near one, small biases."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        value = rng.standard_normal(shape)
        if len(shape) > 1:
            value /= np.sqrt(np.prod(shape[1:]))
        elif name.endswith("bias"):
            value *= 0.2
        else:
            value = 1.0 + 0.2 * value
        weights[name] = value.astype(np.float32)
    return weights


def load(model: Any, weights: Mapping[str, Array]) -> None:
    """Writes weights into a core model through the views it gives out."""
    views = model.tensors()
    for name, value in weights.items():
        assert views[name].shape == value.shape, f"{name}: shape {views[name].shape} in the model, {value.shape} here"
        views[name][...] = value


def leaves(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: Tensor(value) for name, value in arrays.items()}


def mmdit_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
        "qk_norm": None,
        "dual_attention_layers": (),
    }
    config.update(changes)
    config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    return config


# name -> (config, height, width, text tokens, batch, skipped layers)
MMDIT_CASES: dict[str, tuple[dict[str, Any], int, int, int, int, tuple[int, ...]]] = {
    "sd3": (mmdit_config(), 6, 10, 5, 2, ()),
    "sd35_medium": (
        mmdit_config(qk_norm="rms_norm", dual_attention_layers=(0, 1), num_layers=3, in_channels=16, out_channels=16),
        7,
        9,
        3,
        1,
        (),
    ),
    "sd35_large": (mmdit_config(qk_norm="rms_norm", in_channels=8, out_channels=8, num_attention_heads=3), 8, 4, 4, 2, ()),
    "inpainting": (mmdit_config(qk_norm="rms_norm", in_channels=33, out_channels=16), 6, 6, 7, 1, ()),
    "patch_1": (mmdit_config(patch_size=1, sample_size=8, in_channels=8, out_channels=8, num_layers=3), 5, 7, 4, 2, ()),
    "skip_first": (mmdit_config(num_layers=3), 6, 8, 5, 1, (0,)),
    "skip_last": (mmdit_config(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(1,)), 6, 8, 5, 1, (2,)),
    "head_dim_64": (
        mmdit_config(attention_head_dim=64, num_attention_heads=2, in_channels=32, out_channels=32, qk_norm="rms_norm"),
        10,
        6,
        9,
        1,
        (),
    ),
    "one_token": (mmdit_config(num_layers=1), 2, 3, 1, 1, ()),
    # What the released models do not combine: a second attention without norms, in the last block too, behind a skipped block.
    "dual_no_norm": (mmdit_config(num_layers=3, dual_attention_layers=(1, 2), in_channels=33, out_channels=16), 5, 10, 6, 2, (0,)),
}


def mmdit_inputs(name: str) -> dict[str, Array]:
    config, height, width, text_tokens, batch, _ = MMDIT_CASES[name]
    seed = 100 * (1 + list(MMDIT_CASES).index(name))
    h, w = (size // config["patch_size"] * config["patch_size"] for size in (height, width))
    return {
        "latents": normal(seed, batch, config["in_channels"], height, width),
        "sigma": np.linspace(0.31, 0.97, batch).astype(np.float32),
        "context": normal(seed + 1, batch, text_tokens, config["joint_attention_dim"]),
        "pooled": normal(seed + 2, batch, config["pooled_projection_dim"]),
        "cotangent": normal(seed + 3, batch, config["out_channels"], h, w),
    }


def vae_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }
    config.update(changes)
    return config


# name -> (config, image height, image width, batch)
VAE_CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "two_levels": (vae_config(), 12, 16, 2),
    "quant_convs": (
        vae_config(block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2, use_quant_conv=True, use_post_quant_conv=True),
        8,
        20,
        1,
    ),
    "no_attention": (
        vae_config(mid_block_add_attention=False, latent_channels=3, block_out_channels=(4, 12), norm_num_groups=1),
        6,
        10,
        1,
    ),
    "one_level": (vae_config(block_out_channels=(8,), norm_num_groups=8, latent_channels=16), 5, 3, 1),
}


def vae_inputs(name: str) -> dict[str, Array]:
    config, height, width, batch = VAE_CASES[name]
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    seed = 7000 + 100 * list(VAE_CASES).index(name)
    h, w = height // factor, width // factor
    return {
        "images": normal(seed, batch, config["in_channels"], height, width),
        "z": normal(seed + 1, batch, config["latent_channels"], h, w),
        "dmoments": normal(seed + 2, batch, 2 * config["latent_channels"], h, w),
        "dimages": normal(seed + 3, batch, config["out_channels"], height, width),
    }


def fingerprint(gradients: Mapping[str, Array], seed: int = 5) -> dict[str, Array]:
    """Every gradient as three numbers: its largest size, its norm and its product with a random direction of unit length."""
    rng = np.random.default_rng(seed)
    prints = {}
    for name in sorted(gradients):
        g = np.asarray(gradients[name], dtype=np.float64).ravel()
        direction = rng.standard_normal(g.size)
        prints[name] = np.array([np.abs(g).max(), np.linalg.norm(g), g @ direction / np.linalg.norm(direction)])
    return prints
