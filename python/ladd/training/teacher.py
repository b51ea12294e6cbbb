"""Trains a rectified-flow teacher: x_t = (1 - t) z + t e, velocity e - z, mean squared error, t logit-normal (SD3 paper, section 3.1).

Text is dropped to the empty prompt for a share of the pictures, so that guidance has something to steer away from; the text
encoder is trained along. Latents come from a bank of random views that the autoencoder encodes once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes, sampling
from .. import config as configs
from .. import device as devices
from ..config import AdamWConfig, MMDiTConfig
from ..data import openmoji
from ..data.shards import epoch_rows
from ..files import atomic_file
from ..models import AutoencoderKL, MMDiT
from ..pipeline import SamplerSettings, save_pipeline
from ..text import EMPTY, PADDING, WordEncoder, build_vocabulary
from ..weights import sha256
from . import common

Array = NDArray[Any]

GRID_PROMPTS = (
    "red apple", "cat face", "rocket", "pizza", "house", "woman surfing medium skin tone", "butterfly on a pink background", "flag japan",
)  # fmt: skip
GRID_GUIDANCE, GRID_STEPS = 3.0, 20
VALIDATION_TIMES = tuple((i + 0.5) / 8 for i in range(8))


@dataclass(frozen=True)
class TeacherData:
    """[data]: the autoencoder's folder, and how many random views of the drawings are encoded."""

    autoencoder: str = "out/openmoji/autoencoder/vae"
    views: int = 24576

    def __post_init__(self) -> None:
        configs.check_ints(self, views=1)


@dataclass(frozen=True)
class TextSettings:
    """[text]: sizes of the text encoder."""

    max_words: int = 16
    context_dim: int = 128
    pooled_dim: int = 128


@dataclass(frozen=True)
class TeacherRun:
    """[run]: how long, how much at once, which times."""

    seed: int = 0
    steps: int = 3000
    max_minutes: float = 0.0  # 0: no limit; else the steps are planned to fit
    batch: int = 64
    decay_share: float = 0.3  # share of the steps over which the rate falls to 0
    time_mean: float = 0.0  # t = sigmoid(N(mean, std))
    time_std: float = 1.0
    text_dropout: float = 0.1
    ema_decay: float = 0.999
    guidance_scale: float = 3.0  # with which the finished pipeline samples
    checkpoint_every: int = 500
    sample_every: int = 500  # also of the validation losses
    validation_views: int = 64  # of held-out drawings, and as many of seen ones; 0: no validation losses
    keep: int = 2

    def __post_init__(self) -> None:
        configs.check_run(self)
        configs.check_floats(self, ema_decay=(0, 1), text_dropout=(0, 1), time_mean=(-20, 20), time_std=(0, 20), guidance_scale=(1, 1e6))


SECTIONS: dict[str, type] = {
    "data": TeacherData,
    "model": MMDiTConfig,
    "text": TextSettings,
    "optimizer": AdamWConfig,
    "run": TeacherRun,
}


class TeacherTrainer:
    """One step of flow matching on the transformer and the text encoder."""

    def __init__(self, model: MMDiT, text: WordEncoder, optimizer: AdamWConfig, run: TeacherRun) -> None:
        self.model, self.text, self.run = model, text, run
        core = model._core
        buffers = [(core.flat_trainable, core.flat_grad), (text.flat, text.flat_grad)]
        self.optimizer = common.AdamW(buffers, optimizer, "the teacher")
        self.ema = common.EMA([core.flat_trainable, text.flat], run.ema_decay)

    def step(self, latents: Array, ids: Array, step: int, rate_scale: float = 1.0) -> dict[str, float]:
        """One update on latents [B,C,H,W] and the ids [B,T] of their captions."""
        r = self.run
        normal = _purposes.generator(r.seed, _purposes.TIMES, step).standard_normal(len(latents))
        t = (1 / (1 + np.exp(-(r.time_mean + r.time_std * normal)))).astype(np.float32)
        dropped = _purposes.generator(r.seed, _purposes.TEXT_DROP, step).random(len(latents)) < r.text_dropout
        ids = ids.copy()
        ids[dropped] = PADDING
        ids[dropped, 0] = EMPTY

        self.optimizer.zero_grad()
        context, pooled = self.text.encode_ids(ids)
        # Text and loss are on the host, for they are small beside the transformer's work.
        x_t, noise = _core.renoise(latents, t, r.seed, _purposes.TEACHER_NOISE, step, return_noise=True)
        put = self.model._array
        inputs = put(x_t, "latents", x_t.shape), t, put(context, "context", context.shape), put(pooled, "pooled", pooled.shape)
        v, saved = self.model._core.forward(*inputs, keep=True)
        assert saved is not None
        difference = devices.to_host(v) - (noise - latents)
        loss = float(np.square(difference).mean(dtype=np.float64))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the teacher's loss is {loss} at step {step}; nothing was updated")
        dv = put(difference * np.float32(2 / difference.size), "dv", difference.shape)
        _, dcontext, dpooled = saved.backward(dv, latents=False)
        self.text.backward(devices.to_host(dcontext), devices.to_host(dpooled), ids)
        norm = self.optimizer.update(rate_scale)
        self.ema.update()
        return {"loss": loss, "grad_norm": norm}

    def validation_loss(self, latents: Array, ids: Array) -> float:
        """The mean squared error at VALIDATION_TIMES with noise that is always the same, by the weights as they are now.

        Fixed times, as the SD3 paper has it (section 5.1): comparable from step to step, where the training loss jumps with its draws.
        """
        context, pooled = self.text.encode_ids(ids)
        total = 0.0
        for i, time in enumerate(VALIDATION_TIMES):
            t = np.full(len(latents), time, np.float32)
            x_t, noise = _core.renoise(latents, t, self.run.seed, _purposes.VALIDATION, i, return_noise=True)
            v = devices.to_host(self.model(x_t, t, context, pooled))
            total += float(np.square(v - (noise - latents)).mean(dtype=np.float64))
        return total / len(VALIDATION_TIMES)

    def state(self) -> common.State:
        weights = {"model": self.model._core.flat, "text": self.text.flat}
        return common.join_states(weights=(weights, {}), optimizer=self.optimizer.state(), ema=self.ema.state())

    def load_state(self, state: common.State) -> None:
        self.model._core.flat[:] = state[0]["weights.model"]
        self.text.flat[:] = state[0]["weights.text"]
        self.optimizer.load_state(*common.part_of(state, "optimizer"))
        self.ema.load_state(*common.part_of(state, "ema"))


def encode_views(vae: AutoencoderKL, views: openmoji.Views, count: int, batch: int = 64) -> tuple[Array, list[str]]:
    """Scaled latents [count,C,H,W] (float16, the posterior's mean) of random views, and their captions."""
    from tqdm.auto import tqdm

    parts, texts = [], []
    for i in tqdm(range(-(-count // batch)), desc="encoding views", unit=f"x{batch}", disable=None):
        images, captions = views.batch(i, min(batch, count - i * batch))
        parts.append(devices.to_host(vae.encode(images)).astype(np.float16))
        texts += captions
    return np.concatenate(parts), texts


def latent_bank(vae: AutoencoderKL, data: TeacherData, seed: int, size: int) -> tuple[Array, list[str]]:
    """encode_views, kept in the cache folder under a hash of the autoencoder and of all captions."""
    key = hashlib.sha256((sha256(vae._core.flat) + "\n".join(openmoji.captions())).encode()).hexdigest()[:16]
    path = openmoji.cache_folder() / f"latents-{key}-{seed}-{data.views}-{size}.npz"
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # absent, or not what was written: encoded anew
        with np.load(path) as stored:
            latents, texts = stored["latents"], [str(text) for text in stored["texts"]]
        if len(latents) == len(texts) == data.views and latents.dtype == np.float16 and np.isfinite(latents).all():
            return latents, texts
    latents, texts = encode_views(vae, openmoji.Views(seed=seed, size=size), data.views)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, latents=latents, texts=np.array(texts))
    return latents, texts


def validation_sets(
    vae: AutoencoderKL, text: WordEncoder, latents: Array, ids: Array, run: TeacherRun, sample_size: int
) -> dict[str, tuple[Array, Array]]:
    """Latents and ids that the loss is watched on: of the training bank, and of drawings that training never sees."""
    n = run.validation_views
    if n == 0:
        return {}
    sets = {"seen": (latents[:n].astype(np.float32), ids[:n])}
    for kind in ("base", "combination"):
        chosen = openmoji.heldout_records(kind)
        views = openmoji.Views(chosen, seed=run.seed + 1, size=sample_size * vae.config.spatial_factor)
        images, captions = views.batch(0, n)
        sets[f"heldout_{kind}"] = (vae.encode(images), text.ids(captions))
    return sets


def guided_samples(model: MMDiT, text: WordEncoder, prompts: Sequence[str]) -> Array:
    """Latents of the given prompts, seed 0, 1, ..., for the sample grid."""
    context, pooled = text.encode(list(prompts))
    size = model.config.sample_size
    return sampling.sample(
        model,
        context,
        pooled,
        size=(size, size),
        steps=GRID_STEPS,
        guidance_scale=GRID_GUIDANCE,
        negative=text.encode([""]),
        seeds=0,
    )


def run(
    config: Mapping[str, Any], *, out: str | Path, resume: bool = False, dry_run: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Path | None:
    """Trains from the sections [data], [model], [text], [optimizer], [run]; returns the pipeline folder, or None after a dry run."""
    parts = common.sections(config, SECTIONS)
    settings: TeacherRun = parts["run"]
    vae = AutoencoderKL.from_pretrained(parts["data"].autoencoder, device=device, dtype=dtype)
    text = WordEncoder(
        build_vocabulary(openmoji.captions()), max_words=parts["text"].max_words, context_dim=parts["text"].context_dim,
        pooled_dim=parts["text"].pooled_dim, seed=settings.seed,
    )  # fmt: skip
    model = MMDiT(parts["model"], device=device, dtype=dtype, seed=settings.seed)
    c = model.config
    for what, expected, given in (
        ("model.in_channels", vae.config.latent_channels, c.in_channels),
        ("model.out_channels", vae.config.latent_channels, c.out_channels),
        ("model.joint_attention_dim", text.context_dim, c.joint_attention_dim),
        ("model.pooled_projection_dim", text.pooled_dim, c.pooled_projection_dim),
    ):
        if expected != given:
            raise ValueError(f"{what} must be {expected}, as the autoencoder and the text encoder have it, got {given}")
    if dry_run:
        activations = model.plan(settings.batch, c.sample_size, c.sample_size, text.max_words, keep=True)
        trained = model.num_parameters + text.flat.size
        print(
            f"teacher: {model.num_parameters:,} parameters, text: {text.flat.size:,}; {settings.steps} steps of {settings.batch}\n"
            f"{common.memory_plan(model, trained, 0, trained, common.moments_bytes(parts['optimizer'], trained), activations)}"
        )
        return None
    latents, texts = latent_bank(vae, parts["data"], settings.seed, c.sample_size * vae.config.spatial_factor)
    ids = text.ids(texts)
    trainer = TeacherTrainer(model, text, parts["optimizer"], settings)
    book = common.Run(out, parts, settings, resume=resume, shown=("loss", "grad_norm"))
    book.restore(trainer)
    judged = validation_sets(vae, text, latents, ids, settings, c.sample_size)
    for step in book:
        rows = epoch_rows(len(latents), settings.batch, settings.seed, step)
        scale = common.cosine_tail(step, book.steps, settings.decay_share)
        metrics = trainer.step(latents[rows].astype(np.float32), ids[rows], step, scale)
        if book.due(step, settings.sample_every):
            with trainer.ema.applied():
                images = devices.to_host(vae.decode(guided_samples(model, text, GRID_PROMPTS * 2)))
                metrics |= {f"loss_{name}": trainer.validation_loss(*judge) for name, judge in judged.items()}
            common.save_grid(book.out / "samples" / f"step-{step:08d}.png", images, columns=len(GRID_PROMPTS))
        book.log(step, metrics)
        book.checkpoint(step, trainer)
    with trainer.ema.applied():
        how = SamplerSettings(folder="teacher", steps=50, guidance_scale=settings.guidance_scale)
        save_pipeline(book.out / "pipeline", {"teacher": model}, vae, text, {"teacher": how})
    return book.out / "pipeline"
