"""Each kernel at the sizes of one model against this machine's ceilings, and whole passes against its rate of matrix products.

    python benchmarks/kernels.py                     # the demo's sizes; --size S or SD3 for the others
    python benchmarks/kernels.py 'attention*'        # kernels by name

The ceilings are measured first, in the same process with the same threads: the rate of large matrix products (GFLOP/s) and of copying an
array that no cache holds (GB/s, read and written). A kernel's bytes are its inputs and outputs, each counted once, its operations those
that the mathematics needs. "bound" is the time that the ceilings allow, as a share of the time measured. Bound by memory, a kernel may
exceed 100 %: its arrays may lie in a cache. (`python tests/test_kernels.py --time` times the rows of the tests' case table.)
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import ours
from sizes import SIZES, Size

import ladd
from ladd import _core

Array = np.ndarray
Clock = Callable[[], float]


def fastest(call: Callable[[], object], clock: Clock, seconds: float = 0.3) -> float:
    """Seconds of the fastest call. The first is not counted."""
    call()
    best, used, runs = float("inf"), 0.0, 0
    while used < seconds or runs < 3:
        start = clock()
        call()
        took = clock() - start
        best, used, runs = min(best, took), used + took, runs + 1
    return best


def ceilings(clock: Clock) -> dict[str, float]:
    rng = np.random.default_rng(0)
    rate = 0.0
    for m, n, k in ((1024, 1024, 1024), (2048, 1536, 384), (1024, 6144, 1536)):
        x, w = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((n, k), dtype=np.float32)
        y = np.empty((m, n), np.float32)
        rate = max(rate, 2e-9 * m * n * k / fastest(lambda x=x, w=w, y=y: _core.linear_forward(x, w, out=y), clock))
    big = np.zeros(1 << 26, np.float32)
    to = np.empty_like(big)
    return {"gflops": rate, "gbytes": 2e-9 * big.nbytes / fastest(lambda: _core.copy(big, out=to), clock)}


def nbytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


# ---- kernels ------------------------------------------------------------------------------------------------------------

Case = tuple[Callable[[], Any], tuple[Any, ...], float]  # call, what it reads, operations of matrix products


def cases(s: Size) -> dict[str, Case]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    rows, d, tokens, side = s.batch * s.tokens, s.width, s.tokens + s.text, s.side // 2
    table: dict[str, Case] = {}

    def linear(name: str, n: int, k: int) -> None:
        x, w, bias, dy = normal(rows, k), normal(n, k), normal(n), normal(rows, n)
        flops = 2.0 * rows * n * k
        table[f"linear {name} forward"] = (lambda: _core.linear_forward(x, w, bias), (x, w, bias), flops)
        table[f"linear {name} backward"] = (lambda: _core.linear_backward(dy, x, w), (dy, x, w), 2 * flops)

    linear("D to 3D", 3 * d, d)
    linear("D to D", d, d)
    linear("4D to D", d, 4 * d)
    x, w, bias = normal(rows, d), normal(4 * d, d), normal(4 * d)
    table["linear_gelu D to 4D forward"] = (lambda: _core.linear_gelu_forward(x, w, bias), (x, w, bias), 8.0 * rows * d * d)

    streams = [tuple(normal(s.batch, n, s.heads, 64) for _ in range(3)) for n in (s.tokens, s.text)]
    outs, lse = _core.attention_forward(streams)
    flops = 4.0 * s.batch * tokens * tokens * d
    table["attention forward"] = (lambda: _core.attention_forward(streams), (streams,), flops)
    table["attention backward"] = (lambda: _core.attention_backward(outs, streams, outs, lse), (outs, streams, outs, lse), 2 * flops)

    stream, shift, scale = normal(s.batch, s.tokens, d), normal(s.batch, d), normal(s.batch, d)
    _, mean, rstd = _core.layer_norm_modulate_forward(stream, shift, scale)
    table["layer_norm_modulate forward"] = (lambda: _core.layer_norm_modulate_forward(stream, shift, scale), (stream, shift, scale), 0)
    table["layer_norm_modulate backward"] = (
        lambda: _core.layer_norm_modulate_backward(stream, stream, mean, rstd, scale),
        (stream, stream, mean, rstd, scale),
        0,
    )
    table["gate_residual forward"] = (lambda: _core.gate_residual_forward(stream, stream, scale), (stream, stream, scale), 0)
    table["gate_residual backward"] = (lambda: _core.gate_residual_backward(stream, stream, scale), (stream, stream, scale), 0)
    heads, weight = normal(rows, s.heads, 64), normal(64)
    _, head_rstd = _core.rms_norm_heads_forward(heads, weight)
    table["rms_norm_heads forward"] = (lambda: _core.rms_norm_heads_forward(heads, weight), (heads, weight), 0)
    table["rms_norm_heads backward"] = (
        lambda: _core.rms_norm_heads_backward(heads, heads, head_rstd, weight),
        (heads, heads, head_rstd, weight),
        0,
    )
    hidden = normal(rows, 4 * d)
    table["gelu backward"] = (lambda: _core.gelu_backward(hidden, hidden), (hidden, hidden), 0)

    c = s.head_width
    image, kernel, gamma = normal(s.batch, c, side, side), normal(c, c, 3, 3), normal(c)
    pad = (1, 1, 1, 1)
    flops = 18.0 * rows * c * c
    table["conv2d 3x3 forward"] = (lambda: _core.conv2d_forward(image, kernel, gamma, padding=pad), (image, kernel), flops)
    table["conv2d 3x3 backward"] = (lambda: _core.conv2d_backward(image, image, kernel, padding=pad), (image, image, kernel), 2 * flops)
    flat = image.reshape(s.batch, c, -1)
    _, mean8, rstd8 = _core.group_norm_forward(flat, gamma, gamma, 8)
    table["group_norm forward"] = (lambda: _core.group_norm_forward(flat, gamma, gamma, 8), (flat,), 0)
    table["group_norm backward"] = (lambda: _core.group_norm_backward(flat, flat, mean8, rstd8, gamma, gamma), (flat, flat), 0)

    p = normal(sum(a.size for a in ours.model(s).state_dict().values()))
    m, v, g = np.zeros_like(p), np.zeros_like(p), p.copy()
    table["adamw"] = (lambda: _core.adamw(p, m, v, g, 1e-6, 0.9, 0.99, 1e-8, 0.0, 1), (p, p, m, m, v, v, g), 0)  # three are written too
    table["ema"] = (lambda: _core.ema(m, p, 0.99), (m, m, p), 0)
    table["sum_squares"] = (lambda: _core.sum_squares(g), (g,), 0)
    return table


# ---- whole passes -------------------------------------------------------------------------------------------------------


def operations(s: Size) -> dict[str, float]:
    """Operations of the matrix products that the mathematics needs: nothing that is computed twice to save memory counts."""
    d, image, text = s.width, float(s.batch * s.tokens), float(s.batch * s.text)
    patch = 4 * s.channels
    blocks = s.depth * 12 * d * d * image + (s.depth - 1) * 12 * d * d * text + 3 * d * d * text  # the last block's text stops at k, v
    attention = s.depth * 2.0 * s.batch * (s.tokens + s.text) ** 2 * d
    modulation = s.batch * d * d * (12.0 * (s.depth - 1) + 8 + 2)
    entrance = image * patch * d + text * s.context * d
    linear, exit_ = blocks + modulation + entrance, image * d * patch
    head = s.depth * image * s.head_width
    forward, features = linear + attention + exit_, linear + attention
    student_backward = 2 * (linear + exit_) - entrance + 2 * attention  # no gradient of the inputs
    teacher_backward = linear - modulation + 2 * attention  # of the latents alone
    heads = head * (6 * d + 8 * 9 * s.head_width)  # projection: 3 forward, 2 for its weights, 1 for its input; convolution: 3, 2, 3
    return {
        "forward": 2 * forward,
        "forward+backward": 2 * (forward + student_backward),
        "step": 2 * (forward + 2 * features + teacher_backward + student_backward + heads),
    }


def passes(s: Size) -> dict[str, Callable[[], object]]:
    model, inputs = ours.model(s), s.inputs()
    trainer = ours.trainer(s, "float32")
    return {
        "forward": lambda: model(*inputs.values()),
        "forward+backward": ours.forward_backward(model, inputs),
        "step": lambda: trainer.step(inputs["latents"], inputs["context"], inputs["pooled"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["*"], help="kernels or passes by name, with * and ? (default: all)")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--threads", type=int, default=ladd.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, not of the clock: one thread on a busy machine")
    parser.add_argument("--json", type=Path, default=Path("out/kernels.json"))
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads, also while they wait: use --threads 1")
    ladd.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    size, results = SIZES[options.size], {}
    top = ceilings(clock)
    print(f"{measure.processor()}, {options.threads} threads, {_core.backend_name()}; size {options.size}")
    print(f"ceilings: {top['gflops']:.0f} GFLOP/s in matrix products, {top['gbytes']:.1f} GB/s copying\n")
    print(f"{'kernel':32s} {'time':>9s} {'GFLOP/s':>8s} {'GB/s':>7s} {'bound':>6s}")
    for name, (call, reads, flops) in cases(size).items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows):
            moved = nbytes(reads) + nbytes(call())
            took = fastest(call, clock)
            bound = max(1e-9 * flops / top["gflops"], 1e-9 * moved / top["gbytes"]) / took
            results[name] = {"seconds": took, "gflops": 1e-9 * flops / took, "gbytes": 1e-9 * moved / took, "bound": bound}
            rate = f"{results[name]['gflops']:8.0f}" if flops else f"{'-':>8s}"
            print(f"{name:32s} {measure.si(took):>9s} {rate} {results[name]['gbytes']:7.1f} {bound:6.0%}", flush=True)
    print(f"\n{'pass':32s} {'time':>9s} {'GFLOP/s':>8s} {'GFLOP':>7s} {'share of the rate of matrix products':>6s}")
    counted = operations(size)
    for name, call in passes(size).items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.rows):
            took = fastest(call, clock, 2.0)
            rate_of_pass = 1e-9 * counted[name] / took
            results[name] = {"seconds": took, "gflops": rate_of_pass, "share": rate_of_pass / top["gflops"]}
            share = results[name]["share"]
            print(f"{name:32s} {measure.si(took):>9s} {rate_of_pass:8.0f} {1e-9 * counted[name]:7.1f} {share:6.0%}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"size": options.size, "threads": options.threads, "ceilings": top, "rows": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
