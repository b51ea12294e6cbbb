"""The sizes at which both sides are measured, and random inputs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Size:
    depth: int
    heads: int  # of 64 channels each
    side: int  # latent pixels; patches of 2 x 2
    text: int  # text tokens
    channels: int
    batch: int
    context: int  # width of a text token
    pooled: int  # width of the pooled text
    head_width: int  # channels of a discriminator head
    qk_norm: str | None

    @property
    def width(self) -> int:
        return 64 * self.heads

    @property
    def tokens(self) -> int:
        return (self.side // 2) ** 2

    def transformer(self) -> dict[str, Any]:
        """The table that ladd.MMDiT and diffusers' SD3Transformer2DModel both take."""
        return {
            "sample_size": self.side,
            "patch_size": 2,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_layers": self.depth,
            "attention_head_dim": 64,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.context,
            "caption_projection_dim": self.width,
            "pooled_projection_dim": self.pooled,
            "pos_embed_max_size": max(self.side // 2, 16),
            "qk_norm": self.qk_norm,
        }

    def discriminator(self) -> dict[str, Any]:
        return {"feature_dim": self.width, "taps": tuple(range(self.depth)), "pooled_dim": self.pooled, "width": self.head_width}

    def inputs(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        return {
            "latents": normal(self.batch, self.channels, self.side, self.side),
            "sigma": np.linspace(0.2, 1.0, self.batch, dtype=np.float32),
            "context": normal(self.batch, self.text, self.context),
            "pooled": normal(self.batch, self.pooled),
        }


SIZES = {
    "demo": Size(6, 4, 16, 16, 8, 32, 128, 128, 64, "rms_norm"),
    "S": Size(6, 6, 32, 77, 16, 4, 768, 768, 64, "rms_norm"),
    "SD3": Size(2, 24, 64, 154, 16, 1, 4096, 2048, 256, None),
}

# How cost grows: at width 384, batch 1, 77 text tokens; over image tokens at depth 2, over depth at 256 image tokens.
TOKENS = (64, 256, 1024, 4096)
DEPTHS = (1, 2, 4, 8, 16)


def growing(along: str, x: int) -> Size:
    tokens, depth = (x, 2) if along == "image tokens" else (256, x)
    return Size(depth, 6, 2 * math.isqrt(tokens), 77, 16, 1, 768, 768, 64, "rms_norm")


# Stable Diffusion 3's autoencoder.
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


# (batch, image tokens, text tokens, heads of 64 channels): 64 to 1536 channels, 80 to 4429 tokens.
ATTENTION = [
    (32, 64, 16, 1),
    (32, 64, 16, 4),
    (4, 256, 77, 6),
    (1, 256, 77, 24),
    (1, 1024, 154, 1),
    (1, 1024, 154, 24),
    (1, 4096, 333, 6),
]


def attention_inputs(batch: int, image: int, text: int, heads: int) -> list[tuple[Array, Array, Array]]:
    """q, k, v [B,n,heads,64] of both streams."""
    rng = np.random.default_rng(0)
    q, k, v, text_q, text_k, text_v = (
        rng.standard_normal((batch, n, heads, 64), dtype=np.float32) for n in (image, image, image, text, text, text)
    )
    return [(q, k, v), (text_q, text_k, text_v)]
