"""What makes a distillation useless without an error, watched from its metrics: each is said once, as a warning."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping

EPOCHS = 100  # that many times over the same latents
BLIND_STEPS, BLIND_GAP = 500, 0.002  # mean logit gap over so many steps: chance. A run that went well had 0.0055 over its first 660
WON_STEPS, WON_SHARE = 100, 0.9  # share of logits beyond the hinge's margin on their own side


class Watch:
    """Called with each step's metrics."""

    def __init__(self, latents: int, batch: int) -> None:
        self.latents, self.batch = latents, batch
        self.gaps: deque[float] = deque(maxlen=BLIND_STEPS)
        self.shares: deque[float] = deque(maxlen=WON_STEPS)
        self.said: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.gaps.append(metrics["logit_gap"])
        self.shares.append(metrics["saturated"])
        if step * self.batch >= EPOCHS * self.latents:
            self._say("epochs", f"each of the {self.latents} latents has been seen {EPOCHS} times: heads learn them by heart; generate more")
        if len(self.gaps) == BLIND_STEPS and abs(sum(self.gaps)) < BLIND_GAP * BLIND_STEPS:
            self._say(
                "blind",
                f"the heads do not tell real from fake: mean logit gap {sum(self.gaps) / BLIND_STEPS:.4f} over {BLIND_STEPS} steps. "
                "The student learns nothing from them; try a higher ladd.discriminator.lr or ladd.d_steps",
            )
        if len(self.shares) == WON_STEPS and sum(self.shares) > WON_SHARE * WON_STEPS:
            self._say(
                "won",
                f"the discriminator has won: {sum(self.shares) / WON_STEPS:.0%} of its logits are beyond the margin over {WON_STEPS} steps. "
                "Its gradients vanish; try a lower ladd.discriminator.lr, spectral norm, or ladd.r1_weight",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            warnings.warn(text, UserWarning, stacklevel=3)
