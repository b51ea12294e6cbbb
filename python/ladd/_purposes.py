"""What random numbers are for: one constant a use, so that no two draws of a run share a key.

Every random number of `ladd` is keyed by (seed, purpose, step, sample). Arrays come from the core's Philox (`_core.normal`,
`_core.renoise`); a few scalars a step (times, indices) come from NumPy's Philox by `generator`.
"""

from __future__ import annotations

import numpy as np

INIT = 1  # of weights, with the tensor's number for the step; csrc/models/ has this constant and DISC_INIT too
NOISE = 2  # start of the sampler, one seed an image
SAMPLER = 3  # fresh noise of the re-noise sampler, one seed an image
TIMES = 4
DATA = 5
STUDENT_NOISE = 6
RENOISE_FAKE = 7
RENOISE_REAL = 8
T_HAT = 9
STUDENT_TIME = 10
TEXT_DROP = 11
VAE_POSTERIOR = 12
AUGMENT = 13
MISALIGN = 14
TEACHER_NOISE = 15
DISC_INIT = 16
GUIDANCE = 17
VALIDATION = 18
ROUNDING = 32  # of weights, with the number of the optimizer's buffer added
ROUNDING_HEADS = 48

_U64 = (1 << 64) - 1


def generator(seed: int, purpose: int, step: int = 0) -> np.random.Generator:
    """A fresh generator for the scalars of one (purpose, step): a resumed run draws what an uninterrupted one draws."""
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step must be in [0, 2**32), got {step}")
    return np.random.Generator(np.random.Philox(key=np.array([seed & _U64, purpose << 32 | step], dtype=np.uint64)))
