"""ladd beside PyTorch with diffusers' model on this machine: ratios and figures with their targets, and JSON beside the table.

    python benchmarks/vs_pytorch.py                        # every row
    python benchmarks/vs_pytorch.py 'demo/step/*'          # rows by name
    python benchmarks/vs_pytorch.py --list                 # their names in the order they run in, and about how long each takes
    python benchmarks/vs_pytorch.py --resume               # what out/vs_pytorch.json does not hold yet
    python benchmarks/vs_pytorch.py --report               # Markdown tables and the plot from out/vs_pytorch.json, nothing is measured
    python benchmarks/vs_pytorch.py --quick '*/compile'    # compiles beforehand: what torch.compile made stays in out/torchinductor

A row is size/what/dtype. All sides of a row run in one process with the same number of threads, are warmed up and then take turns; the
ratio is the rival's median time over ladd's. "step" is one LADD update of the discriminator and one of the student: ladd shares forward
passes between them, PyTorch's side does them apart (peer.py says how it is written), except in "step-rival-shares-passes". bfloat16 is
autocast on PyTorch's side, and weights in bfloat16 for what is not trained. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import kernels
import measure
import numpy as np
import ours
import report
from sizes import ATTENTION, DEPTHS, SIZES, TOKENS, VAE, Size, attention_inputs, growing

import ladd
from ladd import _core

Calls = dict[str, Callable[[], object]]
DTYPES = ("float32", "bfloat16")
# For the plan of a run. On the two cores of docs/performance.md a turn of both sides takes the time of its operations at RATE a second;
# BUILDING is the seconds before the first turn, COMPILING the same where torch.compile finds what it made before.
RATE, BUILDING, COMPILING = 1e11, 4.0, 20.0
# Ratios that ladd is to reach.
TARGETS = {
    "step": {"float32": {"eager": 1.8, "compile": 1.6}, "bfloat16": {"eager": 2.0, "compile": 1.8}},
    "wide step": {"float32": {"eager": 1.7}, "bfloat16": {"eager": 1.8}},
    "pass": {"float32": {"eager": 1.5, "compile": 1.3}, "bfloat16": {"eager": 1.7, "compile": 1.4}},
    "attention": {"float32": {"eager": 1.3}, "bfloat16": {"eager": 1.3}},
    "decode": {"float32": {"eager": 1.2}},
}


@dataclass(frozen=True)
class Comparison:
    """build makes one call a side, and notes on them; they then take turns for `share` of the time of a row."""

    build: Callable[[], tuple[Calls, dict[str, str]]]
    once: float  # seconds that one turn of all sides takes, roughly
    target: dict[str, float] = field(default_factory=dict)
    share: float = 1.0
    growth: dict[str, Any] | None = None

    def planned(self, seconds: float) -> float:
        building = COMPILING if "compile" in self.target else BUILDING
        return building + 2 * self.once + max(self.share * seconds, 3 * self.once)


@dataclass(frozen=True)
class Figure:
    """One number with a bound."""

    measure: Callable[[float, int], figures.Measured]  # seconds to use, least number of runs
    bound: str  # "at most", "at least"
    target: float
    unit: str
    before: float  # seconds that it takes whatever --seconds says, roughly

    def planned(self, seconds: float) -> float:
        return self.before + seconds


# ---- rows ---------------------------------------------------------------------------------------------------------------


def trained(call: Callable[[], object], rival: str, dtype: str) -> tuple[Callable[[], object], dict[str, str]]:
    """The rival's call and notes on it. In bfloat16 its default attention can be the slower one; in float32 it was not where tried."""
    import peer

    if rival == "compile" or dtype == "float32":
        return call, {}
    call, kernel = peer.with_fastest_attention(call)
    return call, {rival: f"{kernel} was the faster attention"}


def step_row(size: Size, dtype: str, rival: str = "eager", sharing: bool = False) -> tuple[Calls, dict[str, str]]:
    import peer

    trainer, batch, theirs = ours.trainer(size, dtype), ours.batch(size), peer.tensors(size.inputs())
    calls: Calls = {"ladd": lambda: trainer.step(*batch)}
    other = peer.Trainer(size, trainer.teacher.state_dict(), compiled=rival == "compile", bf16=dtype == "bfloat16")
    parameters = sum(p.numel() for p in other.heads.parameters())
    assert parameters == trainer.discriminator.num_parameters, "the heads of both sides must be the same"
    update = functools.partial(other.sharing_step if sharing else other.step, theirs["latents"], theirs["context"], theirs["pooled"])
    calls[rival], notes = trained(update, rival, dtype)
    return calls, notes


def pass_row(size: Size, what: str, dtype: str, rival: str = "eager") -> tuple[Calls, dict[str, str]]:
    import peer

    bf16, inputs = dtype == "bfloat16", size.inputs()
    theirs, model = peer.tensors(inputs), ours.model(size, dtype)
    calls: Calls = {"ladd": (lambda: model(*inputs.values())) if what == "forward" else ours.forward_backward(model, inputs)}
    make: Any = peer.forward if what == "forward" else peer.forward_backward
    call = make(peer.transformer(size, model.state_dict()), theirs, compiled=rival == "compile", bf16=bf16)
    if what != "forward":
        calls[rival], notes = trained(call, rival, dtype)
        return calls, notes
    calls[rival] = call
    if rival == "eager":
        mine, his = model(*inputs.values()), calls[rival]()
        worst = np.abs(mine - his.float().numpy()).max() / np.abs(mine).max()  # type: ignore[attr-defined]
        assert worst < (5e-2 if bf16 else 1e-4), f"both sides must compute the same, they differ by {worst:.1e}"
    return calls, {}


def attention_row(shape: tuple[int, int, int, int], what: str, dtype: str) -> tuple[Calls, dict[str, str]]:
    import peer

    streams = attention_inputs(*shape)
    outs, lse = _core.attention_forward(streams, None, dtype)
    douts = [np.ones_like(o) for o in outs]
    bf16 = dtype == "bfloat16"
    if what == "forward":
        return {"ladd": lambda: _core.attention_forward(streams, None, dtype), "eager": peer.attention(streams, bf16)}, {}
    rival, kernel = peer.attention_backward(streams, bf16)
    calls: Calls = {"ladd": lambda: _core.attention_backward(douts, streams, outs, lse, None, dtype), "eager": rival}
    return calls, {"eager": f"{kernel} was the faster kernel"}


def decode_row() -> tuple[Calls, dict[str, str]]:
    import peer

    vae = ladd.AutoencoderKL({**VAE, "scaling_factor": 1.0})
    latents = np.random.default_rng(0).standard_normal((1, 16, 64, 64), dtype=np.float32)
    rival, layout = peer.decoder(vae.state_dict(), latents)
    return {"ladd": lambda: vae.decode(latents), "eager": rival}, {"eager": f"{layout} was the faster layout"}


def all_rows(options: argparse.Namespace) -> dict[str, Comparison | Figure]:
    """In the order they run in: those that say most first, those of torch.compile, which may take minutes each, last."""
    eager: dict[str, Comparison | Figure] = {}
    compiled: dict[str, Comparison | Figure] = {}

    def both(name: str, build: Callable[..., tuple[Calls, dict[str, str]]], once: float, target: dict[str, float]) -> None:
        eager[name] = Comparison(build, once, {"eager": target["eager"]})
        if "compile" in target:
            compiled[f"{name}/compile"] = Comparison(functools.partial(build, rival="compile"), once, {"compile": target["compile"]})

    for name, size in SIZES.items():
        seconds = {what: operations / RATE for what, operations in kernels.operations(size).items()}
        for dtype in DTYPES:
            target = TARGETS["wide step" if name == "SD3" else "step"][dtype]
            both(f"{name}/step/{dtype}", functools.partial(step_row, size, dtype), seconds["step"], target)
        for what in ("forward", "forward+backward"):
            for dtype in DTYPES:
                both(f"{name}/{what}/{dtype}", functools.partial(pass_row, size, what, dtype), seconds[what], TARGETS["pass"][dtype])
        for dtype in DTYPES if name != "SD3" else ():
            build = functools.partial(step_row, size, dtype, sharing=True)
            eager[f"{name}/step-rival-shares-passes/{dtype}"] = Comparison(build, seconds["step"])
    for shape in ATTENTION:
        once = 4 * shape[0] * (shape[1] + shape[2]) ** 2 * 64 * shape[3] / RATE
        for what in ("forward", "backward"):
            for dtype in DTYPES:
                row = "attention-{}x({}+{})x{}".format(*shape[:3], 64 * shape[3])
                build = functools.partial(attention_row, shape, what, dtype)
                eager[f"{row}/{what}/{dtype}"] = Comparison(build, 2 * once, TARGETS["attention"][dtype], share=0.25)
    eager["VAE-64x64-to-512x512/decode/float32"] = Comparison(decode_row, 17.0, TARGETS["decode"]["float32"])

    bounds: dict[str, Comparison | Figure] = {}
    if options.threads > 1:
        bounds["demo/second-thread"] = Figure(figures.second_thread, "at least", 1.85, "x", 4.0)
        bounds["demo/busy-core"] = Figure(figures.busy_core, "at most", 2.2, "x", 4.0)
    for name in ("S", "SD3"):
        for what in ("forward", "step"):
            share = functools.partial(lambda size, what, seconds, least: figures.share_of_rate(size, what, seconds), SIZES[name], what)
            bounds[f"{name}/share-of-product-rate/{what}"] = Figure(share, "at least", 0.85, "%", 6.0)
    memory = Figure(lambda seconds, least: figures.peak_memory(__file__, options.threads), "at most", 0.5, "of PyTorch's", 15.0)
    bounds["demo/memory"] = memory
    bounds["one-picture"] = Figure(figures.one_picture, "at most", 0.015, "s", 1.0)
    bounds["import"] = Figure(lambda seconds, least: figures.import_time(2 * least), "at most", 0.15, "s", 1.0)
    bounds["wheel-without-model"] = Figure(lambda seconds, least: figures.wheel_size(), "at most", 15.0, "MB", 30.0)

    growth: dict[str, Comparison | Figure] = {}
    for along, values in (("image tokens", TOKENS), ("depth", DEPTHS)):
        for x in values:
            size = growing(along, x)
            for what in ("step", "forward"):
                build = functools.partial(step_row, size, "float32") if what == "step" else functools.partial(pass_row, size, what, "float32")
                once = kernels.operations(size)[what] / RATE
                at = {"along": along, "x": x, "what": what}
                growth[f"growth/{along.replace(' ', '-')}-{x}/{what}"] = Comparison(build, once, share=0.25, growth=at)
    return {**eager, **bounds, **growth, **({} if options.no_compile else compiled)}


# ---- measuring ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(row: Comparison, options: argparse.Namespace) -> report.Result:
    import peer

    calls, notes = row.build()
    warm_ups = 1 if options.quick else 2
    if "compile" in calls:
        before, start = peer.compilations(), time.perf_counter()
        try:
            with at_most(options.compile_limit):
                measure.warm_up(calls["compile"], warm_ups)
            notes["compile"] = f"{peer.compilations() - before} graphs in {time.perf_counter() - start:.0f} s"
        except Exception as e:  # whatever the compiler raises is a row without that side, with the reason beside it
            del calls["compile"]
            late = time.perf_counter() - start > options.compile_limit
            why = f"within {options.compile_limit:.0f} s" if late else f"for {type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
            notes["compile"] = f"not compiled {why}"
    for side in calls.keys() - {"compile"}:
        measure.warm_up(calls[side], warm_ups)
    graphs = peer.compilations()
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = measure.in_turns(calls, row.share * options.seconds, clock, least=1 if options.quick else 3)
    if peer.compilations() != graphs:
        raise RuntimeError(f"{peer.compilations() - graphs} graphs were compiled while the sides took turns")
    sides = {side: measure.summary(values) for side, values in times.items()}
    result: report.Result = {
        "seconds": sides,
        "ratio": {side: s["median"] / sides["ladd"]["median"] for side, s in sides.items() if side != "ladd"},
        "ratio_of_fastest": {side: s["fastest"] / sides["ladd"]["fastest"] for side, s in sides.items() if side != "ladd"},
        "target": row.target,
        "notes": notes,
    }
    return {**result, "growth": row.growth} if row.growth else result


def run(rows: dict[str, Comparison | Figure], results: report.Result, options: argparse.Namespace) -> None:
    import peer

    began = time.perf_counter()
    for name, row in rows.items():
        if name in results["rows"]:
            continue
        start = time.perf_counter()
        try:
            if isinstance(row, Figure):
                value, detail = row.measure(options.seconds, 1 if options.quick else 3)
                result = {"value": value, "unit": row.unit, "bound": row.bound, "target": row.target, "detail": detail}
            else:
                result = compare(row, options)
        except Exception as e:  # what one row cannot do must not cost the others
            result = {"reason": f"{type(e).__name__}: {e}"}
        results["rows"][name] = {**result, "took": round(time.perf_counter() - start, 1)}
        print(f"{time.perf_counter() - began:5.0f} s  {report.line(name, results['rows'][name])}", flush=True)
        write(results, options.json)
        peer.forget_compilations()
        gc.collect()


def write(results: report.Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(aside, path)


def train(side: str, threads: int) -> None:
    """A process of the memory row: three steps at demo size, then the peak. ladd's does not import PyTorch."""
    size = SIZES["demo"]
    ladd.set_num_threads(threads)
    if side == "ladd":
        trainer, batch = ours.trainer(size, "float32"), ours.batch(size)
        for _ in range(3):
            trainer.step(*batch)
    else:
        import peer
        import torch

        torch.set_num_threads(threads)
        rival = peer.Trainer(size, ours.model(size).state_dict(), compiled=False, bf16=False)
        for _ in range(3):
            rival.step(*map(torch.from_numpy, ours.batch(size)))
    print(measure.peak_memory())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["*"], help="names of rows, with * and ? (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the turns of one row, at least three each (default: 6)")
    parser.add_argument("--quick", action="store_true", help="one turn each: does every row work?")
    parser.add_argument("--threads", type=int, default=ladd.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave the rows of torch.compile out")
    parser.add_argument("--compile-limit", type=float, default=400.0, metavar="SECONDS", help="for the compilation of one row (default: 400)")
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock: one thread on a busy machine")
    parser.add_argument("--json", type=Path, default=Path("out/vs_pytorch.json"))
    parser.add_argument("--resume", action="store_true", help="measure only the rows that the JSON does not hold")
    parser.add_argument("--report", action="store_true", help="print the JSON as Markdown and write --plot; nothing is measured")
    parser.add_argument("--plot", type=Path, default=Path("out/growth.png"), help="how the cost grows, once its rows are measured")
    parser.add_argument("--train", choices=("ladd", "pytorch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.threads)
        return 0
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads, also while they wait: use --threads 1")
    if options.quick:
        options.seconds = 0.0
    rows = {n: r for n, r in all_rows(options).items() if any(fnmatch.fnmatchcase(n, p) for p in options.rows)}
    if not rows:
        parser.error(f"no row is called {' or '.join(options.rows)}; --list prints the names")
    if options.list:
        for name, row in rows.items():
            print(f"{row.planned(options.seconds):4.0f} s  {name}")
        print(plan(rows, options))
        return 0
    if options.report:
        results = json.loads(options.json.read_text())
    else:
        results = begin(options)
        print(", ".join(f"{k} {v}" for k, v in results.items() if k != "rows"))
        print(plan({name: row for name, row in rows.items() if name not in results["rows"]}, options), flush=True)
        run(rows, results, options)
    print("\n" + report.markdown(results))
    if all(name in results["rows"] for name in all_rows(options) if name.startswith("growth/")):
        report.plot(results, options.plot)
    return 0


def plan(rows: dict[str, Comparison | Figure], options: argparse.Namespace) -> str:
    minutes = sum(row.planned(options.seconds) for row in rows.values()) / 60
    return f"{len(rows)} rows, about {minutes:.0f} minutes on two quiet cores"


def begin(options: argparse.Namespace) -> report.Result:
    """Sets both sides up. -> what describes the run, and the rows that an earlier one measured when it is resumed."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.json.parent.absolute() / "torchinductor"))
    import torch

    measure.keep_freed_memory()
    ladd.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    results: report.Result = {
        "machine": measure.processor(),
        "threads": options.threads,
        "instruction_set": _core.backend_name(),
        "clock": "processor" if options.cpu_time else "wall",
        "torch": torch.__version__,
        "ladd": ladd.__version__,
    }
    if not options.resume or not options.json.exists():
        return {**results, "rows": {}}
    earlier: report.Result = json.loads(options.json.read_text())
    if {k: v for k, v in earlier.items() if k != "rows"} != results:
        raise SystemExit(f"{options.json} was measured elsewhere or otherwise; remove it, or choose another with --json")
    earlier["rows"] = {name: row for name, row in earlier["rows"].items() if "reason" not in row}
    return earlier


if __name__ == "__main__":
    raise SystemExit(main())
