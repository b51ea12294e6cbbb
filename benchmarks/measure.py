"""Timing: both sides warmed up, then in turns, in one process with the same number of threads."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

Timings = dict[str, list[float]]


def in_turns(calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter, least: int = 3) -> Timings:
    """Seconds of each call by `clock`. All are warmed up; then they take turns until the time is used and each ran `least` times.

    A pause before each call lets the threads of the side that ran last (OpenMP spins for a while) fall asleep.
    """
    for call in calls.values():
        for _ in range(2):
            call()
    times: Timings = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < least:
        for name, call in calls.items():
            time.sleep(0.01)
            # A short call is repeated within one timing, so that waking up does not count as the call's own time.
            repeat = max(1, min(100, int(0.01 / times[name][0]))) if times[name] else 1
            start = clock()
            for _ in range(repeat):
                call()
            times[name].append((clock() - start) / repeat)
    return times


def summary(times: list[float]) -> dict[str, float]:
    kept = times[1:] if len(times) > 3 else times  # the first was timed without repetition
    return {"median": statistics.median(kept), "fastest": min(kept), "runs": len(kept)}


def peak_memory() -> float:
    """MB of resident memory that this process had at most. (Not getrusage: what the parent had before exec counts there.)"""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def si(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
