"""PyTorch's side, as its practised users write it: diffusers' SD3Transformer2DModel on scaled_dot_product_attention, the same
heads as ladd's, fused AdamW, inference_mode for passes without gradients, one teacher pass over real and fake together, frozen
models without gradients. In bfloat16 what is frozen or only sampled has weights in bfloat16; what is trained runs under autocast,
and eager training takes attention's faster kernel. Heads see channels_last images, for tokens lie so. diffusers' fuse_qkv_projections is
not used: it leaves out the norms of q and k, so that another network is computed.
torch.compile sees whole graphs of fixed shapes: what it cannot compile is an error and never run eagerly, and weights that do not
change are packed once (freezing). The discriminator's and the student's update are apart and share no pass, as in every public
trainer; sharing_step is what a user gains who writes them as ladd does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.embeddings import Timesteps
from sizes import VAE, Size
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

Call = Callable[[], Any]
# A wrong guess of a changing shape costs a slower, general kernel: each of the few shapes here gets its own.
COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}


def compilations() -> int:
    """Graphs that torch.compile has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def forget_compilations() -> None:
    torch.compiler.reset()


def tensors(inputs: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def fastest(ways: dict[str, Call]) -> tuple[Call, str]:
    """The way of doing one thing that is the fastest here, and its name."""
    took = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        way()
        took[name] = time.perf_counter() - start
    best = min(took, key=lambda name: took[name])
    return ways[best], best


def with_fastest_attention(call: Call) -> tuple[Call, str]:
    """Its own choice on a CPU, flash, is slower than plain products (math) backward in bfloat16 where sequences are short."""

    def math() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return call()

    return fastest({"flash": call, "math": math})


def transformer(size: Size, state: dict[str, np.ndarray]) -> SD3Transformer2DModel:
    """With ladd's weights: ladd uses diffusers' names."""
    model = SD3Transformer2DModel(**size.transformer())
    model.load_state_dict(tensors(state))
    return model


def cast(model: SD3Transformer2DModel, dtype: torch.dtype) -> SD3Transformer2DModel:
    return nn.Module.to(model, dtype)  # diffusers' own `to` warns of the modules to keep in float32 even where there are none


def autoencoder(state: dict[str, np.ndarray]) -> AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    model = AutoencoderKL(**VAE, down_block_types=down, up_block_types=up)
    model.load_state_dict(tensors(state))
    return model.eval().requires_grad_(False)


def decoder(state: dict[str, np.ndarray], latents: np.ndarray) -> tuple[Call, str]:
    """A decode, and the memory layout that it runs in: the faster one here."""

    def in_layout(layout: torch.memory_format) -> Call:
        vae = autoencoder(state).to(memory_format=layout)  # type: ignore[call-overload]
        given = torch.from_numpy(latents).to(memory_format=layout)

        def call() -> Tensor:
            with torch.inference_mode():
                out: Tensor = vae.decode(given, return_dict=False)[0]
                return out

        return call

    return fastest({"contiguous": in_layout(torch.contiguous_format), "channels_last": in_layout(torch.channels_last)})


def features(model: SD3Transformer2DModel, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> list[Tensor]:
    """Image tokens after every block."""
    temb = model.time_text_embed(1000 * sigma, pooled)
    hidden, text = model.pos_embed(x), model.context_embedder(context)
    out = []
    for block in model.transformer_blocks:
        text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb)
        out.append(hidden)
    return out


class Head(nn.Module):
    def __init__(self, size: Size, condition: int) -> None:
        super().__init__()
        c = size.head_width
        self.proj = spectral_norm(nn.Linear(size.width, c))
        self.norm1, self.norm2 = nn.GroupNorm(8, c), nn.GroupNorm(8, c)
        self.conv = spectral_norm(nn.Conv2d(c, c, 3, padding=1))
        self.out = spectral_norm(nn.Linear(c, 1))
        self.direction = spectral_norm(nn.Linear(condition, c, bias=False))
        self.condition_sigma = nn.Linear(condition, condition)
        self.condition_pooled = nn.Linear(size.pooled, condition, bias=False)

    def forward(self, tokens: Tensor, embedded: Tensor, pooled: Tensor) -> Tensor:
        batch, n, _ = tokens.shape
        side = math.isqrt(n)
        p = self.proj(tokens).transpose(1, 2).reshape(batch, -1, side, side)
        a = functional.leaky_relu(self.norm1(p), 0.2)
        r = functional.leaky_relu(self.norm2(self.conv(a)), 0.2)
        psi = (self.condition_sigma(embedded) + self.condition_pooled(pooled)) / math.sqrt(embedded.shape[1])
        direction = (self.out.weight + self.direction(psi)) * math.sqrt(0.5)
        return torch.einsum("bchw,bc->bhw", r + a, direction) + self.out.bias


class Heads(nn.Module):
    def __init__(self, size: Size, condition: int = 64) -> None:
        super().__init__()
        self.time = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = nn.Sequential(nn.Linear(256, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.heads = nn.ModuleList(Head(size, condition) for _ in range(size.depth))

    def forward(self, taps: list[Tensor], sigma: Tensor, pooled: Tensor) -> list[Tensor]:
        embedded = self.embedder(self.time(1000 * sigma))
        return [head(tap, embedded, pooled) for head, tap in zip(self.heads, taps, strict=True)]


class Trainer:
    """One call of step() is one update of the heads and one of the student."""

    def __init__(self, size: Size, state: dict[str, np.ndarray], *, compiled: bool, bf16: bool) -> None:
        self.student = transformer(size, state)
        self.frozen = torch.bfloat16 if bf16 else torch.float32
        self.teacher = cast(transformer(size, state), self.frozen).eval().requires_grad_(False)
        self.heads = Heads(size)
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, **COMPILE)) if compiled else lambda f: f
        self.run_student, self.run_teacher, self.run_heads = wrap(self.student), wrap(features), wrap(self.heads)
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
        self.heads_optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-3, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
        self.ema = [p.detach().clone() for p in self.student.parameters()]
        self.times = torch.tensor([1.0, 0.75, 0.5, 0.25])
        self.bf16 = bf16

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def _features(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> list[Tensor]:
        out: list[Tensor] = self.run_teacher(self.teacher, x.to(self.frozen), t, context.to(self.frozen), pooled.to(self.frozen))
        return out

    @staticmethod
    def _mix(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        return (1 - t) * x + t * torch.randn_like(x)

    def _x0(self, latents: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        t = self.times[torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), len(latents), replacement=True)]
        x = self._mix(latents, t)
        velocity = self.run_student(
            hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t, return_dict=False
        )
        return x - t[:, None, None, None] * velocity[0]

    def _update_heads(self, taps: list[Tensor], t: Tensor, pooled: Tensor) -> float:
        """taps, t, pooled: of the real pictures, then of the fake ones."""
        with self._autocast():
            logits = self.run_heads(taps, t, pooled)
            pairs = [x.float().chunk(2) for x in logits]
            loss = torch.stack([functional.relu(1 - real).mean() + functional.relu(1 + fake).mean() for real, fake in pairs]).mean()
        self.heads_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0, foreach=True)
        self.heads_optimizer.step()
        return loss.item()

    def _update_student(self, taps: list[Tensor], t: Tensor, pooled: Tensor) -> float:
        self.heads.requires_grad_(False)
        with self._autocast():
            logits = self.run_heads(taps, t, pooled)
            loss = -torch.stack([x.float().mean() for x in logits]).mean()
        self.student_optimizer.zero_grad()
        loss.backward()
        self.heads.requires_grad_(True)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0, foreach=True)
        self.student_optimizer.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.student.parameters()], 0.005)
        return loss.item()

    def _fake_taps(self, latents: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> list[Tensor]:
        return self._features(self._mix(self._x0(latents, context, pooled).float(), t), t, context, pooled)

    def discriminator_step(self, latents: Tensor, context: Tensor, pooled: Tensor) -> float:
        t = torch.sigmoid(1 + torch.randn(len(latents))).repeat(2)
        with self._autocast(), torch.no_grad():  # not inference_mode: the heads' backward keeps these tensors
            both = self._mix(torch.cat([latents, self._x0(latents, context, pooled).float()]), t)
            taps = self._features(both, t, context.repeat(2, 1, 1), pooled.repeat(2, 1))
        return self._update_heads(taps, t, pooled.repeat(2, 1))

    def student_step(self, latents: Tensor, context: Tensor, pooled: Tensor) -> float:
        t = torch.sigmoid(1 + torch.randn(len(latents)))
        with self._autocast():
            taps = self._fake_taps(latents, t, context, pooled)
        return self._update_student(taps, t, pooled)

    def step(self, latents: Tensor, context: Tensor, pooled: Tensor) -> None:
        self.discriminator_step(latents, context, pooled)
        self.student_step(latents, context, pooled)

    def sharing_step(self, latents: Tensor, context: Tensor, pooled: Tensor) -> None:
        """Both updates from one pass of the student and one of the teacher over what it made: what ladd's step does."""
        t = torch.sigmoid(1 + torch.randn(len(latents)))
        with self._autocast():
            fake = self._fake_taps(latents, t, context, pooled)
            with torch.no_grad():
                real = self._features(self._mix(latents, t), t, context, pooled)
        both = [torch.cat([r, f.detach()]) for r, f in zip(real, fake, strict=True)]
        self._update_heads(both, t.repeat(2), pooled.repeat(2, 1))
        self._update_student(fake, t, pooled)


def forward(model: SD3Transformer2DModel, inputs: dict[str, Tensor], *, compiled: bool, bf16: bool) -> Callable[[], Tensor]:
    """A sampler's forward: weights in the compute type, as diffusers' pipelines load them with torch_dtype."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = cast(model, dtype).eval().requires_grad_(False)
    given = {k: v.to(dtype) for k, v in inputs.items()}
    run = torch.compile(model, **COMPILE, options={"freezing": True}) if compiled else model

    def call() -> Tensor:
        with torch.inference_mode():
            out: Tensor = run(given["latents"], given["context"], given["pooled"], 1000 * inputs["sigma"], return_dict=False)[0]
            return out

    return call


def forward_backward(model: SD3Transformer2DModel, inputs: dict[str, Tensor], *, compiled: bool, bf16: bool) -> Callable[[], None]:
    """With gradients of all parameters."""
    run = torch.compile(model, **COMPILE) if compiled else model
    cotangent = torch.ones_like(inputs["latents"])

    def call() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = run(inputs["latents"], inputs["context"], inputs["pooled"], 1000 * inputs["sigma"], return_dict=False)[0]
        out.backward(cotangent.to(out.dtype))

    return call


def attention(streams: list[tuple[np.ndarray, ...]], bf16: bool) -> Call:
    """scaled_dot_product_attention over both streams, already joined (joining is not counted)."""
    q, k, v = joined(streams, bf16)

    def call() -> Tensor:
        with torch.inference_mode():
            return functional.scaled_dot_product_attention(q, k, v)

    return call


def attention_backward(streams: list[tuple[np.ndarray, ...]], bf16: bool) -> tuple[Call, str]:
    """Its backward alone, and the kernel that is the faster here."""

    def by(backend: SDPBackend) -> Call:
        leaves = [x.requires_grad_() for x in joined(streams, bf16)]
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(*leaves)
        cotangent = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    return fastest({"flash": by(SDPBackend.FLASH_ATTENTION), "math": by(SDPBackend.MATH)})


def joined(streams: list[tuple[np.ndarray, ...]], bf16: bool) -> list[Tensor]:
    """q, k, v [B,heads,n,64], as views of [B,n,heads,64]."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return [torch.from_numpy(np.concatenate(parts, axis=1)).to(dtype).transpose(1, 2) for parts in zip(*streams)]
