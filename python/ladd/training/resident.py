"""A step's own numbers where it is computed: what goes in (times, rates, counters) in one copy, what comes out (losses, norms) in one
copy, whenever somebody asks. So a step on a GPU is queued without waiting for it, and can be recorded once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .. import device as devices

Array = NDArray[Any]
Metrics = Mapping[str, float]


# ---- what passes through a step ----------------------------------------------------------------------------------------


@dataclass
class Draws:
    """The random scalars of one pass, and what follows from them; arrays of noise are drawn by key where they are used."""

    key: Any  # the pass's number: an int, or a counter on the device
    t: Any  # [B] student times
    t_hat_fake: Any  # [B]
    t_hat_real: Any  # [B]
    paired: Any  # [B] 1 where x_t starts from the noise that the teacher's picture came from, else 0
    minus_t: Any  # [B] -t
    rest: Any  # [B] 1 - t_hat_fake
    root: Any  # [B] sqrt(1 - t_hat_fake)

    def rows(self, part: slice) -> Draws:
        return Draws(self.key, *(x[part] for x in self.arrays()))

    def arrays(self) -> tuple[Any, ...]:
        return (self.t, self.t_hat_fake, self.t_hat_real, self.paired, self.minus_t, self.rest, self.root)


@dataclass
class Numbers:
    """What differs from step to step, where the step computes: draws, and on a device rates and decay too."""

    draws: list[Draws]  # one a discriminator update; the last one is the student's too
    differs: Any  # [B] 0 where the picture before it has the same text, else 1
    rates: list[Any]  # [4] a discriminator update, then the student's: AdamW.control of common.py
    decay: Any  # [2] of the average: its decay, and whether to do it


@dataclass
class Part:
    """Some rows of a batch, and their place in it: noise is keyed by the place, so it does not depend on the split."""

    latents: Array  # [b,C,H,W]
    context: Array  # [b,T,J]
    pooled: Array  # [b,P]
    other_context: Array  # [b,T,J] text of the picture before it in the batch
    other_pooled: Array  # [b,P]
    differs: Any  # [b] 0 where that text is the same, else 1
    samples: Array  # [b] int64
    share: float  # b / B
    draws: Draws
    noise: Array | None  # [b,C,H,W] what the teacher started from; None: unknown


Batch = tuple[Any, Any, Any, Any]  # latents, context, pooled, noise or None


@dataclass
class StudentPass:
    x0: Array
    saved: Any


@dataclass
class FakePass:
    features: list[Array]
    noised: Array
    saved: Any


# ---- its numbers ---------------------------------------------------------------------------------------------------------


def _zeros(device: devices.Device | None, count: int) -> Any:
    """float32 numbers where a model computes; a pair of them holds a float64 of the kernels."""
    return np.zeros(count, np.float32) if device is None else device.empty((count,), "float32", True)


class Inputs:
    """Host arrays to the device, all of them in one copy. Equal sizes come to equal places, where a recorded step reads them anew."""

    def __init__(self, device: devices.Device | None) -> None:
        self.device = device
        self._blocks: dict[int, Any] = {}

    def __call__(self, arrays: Sequence[Array]) -> list[Any]:
        """float32 arrays, or integers for counters, each as it is on the device. On the CPU they stay what they are."""
        if self.device is None:
            return list(arrays)
        flat = [a.view(np.float32) if a.dtype == np.uint64 else a for a in arrays]
        size = sum(a.size for a in flat)
        if size not in self._blocks:
            self._blocks[size] = _zeros(self.device, size)
        block = self._blocks[size]
        block[...] = np.concatenate([a.reshape(-1) for a in flat])
        ends = np.cumsum([a.size for a in flat]).tolist()
        return [block[end - a.size : end] for a, end in zip(flat, ends, strict=True)]


class Tally:
    """The float64 numbers that kernels of one step write, and how they add up to metrics."""

    def __init__(self, device: devices.Device | None, count: int) -> None:
        self._memory = _zeros(device, 2 * count)
        self.begin()

    def begin(self) -> None:
        """A new step: all numbers are 0."""
        _core.zero(self._memory)
        self.used = 0
        self.known: dict[str, float] = {}  # metrics of the host's own
        self._sums: dict[str, list[tuple[int, float]]] = {}

    def take(self, count: int = 1) -> tuple[int, Any]:
        """The place of the next `count` numbers, and their memory."""
        place, self.used = self.used, self.used + count
        return place, self.memory(place, self.used)

    def memory(self, start: int, stop: int) -> Any:
        return self._memory[2 * start : 2 * stop]

    def add(self, name: str, place: int, factor: float = 1.0) -> None:
        """metrics[name] += factor times the number at `place`."""
        self._sums.setdefault(name, []).append((place, factor))

    def number(self, name: str, factor: float = 1.0) -> Any:
        """The memory of one number that is added to metrics[name]."""
        place, memory = self.take()
        self.add(name, place, factor)
        return memory

    def forget(self) -> None:
        """What was added so far is in no metric."""
        self._sums.clear()

    def alias(self) -> Tally:
        """The same memory with these metrics: another step may begin on this tally, and a replay fills the memory again."""
        twin = object.__new__(Tally)
        twin._memory, twin.used, twin.known = self._memory, self.used, dict(self.known)
        twin._sums = {name: list(terms) for name, terms in self._sums.items()}
        return twin

    def metrics(self, numbers: NDArray[np.float64] | None = None) -> dict[str, float]:
        """From the numbers as they were read; None: reads them now, and waits for them."""
        if numbers is None:
            numbers = devices.to_host(self._memory).view(np.float64)
        sums = {name: float(sum(factor * numbers[place] for place, factor in terms)) for name, terms in self._sums.items()}
        return {**sums, **self.known}


class LateMetrics(Mapping[str, float]):
    """Metrics of a step that may still run: the first look at them waits for it, and raises what went wrong in it."""

    def __init__(self, status: Status, tally: Tally, check: Callable[[int, float, list[int]], None]) -> None:
        """The numbers of both as they are when the work queued so far is done; check is given what Status.read gives."""
        first, rest = status._memory, tally._memory
        self._numbers = first.device.empty((first.size + rest.size,), "float32")
        self._numbers[: first.size] = first
        self._numbers[first.size :] = rest
        self._split = first.size // 2
        self._tally, self._check = tally.alias(), check
        self._known: dict[str, float] | None = None

    def _read(self) -> dict[str, float]:
        if self._known is None:
            numbers = self._numbers.numpy().view(np.float64)
            self._check(*Status.decode(numbers[: self._split]))
            self._known = self._tally.metrics(numbers[self._split :])
        return self._known

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._read() == dict(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._read())


class Status:
    """What a device decided: the first update that it refused because a number was not finite, and how many updates it made.

    After a refusal it refuses everything until the host has seen it, so the weights stay those of that moment.
    """

    def __init__(self, device: devices.Device | None, updates: int) -> None:
        self._memory = _zeros(device, 2 * (2 + updates))
        self.failed = self._memory[:4]
        self.done = [self._memory[4 + 2 * i : 6 + 2 * i] for i in range(updates)]

    def read(self) -> tuple[int, float, list[int]]:
        """decode() of the numbers as they are; waits for them."""
        return self.decode(devices.to_host(self._memory).view(np.float64))

    @staticmethod
    def decode(numbers: NDArray[np.float64]) -> tuple[int, float, list[int]]:
        """(which update failed, counted from 1; 0: none), the norm of its gradient, and how many of each were made."""
        return int(numbers[0]), float(numbers[1]), [int(n) for n in numbers[2:]]

    def reset(self) -> None:
        _core.zero(self._memory)


@dataclass
class Recorded:
    """A step in a graph: what it reads its batch from, and where it leaves its numbers."""

    graph: devices.Graph
    batch: Batch
    tally: Tally


def add_logit_metrics(tally: Tally, real: list[int], fake: list[int], share: float) -> None:
    """What shows a discriminator too strong or too weak: the gap of the logits, per head too, and the share of saturated hinge terms."""
    each = share / len(real)
    for i, (r, f) in enumerate(zip(real, fake, strict=True)):
        mean_real, mean_fake = r + 1, f + 1
        tally.add("logit_real", mean_real, each)
        tally.add("logit_fake", mean_fake, each)
        tally.add("logit_gap", mean_real, each)
        tally.add("logit_gap", mean_fake, -each)
        tally.add("saturated", r + 2, each / 2)
        tally.add("saturated", f + 2, each / 2)
        tally.add(f"logit_gap_{i}", mean_real, share)
        tally.add(f"logit_gap_{i}", mean_fake, -share)
