"""One step of latent adversarial distillation in float64: every loss and gradient of the two updates.

x_t = (1-t) z0 + t e,  x0_hat = x_t - t v_student(x_t, t)
fake = (1-t_hat) x0_hat + t_hat e',  real = (1-t_hat') z0 + t_hat' e'',  features of both by the frozen teacher
the heads' update on (real, fake); then the student's gradient through heads (updated), teacher, renoising and student
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import autodiff as ad
from . import discriminator, losses, mmdit
from .autodiff import Array, Tensor

Weights = dict[str, Array]


@dataclass
class Draws:
    """What is random in a step: times [B] and noises shaped as the latents."""

    t: Array
    noise: Array
    t_hat_fake: Array
    noise_fake: Array
    t_hat_real: Array
    noise_real: Array


@dataclass
class Optimizer:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclass
class Terms:
    """Weights of the optional losses; paired [B]: which rows began from their picture's own noise."""

    misaligned: float = 0.0
    distillation: float = 0.0
    pair: float = 0.0
    paired: Array | None = None


@dataclass
class Result:
    d_loss: float
    g_loss: float
    terms: dict[str, float]  # the optional losses by the name of their metric, not weighted
    d_gradients: Weights
    student_gradients: Weights
    d_weights: Weights  # after their update, spectral norm's u included
    student_weights: Weights


def rowwise(t: Array, like: Array) -> Array:
    return np.asarray(t, dtype=np.float64).reshape(-1, *(1,) * (like.ndim - 1))


def mix(x0: Any, noise: Array, t: Array) -> Tensor:
    """(1 - t) x0 + t noise."""
    time = rowwise(t, noise)
    return ad.tensor(x0) * (1 - time) + time * noise.astype(np.float64)


def gradients(leaves: dict[str, Tensor], names: Sequence[str]) -> Weights:
    return {name: np.zeros(leaves[name].shape) if leaves[name].grad is None else np.array(leaves[name].grad) for name in names}


def first_update(weights: Weights, grads: Weights, o: Optimizer) -> Weights:
    """AdamW's first update with the gradient's norm clipped."""
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    clip = min(1.0, o.clip_norm / norm) if o.clip_norm else 1.0
    new = {name: value.astype(np.float64) for name, value in weights.items()}
    for name, g in grads.items():
        zero = np.zeros_like(g)
        new[name] = losses.adamw(new[name], zero, zero, g, o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, 1, clip)[0]
    return new


def mean_loss(logits: Sequence[Tensor], loss: str, role: str) -> Tensor:
    """The mean over the logits of all taps together."""
    every = ad.concat([part.reshape(-1) for part in logits], 0)
    return losses.adversarial(every, loss, role)


def run(
    configs: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
    weights: tuple[Weights, Weights, Weights],
    data: tuple[Array, Array, Array],
    draws: Draws,
    loss: str,
    optimizers: tuple[Optimizer, Optimizer],
    extra: Terms,
) -> Result:
    """configs, weights: student, teacher, discriminator. data: latents, context, pooled. optimizers: student, discriminator."""
    student_config, teacher_config, disc_config = configs
    latents, context, pooled = data
    p = teacher_config["patch_size"]
    grid = (latents.shape[2] // p, latents.shape[3] // p)
    text, vector = Tensor(context), Tensor(pooled)
    student = {name: Tensor(value) for name, value in weights[0].items()}
    teacher = {name: Tensor(value) for name, value in weights[1].items()}
    trainable = [name for name in weights[2] if not name.endswith("weight_u")]

    x_t = mix(latents, draws.noise, draws.t)
    velocity = mmdit.forward(student_config, student, x_t, draws.t, text, vector)
    x0_hat = x_t - velocity * rowwise(draws.t, latents)
    fake = mix(x0_hat, draws.noise_fake, draws.t_hat_fake)

    def features(x: Tensor, t: Array, text: Tensor = text, vector: Tensor = vector) -> list[Tensor]:
        taps: list[Tensor] = mmdit.forward(teacher_config, teacher, x, t, text, vector, taps=disc_config["taps"])
        return taps

    real = mix(latents, draws.noise_real, draws.t_hat_real)
    fake_features = features(fake, draws.t_hat_fake)
    real_features = features(real, draws.t_hat_real)

    def heads(values: Weights, inputs: Sequence[Tensor], t: Array) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = {name: Tensor(value) for name, value in values.items()}
        return leaves, discriminator.forward(disc_config, leaves, inputs, t, vector, grid)

    before = {name: value.astype(np.float64) for name, value in weights[2].items()}
    for name in before:
        if name.endswith("weight_u"):
            before[name] = discriminator.power_iteration(before[name.removesuffix("_u")], before[name])
    constant = [Tensor(f.data) for f in fake_features]
    leaves, on_fake = heads(before, constant, draws.t_hat_fake)
    on_real = discriminator.forward(disc_config, leaves, [Tensor(f.data) for f in real_features], draws.t_hat_real, vector, grid)
    d_loss = mean_loss(on_real, loss, "real") + mean_loss(on_fake, loss, "fake")
    terms: dict[str, float] = {}
    everything = d_loss
    if extra.misaligned:  # real pictures with the text of the one before are fakes
        other, other_vector = Tensor(np.roll(context, 1, 0)), Tensor(np.roll(pooled, 1, 0))
        wrong = [Tensor(f.data) for f in features(real, draws.t_hat_real, other, other_vector)]
        misaligned = mean_loss(discriminator.forward(disc_config, leaves, wrong, draws.t_hat_real, other_vector, grid), loss, "fake")
        everything, terms["loss_misaligned"] = d_loss + misaligned * extra.misaligned, float(misaligned.data)
    everything.backward()
    d_gradients = gradients(leaves, trainable)
    after = first_update(before, d_gradients, optimizers[1])

    _, on_fake = heads(after, fake_features, draws.t_hat_fake)
    g_loss = mean_loss(on_fake, loss, "generator")
    everything = g_loss
    if extra.distillation:  # the teacher's x0 from the renoised student, weighted by 1 - t_hat; the target is a constant
        noised, t_hat = Tensor(fake.data), rowwise(draws.t_hat_fake, latents)
        target = (noised - mmdit.forward(teacher_config, teacher, noised, draws.t_hat_fake, text, vector) * t_hat).data
        distillation = ((x0_hat - target) ** 2.0 * (1 - t_hat)).mean()
        everything, terms["loss_distillation"] = everything + distillation * extra.distillation, float(distillation.data)
    if extra.paired is not None:
        pair = ((x0_hat - latents.astype(np.float64)) ** 2.0 * rowwise(extra.paired, latents)).mean()
        everything, terms["loss_pair"] = everything + pair * extra.pair, float(pair.data)
    everything.backward()
    student_gradients = gradients(student, [name for name in student if name != "pos_embed.pos_embed"])
    return Result(
        float(d_loss.data),
        float(g_loss.data),
        terms,
        d_gradients,
        student_gradients,
        after,
        first_update(weights[0], student_gradients, optimizers[0]),
    )
