"""The rival of benchmarks/cuda.py: the same transformer, heads and LADD step in PyTorch with its fused attention, eager and compiled.

Written from the equations of docs/architecture.md, with the same shapes and the same number of operations: what a careful user would write.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cuda_work import TEXT
from torch import Tensor, nn


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """In the type of x: the fused kernel refuses the float32 weights that autocast leaves."""
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.q_norm = nn.Parameter(torch.ones(d // heads)) if norm else None
        self.k_norm = nn.Parameter(torch.ones(d // heads)) if norm else None

    def project(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return [normed(q, self.q_norm), normed(k, self.k_norm), v]


class Block(nn.Module):
    def __init__(self, d: int, heads: int, norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.last = last
        self.mod_x, self.mod_y = nn.Linear(d, (9 if dual else 6) * d), nn.Linear(d, (2 if last else 6) * d)
        self.x, self.y = Attention(d, heads, norm), Attention(d, heads, norm)
        self.dual = Attention(d, heads, norm) if dual else None
        self.ff_x = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d))
        self.ff_y = None if last else nn.Sequential(nn.Linear(d, 4 * d), nn.GELU("tanh"), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        d, n = x.shape[2], x.shape[1]
        mx, my = self.mod_x(e).unsqueeze(1).split(d, 2), self.mod_y(e).unsqueeze(1).split(d, 2)
        plain = F.layer_norm(x, (d,), eps=1e-6)
        qkv = [torch.cat(pair, 2) for pair in zip(
            self.x.project(plain * (1 + mx[1]) + mx[0]), self.y.project(F.layer_norm(y, (d,), eps=1e-6) * (1 + my[1]) + my[0])
        )]  # fmt: skip
        o = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        if self.dual is not None:
            own = F.scaled_dot_product_attention(*self.dual.project(plain * (1 + mx[7]) + mx[6])).transpose(1, 2).flatten(2)
            x = x + mx[8] * self.dual.out(own)
        x = x + mx[2] * self.x.out(o[:, :n])
        x = x + mx[5] * self.ff_x(F.layer_norm(x, (d,), eps=1e-6) * (1 + mx[4]) + mx[3])
        if self.ff_y is not None:
            y = y + my[2] * self.y.out(o[:, n:])
            y = y + my[5] * self.ff_y(F.layer_norm(y, (d,), eps=1e-6) * (1 + my[4]) + my[3])
        return x, y


class Transformer(nn.Module):
    def __init__(self, c: Any, tokens: int) -> None:
        super().__init__()
        d, patch = c.inner_dim, c.patch_size
        self.patch = nn.Conv2d(c.in_channels, d, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, tokens, d), requires_grad=False)
        self.context = nn.Linear(c.joint_attention_dim, d)
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.pooled = nn.Sequential(nn.Linear(c.pooled_projection_dim, d), nn.SiLU(), nn.Linear(d, d))
        last = c.num_layers - 1
        self.blocks = nn.ModuleList(
            Block(d, c.num_attention_heads, bool(c.qk_norm), i in c.dual_attention_layers, i == last) for i in range(c.num_layers)
        )
        self.mod, self.out = nn.Linear(d, 2 * d), nn.Linear(d, patch * patch * c.out_channels)
        self.p = patch

    def forward(self, z: Tensor, features: Tensor, context: Tensor, pooled: Tensor, taps: bool = False) -> Any:
        h, w = z.shape[2] // self.p, z.shape[3] // self.p
        x, y = self.patch(z).flatten(2).transpose(1, 2) + self.position, self.context(context)
        e, kept = F.silu(self.time(features) + self.pooled(pooled)), []
        for block in self.blocks:
            x, y = block(x, y, e)
            kept.append(x)
        if taps:
            return kept
        shift, scale = self.mod(e).unsqueeze(1).chunk(2, 2)
        tokens = self.out(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift)
        return tokens.unflatten(1, (h, w)).unflatten(3, (self.p, self.p, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Spectral(nn.Module):
    """A weight over its largest singular value, by one power iteration a call. PyTorch's parametrization does the same, but makes a class a
    weight, and torch.compile would compile every head anew."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / (shape[0] ** 0.5))
        self.register_buffer("u", F.normalize(torch.randn(shape[0]), dim=0))

    def forward(self) -> Tensor:
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(torch.mv(matrix.t(), self.u), dim=0)
            u = F.normalize(torch.mv(matrix, v), dim=0)
            self.u.copy_(u)
        return self.weight / torch.dot(u, torch.mv(matrix, v))


class Head(nn.Module):
    def __init__(self, d: int, c: int, groups: int, kernel: int, pooled: int, k: int) -> None:
        super().__init__()
        self.proj, self.proj_bias = Spectral(c, d), nn.Parameter(torch.zeros(c))
        self.conv, self.conv_bias = Spectral(c, c, kernel, kernel), nn.Parameter(torch.zeros(c))
        self.norm1, self.norm2 = nn.GroupNorm(groups, c), nn.GroupNorm(groups, c)
        self.out, self.direction = nn.Parameter(torch.randn(c) / c**0.5), Spectral(c, k)
        self.psi = nn.Linear(256 + pooled, k)
        self.padding = kernel // 2

    def forward(self, x: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        a = F.linear(x, self.proj(), self.proj_bias).transpose(1, 2).unflatten(2, (side, side))
        a = F.leaky_relu(self.norm1(a), 0.2)
        r = F.leaky_relu(self.norm2(F.conv2d(a, self.conv(), self.conv_bias, padding=self.padding)), 0.2) + a
        e = self.out + F.linear(self.psi(torch.cat([features, pooled], 1)), self.direction())
        return torch.einsum("bchw,bc->bhw", r, e)


# ---- timing ------------------------------------------------------------------------------------------------------------------------------

BY = (("torch.compile", True), ("torch eager", False))
# Blocks differ (second attention, no text at the end) and so does what a step wants of them: some ten graphs of one function. Beyond PyTorch's
# limit of eight the rest would silently run eager.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True


def place(bench: Any) -> str:
    return "cpu" if bench.tiny else "cuda"


def waiter(bench: Any) -> Callable[[], None]:
    return (lambda: None) if bench.tiny else torch.cuda.synchronize


def compiled(model: Transformer | Head) -> Callable[..., Any]:
    """The parts that repeat are compiled, once each, as PyTorch's regional compilation advises: the whole of 24 blocks takes minutes. A head is
    a part."""
    if isinstance(model, Head):
        model.compile()
    else:
        for block in model.blocks:
            block.compile()
    return model


def memory(bench: Any, what: str, size: str, by: str) -> None:
    """The most that PyTorch has asked CUDA for since its last row of memory."""
    if not bench.tiny:
        bench.note(what, size, by, MiB=torch.cuda.max_memory_reserved() / 2**20)


def freed(bench: Any) -> None:
    """What went before is given back, compiled code included, so that neither side works in the other's memory."""
    torch.compiler.reset()
    gc.collect()
    if not bench.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def arrays(bench: Any, config: Any, side: int) -> list[Tensor]:
    kind, text = getattr(torch, bench.dtype), 5 if bench.tiny else TEXT
    shapes = ((1, config.in_channels, side, side), (1, 256), (1, text, config.joint_attention_dim), (1, config.pooled_projection_dim))
    return [torch.randn(shape, device=place(bench), dtype=kind) for shape in shapes]


def sample(model: Callable[..., Any], shape: torch.Size, given: list[Tensor], steps: int) -> Tensor:
    """To the data and back to less noise, `steps` times: ladd.sample's method "renoise"."""
    x = torch.randn(shape, device=given[0].device, dtype=given[0].dtype)
    for i in range(steps):
        sigma, after = 1 - i / steps, 1 - (i + 1) / steps
        x = x - sigma * model(x, *given[1:])
        if after:
            x = (1 - after) * x + after * torch.randn_like(x)
    return x


def forwards(bench: Any, name: str, config: Any, sides: tuple[int, ...]) -> None:
    """Forward and sampling, as benchmarks/cuda.py's ladd side."""
    for by, is_compiled in BY:
        for side in sides:
            freed(bench)
            size = f"{name}, {8 * side} x {8 * side}"
            with torch.device(place(bench)), torch.inference_mode():
                model = Transformer(config, (side // config.patch_size) ** 2).to(getattr(torch, bench.dtype)).requires_grad_(False)
                run, given = compiled(model) if is_compiled else model, arrays(bench, config, side)
                bench.add("forward", size, lambda r=run, g=given: r(*g), by=by, wait=waiter(bench))  # type: ignore[misc]
                for steps in (1, 4):
                    work = functools.partial(sample, run, given[0].shape, given, steps)
                    bench.add(f"sample, {steps} step{'s' * (steps > 1)}", size, work, by=by, wait=waiter(bench))
            memory(bench, "memory of forward and sampling", size, by)
            del model, run, given, work
    freed(bench)


def ladd_step(bench: Any, size: str, config: Any, heads: Any, side: int) -> None:
    """The step of six forwards: heads on fake and real features, then the student through the teacher; autocast over float32 weights."""
    for by, is_compiled in BY:
        freed(bench)
        bench.add("LADD step", size, trainer(bench, config, heads, side, is_compiled), by=by, wait=waiter(bench))
        memory(bench, "memory of the LADD step", size, by)
    freed(bench)


def trainer(bench: Any, config: Any, heads: Any, side: int, is_compiled: bool) -> Callable[[], None]:
    """Models, optimizers and the call of one step."""
    where, tokens, kind = place(bench), (side // config.patch_size) ** 2, getattr(torch, bench.dtype)
    with torch.device(where):
        student, teacher = Transformer(config, tokens), Transformer(config, tokens).to(kind).requires_grad_(False)
        judges = nn.ModuleList(
            Head(config.inner_dim, heads.width, heads.num_groups, heads.kernel_size, config.pooled_projection_dim, heads.condition_dim)
            for _ in heads.taps
        )
    average = [p.detach().clone() for p in student.parameters()]
    optimizers = [torch.optim.AdamW(m.parameters(), fused=True) for m in (judges, student)]
    z, f, y, p = arrays(bench, config, side)
    if is_compiled:
        for model in (student, teacher, *judges):
            compiled(model)

    def logits(features: list[Tensor]) -> list[Tensor]:
        return [judge(x, f, p) for judge, x in zip(judges, features)]

    def step() -> None:
        with torch.autocast(where, kind, enabled=kind != torch.float32):
            noise = torch.randn_like(z)
            fake = teacher(0.5 * (z - student(z, f, y, p)) + 0.5 * noise, f, y, p, True)
            with torch.no_grad():
                real = teacher(0.5 * z + 0.5 * noise, f, y, p, True)
            loss = sum(F.relu(1 - x).mean() for x in logits(real)) + sum(F.relu(1 + x).mean() for x in logits([x.detach() for x in fake]))
        loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(judges.parameters(), 1.0)
        optimizers[0].step()
        judges.requires_grad_(False)
        with torch.autocast(where, kind, enabled=kind != torch.float32):
            loss = -sum(x.mean() for x in logits(fake))
        loss.backward()  # type: ignore[union-attr]
        judges.requires_grad_(True)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizers[1].step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(student.parameters()), 0.01)
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step
