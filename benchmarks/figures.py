"""The figures that have a bound of their own: gain of the second thread, a busy core, memory, import, wheel, one picture, share of the rate
of matrix products. Each function returns a value and what it was made of.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels
import measure
import ours
from sizes import SIZES, Size

import ladd

Measured = tuple[float, dict[str, Any]]
ROOT = Path(__file__).parent.parent


def median(call: Callable[[], object], seconds: float, least: int) -> float:
    call()
    return measure.summary(measure.in_turns({"it": call}, seconds, least=least)["it"])["median"]


def demo_step() -> Callable[[], object]:
    size = SIZES["demo"]
    trainer, batch = ours.trainer(size, "float32"), ours.batch(size)
    return lambda: trainer.step(*batch)


def second_thread(seconds: float, least: int) -> Measured:
    """How many times faster a step is on two threads than on one."""
    step, before = demo_step(), ladd.get_num_threads()

    def on(threads: int) -> Callable[[], object]:
        def call() -> None:
            ladd.set_num_threads(threads)
            step()

        return call

    try:
        calls = {"1 thread": on(1), "2 threads": on(2)}
        for call in calls.values():
            call()
        times = {name: measure.summary(values)["median"] for name, values in measure.in_turns(calls, seconds, least=least).items()}
    finally:
        ladd.set_num_threads(before)
    return times["1 thread"] / times["2 threads"], times


def busy_core(seconds: float, least: int) -> Measured:
    """How many times longer a step on all threads takes while another process spins on one of the cores."""
    step = demo_step()
    alone = median(step, seconds / 2, least)
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    spinner = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        busy = median(step, seconds / 2, least)
    finally:
        spinner.kill()
        spinner.wait()
    return busy / alone, {"alone": alone, "busy": busy}


def share_of_rate(size: Size, what: str, seconds: float) -> Measured:
    """A pass's rate as a share of that of the fastest large matrix product here, ladd's or PyTorch's."""
    import torch

    rate = kernels.ceilings(time.perf_counter)["gflops"]
    for m, n, k in ((1024, 1024, 1024), (2048, 1536, 384), (1024, 6144, 1536)):
        x, w, y = torch.randn(m, k), torch.randn(n, k).T, torch.empty(m, n)
        rate = max(rate, 2e-9 * m * n * k / kernels.fastest(lambda x=x, w=w, y=y: torch.mm(x, w, out=y), time.perf_counter))  # type: ignore[misc]
    took = kernels.fastest(kernels.passes(size)[what], time.perf_counter, seconds)
    reached = 1e-9 * kernels.operations(size)[what] / took
    return reached / rate, {"seconds": took, "GFLOP/s": reached, "of": rate}


def peak_memory(script: str, threads: int) -> Measured:
    """ladd's peak as a share of PyTorch's: fresh processes that train three steps at demo size."""

    def peak(side: str) -> float:
        command = [sys.executable, script, "--train", side, "--threads", str(threads)]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    peaks = {side: peak(side) for side in ("ladd", "pytorch")}
    return peaks["ladd"] / peaks["pytorch"], {"ladd MB": peaks["ladd"], "PyTorch MB": peaks["pytorch"]}


def import_time(runs: int) -> Measured:
    """Of `import ladd` in a fresh interpreter, NumPy included."""
    code = "import time; t = time.perf_counter(); import ladd; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(runs + 1)]
    return statistics.median(times[1:]), {"runs": runs}


def wheel_size() -> Measured:
    """MB of the wheel less what the shipped model takes in it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-build-isolation", "--no-deps", "-w", folder]
        subprocess.run([*command, str(ROOT)], check=True, env={**os.environ, "LADD_CUDA": "0"}, stdout=sys.stderr)
        (wheel,) = Path(folder).glob("ladd-*.whl")
        whole = wheel.stat().st_size
        with zipfile.ZipFile(wheel) as archive:
            model = sum(entry.compress_size for entry in archive.infolist() if entry.filename.startswith("ladd/pretrained/"))
    return (whole - model) / 1e6, {"with the model": whole / 1e6}


def one_picture(seconds: float, least: int) -> Measured:
    """One-step sampling of a 64x64 picture from the shipped model, text to pixels."""
    pipe = ladd.Pipeline.from_pretrained("openmoji")
    seeds = iter(range(1 << 30))
    took = median(lambda: pipe("a red apple", steps=1, seed=next(seeds)), seconds, least)
    return took, {"size": "{}x{}".format(*pipe("a red apple", steps=1).images[0].size)}
