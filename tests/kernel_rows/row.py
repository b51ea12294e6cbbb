"""A row of the kernels' case table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from oracle.autodiff import Tensor

Array = np.ndarray
Arrays = dict[str, Array]


@dataclass
class Row:
    kernels: tuple[str, ...]
    shape: str
    inputs: Arrays
    forward: Callable[[Arrays, Any], Arrays]  # (inputs, out or None) -> results by name, the one that `out` receives is "y"
    oracle: Callable[[dict[str, Tensor]], dict[str, Any]]  # the same results in float64
    backward: Callable[[Arrays, Arrays, Array], Arrays] | None = None  # (inputs, forward's results, dy) -> gradients by input name
    tolerance: float = 2e-6
    backward_tolerance: float = 1e-5
    bf16: float | None = None  # tolerance of results and gradients where products are computed in bfloat16
    out: bool = True  # forward takes out=
    in_place: str | None = None  # the input whose memory out may be
    floors: dict[str, float] = field(default_factory=dict)  # least yardstick of a result or gradient whose terms cancel

    @property
    def id(self) -> str:
        return f"{self.kernels[0].removesuffix('_forward')}-{self.shape}"
