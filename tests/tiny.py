"""A pipeline folder small enough for tests: 64x64 pictures, the vocabulary of the training captions, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import normal

import ladd
from ladd import text
from ladd.data import openmoji
from ladd.pipeline import SamplerSettings, save_pipeline


def tiny_pipeline(folder: Path) -> Path:
    """Writes teacher and student into `folder` and returns it."""
    config = ladd.MMDiTConfig(
        sample_size=16,
        patch_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    vae = ladd.AutoencoderKL(
        ladd.AutoencoderKLConfig(
            latent_channels=4,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            sample_size=64,
        ),
        seed=1,
    )
    words = ladd.WordEncoder(text.build_vocabulary(openmoji.captions()), max_words=16, context_dim=12, pooled_dim=12)
    models = {"student": ladd.MMDiT(config, seed=2), "teacher": ladd.MMDiT(config, seed=3)}
    for model in models.values():
        weights = model.state_dict()
        for number, value in enumerate(weights.values()):
            if value.ndim > 1 and not value.any():  # as training begins, no picture would depend on its prompt
                value[...] = normal(number, *value.shape) * np.float32(0.5 * value.shape[1] ** -0.5)
        weights["proj_out.bias"][:] = 1.0  # so that what the teacher makes does not look like the noise it came from
        model.load_state_dict(weights)
    settings = {
        "student": SamplerSettings(folder="student", steps=4, method="renoise"),
        "teacher": SamplerSettings(folder="teacher", steps=10, guidance_scale=2.5),
    }
    save_pipeline(folder, models, vae, words, settings)
    return folder
