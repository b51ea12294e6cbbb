"""ladd's side of a comparison: models, a training step and passes at one size. It does not import PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sizes import Size

import ladd


def model(size: Size, dtype: str = "float32") -> ladd.MMDiT:
    made = ladd.MMDiT(size.transformer(), dtype=dtype)
    # The standard initialisation is zero at gates and output: with these weights every part of the network counts.
    rng = np.random.default_rng(1)
    made.flat_trainable[:] = rng.standard_normal(made.flat_trainable.shape, dtype=np.float32) * np.float32(0.02)
    return made


def trainer(size: Size, dtype: str) -> ladd.LADD:
    student = model(size, dtype)
    heads = ladd.Discriminator(size.discriminator(), dtype=dtype)
    return ladd.LADD(student, student.copy(), heads, allow_noise_latents=True)


def batch(size: Size) -> tuple[np.ndarray, ...]:
    """latents, context, pooled: what a training step takes."""
    inputs = size.inputs()
    return inputs["latents"], inputs["context"], inputs["pooled"]


def forward_backward(made: ladd.MMDiT, inputs: dict[str, np.ndarray]) -> Callable[[], None]:
    """With gradients of all parameters."""
    cotangent = np.ones_like(inputs["latents"])

    def call() -> None:
        made.zero_grad()
        _, pullback = made.vjp(*inputs.values())
        pullback(cotangent, latents=False, context=False, pooled=False)

    return call
