"""Timing: both sides warmed up, then in turns, in one process with the same number of threads."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

Calls = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]
Timings = dict[str, list[float]]


def warm_up(call: Callable[[], object], times: int = 2) -> None:
    for _ in range(times):
        call()


def in_turns(calls: Calls, seconds: float, clock: Clock = time.perf_counter, least: int = 3) -> Timings:
    """Seconds of each call by `clock`, already warmed up: they take turns until the time is used and each ran `least` times.

    A pause before each call lets the threads of the side that ran last (OpenMP spins for a while) fall asleep.
    """
    times: Timings = {name: [] for name in calls}
    first: dict[str, float] = {}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < least:
        for name, call in calls.items():
            time.sleep(0.01)
            # A short call is repeated within one timing, so that waking up does not count as the call's own time.
            repeat = max(1, min(100, int(0.01 / first[name]))) if name in first else 1
            start = clock()
            for _ in range(repeat):
                call()
            took = (clock() - start) / repeat
            if name in first or took > 0.01:
                times[name].append(took)
            first.setdefault(name, took)
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "fastest": min(times), "slowest": max(times), "runs": len(times)}


def keep_freed_memory() -> None:
    """Lets glibc hand freed memory out again instead of returning it to the system, as PyTorch's tuning guide asks of an allocator."""
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(mmap_threshold, most)
    mallopt(trim_threshold, 2**31 - 1)


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
