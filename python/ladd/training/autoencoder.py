"""Trains the autoencoder: L1 + gradient L1 + squared error of the reconstruction and a small KL term, then measures the latents' scale.

The result is a diffusers folder `vae/` whose scaling_factor and shift_factor make latents of mean 0 and deviation 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes
from .. import config as configs
from .. import device as devices
from ..config import AdamWConfig, AutoencoderKLConfig
from ..data import openmoji
from ..files import atomic_folder
from ..models import AutoencoderKL
from ..weights import STEM
from . import common

Array = NDArray[Any]

LOGVAR_RANGE = (-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution


@dataclass(frozen=True)
class AutoencoderRun:
    """[run]: how long, how much at once, and the weights of the loss."""

    seed: int = 0
    steps: int = 1200
    max_minutes: float = 0.0  # 0: no limit; else the steps are planned to fit
    batch: int = 24
    decay_share: float = 1.0  # share of the steps over which the rate falls to 0 (half a cosine)
    l1_weight: float = 1.0
    gradient_weight: float = 1.0  # L1 of the differences between neighbouring pixels: keeps outlines sharp
    mse_weight: float = 1.0
    kl_weight: float = 1e-4  # of the mean over latent elements
    checkpoint_every: int = 200
    sample_every: int = 200
    keep: int = 2
    image_size: int = openmoji.SIZE
    statistics_views: int = 1024  # views from which scaling_factor and shift_factor are measured

    def __post_init__(self) -> None:
        configs.check_run(self)
        weight = (0, 1e6)
        configs.check_floats(self, l1_weight=weight, gradient_weight=weight, mse_weight=weight, kl_weight=weight)
        configs.check_ints(self, image_size=1, statistics_views=1)


SECTIONS: dict[str, type] = {"model": AutoencoderKLConfig, "optimizer": AdamWConfig, "run": AutoencoderRun}


def reconstruction_loss(out: Array, target: Array, run: AutoencoderRun) -> tuple[float, Array]:
    """Weighted L1, gradient L1 and squared error, each a mean over elements; and the gradient with respect to `out`."""
    diff = out - target
    value = run.l1_weight * float(np.abs(diff).mean()) + run.mse_weight * float(np.square(diff).mean())
    d = (np.sign(diff) * np.float32(run.l1_weight) + diff * np.float32(2 * run.mse_weight)) / np.float32(diff.size)
    for axis in (2, 3):
        step = np.diff(diff, axis=axis)
        value += run.gradient_weight * float(np.abs(step).mean())
        sign = np.sign(step) * np.float32(run.gradient_weight / step.size)
        before, after = [slice(None)] * 4, [slice(None)] * 4
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        d[tuple(before)] -= sign
        d[tuple(after)] += sign
    return value, d


class AutoencoderTrainer:
    """One step: encode, sample the posterior, decode, loss, and all the way back."""

    def __init__(self, vae: AutoencoderKL, optimizer: AdamWConfig, run: AutoencoderRun) -> None:
        self.vae = vae
        self.core = vae._core
        self.run = run
        self.optimizer = common.AdamW([(self.core.flat_trainable, self.core.flat_grad)], optimizer, "the autoencoder")

    def step(self, images: Array, step: int, rate_scale: float = 1.0) -> dict[str, float]:
        """One update on images [B,3,H,W] in [-1, 1]."""
        self.optimizer.zero_grad()
        encoded, saved_encoder = self.core.encode(self._put(images), keep=True)
        assert saved_encoder is not None
        moments = devices.to_host(encoded)
        mean, logvar = np.split(moments, 2, axis=1)
        clamped = np.clip(logvar, *LOGVAR_RANGE)
        deviation = np.exp(0.5 * clamped)
        noise = _core.normal(mean.shape, self.run.seed, _purposes.VAE_POSTERIOR, step)
        z = mean + deviation * noise
        decoded, saved_decoder = self.core.decode(self._put(z), keep=True)
        assert saved_decoder is not None

        out = devices.to_host(decoded)
        loss, dout = reconstruction_loss(out, images, self.run)
        variance = deviation * deviation
        kl = 0.5 * float((mean * mean + variance - 1 - clamped).mean())
        if not math.isfinite(loss) or not math.isfinite(kl):
            raise FloatingPointError(f"the autoencoder's loss is not finite at step {step}: reconstruction {loss}, KL {kl}")

        dz = devices.to_host(saved_decoder.backward(self._put(dout)))
        weight = np.float32(self.run.kl_weight / mean.size)
        dmean = dz + weight * mean
        dlogvar = (dz * noise * deviation + weight * (variance - 1)) * np.float32(0.5)
        dlogvar[logvar != clamped] = 0
        saved_encoder.backward(self._put(np.concatenate([dmean, dlogvar], axis=1)), input=False)
        norm = self.optimizer.update(rate_scale)
        return {"loss": loss, "kl": kl, "psnr": psnr(out, images), "grad_norm": norm}

    def _put(self, array: Array) -> Array:
        return self.vae._array(array, "array", array.shape)  # type: ignore[no-any-return]

    def state(self) -> common.State:
        return common.join_states(vae=({"flat": self.core.flat}, {}), optimizer=self.optimizer.state())

    def load_state(self, state: common.State) -> None:
        self.core.flat[:] = state[0]["vae.flat"]
        self.optimizer.load_state(*common.part_of(state, "optimizer"))


def psnr(out: Array, target: Array) -> float:
    """Peak signal to noise ratio in dB of pictures in [-1, 1]."""
    return float(-10 * np.log10(max(float(np.square(np.clip(out, -1, 1) - target).mean()) / 4, 1e-12)))


def reconstruct(vae: AutoencoderKL, images: Array, batch: int = 32) -> Array:
    """decode(mean of encode) of many pictures, a batch at a time."""
    parts = []
    for i in range(0, len(images), batch):
        mean = np.ascontiguousarray(np.split(_moments(vae, images[i : i + batch]), 2, axis=1)[0])
        parts.append(devices.to_host(vae._core.decode(vae._array(mean, "mean", mean.shape))[0]))
    return np.concatenate(parts)


def _moments(vae: AutoencoderKL, images: Array) -> Array:
    """[mean, logvar] of images [B,3,H,W], on the host."""
    return devices.to_host(vae._core.encode(vae._array(images, "images", images.shape))[0])


def latent_statistics(vae: AutoencoderKL, views: openmoji.Views, count: int, seed: int, batch: int = 32) -> tuple[float, float]:
    """Mean and deviation over all elements of posterior samples of training views."""
    total = square = n = 0.0
    for i in range(-(-count // batch)):
        mean, logvar = np.split(_moments(vae, views.batch(i, batch)[0]), 2, axis=1)
        z = mean + np.exp(0.5 * np.clip(logvar, *LOGVAR_RANGE)) * _core.normal(mean.shape, seed, _purposes.VAE_POSTERIOR, (1 << 31) + i)
        total, square, n = total + float(z.sum(dtype=np.float64)), square + float(np.square(z, dtype=np.float64).sum()), n + z.size
    average = total / n
    return average, math.sqrt(square / n - average * average)


def run(
    config: Mapping[str, Any], *, out: str | Path, resume: bool = False, dry_run: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Path | None:
    """Trains from a configuration with the sections [model], [optimizer] and [run]; returns the folder `vae`, or None after a dry run."""
    parts = common.sections(config, SECTIONS)
    settings: AutoencoderRun = parts["run"]
    vae = AutoencoderKL(parts["model"], device=device, dtype=dtype, seed=settings.seed)
    if settings.image_size % vae.config.spatial_factor:
        raise ValueError(f"run.image_size must be a multiple of {vae.config.spatial_factor}, got {settings.image_size}")
    train = openmoji.Views(seed=settings.seed, size=settings.image_size)
    if dry_run:
        size, trained = settings.image_size, vae.num_parameters
        kept = sum(vae._core.plan(settings.batch, size, size, decode=decode, keep=True) for decode in (False, True))  # both at once
        print(
            f"autoencoder: {vae.num_parameters:,} parameters, {len(train.records)} drawings, {settings.steps} steps of {settings.batch}\n"
            f"{common.memory_plan(vae, trained, 0, 0, common.moments_bytes(parts['optimizer'], trained), kept)}"
        )
        return None
    book = common.Run(out, parts, settings, resume=resume, shown=("loss", "psnr"))
    trainer = AutoencoderTrainer(vae, parts["optimizer"], settings)
    book.restore(trainer)
    held = openmoji.Views(openmoji.heldout_records("base"), seed=settings.seed + 1, size=settings.image_size).batch(0, 64)[0]
    for step in book:
        images, _ = train.batch(step, settings.batch)
        metrics = trainer.step(images, step, common.cosine_tail(step, book.steps, settings.decay_share))
        if book.due(step, settings.sample_every):
            again = reconstruct(vae, held)
            metrics["psnr_heldout"] = psnr(again, held)
            pairs = np.stack([held[:32], again[:32]], axis=1).reshape(64, *held.shape[1:])
            common.save_grid(book.out / "samples" / f"step-{step:08d}.png", pairs, columns=8)
        book.log(step, metrics)
        book.checkpoint(step, trainer)
    return finish(vae, train, settings, book.out / "vae")


def finish(vae: AutoencoderKL, train: openmoji.Views, settings: AutoencoderRun, folder: Path) -> Path:
    """Measures the latents' scale and saves the diffusers folder."""
    mean, deviation = latent_statistics(vae, train, settings.statistics_views, settings.seed)
    result = AutoencoderKL(dataclasses.replace(vae.config, scaling_factor=1 / deviation, shift_factor=mean, sample_size=settings.image_size))
    result._core.flat[:] = devices.to_host(vae._core.flat)
    with atomic_folder(folder, ("config.json", f"{STEM}.safetensors")) as temporary:
        result.save_pretrained(temporary)
    return folder
