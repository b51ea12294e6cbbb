"""Stability's single files: tensor names and configurations of the original layout, to and from diffusers'.

The layouts differ in three ways: q, k and v are one tensor [3D, D] in the original and three in diffusers; the two halves (shift,
scale) of the output norm and of the last block's context norm are swapped; the decoder's levels count the other way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .arrays import Array
from .config import AutoencoderKLConfig, MMDiTConfig

if TYPE_CHECKING:
    from .weights import TensorRef

Shapes = Mapping[str, tuple[int, ...]]

# original -> diffusers, modules (each has .weight and .bias)
_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def _swap_halves(array: Array) -> Array:
    half = array.shape[0] // 2
    return np.concatenate([array[half:], array[:half]])


def _depth(names: Mapping[str, object], pattern: str) -> int:
    found = [int(m.group(1)) for m in (re.match(pattern, n) for n in names) if m]
    return max(found) + 1 if found else 0


# ---- MMDiT --------------------------------------------------------------------------------------------------------


def mmdit_from_single(tensors: dict[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """diffusers' names for the transformer's tensors of a single file; tensors of other models in the file are left aside."""
    prefix = "model.diffusion_model."
    if any(n.startswith(prefix + "joint_blocks.") for n in tensors):
        tensors = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    if any(n.startswith("transformer_blocks.") for n in tensors):
        return tensors
    depth = _depth(tensors, r"joint_blocks\.(\d{1,3})\.")
    if depth == 0:
        raise ValueError(f"{where} holds no MMDiT: expected tensors named [model.diffusion_model.]joint_blocks.* or transformer_blocks.*")
    result: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        for new, ref in _mmdit_rename(name, tensor, depth):
            result[new] = ref
    return result


def _mmdit_rename(name: str, tensor: TensorRef, depth: int) -> list[tuple[str, TensorRef]]:
    if name == "pos_embed":
        return [("pos_embed.pos_embed", tensor)]
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        swap = module == "final_layer.adaLN_modulation.1"
        return [(f"{_TOP[module]}.{kind}", tensor.then(tensor.shape, _swap_halves) if swap else tensor)]
    match = re.match(r"joint_blocks\.(\d{1,3})\.(.+)", module)
    if match:
        index, inner = int(match.group(1)), match.group(2)
        block = f"transformer_blocks.{index}."
        if inner in _BLOCK:
            swap = inner == "context_block.adaLN_modulation.1" and index == depth - 1
            return [(f"{block}{_BLOCK[inner]}.{kind}", tensor.then(tensor.shape, _swap_halves) if swap else tensor)]
        if inner in _QKV and tensor.shape and tensor.shape[0] % 3 == 0:
            rows = tensor.shape[0] // 3
            shape = (rows, *tensor.shape[1:])
            parts = []
            for i, target in enumerate(_QKV[inner]):
                parts.append((f"{block}{target}.{kind}", tensor.then(shape, lambda a, i=i: a[i * rows : (i + 1) * rows])))  # type: ignore[misc]
            return parts
    return [(name, tensor)]  # unknown: the strict check will name it


def mmdit_to_single(tensors: Mapping[str, Array], config: MMDiTConfig, prefix: str = "model.diffusion_model.") -> dict[str, Array]:
    """The original layout of a transformer's tensors."""
    last = config.num_layers - 1
    top = {v: k for k, v in _TOP.items()}
    block = {v: k for k, v in _BLOCK.items()}
    result: dict[str, Array] = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        match = re.match(r"transformer_blocks\.(\d+)\.(.+)", module)
        if name == "pos_embed.pos_embed":
            result[f"{prefix}pos_embed"] = array
        elif module in top:
            result[f"{prefix}{top[module]}.{kind}"] = _swap_halves(array) if module == "norm_out.linear" else array
        elif match and match.group(2) in block:
            index, inner = int(match.group(1)), match.group(2)
            swap = inner == "norm1_context.linear" and index == last
            result[f"{prefix}joint_blocks.{index}.{block[inner]}.{kind}"] = _swap_halves(array) if swap else array
    for index in range(config.num_layers):
        for target, parts in _QKV.items():
            for kind in ("weight", "bias"):
                names = [f"transformer_blocks.{index}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    result[f"{prefix}joint_blocks.{index}.{target}.{kind}"] = np.concatenate([tensors[n] for n in names])
    return result


def mmdit_config(shapes: Shapes, where: str) -> MMDiTConfig:
    """The configuration that the shapes of a transformer (diffusers' names) tell."""

    def need(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes or len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(
                f"{where}: cannot tell the configuration: expected {name} with {rank} dimensions, got {shapes.get(name, 'no such tensor')}"
            )
        return shapes[name]

    width, channels, patch, _ = need("pos_embed.proj.weight", 4)
    depth = _depth(shapes, r"transformer_blocks\.(\d{1,3})\.")
    normed = "transformer_blocks.0.attn.norm_q.weight" in shapes
    # Without norms nothing tells the head's width; every released model has 64.
    head = need("transformer_blocks.0.attn.norm_q.weight", 1)[0] if normed else 64
    if width % head:
        raise ValueError(f"{where}: width {width} is not a multiple of the head width {head}; pass config=MMDiTConfig(...)")
    table = math.isqrt(need("pos_embed.pos_embed", 3)[1])
    return MMDiTConfig(
        sample_size=max(patch, min(128, table * patch)),
        patch_size=patch,
        in_channels=channels,
        num_layers=depth,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=need("context_embedder.weight", 2)[1],
        caption_projection_dim=width,
        pooled_projection_dim=need("time_text_embed.text_embedder.linear_1.weight", 2)[1],
        out_channels=need("proj_out.weight", 2)[0] // patch**2,
        pos_embed_max_size=table,
        dual_attention_layers=tuple(i for i in range(depth) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes),
        qk_norm="rms_norm" if normed else None,
    )


# ---- autoencoder --------------------------------------------------------------------------------------------------

_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def rename_legacy(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Older diffusers files name the middle attention's projections query, key, value, proj_attn."""

    def rename(name: str) -> str:
        match = re.fullmatch(r"(.*\.attentions\.0\.)(query|key|value|proj_attn)(\.weight|\.bias)", name)
        return f"{match.group(1)}{_LEGACY[match.group(2)]}{match.group(3)}" if match else name

    return {rename(n): t for n, t in tensors.items()}


def autoencoder_from_single(tensors: dict[str, TensorRef], where: str) -> dict[str, TensorRef]:
    """diffusers' names for the autoencoder's tensors of a single file."""
    for prefix in _VAE_PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in tensors:
            break
    else:
        raise ValueError(f"{where} holds no autoencoder: expected encoder.conv_in.weight, plain or after {' or '.join(_VAE_PREFIXES[:2])}")
    parts = tuple(prefix + p for p in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    tensors = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(parts)}
    if any(".down_blocks." in n for n in tensors):
        return tensors
    levels = _depth(tensors, r"encoder\.down\.(\d{1,2})\.")
    result: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        new = _vae_rename(name, levels)
        if ".attentions." in new and len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.then(tensor.shape[:2], lambda a: a[:, :, 0, 0])
        result[new] = tensor
    return result


def _vae_rename(name: str, levels: int) -> str:
    name = name.replace("nin_shortcut", "conv_shortcut")
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.block\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.upsample\.conv\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0.conv.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.mid\.attn_1\.(norm|q|k|v|proj_out)\.", lambda m: f".mid_block.attentions.0.{_ATTENTION[m[1]]}.", name)
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)


def autoencoder_config(shapes: Shapes, where: str) -> AutoencoderKLConfig:
    """The configuration that an autoencoder's shapes tell; scaling as in Stable Diffusion 3 (16 channels) or 1 (4 channels)."""

    def need(name: str) -> tuple[int, ...]:
        if name not in shapes or len(shapes[name]) != 4:
            raise ValueError(
                f"{where}: cannot tell the configuration: expected {name} with 4 dimensions, got {shapes.get(name, 'no such tensor')}"
            )
        return shapes[name]

    levels = _depth(shapes, r"encoder\.down_blocks\.(\d{1,2})\.")
    latent = need("encoder.conv_out.weight")[0] // 2
    scaling = {16: (1.5305, 0.0609), 4: (0.18215, None)}
    if latent not in scaling:
        raise ValueError(f"{where}: the scaling of {latent} latent channels is not known; pass config=AutoencoderKLConfig(...)")
    return AutoencoderKLConfig(
        in_channels=need("encoder.conv_in.weight")[1],
        out_channels=need("decoder.conv_out.weight")[0],
        block_out_channels=tuple(need(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)),
        layers_per_block=_depth(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d{1,2})\."),
        latent_channels=latent,
        sample_size=1024 if latent == 16 else 512,
        scaling_factor=scaling[latent][0],
        shift_factor=scaling[latent][1],
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in shapes,
    )
