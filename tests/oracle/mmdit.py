"""MMDiT of Stable Diffusion 3 and 3.5 in float64: joint blocks, dual attention, RMS norm of q and k, taps, skipped layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from . import autodiff as ad
from .autodiff import Array, Tensor

EPS = 1e-6


def position_table(config: dict[str, Any]) -> Array:
    """[1, M*M, D]: sine then cosine of the column in the first half of the channels, of the row in the second."""
    size = config["pos_embed_max_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    base = config["sample_size"] // config["patch_size"]
    at = np.arange(size, dtype=np.float32) / np.float32(size / base)
    omega = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angle = at.astype(np.float64)[:, None] * omega
    one = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    table = np.empty((size, size, width))
    table[:, :, : width // 2] = one[None, :, :]
    table[:, :, width // 2 :] = one[:, None, :]
    return table.astype(np.float32).reshape(1, size * size, width)


def timestep_features(sigma: Array, dim: int = 256) -> Array:
    """[cos, sin] of 1000 sigma f_i. Frequencies and angles are single precision, as in the models' own training."""
    half = dim // 2
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    time = np.asarray(sigma, dtype=np.float32) * np.float32(1000.0)
    angle = (time[:, None] * frequency).astype(np.float64)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def forward(
    config: dict[str, Any],
    w: dict[str, Tensor],
    latents: Tensor,
    sigma: Array,
    context: Tensor,
    pooled: Tensor,
    skip_layers: Collection[int] = (),
    taps: Sequence[int] | None = None,
) -> Any:
    """Velocity [B, Cout, h*p, w*p], or with taps the list of image tokens [B, N, D] after those blocks."""
    p, layers = config["patch_size"], config["num_layers"]
    heads, dh = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * dh

    def lin(name: str, x: Tensor) -> Tensor:
        return ad.linear(x, w[name + ".weight"], w[name + ".bias"])

    def embed(name: str, x: Tensor) -> Tensor:
        return lin(name + ".linear_2", ad.silu(lin(name + ".linear_1", x)))

    def chunks(name: str, n: int) -> list[Tensor]:
        m = lin(name, s)
        return [m[:, None, i * width : (i + 1) * width] for i in range(n)]

    def split_heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], heads, dh).transpose(0, 2, 1, 3)

    def merge_heads(x: Tensor) -> Tensor:
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], width)

    def qkv(block: str, projections: tuple[str, str, str], norms: tuple[str, str], x: Tensor) -> list[Tensor]:
        out = [split_heads(lin(block + name, x)) for name in projections]
        if config["qk_norm"] == "rms_norm":
            out[:2] = [ad.rms_norm(part, w[f"{block}{name}.weight"], EPS) for part, name in zip(out[:2], norms, strict=True)]
        return out

    def feed_forward(name: str, x: Tensor) -> Tensor:
        return lin(name + ".net.2", ad.gelu(lin(name + ".net.0.proj", x)))

    def modulate(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return z * (scale + 1.0) + shift

    batch, channels, rows, columns = latents.shape
    h, wd = rows // p, columns // p
    patches = latents[:, :, : h * p, : wd * p].reshape(batch, channels, h, p, wd, p).transpose(0, 2, 4, 1, 3, 5)
    kernel = w["pos_embed.proj.weight"]
    x = ad.linear(patches.reshape(batch, h * wd, -1), kernel.reshape(width, -1), w["pos_embed.proj.bias"])
    size = config["pos_embed_max_size"]
    top, left = (size - h) // 2, (size - wd) // 2
    table = w["pos_embed.pos_embed"].data.reshape(size, size, width)
    x = x + table[top : top + h, left : left + wd].reshape(1, h * wd, width)

    time = Tensor(timestep_features(sigma))
    s = ad.silu(embed("time_text_embed.timestep_embedder", time) + embed("time_text_embed.text_embedder", pooled))
    y = lin("context_embedder", context)

    features: list[Tensor] = []
    for i in range(layers):
        b = f"transformer_blocks.{i}."
        if i not in skip_layers:
            dual, last = i in config["dual_attention_layers"], i == layers - 1
            m = chunks(b + "norm1.linear", 9 if dual else 6)
            xn = ad.layer_norm(x, EPS)
            q, k, v = qkv(b + "attn.", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), modulate(xn, m[0], m[1]))
            if last:  # only the keys and values of the text matter here, and its scale comes before its shift
                scale, shift = chunks(b + "norm1_context.linear", 2)
            else:
                shift, scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = chunks(b + "norm1_context.linear", 6)
            y1 = modulate(ad.layer_norm(y, EPS), shift, scale)
            cq, ck, cv = qkv(b + "attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), y1)
            joint = ad.attention(ad.concat([q, cq], 2), ad.concat([k, ck], 2), ad.concat([v, cv], 2))
            both = merge_heads(joint)
            x = x + m[2] * lin(b + "attn.to_out.0", both[:, : h * wd])
            if dual:
                q, k, v = qkv(b + "attn2.", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), modulate(xn, m[6], m[7]))
                x = x + m[8] * lin(b + "attn2.to_out.0", merge_heads(ad.attention(q, k, v)))
            x = x + m[5] * feed_forward(b + "ff", modulate(ad.layer_norm(x, EPS), m[3], m[4]))
            if not last:
                y = y + c_gate * lin(b + "attn.to_add_out", both[:, h * wd :])
                y = y + c_gate_mlp * feed_forward(b + "ff_context", modulate(ad.layer_norm(y, EPS), c_shift_mlp, c_scale_mlp))
        if taps is not None and i in taps:
            features.append(x)
    if taps is not None:
        return features

    scale, shift = chunks("norm_out.linear", 2)
    tokens = lin("proj_out", modulate(ad.layer_norm(x, EPS), shift, scale))
    c_out = config["out_channels"]
    return tokens.reshape(batch, h, wd, p, p, c_out).transpose(0, 5, 1, 3, 2, 4).reshape(batch, c_out, h * p, wd * p)


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint but the position table, which is computed."""
    dh, p, layers = config["attention_head_dim"], config["patch_size"], config["num_layers"]
    d = config["num_attention_heads"] * dh
    shapes: dict[str, tuple[int, ...]] = {"pos_embed.proj.weight": (d, config["in_channels"], p, p), "pos_embed.proj.bias": (d,)}

    def lin(name: str, out: int, into: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (out, into), (out,)

    for name, width in (("timestep", 256), ("text", config["pooled_projection_dim"])):
        lin(f"time_text_embed.{name}_embedder.linear_1", d, width)
        lin(f"time_text_embed.{name}_embedder.linear_2", d, d)
    lin("context_embedder", d, config["joint_attention_dim"])
    for i in range(layers):
        b, dual, last = f"transformer_blocks.{i}.", i in config["dual_attention_layers"], i == layers - 1
        lin(b + "norm1.linear", (9 if dual else 6) * d, d)
        lin(b + "norm1_context.linear", (2 if last else 6) * d, d)
        projections = [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
        ]
        projections += [] if last else ["attn.to_add_out"]
        projections += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if dual else []
        for name in projections:
            lin(b + name, d, d)
        if config["qk_norm"] == "rms_norm":
            norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"] + (
                ["attn2.norm_q", "attn2.norm_k"] if dual else []
            )
            shapes.update({f"{b}{name}.weight": (dh,) for name in norms})
        for name in ["ff"] if last else ["ff", "ff_context"]:
            lin(f"{b}{name}.net.0.proj", 4 * d, d)
            lin(f"{b}{name}.net.2", d, 4 * d)
    lin("norm_out.linear", 2 * d, d)
    lin("proj_out", p * p * config["out_channels"], d)
    return shapes
