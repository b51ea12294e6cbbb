"""Times of the CUDA half on the GPU of this machine: kernels against a measured copy and a measured product, SD3 sized forwards, the LADD
step and sampling, each against PyTorch (eager with its fused attention, and torch.compile) in the same run where torch can be imported.

    python benchmarks/cuda.py --out out/gpu            # writes cuda.json and cuda.md there
    make gpu                                           # builds, tests and then this

Weights are random. A time is the median of repetitions after a warm-up; work is queued and waited for once a repetition. What does not
fit into the time or the memory is listed as skipped, with the reason. --tiny: toy sizes, to try the script itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ladd
from ladd import _core

MIB = 2**20
SD3 = dict(  # noqa: C408
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24, attention_head_dim=64,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
)  # fmt: skip
MODELS = {
    "SD3-medium": SD3,
    "SD3.5-medium": {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}
TINY = {**SD3, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32, "joint_attention_dim": 24}
TEXT = 333  # 77 CLIP and 256 T5 tokens


class Bench:
    """Collects results; keeps the time."""

    def __init__(self, minutes: float, tiny: bool) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.tiny = tiny
        self.rows: list[dict[str, Any]] = []
        device = ladd.device.get("cuda")
        assert device is not None
        self.device = device

    def seconds(self, work: Callable[[], Any], wait: Callable[[], None], repeat: int = 7) -> float:
        """Median time of one call. Calls are grouped so that a repetition takes some milliseconds."""
        work()
        wait()
        start = time.perf_counter()
        work()
        wait()
        once = time.perf_counter() - start
        group = 1 if self.tiny else max(1, min(200, int(0.02 / once)))
        times = []
        for _ in range(1 if self.tiny else repeat):
            start = time.perf_counter()
            for _ in range(group):
                work()
            wait()
            times.append((time.perf_counter() - start) / group)
        return statistics.median(times)

    def add(
        self, what: str, size: str, work: Callable[[], Any], *, by: str = "ladd", wait: Callable[[], None] | None = None, **facts: Any
    ) -> None:
        """Times `work` and notes it, or notes why it was skipped."""
        row: dict[str, Any] = {"what": what, "size": size, "by": by, **facts}
        if time.monotonic() > self.end:
            row["skipped"] = "the time is over"
        else:
            try:
                row["seconds"] = self.seconds(work, wait or self.device.wait)
            except (MemoryError, RuntimeError) as error:
                row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if "seconds" in row:
            for amount, unit in (("bytes", 1e9), ("flops", 1e12)):
                if row.get(amount):
                    row["GB/s" if amount == "bytes" else "TFLOP/s"] = row[amount] / row["seconds"] / unit
        self.rows.append(row)
        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['what']:34s} {row['size']:34s} {row['by']:14s} skipped: {row['skipped']}"
    rates = "  ".join(f"{row[key]:.1f} {key}" for key in ("GB/s", "TFLOP/s") if key in row)
    return f"{row['what']:34s} {row['size']:34s} {row['by']:14s} {1e3 * row['seconds']:10.3f} ms  {rates}"


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


def kernels(bench: Bench, dtype: str) -> None:
    """Bandwidth and products as measured, then each kernel at SD3.5-medium's size for one picture of 1024 x 1024."""
    n, d, heads, t = (16, 32, 2, 5) if bench.tiny else (4096, 1536, 24, TEXT)
    size = 2 if dtype != "float32" else 4
    rng = np.random.default_rng(0)

    def put(*shape: int, kind: str = dtype) -> Any:
        x: Any = bench.device.empty(shape, kind)
        x[...] = rng.standard_normal(shape, dtype=np.float32)
        return x

    _reference(bench, put, size)
    h, g = put(1, n, d), put(1, n, d)
    w, w4, back = put(3 * d, d), put(4 * d, d), put(d, 4 * d)
    bias, bias4, shift, scale = put(3 * d), put(4 * d), put(1, d), put(1, d)
    rows, wide = h[0], put(n, 4 * d)
    tokens = n * d * size
    _, mean, rstd = _core.layer_norm_modulate_forward(h, shift, scale)
    q, k, v = (put(1, n, heads, d // heads) for _ in range(3))
    streams: Any = [(q, k, v), tuple(put(1, t, heads, d // heads) for _ in range(3))]
    outs, lse = _core.attention_forward(streams)
    s, norm = n + t, put(d // heads)
    _, qr = _core.rms_norm_heads_forward(q[0], norm)
    count = 1 << (12 if bench.tiny else 28)
    p, m, second, grad = (put(count, kind="float32") for _ in range(4))
    rows_of: list[tuple[str, Callable[[], Any], float, float]] = [
        ("linear_forward (qkv)", lambda: _core.linear_forward(rows, w, bias), 0, 6 * n * d * d),
        ("linear_gelu_forward", lambda: _core.linear_gelu_forward(rows, w4, bias4), 0, 8 * n * d * d),
        ("linear_backward (down)", lambda: _core.linear_backward(rows, wide, back), 0, 16 * n * d * d),
        ("attention_forward", lambda: _core.attention_forward(streams), 0, 4 * s * s * d),
        ("attention_backward", lambda: _core.attention_backward(outs, streams, outs, lse), 0, 10 * s * s * d),
        ("layer_norm_modulate_forward", lambda: _core.layer_norm_modulate_forward(h, shift, scale), 2 * tokens, 0),
        ("layer_norm_modulate_backward", lambda: _core.layer_norm_modulate_backward(g, h, mean, rstd, scale), 4 * tokens, 0),
        ("gate_residual_forward", lambda: _core.gate_residual_forward(h, g, shift), 3 * tokens, 0),
        ("gate_residual_backward", lambda: _core.gate_residual_backward(h, g, shift), 3 * tokens, 0),
        ("rms_norm_heads_forward", lambda: _core.rms_norm_heads_forward(q[0], norm), 2 * tokens, 0),
        ("rms_norm_heads_backward", lambda: _core.rms_norm_heads_backward(k[0], q[0], qr, norm), 3 * tokens, 0),
        ("gelu_backward", lambda: _core.gelu_backward(wide, wide), 3 * 4 * tokens, 0),
        ("add", lambda: _core.add(h, g), 3 * tokens, 0),
        ("adamw", lambda: _core.adamw(p, m, second, grad, 1e-4, 0.9, 0.99, 1e-8, 0.0, 1), 28 * count, 0),
        ("sum_squares", lambda: _core.sum_squares(grad), 4 * count, 0),
        ("ema", lambda: _core.ema(p, m, 0.99), 12 * count, 0),
    ]  # fmt: skip
    for name, work, moved, flops in rows_of:
        bench.add(name, f"{n} tokens, width {d}", work, bytes=moved, flops=flops)


def _reference(bench: Bench, put: Callable[..., Any], size: int) -> None:
    """What this GPU does at best: a copy and a product, both large."""
    big = 1 << (12 if bench.tiny else 28)
    x, y = put(big), put(big)
    bench.add("copy (the measured bandwidth)", f"{size * big / MIB:.0f} MiB", lambda: _core.copy(x, out=y), bytes=2 * size * big)
    side = 64 if bench.tiny else 8192
    a, b, c = put(side, side), put(side, side), put(side, side)
    bench.add("linear (the measured product)", f"{side} cubed", lambda: _core.linear_forward(a, b, out=c), flops=2 * side**3)


def convolutions(bench: Bench, dtype: str) -> None:
    for what, shape, kernel in (("conv2d (heads)", (1, 64, 64, 64), 9), ("conv2d (decoder)", (1, 128, 512, 512), 3)):
        if bench.tiny:
            shape = (1, 8, 8, 8)
        x, w = bench.device.empty(shape, dtype, True), bench.device.empty((shape[1], shape[1], kernel, kernel), dtype, True)
        pad: Any = (kernel // 2,) * 4
        flops = 2 * np.prod(shape) * shape[1] * kernel**2
        work = functools.partial(_core.conv2d_forward, x, w, None, 1, pad)
        bench.add(what, f"{list(shape)}, {kernel} x {kernel}", work, flops=float(flops))


# ---- models ------------------------------------------------------------------------------------------------------------------------------


def inputs(bench: Bench, model: ladd.MMDiT, batch: int, side: int, dtype: str) -> list[Any]:
    rng, c = np.random.default_rng(1), model.config
    text = 5 if bench.tiny else TEXT
    shapes = ((batch, c.in_channels, side, side), (batch, text, c.joint_attention_dim), (batch, c.pooled_projection_dim))
    return [ladd.device.as_array(rng.standard_normal(s, dtype=np.float32), "input", device=bench.device, dtype=dtype) for s in shapes]


def forward_flops(model: ladd.MMDiT, side: int, text: int) -> float:
    """Products of one forward of one picture."""
    c = model.config
    n, d, layers, dual = (side // c.patch_size) ** 2, model.config.inner_dim, c.num_layers, len(c.dual_attention_layers)
    per_token = 24.0 * d * d
    attention = 4.0 * d * (layers * (n + text) ** 2 + dual * n * n)
    return layers * per_token * (n + text) - 18.0 * d * d * text + dual * 8.0 * d * d * n + attention


def models(bench: Bench, dtype: str, torch: Any) -> None:
    for name, settings in MODELS.items():
        small = {**TINY, **{key: settings[key] for key in ("qk_norm",) if key in settings}}
        _one_model(bench, name, ladd.MMDiTConfig(**(small if bench.tiny else settings)), dtype, torch)  # type: ignore[arg-type]
        _core.empty_cache()
    name, side = "SD3.5-medium", 8 if bench.tiny else 64
    config = ladd.MMDiTConfig(**(TINY if bench.tiny else MODELS[name]))  # type: ignore[arg-type]
    width, groups = (8, 2) if bench.tiny else (64, 8)
    heads = ladd.DiscriminatorConfig(
        feature_dim=config.inner_dim,
        pooled_dim=config.pooled_projection_dim,
        taps=tuple(range(config.num_layers)),
        width=width,
        num_groups=groups,
    )
    size = f"{name}, {8 * side} x {8 * side}, batch 1"
    _ladd_step(bench, config, heads, side, dtype, size)
    _core.empty_cache()
    if torch is not None:
        import cuda_torch

        cuda_torch.ladd_step(bench, torch, config, heads, side, 5 if bench.tiny else TEXT, dtype, size)


def _one_model(bench: Bench, name: str, config: ladd.MMDiTConfig, dtype: str, torch: Any) -> None:
    """Forward and sampling at 512 and 1024."""
    free = bench.device.info()["memory_free"]
    try:
        model = ladd.MMDiT(config, device="cuda", dtype=dtype)
    except MemoryError as error:
        bench.rows.append({"what": "forward", "size": name, "by": "ladd", "skipped": str(error)})
        return
    bench.rows.append({"what": "memory of weights", "size": name, "by": "ladd", "MiB": (free - bench.device.info()["memory_free"]) / MIB})
    for side in (8,) if bench.tiny else (64, 128):
        size = f"{name}, {8 * side} x {8 * side}"
        z, y, p = inputs(bench, model, 1, side, dtype)
        flops = forward_flops(model, side, y.shape[1])
        bench.add("forward", size, functools.partial(model, z, 1.0, y, p), flops=flops)
        for steps in (1, 4):
            work = functools.partial(ladd.sample, model, y, p, size=z.shape[2:], steps=steps, method="renoise")
            bench.add(f"sample, {steps} step{'s' * (steps > 1)}", size, work)
        if torch is not None:
            import cuda_torch

            cuda_torch.forward(bench, torch, config, side, y.shape[1], dtype, size, flops)


def _ladd_step(bench: Bench, config: ladd.MMDiTConfig, heads: ladd.DiscriminatorConfig, side: int, dtype: str, size: str) -> None:
    try:
        free = bench.device.info()["memory_free"]
        teacher = ladd.MMDiT(config, device="cuda", dtype=dtype)
        discriminator = ladd.Discriminator(heads, device="cuda", dtype=dtype)
        trainer = ladd.LADD(teacher.copy(), teacher, discriminator, ladd.LADDConfig(), allow_noise_latents=True)
        z, y, p = inputs(bench, teacher, 1, side, dtype)
        bench.add("LADD step", size, functools.partial(trainer.step, z, y, p))
        used = (free - bench.device.info()["memory_free"]) / MIB
        bench.rows.append({"what": "memory of the LADD step", "size": size, "by": "ladd", "MiB": used})
    except MemoryError as error:
        bench.rows.append({"what": "LADD step", "size": size, "by": "ladd", "skipped": str(error)})


# ---- report ------------------------------------------------------------------------------------------------------------------------------


def table(bench: Bench, header: dict[str, Any]) -> str:
    out = [f"# {header['device']['name']}, {header['dtype']}, ladd {header['ladd']}, torch {header['torch'] or 'not installed'}", ""]
    out += ["| what | size | by | ms | GB/s | TFLOP/s | of measured |", "|---|---|---|--:|--:|--:|--:|"]
    measured = {key: next((r[key] for r in bench.rows if r["what"].startswith(word) and key in r), 0.0) for word, key in REFERENCE.items()}
    for r in bench.rows:
        if "skipped" in r:
            out.append(f"| {r['what']} | {r['size']} | {r['by']} | skipped: {r['skipped']} | | | |")
        elif "MiB" in r:
            out.append(f"| {r['what']} | {r['size']} | {r['by']} | {r['MiB']:.0f} MiB | | | |")
        else:
            share = next((f"{100 * r[key] / measured[key]:.0f} %" for key in measured if key in r and measured[key]), "")
            cells = [f"{r[key]:.1f}" if key in r else "" for key in ("GB/s", "TFLOP/s")]
            out.append(f"| {r['what']} | {r['size']} | {r['by']} | {1e3 * r['seconds']:.3f} | {cells[0]} | {cells[1]} | {share} |")
    return "\n".join(out) + "\n"


REFERENCE = {"copy (": "GB/s", "linear (the": "TFLOP/s"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dtype", choices=ladd.device.DTYPES, default="bfloat16")
    parser.add_argument("--minutes", type=float, default=5.0, help="what has not begun by then is skipped")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    given = parser.parse_args()
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    if torch is not None and not given.tiny and not torch.cuda.is_available():
        torch = None  # type: ignore[assignment]
    bench = Bench(given.minutes, given.tiny)
    header = {"device": bench.device.info(), "dtype": given.dtype, "ladd": ladd.__version__, "torch": getattr(torch, "__version__", None)}
    kernels(bench, given.dtype)
    convolutions(bench, given.dtype)
    models(bench, given.dtype, torch)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "cuda.json").write_text(json.dumps({**header, "rows": bench.rows}, indent=1))
    (given.out / "cuda.md").write_text(table(bench, header))
    print(f"{given.out}/cuda.json, {given.out}/cuda.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
