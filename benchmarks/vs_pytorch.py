"""ladd beside PyTorch with diffusers' model on this machine: a table of ratios, and JSON beside it.

    python benchmarks/vs_pytorch.py                        # every row, some 40 minutes
    python benchmarks/vs_pytorch.py 'demo/step/*'          # rows by name; a row takes about a minute
    python benchmarks/vs_pytorch.py --list                 # their names
    python benchmarks/vs_pytorch.py --grow docs/images/growth.png

A row is size/what/dtype. All sides of a row run in one process with the same number of threads, are warmed up and then take turns; the
ratio is the rival's median time over ladd's. "step" is one LADD update of the discriminator and one of the student: ladd shares forward
passes between them, PyTorch's side does them apart (peer.py says how it is written). bfloat16 is autocast on PyTorch's side, and weights
in bfloat16 for its forward alone. "memory" is the peak resident memory of a process that trains a few steps at demo size.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
from sizes import ATTENTION, SIZES, VAE, Size, attention_inputs

import ladd
from ladd import _core

Call = Callable[[], object]
Clock = Callable[[], float]
DTYPES = ("float32", "bfloat16")


class NotHere(Exception):
    """This build or processor has no such row."""


# ---- ladd's side --------------------------------------------------------------------------------------------------------


def our_model(size: Size, dtype: str = "float32") -> ladd.MMDiT:
    model = ladd.MMDiT(size.transformer(), dtype=dtype)
    # The standard initialisation is zero at gates and output: with these weights every part of the network counts.
    rng = np.random.default_rng(1)
    model.flat_trainable[:] = rng.standard_normal(model.flat_trainable.shape, dtype=np.float32) * np.float32(0.02)
    return model


def our_trainer(size: Size, dtype: str) -> ladd.LADD:
    student = our_model(size, dtype)
    heads = ladd.Discriminator(size.discriminator(), dtype=dtype)
    return ladd.LADD(student, student.copy(), heads, allow_noise_latents=True)


def our_forward_backward(model: ladd.MMDiT, inputs: dict[str, np.ndarray]) -> Call:
    cotangent = np.ones_like(inputs["latents"])

    def call() -> None:
        model.zero_grad()
        _, pullback = model.vjp(*inputs.values())
        pullback(cotangent, latents=False, context=False, pooled=False)

    return call


# ---- rows ---------------------------------------------------------------------------------------------------------------


def model_row(size: Size, what: str, dtype: str, compiled: bool) -> dict[str, Call]:
    import peer

    bf16, inputs = dtype == "bfloat16", size.inputs()
    theirs = peer.tensors(inputs)
    modes = {"eager": False, "compile": True} if compiled else {"eager": False}
    calls: dict[str, Call] = {}
    if what == "step":
        trainer = our_trainer(size, dtype)
        batch = (inputs["latents"], inputs["context"], inputs["pooled"])
        calls["ladd"] = lambda: trainer.step(*batch)
        state = trainer.teacher.state_dict()
        for mode, flag in modes.items():
            rival = peer.Trainer(size, state, compiled=flag, bf16=bf16)
            parameters = sum(p.numel() for p in rival.heads.parameters())
            assert parameters == trainer.discriminator.num_parameters, "the heads of both sides must be the same"
            calls[mode] = lambda rival=rival: rival.step(theirs["latents"], theirs["context"], theirs["pooled"])
        return calls
    model = our_model(size, dtype)
    state = model.state_dict()
    calls["ladd"] = (lambda: model(*inputs.values())) if what == "forward" else our_forward_backward(model, inputs)
    for mode, flag in modes.items():
        make: Any = peer.forward if what == "forward" else peer.forward_backward
        calls[mode] = make(peer.transformer(size, state), theirs, compiled=flag, bf16=bf16)
    if what == "forward":
        ours, rival = model(*inputs.values()), calls["eager"]()
        worst = np.abs(ours - rival.float().numpy()).max() / np.abs(ours).max()  # type: ignore[attr-defined]
        assert worst < (5e-2 if bf16 else 1e-4), f"both sides must compute the same, they differ by {worst:.1e}"
    return calls


def attention_row(shape: tuple[int, int, int, int], what: str, dtype: str) -> dict[str, Call]:
    import peer

    if dtype != "float32":
        raise NotHere("ladd's attention kernels take float32 arrays")
    streams = attention_inputs(*shape)
    outs, lse = _core.attention_forward(streams)
    douts = [np.ones_like(o) for o in outs]
    forward, backward = peer.attention(streams, False)
    if what == "forward":
        return {"ladd": lambda: _core.attention_forward(streams), "eager": forward}
    return {"ladd": lambda: _core.attention_backward(douts, streams, outs, lse), "eager": backward}


def decode_row() -> dict[str, Call]:
    import peer
    import torch

    vae = ladd.AutoencoderKL({**VAE, "scaling_factor": 1.0})
    latents = np.random.default_rng(0).standard_normal((1, 16, 64, 64), dtype=np.float32)
    rival, theirs = peer.autoencoder(vae.state_dict()), torch.from_numpy(latents)

    def decode() -> object:
        with torch.inference_mode():
            return rival.decode(theirs).sample

    return {"ladd": lambda: vae.decode(latents), "eager": decode}


def rows(compiled: bool) -> dict[str, Callable[[], dict[str, Call]]]:
    table: dict[str, Callable[[], dict[str, Call]]] = {}
    for name, size in SIZES.items():
        for what in ("step", "forward", "forward+backward"):
            for dtype in DTYPES:
                also = compiled and name != "SD3"  # compiling two blocks of width 1536 changes little and takes minutes
                table[f"{name}/{what}/{dtype}"] = lambda s=size, w=what, d=dtype, c=also: model_row(s, w, d, c)  # type: ignore[misc]
    for shape in ATTENTION:
        for what in ("forward", "backward"):
            name = "attention-{}x({}+{})x{}".format(*shape[:3], 64 * shape[3])
            table[f"{name}/{what}/float32"] = lambda s=shape, w=what: attention_row(s, w, "float32")  # type: ignore[misc]
    table["VAE-64x64-to-512x512/decode/float32"] = decode_row
    return table


def set_threads(n: int) -> None:
    import torch

    ladd.set_num_threads(n)
    torch.set_num_threads(n)


# ---- memory -------------------------------------------------------------------------------------------------------------


def peak_memory(side: str, threads: int) -> float:
    """MB of a fresh process that trains a few steps at demo size."""
    command = [sys.executable, __file__, "--train", side, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def train(side: str, threads: int) -> None:
    """The child: three steps, then the peak. ladd's does not import PyTorch."""
    size = SIZES["demo"]
    inputs = size.inputs()
    batch = [inputs[k] for k in ("latents", "context", "pooled")]
    if side == "ladd":
        ladd.set_num_threads(threads)
        trainer = our_trainer(size, "float32")
        for _ in range(3):
            trainer.step(*batch)
    else:
        import peer
        import torch

        set_threads(threads)
        rival = peer.Trainer(size, our_model(size).state_dict(), compiled=False, bf16=False)
        for _ in range(3):
            rival.step(*map(torch.from_numpy, batch))
    print(measure.peak_memory())


# ---- growth -------------------------------------------------------------------------------------------------------------


def grow(path: Path, seconds: float, clock: Clock) -> dict[str, Any]:
    """How the time of a step and of a sampler's pass grows with image tokens (depth 2) and with depth (256 tokens); width 384, batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides, depths = (16, 32, 64, 128), (1, 2, 4, 8, 16)
    base: dict[str, Any] = {"heads": 6, "text": 77, "channels": 16, "batch": 1, "context": 768, "pooled": 768, "head_width": 64}
    base["qk_norm"] = "rms_norm"
    plans = {
        "image tokens": {(side // 2) ** 2: Size(depth=2, side=side, **base) for side in sides},
        "depth": {depth: Size(depth=depth, side=32, **base) for depth in depths},
    }
    results: dict[str, Any] = {}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {"ladd": "tab:blue", "eager": "tab:orange"}
    for axis, (along, plan) in zip(axes, plans.items(), strict=True):
        for what, style in (("step", "-o"), ("forward", "--s")):
            points: dict[str, list[float]] = {"ladd": [], "eager": []}
            for x, size in plan.items():
                times = measure.in_turns(model_row(size, what, "float32", False), seconds, clock)
                for side, values in times.items():
                    points[side].append(measure.summary(values)["median"])
                print(f"{along} {x:5d} {what:8s} " + "  ".join(f"{s} {measure.si(v[-1])}" for s, v in points.items()), flush=True)
            for side, values in points.items():
                label = f"{'ladd' if side == 'ladd' else 'PyTorch'}, {'LADD step' if what == 'step' else 'one sampling step'}"
                axis.loglog(list(plan), values, style, color=colours[side], label=label)
            results[f"{along}/{what}"] = {"x": list(plan), **points}
        axis.set_xlabel(along)
        axis.set_ylabel("seconds")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return results


# ---- the command --------------------------------------------------------------------------------------------------------


def run(table: dict[str, Callable[[], dict[str, Call]]], seconds: float, clock: Clock) -> dict[str, Any]:
    print(f"{'row':46s} {'ladd':>9s} {'eager':>9s} {'compile':>9s}   eager/ladd  compile/ladd", flush=True)
    results: dict[str, Any] = {}
    for name, build in table.items():
        try:
            times = measure.in_turns(build(), seconds, clock)
        except (NotHere, ValueError) as e:
            print(f"{name:46s} not measured: {e}", flush=True)
            continue
        sides = {side: measure.summary(values) for side, values in times.items()}
        ours = sides["ladd"]
        ratios = {side: s["median"] / ours["median"] for side, s in sides.items() if side != "ladd"}
        fastest = {side: s["fastest"] / ours["fastest"] for side, s in sides.items() if side != "ladd"}
        results[name] = {"seconds": sides, "ratio": ratios, "ratio_of_fastest": fastest}
        columns = [f"{measure.si(sides[s]['median']) if s in sides else '-':>9s}" for s in ("ladd", "eager", "compile")]
        columns += [f"{ratios[s] if s in ratios else float('nan'):12.2f}" for s in ("eager", "compile")]
        print(f"{name:46s} " + " ".join(columns), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["*"], help="names of rows, with * and ? (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the turns of one row (default: 20)")
    parser.add_argument("--threads", type=int, default=ladd.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock: one thread on a busy machine")
    parser.add_argument("--json", type=Path, default=Path("out/vs_pytorch.json"))
    parser.add_argument("--grow", type=Path, metavar="PNG", help="instead: plot how the cost grows")
    parser.add_argument("--train", choices=("ladd", "pytorch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.threads)
        return 0
    table = {n: f for n, f in rows(not options.no_compile).items() if any(fnmatch.fnmatch(n, p) for p in options.rows)}
    memory = any(fnmatch.fnmatch("demo/memory/float32", p) for p in options.rows)
    if options.list:
        print(*table, *(["demo/memory/float32"] if memory else []), sep="\n")
        return 0
    if not table and not memory:
        parser.error(f"no row is called {' or '.join(options.rows)}; --list prints the names")
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads, also while they wait: use --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    import torch

    set_threads(options.threads)
    results: dict[str, Any] = {
        "machine": measure.processor(),
        "threads": options.threads,
        "instruction_set": _core.backend_name(),
        "clock": "processor" if options.cpu_time else "wall",
        "torch": torch.__version__,
        "ladd": ladd.__version__,
    }
    print(", ".join(f"{k} {v}" for k, v in results.items()))
    if options.grow:
        results["growth"] = grow(options.grow, options.seconds / 4, clock)
    else:
        results["rows"] = run(table, options.seconds, clock)
        if memory:
            peaks = {side: peak_memory(side, options.threads) for side in ("ladd", "pytorch")}
            results["peak_memory_mb"] = peaks
            ratio = peaks["pytorch"] / peaks["ladd"]
            print(f"demo/memory/float32: ladd {peaks['ladd']:.0f} MB, eager {peaks['pytorch']:.0f} MB, ratio {ratio:.2f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
