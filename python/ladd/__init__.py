"""Latent adversarial diffusion distillation of Stable Diffusion 3 type transformers, on a C core.

Names are imported when they are first used: `import ladd` itself loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import data, device, kernels, losses, sampling
    from ._core import get_num_threads, set_num_threads
    from .config import AdamWConfig, AutoencoderKLConfig, DiscriminatorConfig, LADDConfig, MMDiTConfig, load_toml
    from .device import DeviceArray
    from .models import AutoencoderKL, Discriminator, MMDiT
    from .pipeline import Pipeline, save_pipeline
    from .sampling import iterate, sample, sigmas
    from .text import WordEncoder
    from .training.ladd import LADD

_HOME = {
    "AdamWConfig": "config",
    "AutoencoderKL": "models",
    "AutoencoderKLConfig": "config",
    "DeviceArray": "device",
    "Discriminator": "models",
    "DiscriminatorConfig": "config",
    "LADD": "training.ladd",
    "LADDConfig": "config",
    "MMDiT": "models",
    "MMDiTConfig": "config",
    "Pipeline": "pipeline",
    "WordEncoder": "text",
    "get_num_threads": "_core",
    "iterate": "sampling",
    "load_toml": "config",
    "sample": "sampling",
    "save_pipeline": "pipeline",
    "set_num_threads": "_core",
    "sigmas": "sampling",
}
_MODULES = ("data", "device", "kernels", "losses", "sampling")

__all__ = [
    "LADD",
    "AdamWConfig",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DeviceArray",
    "Discriminator",
    "DiscriminatorConfig",
    "LADDConfig",
    "MMDiT",
    "MMDiTConfig",
    "Pipeline",
    "WordEncoder",
    "__version__",
    "data",
    "device",
    "get_num_threads",
    "iterate",
    "kernels",
    "load_toml",
    "losses",
    "sample",
    "sampling",
    "save_pipeline",
    "set_num_threads",
    "sigmas",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'ladd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
