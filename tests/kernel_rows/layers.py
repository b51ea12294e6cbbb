"""Rows of what layers are made of: products, convolutions, attention, norms."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle import autodiff as ad
from oracle.autodiff import Tensor
from support import normal

from .row import Array, Arrays, Row


def matrix_products(core: Any, rows: list[Row]) -> None:
    for m, n, k in ((1, 1, 1), (2, 3, 5), (1, 64, 33), (7, 1, 17), (37, 65, 129), (130, 48, 64), (257, 100, 31), (16, 384, 128)):
        x, w, bias = normal(10, m, k), normal(11, n, k), normal(12, n)

        def backward(i: Arrays, r: Arrays, dy: Array) -> Arrays:
            dx, dw, dbias = core.linear_backward(dy, i["x"], i["w"], bias="bias" in i)
            return {"x": dx, "w": dw, **({"bias": dbias} if "bias" in i else {})}

        for with_bias in (True, False):
            rows.append(
                Row(
                    ("linear_forward", "linear_backward"),
                    f"{m}x{n}x{k}{'' if with_bias else 'nobias'}",
                    {"x": x, "w": w, **({"bias": bias} if with_bias else {})},
                    lambda i, out: {"y": core.linear_forward(i["x"], i["w"], i.get("bias"), out=out)},
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
            dx, dw, dbias = core.linear_backward(core.gelu_backward(dy, r["h"]), i["x"], i["w"])
            return {"x": dx, "w": dw, "bias": dbias}

        rows.append(
            Row(
                ("linear_gelu_forward",),
                f"{m}x{n}x{k}",
                {"x": x, "w": w / np.float32(k**0.5), "bias": bias},
                lambda i, out: dict(zip(("y", "h"), core.linear_gelu_forward(i["x"], i["w"], i["bias"], out=out), strict=True)),
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
        (2, 3, 5, 4, 3, 1, 1, (1, 0, 0, 2)),  # 1x1, but no row of pixels: a margin
        (1, 3, 7, 5, 4, 1, 2, (0, 0, 0, 0)),  # or a stride, which also leaves rows of x that no tap reaches
        (1, 2, 8, 7, 3, 2, 3, (1, 0, 1, 1)),
    )
    for b, c_in, h, w, c_out, kernel, stride, pad in convs:

        def conv_backward(i: Arrays, r: Arrays, dy: Array, a: Any = (stride, pad)) -> Arrays:
            return dict(zip(("x", "w", "bias"), core.conv2d_backward(dy, i["x"], i["w"], *a), strict=True))

        rows.append(
            Row(
                ("conv2d_forward", "conv2d_backward"),
                f"{b}x{c_in}x{h}x{w}to{c_out}k{kernel}s{stride}",
                {"x": normal(13, b, c_in, h, w), "w": normal(14, c_out, c_in, kernel, kernel), "bias": normal(15, c_out)},
                lambda i, out, a=(stride, pad): {"y": core.conv2d_forward(i["x"], i["w"], i["bias"], *a, out=out)},
                lambda t, a=(stride, pad): {"y": ad.conv2d(t["x"], t["w"], t["bias"], *a)},
                conv_backward,
                tolerance=1e-5,
                backward_tolerance=1e-5,
                bf16=8e-3,
            )
        )


def attention(core: Any, rows: list[Row]) -> None:
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
            outs, lse = core.attention_forward(streams(i))
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
            grads = core.attention_backward(split, streams(i), outs, r["lse"])
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


def norms(core: Any, rows: list[Row]) -> None:
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
                y, mean, rstd = core.layer_norm_modulate_forward(i["x"], i.get("shift"), i.get("scale"), out=out)
                return {"y": y, "mean": mean, "rstd": rstd}

            def oracle(t: dict[str, Tensor]) -> dict[str, Any]:
                y, x = ad.layer_norm(t["x"], 1e-6), t["x"].data
                if "shift" in t:
                    rows, width = t["shift"].shape
                    y = y * (t["scale"].reshape(rows, 1, width) + 1.0) + t["shift"].reshape(rows, 1, width)
                return {"y": y, "mean": x.mean(-1), "rstd": (x.var(-1) + 1e-6) ** -0.5}

            def backward(i: Arrays, r: Arrays, dy: Array) -> Arrays:
                dx, dshift, dscale = core.layer_norm_modulate_backward(dy, i["x"], r["mean"], r["rstd"], i.get("scale"))
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
                lambda i, out: {"y": core.gate_residual_forward(i["x"], i["y"], i["gate"], out=out)},
                lambda t: {"y": t["x"] + t["y"] * t["gate"].reshape(t["gate"].shape[0], 1, t["gate"].shape[1])},
                lambda i, r, dy: {
                    "x": dy,
                    **dict(zip(("y", "gate"), core.gate_residual_backward(dy, i["y"], i["gate"]), strict=True)),
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
                lambda i, out: dict(zip(("y", "rstd"), core.rms_norm_heads_forward(i["x"], i["w"], out=out), strict=True)),
                lambda t: {"y": ad.rms_norm(t["x"], t["w"], 1e-6), "rstd": ((t["x"].data ** 2).mean(-1) + 1e-6) ** -0.5},
                lambda i, r, dy: dict(zip(("x", "w"), core.rms_norm_heads_backward(dy, i["x"], r["rstd"], i["w"]), strict=True)),
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
                y, mean, rstd = core.group_norm_forward(i["x"], i["gamma"], i["beta"], *a, out=out)
                return {"y": y, "mean": mean, "rstd": rstd}

            def gn_oracle(t: dict[str, Tensor], groups: int = groups, silu: bool = silu) -> dict[str, Any]:
                y = ad.group_norm(t["x"], t["gamma"], t["beta"], groups, 1e-6)
                x = t["x"].data.reshape(t["x"].shape[0], groups, -1)
                return {"y": ad.silu(y) if silu else y, "mean": x.mean(-1), "rstd": (x.var(-1) + 1e-6) ** -0.5}

            def gn_backward(i: Arrays, r: Arrays, dy: Array, silu: bool = silu) -> Arrays:
                grads = core.group_norm_backward(dy, i["x"], r["mean"], r["rstd"], i["gamma"], i["beta"], silu)
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


def spectral(core: Any, rows: list[Row]) -> None:
    for r, k, iterations in ((1, 1, 1), (3, 5, 1), (8, 72, 3), (65, 33, 0), (64, 576, 1)):
        u = normal(40, r)
        u /= np.linalg.norm(u)

        def forward(i: Arrays, out: Any, n: int = iterations) -> Arrays:
            u = i["u"].copy()
            w_hat, v, sigma = core.spectral_norm_forward(i["w"], u, n)
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
                lambda i, r, dy: {"w": core.spectral_norm_backward(dy, r["y"], r["u"], r["v"], float(r["sigma"][0]))},
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
                lambda i, out: {"y": core.channel_dot_forward(i["x"], i["e"], i["bias"], out=out)},
                lambda t: {"y": (t["x"] * t["e"].reshape(*t["e"].shape, 1)).sum(axis=1) + t["bias"]},
                lambda i, r, dy: dict(zip(("x", "e", "bias"), core.channel_dot_backward(dy, i["x"], i["e"]), strict=True)),
                tolerance=3e-6,
            )
        )
