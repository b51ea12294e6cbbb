"""Adversarial losses on logits, with their gradients.

Each loss has `discriminator(real, fake) -> value, dreal, dfake` and `generator(fake) -> value, dfake`. Logits are an array, or a
list with one array a head; the value is the mean over a head's logits, then over heads. A list comes back as a list.

  name      real                      fake                 generator
  hinge     max(0, 1 - x)             max(0, 1 + x)        -x
  logistic  softplus(-x)              softplus(x)          softplus(-x)
  lsgan     (x - 1)^2 / 2             x^2 / 2              (x - 1)^2 / 2
  bce       cross-entropy with 1      with 0               with 1       (the same function as logistic)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from . import _core
from .arrays import as_float32

Name = Literal["hinge", "logistic", "lsgan", "bce"]
Role = Literal["real", "fake", "generator"]


class Loss:
    """One of the losses of this module."""

    def __init__(self, name: Name) -> None:
        self.name: Name = name

    def __repr__(self) -> str:
        return f"ladd.losses.{self.name}"

    def _mean(self, logits: Any, role: Role) -> tuple[float, Any]:
        """Mean over a head's logits, then over heads, and its gradient."""
        heads: Sequence[Any] = logits if isinstance(logits, (list, tuple)) else [logits]
        if not heads:
            raise ValueError(f"logits ({role}) must be an array or a list of at least one, got an empty list")
        value, gradients = 0.0, []
        for i, head in enumerate(heads):
            x: Any = head if isinstance(head, _core.DeviceArray) else as_float32(head, f"logits[{i}] ({role})")
            if x.size == 0:
                raise ValueError(f"logits[{i}] ({role}) must not be empty, got shape {list(x.shape)}")
            one, d = _core.adversarial_loss(x, self.name, role, 1.0 / len(heads))
            value += one / len(heads)
            gradients.append(d)
        return value, gradients if isinstance(logits, (list, tuple)) else gradients[0]

    def discriminator(self, real: Any, fake: Any) -> tuple[float, Any, Any]:
        """-> value, dreal, dfake; lower where real logits are high and fake ones low."""
        on_real, dreal = self._mean(real, "real")
        on_fake, dfake = self._mean(fake, "fake")
        return on_real + on_fake, dreal, dfake

    def generator(self, fake: Any) -> tuple[float, Any]:
        """-> value, dfake; lower where the fake's logits are high."""
        return self._mean(fake, "generator")


hinge = Loss("hinge")
logistic = Loss("logistic")
lsgan = Loss("lsgan")
bce = Loss("bce")


def by_name(name: str) -> Loss:
    """The loss of that name."""
    losses = {loss.name: loss for loss in (hinge, logistic, lsgan, bce)}
    for known, loss in losses.items():
        if known == name:
            return loss
    raise ValueError(f"loss must be one of {', '.join(losses)}, got {name!r}")
