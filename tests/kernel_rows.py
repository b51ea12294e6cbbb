"""The case table of the kernels: for each row its inputs, how it is called, what float64 says, and how far from that it may be.

A row covers one or more names of LADD_KERNELS in csrc/backend.h. Shapes are chosen where kernels break: size 1, odd sizes, tails
behind a vector or a tile, large mean with small variance, scores that would overflow exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from oracle import autodiff as ad
from oracle import losses, philox
from oracle import mmdit as mmdit_oracle
from oracle.autodiff import Tensor
from support import normal

from ladd import _core

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


def elementwise(rows: list[Row]) -> None:
    for n in (1, 7, 16, 33, 1000, 70001):
        x, y = normal(1, n), normal(2, n)
        rows += [
            Row(
                ("copy",),
                f"{n}",
                {"x": x},
                lambda i, out: {"y": _core.copy(i["x"], out=out)},
                lambda t: {"y": t["x"]},
                tolerance=0,
            ),
            Row(
                ("add",),
                f"{n}",
                {"a": x, "b": y},
                lambda i, out: {"y": _core.add(i["a"], i["b"], out=out)},
                lambda t: {"y": t["a"] + t["b"]},
                in_place="a",
            ),
            Row(
                ("scale",),
                f"{n}",
                {"x": x},
                lambda i, out: {"y": _core.scale(i["x"], -0.3, out=out)},
                lambda t: {"y": t["x"] * np.float32(-0.3)},
                in_place="x",
            ),
            Row(
                ("axpy",),
                f"{n}",
                {"y": y, "x": x},
                lambda i, out: {"y": changed(i["y"], lambda into: _core.axpy(into, i["x"], 1.7))},
                lambda t: {"y": t["y"] + t["x"] * np.float32(1.7)},
                out=False,
            ),
            Row(
                ("zero",),
                f"{n}",
                {"y": y},
                lambda i, out: {"y": changed(i["y"], _core.zero)},
                lambda t: {"y": np.zeros(t["y"].shape)},
                tolerance=0,
                out=False,
            ),
        ]
    x = np.concatenate([normal(3, 997) * 4, np.float32([0, -0.0, 1e-8, -1e-8, 30, -30, 88, -88, 200, -200, 1e4, -1e4])])
    for n in (1, 17, x.size):
        for name, oracle in (("gelu", ad.gelu), ("silu", ad.silu), ("leaky_relu", lambda t: ad.leaky_relu(t, np.float32(0.2)))):
            forward, backward = getattr(_core, name + "_forward"), getattr(_core, name + "_backward")
            values = x[-n:] if n > 1 else x[:1]
            rows.append(
                Row(
                    (name + "_forward", name + "_backward"),
                    f"{n}",
                    {"x": values},
                    lambda i, out, f=forward: {"y": f(i["x"], out=out)},
                    lambda t, o=oracle: {"y": o(t["x"])},
                    lambda i, r, dy, b=backward: {"x": b(dy, i["x"])},
                    in_place="x",
                )
            )
        # The largest value would hide an error in the curved part: once more over a range where everything matters.
    small = np.linspace(-6, 6, 601).astype(np.float32)
    for name, oracle in (("gelu", ad.gelu), ("silu", ad.silu)):
        forward, backward = getattr(_core, name + "_forward"), getattr(_core, name + "_backward")
        rows.append(
            Row(
                (name + "_forward", name + "_backward"),
                "curve",
                {"x": small},
                lambda i, out, f=forward: {"y": f(i["x"], out=out)},
                lambda t, o=oracle: {"y": o(t["x"])},
                lambda i, r, dy, b=backward: {"x": b(dy, i["x"])},
                backward_tolerance=3e-6,
            )
        )


def changed(x: Array, change: Callable[[Array], Any]) -> Array:
    """A copy on which a kernel that works in place has worked."""
    x = x.copy()
    change(x)
    return x


def layouts(rows: list[Row]) -> None:
    for b, r, q in ((1, 1, 1), (2, 5, 3), (3, 16, 17), (1, 65, 130)):
        rows.append(
            Row(
                ("transpose",),
                f"{b}x{r}x{q}",
                {"x": normal(4, b, r, q)},
                lambda i, out: {"y": _core.transpose(i["x"], out=out)},
                lambda t: {"y": t["x"].transpose(0, 2, 1)},
                tolerance=0,
            )
        )
    for b, c, h, w, p in ((1, 1, 1, 1, 1), (2, 3, 5, 7, 2), (1, 4, 6, 4, 2), (2, 16, 4, 4, 1), (1, 2, 7, 7, 3)):
        for last in (False, True):

            def gather(t: dict[str, Tensor], p: int = p, last: bool = last) -> dict[str, Any]:
                x = t["image"].data
                b, c, h, w = x.shape
                h, w = h // p, w // p
                x = x[:, :, : h * p, : w * p].reshape(b, c, h, p, w, p)
                return {"y": x.transpose((0, 2, 4, 3, 5, 1) if last else (0, 2, 4, 1, 3, 5)).reshape(b, h * w, c * p * p)}

            rows.append(
                Row(
                    ("patch_gather",),
                    f"{b}x{c}x{h}x{w}p{p}{'last' if last else ''}",
                    {"image": normal(5, b, c, h, w)},
                    lambda i, out, p=p, last=last: {"y": _core.patch_gather(i["image"], p, last)},
                    gather,
                    tolerance=0,
                    out=False,
                )
            )

            def scatter(t: dict[str, Tensor], c: int = c, h: int = h, w: int = w, p: int = p, last: bool = last) -> dict[str, Any]:
                x, r, q = t["tokens"].data, h // p, w // p
                image = np.zeros((x.shape[0], c, h, w))
                x = x.reshape((-1, r, q, p, p, c) if last else (-1, r, q, c, p, p))
                x = x.transpose((0, 5, 1, 3, 2, 4) if last else (0, 3, 1, 4, 2, 5))
                image[:, :, : r * p, : q * p] = x.reshape(-1, c, r * p, q * p)
                return {"y": image}

            rows.append(
                Row(
                    ("patch_scatter",),
                    f"{b}x{c}x{h}x{w}p{p}{'last' if last else ''}",
                    {"tokens": normal(6, b, (h // p) * (w // p), c * p * p)},
                    lambda i, out, a=(c, h, w, p, last): {"y": _core.patch_scatter(i["tokens"], *a)},
                    scatter,
                    tolerance=0,
                    out=False,
                )
            )
    for b, h, w, size, d in ((1, 1, 1, 1, 4), (2, 3, 4, 7, 12), (1, 8, 3, 9, 17)):

        def position(t: dict[str, Tensor], h: int = h, w: int = w) -> dict[str, Any]:
            table = t["table"].data
            top, left = (table.shape[0] - h) // 2, (table.shape[0] - w) // 2
            return {"y": t["x"].data + table[top : top + h, left : left + w].reshape(1, h * w, -1)}

        rows.append(
            Row(
                ("add_position",),
                f"{b}x{h}x{w}of{size}x{d}",
                {"x": normal(7, b, h * w, d), "table": normal(8, size, size, d)},
                lambda i, out, g=(h, w): {"y": changed(i["x"], lambda x: _core.add_position(x, i["table"], g))},
                position,
                out=False,
            )
        )
    rows.append(
        Row(
            ("timestep_features",),
            "9x256",
            {"sigma": np.float32([0, 1e-3, 0.1, 1 / 3, 0.5, 0.731, 0.97, 0.9999, 1])},
            lambda i, out: {"y": _core.timestep_features(i["sigma"], 256)},
            lambda t: {"y": mmdit_oracle.timestep_features(t["sigma"].data)},
            tolerance=7e-5,
            out=False,
        )
    )
    for b, c, h, w in ((1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 16, 9)):
        rows.append(
            Row(
                ("upsample2x_forward", "upsample2x_backward"),
                f"{b}x{c}x{h}x{w}",
                {"x": normal(9, b, c, h, w)},
                lambda i, out: {"y": _core.upsample2x_forward(i["x"], out=out)},
                lambda t: {"y": ad.upsample2x(t["x"])},
                lambda i, r, dy: {"x": _core.upsample2x_backward(dy)},
                tolerance=0,
            )
        )


def matrix_products(rows: list[Row]) -> None:
    for m, n, k in ((1, 1, 1), (2, 3, 5), (1, 64, 33), (7, 1, 17), (37, 65, 129), (130, 48, 64), (257, 100, 31), (16, 384, 128)):
        x, w, bias = normal(10, m, k), normal(11, n, k), normal(12, n)

        def backward(i: Arrays, r: Arrays, dy: Array) -> Arrays:
            dx, dw, dbias = _core.linear_backward(dy, i["x"], i["w"], bias="bias" in i)
            return {"x": dx, "w": dw, **({"bias": dbias} if "bias" in i else {})}

        for with_bias in (True, False):
            rows.append(
                Row(
                    ("linear_forward", "linear_backward"),
                    f"{m}x{n}x{k}{'' if with_bias else 'nobias'}",
                    {"x": x, "w": w, **({"bias": bias} if with_bias else {})},
                    lambda i, out: {"y": _core.linear_forward(i["x"], i["w"], i.get("bias"), out=out)},
                    lambda t: {"y": ad.linear(t["x"], t["w"], t.get("bias"))},
                    backward,
                    tolerance=1e-6 * (1 + k**0.5),
                    backward_tolerance=1e-5,
                    bf16=6e-3,
                )
            )

        def gelu(t: dict[str, Tensor]) -> dict[str, Any]:
            h = ad.linear(t["x"], t["w"], t["bias"])
            return {"y": ad.gelu(h), "h": h}

        def gelu_backward(i: Arrays, r: Arrays, dy: Array) -> Arrays:
            dx, dw, dbias = _core.linear_backward(_core.gelu_backward(dy, r["h"]), i["x"], i["w"])
            return {"x": dx, "w": dw, "bias": dbias}

        rows.append(
            Row(
                ("linear_gelu_forward",),
                f"{m}x{n}x{k}",
                {"x": x, "w": w / np.float32(k**0.5), "bias": bias},
                lambda i, out: dict(zip(("y", "h"), _core.linear_gelu_forward(i["x"], i["w"], i["bias"], out=out), strict=True)),
                gelu,
                gelu_backward,
                tolerance=1e-6 * (1 + k**0.5),
                backward_tolerance=2e-5,
                bf16=6e-3,
            )
        )
    convs = (
        (1, 1, 1, 1, 1, 1, 1, (0, 0, 0, 0)),
        (2, 3, 5, 7, 4, 3, 1, (1, 1, 1, 1)),
        (1, 4, 8, 6, 5, 3, 2, (0, 0, 1, 1)),
        (1, 2, 9, 9, 3, 5, 1, (2, 2, 2, 2)),
        (2, 17, 4, 3, 9, 1, 1, (0, 0, 0, 0)),
        (1, 3, 6, 5, 2, 2, 2, (0, 0, 0, 0)),
        (1, 16, 33, 17, 8, 3, 1, (1, 1, 1, 1)),
        (2, 5, 3, 3, 4, 3, 1, (0, 2, 1, 0)),
        (1, 8, 2, 1, 8, 9, 1, (4, 4, 4, 4)),
        (2, 71, 20, 40, 35, 3, 1, (1, 1, 1, 1)),  # several passes over the channels, an odd number of them, copies of a tap's columns
        (3, 4, 3, 530, 66, 3, 1, (1, 1, 1, 1)),  # tiles across
        (2, 2, 70, 31, 3, 3, 3, (1, 1, 1, 1)),
        (2, 300, 13, 12, 17, 1, 1, (0, 0, 0, 0)),
        (5, 6, 8, 8, 7, 3, 1, (1, 1, 1, 1)),  # samples that share a tile
    )
    for b, c_in, h, w, c_out, kernel, stride, pad in convs:

        def conv_backward(i: Arrays, r: Arrays, dy: Array, a: Any = (stride, pad)) -> Arrays:
            return dict(zip(("x", "w", "bias"), _core.conv2d_backward(dy, i["x"], i["w"], *a), strict=True))

        rows.append(
            Row(
                ("conv2d_forward", "conv2d_backward"),
                f"{b}x{c_in}x{h}x{w}to{c_out}k{kernel}s{stride}",
                {"x": normal(13, b, c_in, h, w), "w": normal(14, c_out, c_in, kernel, kernel), "bias": normal(15, c_out)},
                lambda i, out, a=(stride, pad): {"y": _core.conv2d_forward(i["x"], i["w"], i["bias"], *a, out=out)},
                lambda t, a=(stride, pad): {"y": ad.conv2d(t["x"], t["w"], t["bias"], *a)},
                conv_backward,
                tolerance=1e-5,
                backward_tolerance=1e-5,
                bf16=8e-3,
            )
        )


def attention(rows: list[Row]) -> None:
    # (batch, heads, head_dim, tokens of each stream, scale of the scores' inputs)
    shapes = (
        (1, 1, 1, (1,), 1.0),
        (2, 3, 8, (5,), 1.0),
        (1, 2, 64, (33, 7), 1.0),
        (2, 2, 32, (64, 1), 1.0),
        (1, 3, 16, (70, 65), 1.0),
        (1, 1, 24, (130, 19), 1.0),
        (1, 2, 64, (257,), 1.0),
        (1, 2, 16, (40, 9), 30.0),
        (3, 1, 5, (1, 2), 1.0),
        (1, 1, 128, (17, 3), 1.0),
    )
    for b, heads, dh, tokens, size in shapes:
        inputs = {}
        for s, n in enumerate(tokens):
            for j, part in enumerate("qkv"):
                inputs[f"{part}{s}"] = normal(20 + 3 * s + j, b, n, heads, dh) * np.float32(size if part == "q" else 1)

        def streams(i: Arrays, count: int = len(tokens)) -> list[Any]:
            return [tuple(i[f"{part}{s}"] for part in "qkv") for s in range(count)]

        def forward(i: Arrays, out: Any, streams: Any = streams) -> Arrays:
            outs, lse = _core.attention_forward(streams(i))
            return {"y": np.concatenate(outs, axis=1), "lse": lse}

        def oracle(t: dict[str, Tensor], count: int = len(tokens)) -> dict[str, Any]:
            q, k, v = (ad.concat([t[f"{part}{s}"] for s in range(count)], 1).transpose(0, 2, 1, 3) for part in "qkv")
            scores = (q @ k.transpose(0, 1, 3, 2)).data * q.shape[-1] ** -0.5
            top = scores.max(axis=-1)
            lse = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
            return {"y": ad.attention(q, k, v).transpose(0, 2, 1, 3), "lse": lse}

        def backward(i: Arrays, r: Arrays, dy: Array, streams: Any = streams) -> Arrays:
            cuts = np.cumsum([q.shape[1] for q, _, _ in streams(i)])[:-1]
            split = [np.ascontiguousarray(part) for part in np.split(dy, cuts, axis=1)]
            outs = [np.ascontiguousarray(part) for part in np.split(r["y"], cuts, axis=1)]
            grads = _core.attention_backward(split, streams(i), outs, r["lse"])
            return {f"{part}{s}": g for s, triple in enumerate(grads) for part, g in zip("qkv", triple, strict=True)}

        floors = {f"q{s}": 1e-2 for s in range(len(tokens))} | {f"k{s}": 1e-2 for s in range(len(tokens))}
        rows.append(
            Row(
                ("attention_forward", "attention_backward"),
                f"{b}x{heads}x{dh}n{'+'.join(map(str, tokens))}{'' if size == 1 else 'large'}",
                inputs,
                forward,
                oracle,
                backward,
                tolerance=3e-6 if size == 1 else 1e-4,
                backward_tolerance=2e-5 if size == 1 else 2e-4,
                bf16=1.5e-2 if size == 1 else 0.2,  # large scores: rounding a factor moves their exponentials by much
                out=False,
                floors=floors,
            )
        )


def norms(rows: list[Row]) -> None:
    for b, n, d, mean, spread, tolerance in (
        (1, 1, 2, 0, 1, 1e-5),
        (2, 5, 33, 0, 1, 3e-6),
        (1, 130, 64, 0, 1, 3e-6),
        (3, 7, 384, 2, 1, 1e-5),
        (1, 4, 100, 100, 1, 1e-4),
        (1, 3, 256, 1000, 0.1, 2e-3),
        (2, 2, 17, 0, 1e-4, 1e-5),
    ):
        x = (normal(30, b, n, d).astype(np.float64) * spread + mean).astype(np.float32)
        for modulated in (True, False):
            inputs = {"x": x, **({"shift": normal(31, b, d), "scale": normal(32, b, d) * np.float32(0.5)} if modulated else {})}

            def forward(i: Arrays, out: Any) -> Arrays:
                y, mean, rstd = _core.layer_norm_modulate_forward(i["x"], i.get("shift"), i.get("scale"), out=out)
                return {"y": y, "mean": mean, "rstd": rstd}

            def oracle(t: dict[str, Tensor]) -> dict[str, Any]:
                y, x = ad.layer_norm(t["x"], 1e-6), t["x"].data
                if "shift" in t:
                    rows, width = t["shift"].shape
                    y = y * (t["scale"].reshape(rows, 1, width) + 1.0) + t["shift"].reshape(rows, 1, width)
                return {"y": y, "mean": x.mean(-1), "rstd": (x.var(-1) + 1e-6) ** -0.5}

            def backward(i: Arrays, r: Arrays, dy: Array) -> Arrays:
                dx, dshift, dscale = _core.layer_norm_modulate_backward(dy, i["x"], r["mean"], r["rstd"], i.get("scale"))
                return {"x": dx, **({"shift": dshift, "scale": dscale} if "scale" in i else {})}

            rows.append(
                Row(
                    ("layer_norm_modulate_forward", "layer_norm_modulate_backward"),
                    f"{b}x{n}x{d}mean{mean}{'' if modulated else 'plain'}",
                    inputs,
                    forward,
                    oracle,
                    backward,
                    tolerance=tolerance,
                    backward_tolerance=max(3 * tolerance, 1e-5),
                    floors={"mean": 1e-2, "x": (1 if d == 2 else 1e-3) / spread},  # two numbers have no gradient but through eps
                )
            )
        if spread != 1 or mean > 10:
            continue
        rows.append(
            Row(
                ("gate_residual_forward", "gate_residual_backward"),
                f"{b}x{n}x{d}",
                {"x": x, "y": normal(33, b, n, d), "gate": normal(34, b, d)},
                lambda i, out: {"y": _core.gate_residual_forward(i["x"], i["y"], i["gate"], out=out)},
                lambda t: {"y": t["x"] + t["y"] * t["gate"].reshape(t["gate"].shape[0], 1, t["gate"].shape[1])},
                lambda i, r, dy: {
                    "x": dy,
                    **dict(zip(("y", "gate"), _core.gate_residual_backward(dy, i["y"], i["gate"]), strict=True)),
                },
                in_place="x",
            )
        )
    for r, heads, dh, size in ((1, 1, 1, 1), (5, 2, 8, 1), (3, 3, 64, 1), (130, 1, 17, 1), (64, 6, 64, 1e-3), (2, 2, 96, 1e3)):
        rows.append(
            Row(
                ("rms_norm_heads_forward", "rms_norm_heads_backward"),
                f"{r}x{heads}x{dh}by{size:g}",
                {"x": normal(35, r, heads, dh) * np.float32(size), "w": normal(36, dh)},
                lambda i, out: dict(zip(("y", "rstd"), _core.rms_norm_heads_forward(i["x"], i["w"], out=out), strict=True)),
                lambda t: {"y": ad.rms_norm(t["x"], t["w"], 1e-6), "rstd": ((t["x"].data ** 2).mean(-1) + 1e-6) ** -0.5},
                lambda i, r, dy: dict(zip(("x", "w"), _core.rms_norm_heads_backward(dy, i["x"], r["rstd"], i["w"]), strict=True)),
                floors={"x": 1e-2 / size},
            )
        )
    for b, c, length, groups, mean, tolerance in (
        (1, 1, 2, 1, 0, 1e-5),
        (2, 6, 7, 3, 0, 5e-6),
        (1, 32, 64, 8, 0, 5e-6),
        (2, 12, 33, 12, 0, 5e-6),
        (1, 8, 1000, 2, 3, 2e-5),
        (1, 4, 300, 1, 100, 2e-4),
    ):
        for silu in (False, True):

            def gn_forward(i: Arrays, out: Any, a: Any = (groups, 1e-6, silu)) -> Arrays:
                y, mean, rstd = _core.group_norm_forward(i["x"], i["gamma"], i["beta"], *a, out=out)
                return {"y": y, "mean": mean, "rstd": rstd}

            def gn_oracle(t: dict[str, Tensor], groups: int = groups, silu: bool = silu) -> dict[str, Any]:
                y = ad.group_norm(t["x"], t["gamma"], t["beta"], groups, 1e-6)
                x = t["x"].data.reshape(t["x"].shape[0], groups, -1)
                return {"y": ad.silu(y) if silu else y, "mean": x.mean(-1), "rstd": (x.var(-1) + 1e-6) ** -0.5}

            def gn_backward(i: Arrays, r: Arrays, dy: Array, silu: bool = silu) -> Arrays:
                grads = _core.group_norm_backward(dy, i["x"], r["mean"], r["rstd"], i["gamma"], i["beta"], silu)
                return dict(zip(("x", "gamma", "beta"), grads, strict=True))

            rows.append(
                Row(
                    ("group_norm_forward", "group_norm_backward"),
                    f"{b}x{c}x{length}g{groups}mean{mean}{'silu' if silu else ''}",
                    {"x": normal(37, b, c, length) + np.float32(mean), "gamma": normal(38, c), "beta": normal(39, c)},
                    gn_forward,
                    gn_oracle,
                    gn_backward,
                    tolerance=tolerance,
                    backward_tolerance=max(3 * tolerance, 2e-5),
                    floors={"mean": 1e-2, "x": 1e-2},
                )
            )


def spectral(rows: list[Row]) -> None:
    for r, k, iterations in ((1, 1, 1), (3, 5, 1), (8, 72, 3), (65, 33, 0), (64, 576, 1)):
        u = normal(40, r)
        u /= np.linalg.norm(u)

        def forward(i: Arrays, out: Any, n: int = iterations) -> Arrays:
            u = i["u"].copy()
            w_hat, v, sigma = _core.spectral_norm_forward(i["w"], u, n)
            return {"y": w_hat, "u": u, "v": v, "sigma": np.float32([sigma])}

        def oracle(t: dict[str, Tensor], n: int = iterations) -> dict[str, Any]:
            w, u = t["w"].data, t["u"].data
            v = w.T @ u
            v /= np.linalg.norm(v)
            for _ in range(n):
                u = w @ v
                u /= np.linalg.norm(u)
                v = w.T @ u
                v /= np.linalg.norm(v)
            sigma = (t["w"] * np.outer(u, v)).sum()  # u and v are constants to the gradient
            return {"y": t["w"] / sigma, "u": u, "v": v, "sigma": sigma.data.reshape(1)}

        rows.append(
            Row(
                ("spectral_norm_forward", "spectral_norm_backward"),
                f"{r}x{k}n{iterations}",
                {"w": normal(41, r, k), "u": u},
                forward,
                oracle,
                lambda i, r, dy: {"w": _core.spectral_norm_backward(dy, r["y"], r["u"], r["v"], float(r["sigma"][0]))},
                tolerance=5e-6,
                backward_tolerance=1e-5,
                out=False,
                floors={"w": 1e-2},
            )
        )

    for b, c, length in ((1, 1, 1), (2, 5, 7), (3, 33, 600), (1, 64, 1025)):
        rows.append(
            Row(
                ("channel_dot_forward", "channel_dot_backward"),
                f"{b}x{c}x{length}",
                {"x": normal(42, b, c, length), "e": normal(43, b, c), "bias": normal(44, 1)},
                lambda i, out: {"y": _core.channel_dot_forward(i["x"], i["e"], i["bias"], out=out)},
                lambda t: {"y": (t["x"] * t["e"].reshape(*t["e"].shape, 1)).sum(axis=1) + t["bias"]},
                lambda i, r, dy: dict(zip(("x", "e", "bias"), _core.channel_dot_backward(dy, i["x"], i["e"]), strict=True)),
                tolerance=3e-6,
            )
        )


def adversarial(rows: list[Row]) -> None:
    values = np.concatenate([normal(50, 500) * 2, np.float32([0, 1, -1, 60, -60, 120, -120])])
    for n in (1, 33, values.size):
        for loss in ("hinge", "logistic", "lsgan", "bce"):
            for role in ("real", "fake", "generator"):

                def forward(i: Arrays, out: Any, a: Any = (loss, role)) -> Arrays:
                    value, dlogits = _core.adversarial_loss(i["x"], *a, 0.7)
                    return {"y": np.float64([value]), "dlogits": dlogits}

                def oracle(t: dict[str, Tensor], a: Any = (loss, role)) -> dict[str, Any]:
                    value = losses.adversarial(t["x"], *a)
                    value.backward(0.7)
                    return {"y": value.data.reshape(1), "dlogits": np.array(t["x"].grad)}

                rows.append(
                    Row(
                        ("adversarial_loss",),
                        f"{loss}-{role}-{n}",
                        {"x": values[-n:]},
                        forward,
                        oracle,
                        out=False,
                        tolerance=3e-6,
                    )
                )


def random_numbers(rows: list[Row]) -> None:
    for shape in ((1, 1), (2, 3), (3, 4, 5), (2, 1001), (1, 4, 64, 64)):
        for seed, purpose, step, samples in ((0, 1, 0, None), (2**63 + 12345, 7, 2**40 + 3, None), (77, 8, 5, "given")):
            numbers = np.arange(shape[0], dtype=np.int64)
            if samples:
                numbers = (numbers * 1_000_003 + 2**35)[::-1].copy()
            key = (seed, purpose, step, numbers if samples else None)
            size = "x".join(map(str, shape))
            rows.append(
                Row(
                    ("normal",),
                    f"{size}seed{seed}",
                    {},
                    lambda i, out, s=shape, k=key: {"y": _core.normal(s, *k, out=out)},
                    lambda t, s=shape, k=key, n=numbers: {"y": philox.normal(s, *k[:3], n)},
                )
            )

            def oracle(t: dict[str, Tensor], k: Any = key, n: Array = numbers) -> dict[str, Any]:
                e = philox.normal(t["x0"].shape, *k[:3], n)
                time = t["t"].data.reshape(-1, *(1,) * (e.ndim - 1))
                return {"y": t["x0"].data * (1 - time) + time * e, "noise": e}

            rows.append(
                Row(
                    ("renoise",),
                    f"{size}seed{seed}",
                    {"x0": normal(51, *shape), "t": np.linspace(0.9, 0.2, shape[0]).astype(np.float32)},
                    lambda i, out, k=key: dict(zip(("y", "noise"), _core.renoise(i["x0"], i["t"], *k, True, out=out), strict=True)),
                    oracle,
                    in_place="x0",
                )
            )


def diffusion(rows: list[Row]) -> None:
    for shape in ((1, 1), (3, 7), (2, 4, 9, 11), (1, 40000)):
        x, y, t = normal(52, *shape), normal(53, *shape), np.linspace(0, 1, shape[0]).astype(np.float32)
        size = "x".join(map(str, shape))

        def rowwise(t: Tensor, like: Tensor) -> Tensor:
            return t.reshape(-1, *(1,) * (len(like.shape) - 1))

        rows += [
            Row(
                ("interpolate",),
                size,
                {"x0": x, "noise": y, "t": t},
                lambda i, out: {"y": _core.interpolate(i["x0"], i["noise"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x0"] * (1.0 - f(t["t"], t["x0"])) + t["noise"] * f(t["t"], t["x0"])},
                in_place="x0",
            ),
            Row(
                ("predict_x0",),
                size,
                {"x": x, "v": y, "t": t},
                lambda i, out: {"y": _core.predict_x0(i["x"], i["v"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x"] - t["v"] * f(t["t"], t["x"])},
                in_place="x",
            ),
            Row(
                ("row_scale",),
                size,
                {"x": x, "t": t},
                lambda i, out: {"y": _core.row_scale(i["x"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x"] * f(t["t"], t["x"])},
                in_place="x",
            ),
            Row(
                ("euler_step",),
                size,
                {"x": x, "v": y},
                lambda i, out: {"y": _core.euler_step(i["x"], i["v"], 0.75, 0.5, out=out)},
                lambda t: {"y": t["x"] + t["v"] * -0.25},
                in_place="x",
            ),
        ]


def pairs(x: Array) -> Array:
    """float64 numbers as the kernels of a step keep them: in pairs of float32."""
    return np.ascontiguousarray(x, np.float64).view(np.float32).copy()


def clips(rows: list[Row]) -> None:
    for n, limit in ((1, 0.0), (3, 0.5), (70, 0.5), (3, 50.0)):
        squares = np.square(normal(64, n))

        def clip(i: Arrays, out: Any, limit: float = limit) -> Arrays:
            factor, norm, failed, done = np.zeros(1, np.float32), pairs(np.zeros(1)), pairs(np.zeros(2)), pairs(np.full(1, 6.0))
            _core.clip_factor(factor, norm, failed, done, pairs(i["x"]), pairs(i["x"]), limit, 1)
            read = {name: a.view(np.float64) for name, a in (("norm", norm), ("failed", failed), ("done", done))}
            return {"y": factor, **read}

        def clip_oracle(t: dict[str, Tensor], limit: float = limit) -> dict[str, Any]:
            norm = np.sqrt(t["x"].data.sum())
            factor = min(1.0, limit / norm) if limit else 1.0
            return {"y": np.array([factor]), "norm": norm.reshape(1), "failed": np.zeros(2), "done": np.array([7.0])}

        rows.append(Row(("clip_factor",), f"{n}limit{limit}", {"x": squares}, clip, clip_oracle, out=False))
    for name, sums in (("usual", [3.0, 40.0]), ("no gradient", [0.0, 40.0]), ("no features", [3.0, 0.0])):

        def r1(i: Arrays, out: Any) -> Arrays:
            factors, penalty = np.zeros(4, np.float32), pairs(np.full(1, 2.0))
            _core.r1_factors(factors, penalty, pairs(i["x"]), 0.3, 1e-4, 0.5)
            return {"y": factors, "penalty": penalty.view(np.float64)}

        def r1_oracle(t: dict[str, Tensor]) -> dict[str, Any]:
            size, length = t["x"].data
            h = 1e-4 * np.sqrt(length / size) if size else 0.0
            slope = 0.3 / h if h else 0.0
            return {"y": np.array([h, -h, slope, -slope]), "penalty": np.array([2.0 + 0.5 * size])}

        rows.append(Row(("r1_factors",), name, {"x": np.float32(sums)}, r1, r1_oracle, out=False))


def optimizers(rows: list[Row]) -> None:
    for n in (1, 19, 5000, 100_003):
        p, g, m, v = normal(60, n), normal(61, n), normal(62, n) * np.float32(0.1), np.square(normal(63, n))
        for step, decay, grad_scale in ((1, 0.0, 1.0), (7, 0.05, 0.25)):
            a = (1e-2, 0.9, 0.99, 1e-8, decay, step, grad_scale)
            if step == 1:
                m, v = np.zeros_like(m), np.zeros_like(v)

            def forward(i: Arrays, out: Any, a: Any = a) -> Arrays:
                p, m, v = (i[name].copy() for name in "pmv")
                _core.adamw(p, m, v, i["g"], *a)
                return {"y": p, "m": m, "v": v}

            def oracle(t: dict[str, Tensor], a: Any = a) -> dict[str, Any]:
                return dict(zip(("y", "m", "v"), losses.adamw(*(t[name].data for name in "pmvg"), *a), strict=True))

            rows.append(Row(("adamw",), f"{n}step{step}", {"p": p, "m": m, "v": v, "g": g}, forward, oracle, out=False))

            b = (1e-2, 0.0, *a[2:])

            def forward_without(i: Arrays, out: Any, b: Any = b) -> Arrays:
                p, v = i["p"].copy(), i["v"].copy()
                _core.adamw(p, None, v, i["g"], *b)
                return {"y": p, "v": v}

            def oracle_without(t: dict[str, Tensor], b: Any = b) -> dict[str, Any]:
                p, v, g = (t[name].data for name in "pvg")
                y, _, v = losses.adamw(p, np.zeros_like(p), v, g, *b)
                return {"y": y, "v": v}

            name = f"{n}step{step}-no-first-moment"
            rows.append(Row(("adamw",), name, {"p": p, "v": v, "g": g}, forward_without, oracle_without, out=False))
        rows += [
            Row(
                ("sum_squares",),
                f"{n}",
                {"x": p},
                lambda i, out: {"y": np.float64([_core.sum_squares(i["x"])])},
                lambda t: {"y": (t["x"].data ** 2).sum().reshape(1)},
                tolerance=1e-12,
                out=False,
            ),
            Row(
                ("ema",),
                f"{n}",
                {"e": p, "p": g},
                lambda i, out: {"y": changed(i["e"], lambda e: _core.ema(e, i["p"], 0.99))},
                lambda t: {"y": t["e"] * np.float32(0.99) + t["p"] * (1 - np.float32(0.99))},
                out=False,
            ),
        ]


def all_rows() -> list[Row]:
    rows: list[Row] = []
    for family in (
        elementwise,
        layouts,
        matrix_products,
        attention,
        norms,
        spectral,
        adversarial,
        random_numbers,
        diffusion,
        optimizers,
        clips,
    ):
        family(rows)
    return rows


def model_sized_rows() -> list[Row]:
    """What a transformer of width 384 on 8 x 8 tokens does at batch 32; only ever timed."""
    rows: list[Row] = []
    matrix = {"x": normal(70, 2048, 384), "w": normal(71, 1536, 384), "bias": normal(72, 1536)}
    linear = next(row for row in all_rows() if row.kernels[0] == "linear_forward" and "bias" in row.inputs)
    layer_norm = next(row for row in all_rows() if row.kernels[0] == "layer_norm_modulate_forward" and "shift" in row.inputs)
    streams = {f"{part}{s}": normal(73 + s, 32, n, 6, 64) for part in "qkv" for s, n in enumerate((64, 16))}
    joint = next(row for row in all_rows() if row.kernels[0] == "attention_forward" and len(row.inputs) == 6)
    tokens = {"x": normal(75, 32, 64, 384), "shift": normal(76, 32, 384), "scale": normal(77, 32, 384)}
    conv = next(row for row in all_rows() if row.id == "conv2d-1x16x33x17to8k3s1")
    image = {"x": normal(78, 8, 64, 32, 32), "w": normal(79, 64, 64, 3, 3), "bias": normal(80, 64)}
    for row, inputs, shape in (
        (linear, matrix, "2048x1536x384"),
        (joint, streams, "32x6x64n64+16"),
        (layer_norm, tokens, "32x64x384"),
        (conv, image, "8x64x32x32to64"),
    ):
        if row is joint:
            inputs = {f"{part}{s}": inputs[f"{part}{s}"] for s in range(2) for part in "qkv"}
        rows.append(replace(row, inputs=inputs, shape="model" + shape))
    return rows
