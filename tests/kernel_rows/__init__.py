"""The case table of the kernels: for each row its inputs, how it is called, what float64 says, and how far from that it may be.

A row covers one or more names of LADD_KERNELS in csrc/backend.h. Shapes are chosen where kernels break: size 1, odd sizes, tails
behind a vector or a tile, large mean with small variance, scores that would overflow exp.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from support import normal

from ladd import _core

from . import buffers, layers
from .row import Row


def all_rows(core: Any = _core) -> list[Row]:
    """core: ladd._core, or what has its functions and computes elsewhere."""
    rows: list[Row] = []
    for family in (
        buffers.elementwise,
        buffers.layouts,
        layers.matrix_products,
        layers.attention,
        layers.norms,
        layers.spectral,
        buffers.adversarial,
        buffers.random_numbers,
        buffers.diffusion,
        buffers.optimizers,
        buffers.clips,
    ):
        family(core, rows)
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
