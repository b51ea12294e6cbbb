"""The discriminator heads in float64: one logit a token from the features after each tapped block, conditioned by projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import autodiff as ad
from .autodiff import Array, Tensor
from .mmdit import timestep_features

SLOPE, EPS = 0.2, 1e-5


def power_iteration(weight: Array, u: Array) -> Array:
    """A better estimate of the first left singular vector of the weight as a matrix [rows, everything else]."""
    matrix = weight.reshape(weight.shape[0], -1)
    v = matrix.T @ u
    u = matrix @ (v / np.linalg.norm(v))
    return u / np.linalg.norm(u)


def normalized(w: dict[str, Tensor], name: str) -> Tensor:
    """The weight divided by u^T W v; u and v are constants to the gradient. As it is where there is no u."""
    weight = w[name + ".weight"]
    if name + ".weight_u" not in w:
        return weight
    u = w[name + ".weight_u"].data
    matrix = weight.reshape(weight.shape[0], -1)
    v = matrix.data.T @ u
    v = v / np.linalg.norm(v)
    return weight / (matrix * np.outer(u, v)).sum()


def forward(
    config: dict[str, Any],
    w: dict[str, Tensor],
    features: Sequence[Tensor],
    sigma: Array,
    pooled: Tensor | None,
    grid: tuple[int, int],
) -> list[Tensor]:
    """Logits, one [B, h, w] a tap."""
    rows, columns = grid
    width, groups = config["width"], config["num_groups"]
    embedded = None
    if config["condition_sigma"]:
        time = Tensor(timestep_features(sigma))
        first = ad.silu(ad.linear(time, w["sigma_embedder.linear_1.weight"], w["sigma_embedder.linear_1.bias"]))
        embedded = ad.linear(first, w["sigma_embedder.linear_2.weight"], w["sigma_embedder.linear_2.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return ad.group_norm(x, w[name + ".weight"], w[name + ".bias"], groups, EPS) if config["norm"] == "group" else x

    logits = []
    for i, tokens in enumerate(features):
        head = f"heads.{i}."
        batch = tokens.shape[0]
        p = ad.linear(tokens, normalized(w, head + "proj"), w[head + "proj.bias"])
        p = p.transpose(0, 2, 1).reshape(batch, width, rows, columns)
        a = ad.leaky_relu(norm(head + "norm1", p), SLOPE)
        pad = config["kernel_size"] // 2
        c = ad.conv2d(a, normalized(w, head + "conv"), w[head + "conv.bias"], 1, (pad,) * 4)
        h = (ad.leaky_relu(norm(head + "norm2", c), SLOPE) + a) * 2**-0.5
        logit = (h * normalized(w, head + "out").reshape(1, width, 1, 1)).sum(axis=1) + w[head + "out.bias"]
        if config["condition_sigma"] or config["condition_pooled"]:
            psi = w[head + "condition_bias"]
            if embedded is not None:
                psi = psi + ad.linear(embedded, w[head + "condition_sigma.weight"])
            if config["condition_pooled"]:
                assert pooled is not None
                psi = psi + ad.linear(pooled, w[head + "condition_pooled.weight"])
            psi = psi.reshape(-1, config["condition_dim"])
            direction = ad.linear(psi, normalized(w, head + "direction")) * config["condition_dim"] ** -0.5
            logit = logit + (h * direction.reshape(batch, width, 1, 1)).sum(axis=1)
        logits.append(logit)
    return logits
