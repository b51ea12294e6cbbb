"""What a sample gives is the same to the bit alone and in any batch, at any place of it: kernels, models, and pictures of a pipeline.

`python tests/test_batch_invariance.py` runs all checks without pytest, so that a subprocess can do it on another instruction set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import tiny
from numpy.typing import NDArray
from test_kernels import instruction_sets

import ladd
from ladd import _core, kernels

Array = NDArray[np.float32]
BATCH = 7


def check_alone(what: str, run: Callable[..., Any], *batched: Array) -> None:
    """run(*arrays) -> arrays with the samples first: sample by sample and in threes it gives the rows that the whole batch gives."""
    whole = run(*batched)
    for first, last in [(b, b + 1) for b in range(BATCH)] + [(1, 4), (4, 7)]:
        part = run(*(np.ascontiguousarray(a[first:last]) for a in batched))
        for i, (some, all_of_them) in enumerate(zip(part, whole, strict=True)):
            assert support.same_bits(some, all_of_them[first:last]), f"{what}: result {i}, samples {first} to {last - 1} of {BATCH}"


def linear() -> None:
    # tokens of a sample, outputs, inputs: sizes of the models, remainders of every tile, a single row, more than one block along the sum
    for tokens, n, k in ((80, 256, 256), (16, 768, 256), (1, 512, 96), (77, 130, 1000), (13, 33, 31), (257, 96, 384), (64, 1024, 1025)):
        x, w, bias, dy = support.normal(1, BATCH, tokens, k), support.normal(2, n, k), support.normal(3, n), support.normal(4, BATCH, tokens, n)

        def forward(x: Array, dy: Array, w: Array = w, bias: Array = bias) -> list[Array]:
            samples, tokens, k = x.shape
            rows, n = x.reshape(-1, k), len(w)
            y, h = _core.linear_gelu_forward(rows, w, bias)
            plain = _core.linear_forward(rows, w, None)
            dx = _core.linear_backward(dy.reshape(-1, n), rows, w)[0]
            return [a.reshape(samples, tokens, -1) for a in (y, h, plain, dx)]

        check_alone(f"linear {tokens}x{n}x{k}", forward, x, dy)


def attention() -> None:
    for image, text, heads, dh in ((64, 16, 4, 64), (37, 0, 3, 24), (256, 77, 2, 64), (5, 130, 1, 128)):
        shapes = [(BATCH, n, heads, dh) for n in (image, text) if n]
        arrays = [support.normal(10 + i, *shape) for shape in shapes for i in range(4)]

        def both(*arrays: Array) -> list[Array]:
            streams = [tuple(arrays[i : i + 3]) for i in range(0, len(arrays), 4)]
            outputs, lse = kernels.joint_attention_forward(streams)
            gradients = kernels.joint_attention_backward(list(arrays[3::4]), streams, outputs, lse)
            return [*outputs, lse, *(g for stream in gradients for g in stream)]

        check_alone(f"attention {image}+{text}, {heads}x{dh}", both, *arrays)


def convolution() -> None:
    for c, n, h, w, kernel, stride in ((8, 16, 16, 16, 3, 1), (3, 5, 9, 7, 3, 2), (64, 64, 8, 8, 1, 1), (64, 32, 33, 40, 3, 1)):
        weight, pad = support.normal(21, n, c, kernel, kernel), kernel // 2
        x = support.normal(20, BATCH, c, h, w)

        def both(x: Array, weight: Array = weight, stride: int = stride, pad: int = pad) -> list[Array]:
            y = kernels.conv2d_forward(x, weight, None, stride=stride, padding=pad)
            dx = kernels.conv2d_backward(np.ascontiguousarray(y[..., ::-1]), x, weight, stride=stride, padding=pad)[0]
            return [y, dx]

        check_alone(f"convolution {c}->{n}, {h}x{w}", both, x)


def transformer() -> None:
    config = ladd.MMDiTConfig(
        sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=2, num_attention_heads=4, attention_head_dim=64,
        joint_attention_dim=64, caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    model = ladd.MMDiT(config, seed=5)
    model.load_state_dict(support.seeded_weights({name: value.shape for name, value in model.state_dict().items()}, 6))
    inputs = (
        support.normal(30, BATCH, 8, 16, 16),
        np.linspace(0.1, 1, BATCH, dtype=np.float32),
        support.normal(31, BATCH, 16, 64),
        support.normal(32, BATCH, 64),
    )

    def both(latents: Array, sigma: Array, context: Array, pooled: Array) -> list[Array]:
        velocity, pullback = model.vjp(latents, sigma, context, pooled)
        features = model.features(latents, sigma, context, pooled, taps=(0, 1))
        g = pullback(velocity, params=False)
        return [velocity, *features, g.latents, g.context, g.pooled]

    check_alone("MMDiT", both, *inputs)


def autoencoder() -> None:
    config = ladd.AutoencoderKLConfig(latent_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, sample_size=32)
    vae = ladd.AutoencoderKL(config, seed=7)
    check_alone("AutoencoderKL", lambda images: [vae.encode(images), vae.decode(vae.encode(images))], support.normal(40, BATCH, 3, 32, 32))


def discriminator() -> None:
    config = ladd.DiscriminatorConfig(feature_dim=64, taps=(0, 1), pooled_dim=16, width=32)
    heads = ladd.Discriminator(config, seed=8)
    features = [support.normal(50 + i, BATCH, 48, 64) for i in range(2)]

    def logits(first: Array, second: Array, sigma: Array, pooled: Array) -> list[Array]:
        return list(heads([first, second], sigma, pooled, grid=(6, 8)))

    check_alone("Discriminator", logits, *features, np.linspace(0, 1, BATCH, dtype=np.float32), support.normal(53, BATCH, 16))


def pictures() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = tiny.tiny_pipeline(Path(folder))
        for name, settings in (("student", {}), ("teacher", {"steps": 3, "guidance_scale": 2.5})):
            pipe = ladd.Pipeline.from_pretrained(path, model=name)
            prompts = ["red apple", "cat face", "pizza", "woman surfing", "red heart", "pizza", "dog face"]
            whole = pipe(prompts, seed=11, **settings)
            for i, prompt in enumerate(prompts):
                alone = pipe(prompt, seed=11 + i, **settings)
                assert support.same_bits(alone.latents[0], whole.latents[i]), f"{name}: {prompt}"
                assert alone.images[0].tobytes() == whole.images[i].tobytes(), f"{name}: {prompt}"


CHECKS = [linear, attention, convolution, transformer, autoencoder, discriminator, pictures]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sample_alone_and_in_a_batch(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_every_instruction_set(instruction_set: str) -> None:
    environment = {**os.environ, "LADD_CPU": instruction_set}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"{instruction_set}: {len(CHECKS)} checks\n", done.stdout + done.stderr[-4000:]


if __name__ == "__main__":
    for check in CHECKS:
        check()
    print(f"{_core.backend_name()}: {len(CHECKS)} checks")
