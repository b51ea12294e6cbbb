"""The rival of benchmarks/cuda.py: the same transformer, heads and LADD step in PyTorch with its fused attention, eager and compiled.

Written from the equations of docs/architecture.md, with the same shapes and the same number of operations: what a careful user would write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.q_norm = nn.RMSNorm(d // heads, eps=1e-6) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d // heads, eps=1e-6) if norm else nn.Identity()

    def project(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return [self.q_norm(q), self.k_norm(k), v]


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


class Head(nn.Module):
    def __init__(self, d: int, c: int, groups: int, kernel: int, pooled: int, k: int) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm
        self.proj, self.conv = normed(nn.Linear(d, c)), normed(nn.Conv2d(c, c, kernel, padding=kernel // 2))
        self.norm1, self.norm2 = nn.GroupNorm(groups, c), nn.GroupNorm(groups, c)
        self.out, self.direction = nn.Parameter(torch.randn(c) / c**0.5), normed(nn.Linear(k, c, bias=False))
        self.psi = nn.Linear(256 + pooled, k)

    def forward(self, x: Tensor, features: Tensor, pooled: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        a = F.leaky_relu(self.norm1(self.proj(x).transpose(1, 2).unflatten(2, (side, side))), 0.2)
        r = F.leaky_relu(self.norm2(self.conv(a)), 0.2) + a
        e = self.out + self.direction(self.psi(torch.cat([features, pooled], 1)))
        return torch.einsum("bchw,bc->bhw", r, e)


def place(tiny: bool) -> str:
    return "cpu" if tiny else "cuda"


def waiter(tiny: bool) -> Callable[[], None]:
    return (lambda: None) if tiny else torch.cuda.synchronize


def arrays(config: Any, side: int, text: int, dtype: str, where: str) -> list[Tensor]:
    kind = getattr(torch, dtype)
    shapes = ((1, config.in_channels, side, side), (1, 256), (1, text, config.joint_attention_dim), (1, config.pooled_projection_dim))
    return [torch.randn(shape, device=where, dtype=kind) for shape in shapes]


def forward(bench: Any, module: Any, config: Any, side: int, text: int, dtype: str, size: str, flops: float) -> None:
    where, tokens = place(bench.tiny), (side // config.patch_size) ** 2
    try:
        with module.device(where):
            model = Transformer(config, tokens).to(getattr(module, dtype)).requires_grad_(False)
    except module.OutOfMemoryError as error:
        bench.rows.append({"what": "forward", "size": size, "by": "torch", "skipped": str(error).splitlines()[0]})
        return
    given = arrays(config, side, text, dtype, where)
    for by, run in (("torch eager", model), ("torch.compile", module.compile(model))):
        bench.add("forward", size, lambda r=run: r(*given), by=by, wait=waiter(bench.tiny), flops=flops)  # type: ignore[misc]


def ladd_step(bench: Any, module: Any, config: Any, heads: Any, side: int, text: int, dtype: str, size: str) -> None:
    """The step of six forwards: heads on fake and real features, then the student through the teacher; autocast over float32 weights."""
    where, tokens = place(bench.tiny), (side // config.patch_size) ** 2
    kind = getattr(module, dtype)
    try:
        with module.device(where):
            student, teacher = Transformer(config, tokens), Transformer(config, tokens).to(kind).requires_grad_(False)
            judges = nn.ModuleList(
                Head(config.inner_dim, heads.width, heads.num_groups, heads.kernel_size, config.pooled_projection_dim, heads.condition_dim)
                for _ in heads.taps
            )
        average = [p.detach().clone() for p in student.parameters()]
        optimizers = [module.optim.AdamW(m.parameters(), fused=not bench.tiny) for m in (judges, student)]
    except module.OutOfMemoryError as error:
        bench.rows.append({"what": "LADD step", "size": size, "by": "torch", "skipped": str(error).splitlines()[0]})
        return
    z, f, y, p = arrays(config, side, text, dtype, where)

    def build(compiled: bool) -> Callable[[], None]:
        run_student, run_teacher = (module.compile(m) if compiled else m for m in (student, teacher))
        run_judge = [module.compile(j) if compiled else j for j in judges]

        def logits(features: list[Tensor]) -> list[Tensor]:
            return [judge(x, f, p) for judge, x in zip(run_judge, features)]

        def step() -> None:
            with module.autocast(where, kind):
                noise = module.randn_like(z)
                fake = run_teacher(0.5 * (z - run_student(z, f, y, p)) + 0.5 * noise, f, y, p, True)
                with module.no_grad():
                    real = run_teacher(0.5 * z + 0.5 * noise, f, y, p, True)
                loss = sum(F.relu(1 - x).mean() for x in logits(real)) + sum(F.relu(1 + x).mean() for x in logits([x.detach() for x in fake]))
            loss.backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(judges.parameters(), 1.0)
            optimizers[0].step()
            judges.requires_grad_(False)
            with module.autocast(where, kind):
                loss = -sum(x.mean() for x in logits(fake))
            loss.backward()  # type: ignore[union-attr]
            judges.requires_grad_(True)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizers[1].step()
            module._foreach_lerp_(average, list(student.parameters()), 0.01)
            for optimizer in optimizers:
                optimizer.zero_grad()

        return step

    for by, compiled in (("torch eager", False), ("torch.compile", True)):
        bench.add("LADD step", size, build(compiled), by=by, wait=waiter(bench.tiny))
