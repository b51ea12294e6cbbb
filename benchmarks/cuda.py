"""Times of the CUDA half on the GPU of this machine: kernels against a measured copy and a measured product, attention's two engines, the
LADD step, SD3 sized forwards and samplers, each against PyTorch (eager with its fused attention, and torch.compile) in the same run where
torch can be imported.

    make gpu                                           # builds, tests and measures within 8 minutes: benchmarks/gpu.py
    python benchmarks/cuda.py --rows out/gpu/rows.jsonl --minutes 5

A row is written as a line of JSON as soon as it is known, so that nothing is lost when a later one hangs or breaks the device; rows that are
there already are passed over, so that a second start goes on where the first one ended. Weights are random. A time is the median of
repetitions after a warm-up; work is queued and waited for once a repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cuda_work import TEXT, TINY, Sizes, works

import ladd
from ladd import _core, attention

MIB = 2**20
SD3 = dict(  # noqa: C408
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24, attention_head_dim=64,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
)  # fmt: skip
MODELS = {
    "SD3.5-medium": {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "SD3-medium": SD3,
}
SMALL = dict(sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=24)  # noqa: C408
BROKEN = 3  # exit status: the device is lost to this process, another one may go on


class Bench:
    """Writes rows, keeps the time."""

    def __init__(self, rows: Path, end: float, tiny: bool, dtype: str) -> None:
        self.path, self.end, self.tiny, self.dtype = rows, end, tiny, dtype
        rows.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(rows)
        self.known = {(row["what"], row["size"], row["by"]) for row in self.rows}
        device = ladd.device.get("cuda")
        assert device is not None
        self.device = device

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def note(self, what: str, size: str, by: str, **facts: Any) -> None:
        if (what, size, by) not in self.known:
            row = {"what": what, "size": size, "by": by, **facts}
            self.known.add((what, size, by))
            self.rows.append(row)
            self.write(**row)
            print(line(row), flush=True)

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
        for i in range(1 if self.tiny else repeat):
            if i >= 3 and time.time() > self.end:
                break
            start = time.perf_counter()
            for _ in range(group):
                work()
            wait()
            times.append((time.perf_counter() - start) / group)
        return statistics.median(times)

    def add(
        self, what: str, size: str, work: Callable[[], Any], *, by: str = "ladd", wait: Callable[[], None] | None = None, **facts: Any
    ) -> float | None:
        """Times `work` and notes it, or notes why there is no time. The seconds, if there are any."""
        if (what, size, by) in self.known:
            return next((row.get("seconds") for row in self.rows if (row["what"], row["size"], row["by"]) == (what, size, by)), None)
        if time.time() > self.end:
            return self.note(what, size, by, skipped="the time is over")
        self.write(begun=[what, size, by])
        try:
            seconds = self.seconds(work, wait or self.device.wait)
        except Exception as error:
            self.failed(what, size, by, error)
            return None
        facts = {key: value for key, value in facts.items() if value}
        rates = {unit: facts[key] / seconds / scale for key, unit, scale in RATES if key in facts}
        self.note(what, size, by, seconds=seconds, **facts, **rates)
        return seconds

    def failed(self, what: str, size: str, by: str, error: BaseException) -> None:
        """Notes the error; ends the process where it cannot compute any more (a fault of the GPU stays in the process)."""
        self.note(what, size, by, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        try:
            self.device.wait()
        except RuntimeError:
            sys.exit(BROKEN)
        if by != "ladd" and "CUDA error" in str(error):
            sys.exit(BROKEN)

    def section(self, name: str, by: str, work: Callable[[], None]) -> None:
        """Rows that are prepared together. What goes wrong in preparing them is a row of its own."""
        if any(row["what"] == f"end of {name}" and row["by"] == by for row in self.rows):
            return
        if time.time() > self.end:
            return self.note(name, "all of it", by, skipped="the time is over")
        self.write(begun=[name, "preparing", by])
        try:
            work()
        except Exception as error:
            self.failed(name, "preparing", by, error)
        self.note(f"end of {name}", "", by, ended=True)
        _core.empty_cache()


RATES = (("bytes", "GB/s", 1e9), ("flops", "TFLOP/s", 1e12))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Without the marks of what was begun."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    return [one for one in lines if "begun" not in one]


def line(row: dict[str, Any]) -> str:
    head = f"{row['what']:34s} {row['size']:38s} {row['by']:14s}"
    for word in ("skipped", "failed"):
        if word in row:
            return f"{head} {word}: {row[word]}"
    if "MiB" in row:
        return f"{head} {row['MiB']:10.0f} MiB"
    rates = "  ".join(f"{row[key]:.1f} {key}" for _, key, _ in RATES if key in row)
    return f"{head} {1e3 * row['seconds']:10.3f} ms  {rates}" if "seconds" in row else head


# ---- kernels -----------------------------------------------------------------------------------------------------------------------------


def filled(device: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal numbers; large arrays repeat a block of them, since drawing gigabytes on the host takes minutes."""
    x: Any = device.empty(shape, dtype)
    flat, block = x.reshape(x.size), 1 << 22
    source: Any = device.empty((min(block, x.size),), dtype)
    source[...] = np.random.default_rng(x.size).standard_normal(source.size, dtype=np.float32)
    for start in range(0, x.size, block):
        part = flat[start : start + block]
        part[...] = source[: part.size]
    return x


def kernels(bench: Bench) -> None:
    """Bandwidth and products as measured, then every kernel at SD3.5-medium's sizes for one picture of 1024 x 1024."""
    size = 4 if bench.dtype == "float32" else 2
    s = TINY if bench.tiny else Sizes(parameters=1 << 28, element=size)

    def put(*shape: int, kind: str = bench.dtype) -> Any:
        return filled(bench.device, shape, kind)

    _reference(bench, s, put)
    makers = {**_rows(s, put), **_pictures(s, put), **_parameters(s, put)}
    for work in works(s):
        if work.name in makers:
            try:
                call = makers[work.name]()
            except Exception as error:
                bench.failed(work.name, work.size, "ladd", error)
                continue
            bench.add(work.name, work.size, call, bytes=work.moved, flops=work.operations)


def _reference(bench: Bench, s: Sizes, put: Callable[..., Any]) -> None:
    """What this GPU does at best: a copy and a product, both large."""
    big, side = s.parameters, 64 if bench.tiny else 8192
    x, y = put(big), put(big)
    bench.add("copy (the measured bandwidth)", f"{x.nbytes / MIB:.0f} MiB", lambda: _core.copy(x, out=y), bytes=2 * x.nbytes)
    a, b, c = put(side, side), put(side, side), put(side, side)
    bench.add("linear (the measured product)", f"{side} cubed", lambda: _core.linear_forward(a, b, out=c), flops=2 * side**3)


Makers = dict[str, Callable[[], Callable[[], Any]]]


def _rows(s: Sizes, put: Callable[..., Any]) -> Makers:
    """Kernels on rows of tokens. Each maker makes its arrays and gives the call."""
    n, t, d, dh = s.tokens, s.text, s.width, s.width // s.heads

    def streams() -> Any:
        return [tuple(put(1, m, s.heads, dh) for _ in range(3)) for m in (n, t)]

    def attention_backward() -> Callable[[], Any]:
        given = streams()
        outs, lse = _core.attention_forward(given)
        return lambda: _core.attention_backward(outs, given, outs, lse)

    def layer_norm_backward() -> Callable[[], Any]:
        g, x, scale = put(1, n, d), put(1, n, d), put(1, d)
        _, mean, rstd = _core.layer_norm_modulate_forward(x, scale, scale)
        return lambda: _core.layer_norm_modulate_backward(g, x, mean, rstd, scale)

    def rms_backward() -> Callable[[], Any]:
        g, x, w = put(n, s.heads, dh), put(n, s.heads, dh), put(dh)
        _, rstd = _core.rms_norm_heads_forward(x, w)
        return lambda: _core.rms_norm_heads_backward(g, x, rstd, w)

    def wide() -> Callable[[], Any]:
        c, side = s.middle
        given: Any = [tuple(put(1, side * side, 1, c) for _ in range(3))]
        return lambda: _core.attention_forward(given)

    def call(function: Callable[..., Any], *shapes: tuple[int, ...], numbers: tuple[Any, ...] = ()) -> Callable[[], Callable[[], Any]]:
        return lambda: functools.partial(function, *(put(*shape) for shape in shapes), *numbers)

    row, mod, wider = (1, n, d), (1, d), (n, 4 * d)
    grid = (s.latent // 2, s.latent // 2)
    sigma = np.array([0.5], np.float32)
    features = lambda: functools.partial(_core.timestep_features, sigma, 256, out=put(1, 256))  # noqa: E731
    return {
        "linear_forward": call(_core.linear_forward, (n, d), (3 * d, d), (3 * d,)),
        "linear_gelu_forward": call(_core.linear_gelu_forward, (n, d), (4 * d, d), (4 * d,)),
        "linear_backward": call(_core.linear_backward, (n, d), wider, (d, 4 * d)),
        "attention_forward": lambda: functools.partial(_core.attention_forward, streams()),
        "attention_backward": attention_backward,
        "attention_forward, wide": wide,
        "layer_norm_modulate_forward": call(_core.layer_norm_modulate_forward, row, mod, mod),
        "layer_norm_modulate_backward": layer_norm_backward,
        "gate_residual_forward": call(_core.gate_residual_forward, row, row, mod),
        "gate_residual_backward": call(_core.gate_residual_backward, row, row, mod),
        "rms_norm_heads_forward": call(_core.rms_norm_heads_forward, (n, s.heads, dh), (dh,)),
        "rms_norm_heads_backward": rms_backward,
        "gelu_forward": call(_core.gelu_forward, wider),
        "gelu_backward": call(_core.gelu_backward, wider, wider),
        "silu_forward": call(_core.silu_forward, row),
        "silu_backward": call(_core.silu_backward, row, row),
        "add": call(_core.add, row, row),
        "axpy": call(_core.axpy, row, row, numbers=(1e-3,)),
        "scale": call(_core.scale, row, numbers=(0.5,)),
        "add_position": call(_core.add_position, (1, grid[0] * grid[1], d), (*grid, d), numbers=(grid,)),
        "timestep_features": features,
    }


def _pictures(s: Sizes, put: Callable[..., Any]) -> Makers:
    """Kernels on latents, on the heads' feature maps and in the autoencoder."""
    latent, t = (1, 16, s.latent, s.latent), np.array([0.5], np.float32)
    c, side, k = s.head
    head, weights, flat = (1, c, side, side), (c, c, k, k), (1, c, side * side)
    wide, large = s.decoder
    groups = min(8, c // 2)

    def conv(x: tuple[int, ...], w: tuple[int, ...]) -> Callable[[], Any]:
        pad = (w[2] // 2,) * 4
        return functools.partial(_core.conv2d_forward, put(*x), put(*w), None, 1, pad)

    def group(x: tuple[int, ...], count: int) -> Callable[[], Any]:
        return functools.partial(_core.group_norm_forward, put(*x), put(x[1]), put(x[1]), count, 1e-6, True)

    def group_backward() -> Callable[[], Any]:
        x, gamma, beta = put(*flat), put(c), put(c)
        _, mean, rstd = _core.group_norm_forward(x, gamma, beta, groups)
        return lambda: _core.group_norm_backward(x, x, mean, rstd, gamma, beta, True)

    def spectral() -> Callable[[], Any]:
        w, u = put(c, c * k * k, kind="float32"), put(c, kind="float32")
        return lambda: _core.spectral_norm_forward(w, u)

    return {
        "patch_gather": lambda: functools.partial(_core.patch_gather, put(*latent), 2),
        "patch_scatter": lambda: functools.partial(_core.patch_scatter, put(1, (s.latent // 2) ** 2, 64), 16, s.latent, s.latent, 2),
        "renoise": lambda: functools.partial(_core.renoise, put(*latent), t, 7, 1, 2),
        "interpolate": lambda: functools.partial(_core.interpolate, put(*latent), put(*latent), t),
        "predict_x0": lambda: functools.partial(_core.predict_x0, put(*latent), put(*latent), t),
        "row_scale": lambda: functools.partial(_core.row_scale, put(*latent), t),
        "euler_step": lambda: functools.partial(_core.euler_step, put(*latent), put(*latent), 0.5, 0.25),
        "conv2d_forward": lambda: conv(head, weights),
        "conv2d_backward": lambda: functools.partial(_core.conv2d_backward, put(*head), put(*head), put(*weights), 1, (k // 2,) * 4),
        "conv2d_forward, decoder": lambda: conv((1, wide, large, large), (wide, wide, 3, 3)),
        "group_norm_forward": lambda: group((1, wide, large * large), min(32, wide // 2)),
        "group_norm_backward": group_backward,
        "leaky_relu_forward": lambda: functools.partial(_core.leaky_relu_forward, put(*head)),
        "leaky_relu_backward": lambda: functools.partial(_core.leaky_relu_backward, put(*head), put(*head)),
        "transpose": lambda: functools.partial(_core.transpose, put(1, side * side, c)),
        "channel_dot_forward": lambda: functools.partial(_core.channel_dot_forward, put(*flat), put(1, c), put(1)),
        "channel_dot_backward": lambda: functools.partial(_core.channel_dot_backward, put(1, side * side), put(*flat), put(1, c)),
        "spectral_norm_forward": spectral,
        "adversarial_loss": lambda: functools.partial(_core.adversarial_loss, put(1, side * side), "hinge", "real"),
        "upsample2x_forward": lambda: functools.partial(_core.upsample2x_forward, put(1, wide, large // 2, large // 2)),
        "upsample2x_backward": lambda: functools.partial(_core.upsample2x_backward, put(1, wide, large, large)),
    }


def _parameters(s: Sizes, put: Callable[..., Any]) -> Makers:
    """Kernels on all parameters of a model at once, here a part of them."""
    count = s.parameters

    def flat() -> Any:
        return put(count, kind="float32")

    def adamw() -> Callable[[], Any]:
        p, m, v, g = flat(), flat(), _core.scale(flat(), 0.0), flat()
        return lambda: _core.adamw(p, m, v, g, 1e-4, 0.9, 0.99, 1e-8, 0.0, 1)

    return {
        "adamw": adamw,
        "sum_squares": lambda: functools.partial(_core.sum_squares, flat()),
        "ema": lambda: functools.partial(_core.ema, flat(), flat(), 0.99),
        "astype": lambda: functools.partial(flat().astype, "bfloat16"),
    }


# ---- attention's engines -----------------------------------------------------------------------------------------------------------------


def engines(bench: Bench, dtype: str, table: Path, save: bool) -> None:
    """Both engines of attention by head size and tokens; the faster ones become the table that devices read when they are opened."""
    about, times = bench.device.info(), []
    shapes = (
        [(16, 2, n) for n in (24, 40)] if bench.tiny else [(dh, 1536 // dh, n + TEXT) for dh in (64, 128) for n in (256, 1024, 4096, 16384)]
    )
    for dh, heads, n in shapes:
        text = 5 if bench.tiny else TEXT
        streams: Any = [tuple(filled(bench.device, (1, m, heads, dh), dtype) for _ in range(3)) for m in (n - text, text)]
        size = f"{n} tokens, {heads} heads of {dh}, {dtype}"
        ours, other = _engine(bench, "ladd", size, streams), _engine(bench, "cudnn", size, streams)
        if ours is None:
            continue
        if other is not None:
            apart = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(ours[1], other[1])]
            if not max(apart) <= 0.02:
                bench.note(
                    "attention, the engines' results", size, "ladd", failed=f"they differ by {100 * max(apart):.2g} %: cuDNN is not used"
                )
                other = None
        for i, which in enumerate(("forward", "backward")):
            measured = [None if engine is None or engine[0][i] is None else 1e3 * engine[0][i] for engine in (ours, other)]
            if measured[0] is not None:
                row = {"dtype": dtype, "head_dim": dh, "pass": which, "tokens": n}
                times.append({**row, "ladd_ms": measured[0], "cudnn_ms": measured[1]})
    rows = attention.rows_from_times(about["name"], about["capability"], times)
    for path in (table, attention.user_table()) if save else (table,):
        kept = [row for row in attention.read(path) if row["dtype"] != dtype and row["device"] == about["name"]] if path.is_file() else []
        attention.write(path, [*kept, *rows], about["name"])


def _engine(bench: Bench, engine: str, size: str, streams: Any) -> tuple[list[Any], list[Any]] | None:
    """Seconds forward and backward, and what the text tokens get, which depends on all the others."""
    with forced(engine):
        try:
            outs, lse = _core.attention_forward(streams)
            grads = _core.attention_backward(outs, streams, outs, lse)
            results = [x.numpy() for x in (outs[1], *grads[1])]
        except Exception as error:
            bench.failed(f"attention, {engine}", size, "ladd", error)
            return None
        heads, dh = streams[0][0].shape[2:]
        flops = heads * dh * sum(q.shape[1] for q, _, _ in streams) ** 2
        forward = bench.add(f"attention forward, {engine}", size, lambda: _core.attention_forward(streams), flops=4 * flops)
        backward = lambda: _core.attention_backward(outs, streams, outs, lse)  # noqa: E731
        return [forward, bench.add(f"attention backward, {engine}", size, backward, flops=10 * flops)], results


@contextlib.contextmanager
def forced(engine: str) -> Iterator[None]:
    """Within the block one engine serves attention."""
    before = os.environ.get("LADD_CUDA_ATTENTION")
    os.environ["LADD_CUDA_ATTENTION"] = engine
    try:
        yield
    finally:
        del os.environ["LADD_CUDA_ATTENTION"]
        if before is not None:
            os.environ["LADD_CUDA_ATTENTION"] = before


# ---- models ------------------------------------------------------------------------------------------------------------------------------


def config_of(name: str, tiny: bool) -> ladd.MMDiTConfig:
    given = {**MODELS[name], **(SMALL if tiny else {})}
    if tiny and "dual_attention_layers" in given:
        given["dual_attention_layers"] = (0,)
    return ladd.MMDiTConfig(**given)  # type: ignore[arg-type]


def made(bench: Bench, config: ladd.MMDiTConfig) -> ladd.MMDiT:
    """With random numbers everywhere: the standard initialisation has zeros, and products with zeros take less power and time."""
    model = ladd.MMDiT(config, device="cuda", dtype=bench.dtype)
    flat: Any = model.flat
    block = filled(bench.device, (min(flat.size, 1 << 22),), "float32")
    _core.scale(block, 0.02, out=block)
    for start in range(0, flat.size, block.size):
        part = flat[start : start + block.size]
        part[...] = block[: part.size]
    return model


def inputs(bench: Bench, config: ladd.MMDiTConfig, side: int) -> list[Any]:
    text = 5 if bench.tiny else TEXT
    shapes = ((1, config.in_channels, side, side), (1, text, config.joint_attention_dim), (1, config.pooled_projection_dim))
    return [filled(bench.device, shape, bench.dtype) for shape in shapes]


def forward_flops(config: ladd.MMDiTConfig, side: int, text: int) -> float:
    """Products of one forward of one picture."""
    c, n = config, (side // config.patch_size) ** 2
    d, layers, dual = c.inner_dim, c.num_layers, len(c.dual_attention_layers)
    attended = 4.0 * d * (layers * (n + text) ** 2 + dual * n * n)
    return layers * 24.0 * d * d * (n + text) - 18.0 * d * d * text + dual * 8.0 * d * d * n + attended


def sides(bench: Bench) -> tuple[int, ...]:
    return (8,) if bench.tiny else (128, 64)


def used_memory(bench: Bench) -> float:
    about = bench.device.info()
    return float(about["memory_total"] - about["memory_free"]) / MIB


def forwards(bench: Bench, name: str) -> None:
    """Forward and sampling at 1024 and 512."""
    config, before = config_of(name, bench.tiny), used_memory(bench)
    model = made(bench, config)
    for side in sides(bench):
        size = f"{name}, {8 * side} x {8 * side}"
        z, y, p = inputs(bench, config, side)
        bench.add("forward", size, functools.partial(model, z, 1.0, y, p), flops=forward_flops(config, side, y.shape[1]))
        for steps in (1, 4):
            work = functools.partial(ladd.sample, model, y, p, size=z.shape[2:], steps=steps, method="renoise")
            bench.add(f"sample, {steps} step{'s' * (steps > 1)}", size, work)
        bench.note("memory of forward and sampling", size, "ladd", MiB=used_memory(bench) - before)


def step_size(bench: Bench) -> tuple[str, ladd.MMDiTConfig, ladd.DiscriminatorConfig, int]:
    name, side = "SD3.5-medium", 8 if bench.tiny else 64
    config = config_of(name, bench.tiny)
    heads = ladd.DiscriminatorConfig(
        feature_dim=config.inner_dim,
        pooled_dim=config.pooled_projection_dim,
        taps=tuple(range(config.num_layers)),
        width=8 if bench.tiny else 64,
        num_groups=2 if bench.tiny else 8,
    )
    return f"{name}, {8 * side} x {8 * side}, batch 1", config, heads, side


def ladd_step(bench: Bench) -> None:
    size, config, heads, side = step_size(bench)
    before = used_memory(bench)
    teacher = made(bench, config)
    discriminator = ladd.Discriminator(heads, device="cuda", dtype=bench.dtype)
    trainer = ladd.LADD(teacher.copy(), teacher, discriminator, ladd.LADDConfig(), allow_noise_latents=True)
    z, y, p = inputs(bench, config, side)
    bench.add("LADD step", size, functools.partial(trainer.step, z, y, p))
    bench.note("memory of the LADD step", size, "ladd", MiB=used_memory(bench) - before)


def everything(bench: Bench, torch_too: bool, table: Path, save: bool) -> None:
    """The most important rows first, after the short ones."""
    bench.section("kernels", "ladd", functools.partial(kernels, bench))
    kinds = [] if bench.dtype == "float32" else [bench.dtype, *({"bfloat16", "float16"} - {bench.dtype})]
    for kind in kinds[:1]:
        bench.section(f"attention's engines, {kind}", "ladd", functools.partial(engines, bench, kind, table, save))
    if table.is_file():
        about = bench.device.info()
        bench.device.set_attention(attention.rules_of(attention.read(table), about["name"], about["capability"]))
    rival: Any = None
    if torch_too:
        import cuda_torch as rival

        if not bench.tiny and not rival.torch.cuda.is_available():
            bench.note("PyTorch", "all of it", "torch", skipped=f"torch {rival.torch.__version__} sees no GPU")
            rival = None
    bench.section("LADD step", "ladd", functools.partial(ladd_step, bench))
    if rival:
        bench.section("LADD step", "torch", functools.partial(rival.ladd_step, bench, *step_size(bench)))
    for name in MODELS:
        bench.section(f"forward of {name}", "ladd", functools.partial(forwards, bench, name))
        if rival:
            bench.section(
                f"forward of {name}", "torch", functools.partial(rival.forwards, bench, name, config_of(name, bench.tiny), sides(bench))
            )
    for kind in kinds[1:]:
        bench.section(f"attention's engines, {kind}", "ladd", functools.partial(engines, bench, kind, table, save))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("out/gpu/rows.jsonl"), help="where results are added; attention.json goes beside it")
    parser.add_argument("--dtype", choices=ladd.device.DTYPES, default="bfloat16")
    parser.add_argument("--minutes", type=float, default=5.0, help="what has not begun by then is skipped")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's rows out")
    parser.add_argument("--save-table", action="store_true", help="write attention's table where ladd reads it, too")
    given = parser.parse_args(arguments)
    bench = Bench(given.rows, time.time() + 60 * given.minutes, given.tiny, given.dtype)
    everything(bench, not given.no_torch, given.rows.with_name("attention.json"), given.save_table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
