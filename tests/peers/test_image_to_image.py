"""Pictures as input, live against diffusers' pipelines: from a PIL picture and a PIL mask of other sizes to the final latents."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import support
import torch
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as img2img
from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_inpaint as inpaint
from oracle import mmdit as mmdit_oracle
from PIL import Image
from support import mmdit_config, vae_config

import ladd
from ladd.pipeline import SamplerSettings
from ladd.sampling import noise

pytestmark = pytest.mark.peers
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.random.default_rng(2).integers(0, 2, (5, 5), dtype=np.uint8) * 255, np.ones((8, 8), np.uint8)))
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))


@pytest.mark.filterwarnings("ignore:.*pure noise")  # strength 1 without a mask is meant here
@pytest.mark.parametrize("strength", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["img2img", "mask, 16 channels", "mask, 33 channels"])
def test_latents_from_a_picture(kind: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = 33 if "33" in kind else 16
    config = mmdit_config(in_channels=channels, out_channels=16, qk_norm="rms_norm")
    model = ladd.MMDiT(config)
    model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit_oracle.parameter_shapes(config), 4)})
    vae = ladd.AutoencoderKL({**vae_config(latent_channels=16), "scaling_factor": 1.3, "shift_factor": 0.2}, seed=5)
    state = vae.state_dict()
    last = "quant_conv" if "quant_conv.weight" in state else "encoder.conv_out"
    state[f"{last}.weight"][16:], state[f"{last}.bias"][16:] = 0, -30  # no spread: diffusers draws from the posterior
    vae.load_state_dict(state)
    text = ladd.WordEncoder(["red", "apple"], max_words=5, context_dim=12, pooled_dim=10)
    settings = SamplerSettings(schedule="diffusers", shift=3.0, guidance_scale=2.5)
    given: dict[str, Any] = {} if kind == "img2img" else {"mask": MASK}
    ours = ladd.Pipeline(model, vae, text, settings)(
        ["red apple", "apple"], image=PICTURE, strength=strength, steps=4, seed=3, negative_prompt="red", **given
    )

    parts: dict[str, Any] = {
        "transformer": _peer(diffusers.SD3Transformer2DModel, model),
        "vae": _peer(diffusers.AutoencoderKL, vae),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **NO_TEXT,
    }
    start = torch.from_numpy(noise((2, 16, 16, 16), 3))
    for module in (img2img, inpaint):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: start)
    (context, pooled), (negative, negative_pooled) = (map(torch.from_numpy, text.encode(p)) for p in (["red apple", "apple"], ["red"] * 2))
    cls = diffusers.StableDiffusion3Img2ImgPipeline if kind == "img2img" else diffusers.StableDiffusion3InpaintPipeline
    theirs = cls(**parts)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        image=PICTURE, strength=strength, height=32, width=32, num_inference_steps=4, guidance_scale=2.5, output_type="latent",
        prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled,
        **({} if kind == "img2img" else {"mask_image": MASK}),
    ).images.numpy()  # fmt: skip
    support.assert_close(ours.latents, wanted, 2e-5, "latents")


def _peer(kind: Any, model: Any) -> Any:
    peer = kind.from_config({**model.config.to_dict(), "_class_name": kind.__name__})
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in model.state_dict().items()})
    return peer.eval()
