"""Time lists and noise that diffusers and PyTorch would give, from stored values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ladd
from ladd.sampling import TorchNoise

with np.load(Path(__file__).parent / "data" / "schedule.npz") as file:
    STORED = dict(file)


@pytest.mark.parametrize("name", [name for name in STORED if name.startswith("sigmas")])
def test_sigmas_of_diffusers(name: str) -> None:
    _, shift, steps = name.split("_")
    sigmas = ladd.sigmas(int(steps), schedule="diffusers", shift=float(shift))
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, STORED[name], rtol=0, atol=6e-8)


@pytest.mark.parametrize("name", [name for name in STORED if name.startswith("randn")])
def test_normal_numbers_of_pytorch(name: str) -> None:
    _, seed, count = name.split("_")
    drawn = TorchNoise([7, int(seed)]).start((int(count),))
    np.testing.assert_allclose(drawn[1], STORED[name], rtol=0, atol=3e-6)
