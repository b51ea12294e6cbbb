"""Rows of kernels over flat buffers and latents: element by element, layouts, losses, random numbers, steps of samplers and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from oracle import autodiff as ad
from oracle import losses, philox
from oracle import mmdit as mmdit_oracle
from oracle.autodiff import Tensor
from support import normal

from .row import Array, Arrays, Row


def changed(x: Array, change: Callable[[Array], Any]) -> Array:
    """A copy on which a kernel that works in place has worked."""
    x = x.copy()
    change(x)
    return x


def elementwise(core: Any, rows: list[Row]) -> None:
    for n in (1, 7, 16, 33, 1000, 70001):
        x, y = normal(1, n), normal(2, n)
        rows += [
            Row(
                ("copy",),
                f"{n}",
                {"x": x},
                lambda i, out: {"y": core.copy(i["x"], out=out)},
                lambda t: {"y": t["x"]},
                tolerance=0,
            ),
            Row(
                ("add",),
                f"{n}",
                {"a": x, "b": y},
                lambda i, out: {"y": core.add(i["a"], i["b"], out=out)},
                lambda t: {"y": t["a"] + t["b"]},
                in_place="a",
            ),
            Row(
                ("scale",),
                f"{n}",
                {"x": x},
                lambda i, out: {"y": core.scale(i["x"], -0.3, out=out)},
                lambda t: {"y": t["x"] * np.float32(-0.3)},
                in_place="x",
            ),
            Row(
                ("axpy",),
                f"{n}",
                {"y": y, "x": x},
                lambda i, out: {"y": changed(i["y"], lambda into: core.axpy(into, i["x"], 1.7))},
                lambda t: {"y": t["y"] + t["x"] * np.float32(1.7)},
                out=False,
            ),
            Row(
                ("zero",),
                f"{n}",
                {"y": y},
                lambda i, out: {"y": changed(i["y"], core.zero)},
                lambda t: {"y": np.zeros(t["y"].shape)},
                tolerance=0,
                out=False,
            ),
        ]
    x = np.concatenate([normal(3, 997) * 4, np.float32([0, -0.0, 1e-8, -1e-8, 30, -30, 88, -88, 200, -200, 1e4, -1e4])])
    for n in (1, 17, x.size):
        for name, oracle in (("gelu", ad.gelu), ("silu", ad.silu), ("leaky_relu", lambda t: ad.leaky_relu(t, np.float32(0.2)))):
            forward, backward = getattr(core, name + "_forward"), getattr(core, name + "_backward")
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
        forward, backward = getattr(core, name + "_forward"), getattr(core, name + "_backward")
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


def layouts(core: Any, rows: list[Row]) -> None:
    for b, r, q in ((1, 1, 1), (2, 5, 3), (3, 16, 17), (1, 65, 130)):
        rows.append(
            Row(
                ("transpose",),
                f"{b}x{r}x{q}",
                {"x": normal(4, b, r, q)},
                lambda i, out: {"y": core.transpose(i["x"], out=out)},
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
                    lambda i, out, p=p, last=last: {"y": core.patch_gather(i["image"], p, last)},
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
                    lambda i, out, a=(c, h, w, p, last): {"y": core.patch_scatter(i["tokens"], *a)},
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
                lambda i, out, g=(h, w): {"y": changed(i["x"], lambda x: core.add_position(x, i["table"], g))},
                position,
                out=False,
            )
        )
    rows.append(
        Row(
            ("timestep_features",),
            "9x256",
            {"sigma": np.float32([0, 1e-3, 0.1, 1 / 3, 0.5, 0.731, 0.97, 0.9999, 1])},
            lambda i, out: {"y": core.timestep_features(i["sigma"], 256)},
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
                lambda i, out: {"y": core.upsample2x_forward(i["x"], out=out)},
                lambda t: {"y": ad.upsample2x(t["x"])},
                lambda i, r, dy: {"x": core.upsample2x_backward(dy)},
                tolerance=0,
            )
        )


def adversarial(core: Any, rows: list[Row]) -> None:
    values = np.concatenate([normal(50, 500) * 2, np.float32([0, 1, -1, 60, -60, 120, -120])])
    for n in (1, 33, values.size):
        for loss in ("hinge", "logistic", "lsgan", "bce"):
            for role in ("real", "fake", "generator"):

                def forward(i: Arrays, out: Any, a: Any = (loss, role)) -> Arrays:
                    value, dlogits = core.adversarial_loss(i["x"], *a, 0.7)
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


def random_numbers(core: Any, rows: list[Row]) -> None:
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
                    lambda i, out, s=shape, k=key: {"y": core.normal(s, *k, out=out)},
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
                    lambda i, out, k=key: dict(zip(("y", "noise"), core.renoise(i["x0"], i["t"], *k, True, out=out), strict=True)),
                    oracle,
                    in_place="x0",
                )
            )


def diffusion(core: Any, rows: list[Row]) -> None:
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
                lambda i, out: {"y": core.interpolate(i["x0"], i["noise"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x0"] * (1.0 - f(t["t"], t["x0"])) + t["noise"] * f(t["t"], t["x0"])},
                in_place="x0",
            ),
            Row(
                ("predict_x0",),
                size,
                {"x": x, "v": y, "t": t},
                lambda i, out: {"y": core.predict_x0(i["x"], i["v"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x"] - t["v"] * f(t["t"], t["x"])},
                in_place="x",
            ),
            Row(
                ("row_scale",),
                size,
                {"x": x, "t": t},
                lambda i, out: {"y": core.row_scale(i["x"], i["t"], out=out)},
                lambda t, f=rowwise: {"y": t["x"] * f(t["t"], t["x"])},
                in_place="x",
            ),
            Row(
                ("euler_step",),
                size,
                {"x": x, "v": y},
                lambda i, out: {"y": core.euler_step(i["x"], i["v"], 0.75, 0.5, out=out)},
                lambda t: {"y": t["x"] + t["v"] * -0.25},
                in_place="x",
            ),
        ]


def pairs(x: Array) -> Array:
    """float64 numbers as the kernels of a step keep them: in pairs of float32."""
    return np.ascontiguousarray(x, np.float64).view(np.float32).copy()


def clips(core: Any, rows: list[Row]) -> None:
    for n, limit in ((1, 0.0), (3, 0.5), (70, 0.5), (3, 50.0)):
        squares = np.square(normal(64, n))

        def clip(i: Arrays, out: Any, limit: float = limit) -> Arrays:
            factor, norm, failed, done = np.zeros(1, np.float32), pairs(np.zeros(1)), pairs(np.zeros(2)), pairs(np.full(1, 6.0))
            core.clip_factor(factor, norm, failed, done, pairs(i["x"]), pairs(i["x"]), limit, 1)
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
            core.r1_factors(factors, penalty, pairs(i["x"]), 0.3, 1e-4, 0.5)
            return {"y": factors, "penalty": penalty.view(np.float64)}

        def r1_oracle(t: dict[str, Tensor]) -> dict[str, Any]:
            size, length = t["x"].data
            h = 1e-4 * np.sqrt(length / size) if size else 0.0
            slope = 0.3 / h if h else 0.0
            return {"y": np.array([h, -h, slope, -slope]), "penalty": np.array([2.0 + 0.5 * size])}

        rows.append(Row(("r1_factors",), name, {"x": np.float32(sums)}, r1, r1_oracle, out=False))


def optimizers(core: Any, rows: list[Row]) -> None:
    for n in (1, 19, 5000, 100_003):
        p, g, m, v = normal(60, n), normal(61, n), normal(62, n) * np.float32(0.1), np.square(normal(63, n))
        for step, decay, grad_scale in ((1, 0.0, 1.0), (7, 0.05, 0.25)):
            a = (1e-2, 0.9, 0.99, 1e-8, decay, step, grad_scale)
            if step == 1:
                m, v = np.zeros_like(m), np.zeros_like(v)

            def forward(i: Arrays, out: Any, a: Any = a) -> Arrays:
                p, m, v = (i[name].copy() for name in "pmv")
                core.adamw(p, m, v, i["g"], *a)
                return {"y": p, "m": m, "v": v}

            def oracle(t: dict[str, Tensor], a: Any = a) -> dict[str, Any]:
                return dict(zip(("y", "m", "v"), losses.adamw(*(t[name].data for name in "pmvg"), *a), strict=True))

            rows.append(Row(("adamw",), f"{n}step{step}", {"p": p, "m": m, "v": v, "g": g}, forward, oracle, out=False))

            b = (1e-2, 0.0, *a[2:])

            def forward_without(i: Arrays, out: Any, b: Any = b) -> Arrays:
                p, v = i["p"].copy(), i["v"].copy()
                core.adamw(p, None, v, i["g"], *b)
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
                lambda i, out: {"y": np.float64([core.sum_squares(i["x"])])},
                lambda t: {"y": (t["x"].data ** 2).sum().reshape(1)},
                tolerance=1e-12,
                out=False,
            ),
            Row(
                ("ema",),
                f"{n}",
                {"e": p, "p": g},
                lambda i, out: {"y": changed(i["e"], lambda e: core.ema(e, i["p"], 0.99))},
                lambda t: {"y": t["e"] * np.float32(0.99) + t["p"] * (1 - np.float32(0.99))},
                out=False,
            ),
        ]
