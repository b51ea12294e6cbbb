"""Adversarial losses and the optimizer in float64."""

from __future__ import annotations

from . import autodiff as ad
from .autodiff import Array, Tensor


def adversarial(logits: Tensor, loss: str, role: str) -> Tensor:
    """The mean over all logits. role: "real" and "fake" for the discriminator, "generator" for the student."""
    sign = 1.0 if role == "fake" else -1.0
    if loss == "hinge":
        each = -logits if role == "generator" else ad.relu(logits * sign + 1.0)
    elif loss == "lsgan":
        each = (logits - (0.0 if role == "fake" else 1.0)) ** 2 * 0.5
    elif loss in ("logistic", "bce"):  # -log sigmoid(l) for a target of 1, -log(1 - sigmoid(l)) for 0
        each = ad.softplus(logits * sign)
    else:
        raise ValueError(loss)
    return each.mean()


def adamw(
    p: Array,
    m: Array,
    v: Array,
    g: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> tuple[Array, Array, Array]:
    """Loshchilov and Hutter 2019, algorithm 2, with the decay multiplied by the rate. -> new p, m, v."""
    g = g * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + eps)
    return p - lr * weight_decay * p - lr * update, m, v
