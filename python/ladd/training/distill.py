"""`ladd distill`: a whole run of LADD, from a teacher's folder and its latent shards to a folder with the averaged student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import config as configs
from .. import device as devices
from ..config import DiscriminatorConfig, LADDConfig, to_dict
from ..data.shards import LatentShards, epoch_rows, identity
from ..files import atomic_folder
from ..models import AutoencoderKL, Discriminator, MMDiT
from ..sampling import METHODS
from ..weights import STEM, sha256
from . import common
from .ladd import LADD
from .resident import Metrics
from .watch import Watch

if TYPE_CHECKING:
    from ..pipeline import Pipeline

Array = NDArray[Any]


@dataclass(frozen=True)
class LADDRun:
    """[run]: how long, how much at once, and how the finished student samples."""

    steps: int = 2000
    max_minutes: float = 0.0  # 0: no limit; else the steps are planned to fit
    batch: int = 32
    decay_share: float = 0.3  # share of the steps over which both rates fall to 0
    checkpoint_every: int = 200
    sample_every: int = 200
    keep: int = 2
    sampling_steps: int = 4  # the student's own number of steps
    sampling_method: str = "renoise"
    # On a GPU: steps between two looks at the metrics, for which the host waits (the CPU has them at once), and whether a step is recorded once
    # as a CUDA graph and then replayed. Neither changes what is computed.
    log_every: int = 10
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        configs.check_run(self)
        configs.check_ints(self, sampling_steps=1, log_every=1)
        if self.sampling_method not in METHODS:
            raise ValueError(f"run.sampling_method must be one of {', '.join(METHODS)}, got {self.sampling_method!r}")


@dataclass(frozen=True)
class LADDData:
    """[data]: the folder of the teacher, a pipeline ("openmoji": the shipped one) or diffusers' own, and the latent shards made with it."""

    teacher: str = "openmoji"
    latents: str = "out/openmoji/latents"
    allow_noise_latents: bool = False  # train although the latents look like standard normal noise


SECTIONS: dict[str, type] = {"data": LADDData, "ladd": LADDConfig, "discriminator": dict, "run": LADDRun}


def default_discriminator(teacher: MMDiT, settings: Mapping[str, Any]) -> DiscriminatorConfig:
    """[discriminator] with what follows from the teacher filled in: its widths, and a head on every block."""
    known = {
        "feature_dim": teacher.config.inner_dim,
        "pooled_dim": teacher.config.pooled_projection_dim,
        "taps": list(range(teacher.config.num_layers)),
    }
    return DiscriminatorConfig.from_dict({**known, **settings}, "[discriminator]")


def _noise_of(shards: LatentShards, rows: Array, shape: tuple[int, ...]) -> Array:
    """What the latents were sampled from; where no seeds are stored, noise of their rows' numbers, for pictures to look at."""
    from ..sampling import noise

    seeds = shards.rows("seed", rows) if "seed" in shards.arrays else rows
    return noise((len(rows), *shape), [int(seed) for seed in seeds])


@dataclass
class Source:
    """What a run starts from. A diffusers folder has neither a text encoder of this project nor settings: its shards hold encoded text."""

    teacher: MMDiT
    vae: AutoencoderKL
    pipeline: Pipeline | None

    @classmethod
    def open(cls, path: str, device: str, dtype: str) -> Source:
        from ..pipeline import Pipeline, pipeline_folder

        folder = pipeline_folder(path)
        if folder.is_dir() and not (folder / "ladd.json").is_file():
            teacher = MMDiT.from_pretrained(folder, device=device, dtype=dtype)
            return cls(teacher, AutoencoderKL.from_pretrained(folder, device=device, dtype=dtype), None)
        pipe = Pipeline.from_pretrained(path, model="teacher", device=device, dtype=dtype)
        return cls(pipe.model, pipe.vae, pipe)

    def pictures(self, latents: Array) -> Array:
        """[B,3,H,W] on the host; a few at a time, for large ones take much memory."""
        return np.concatenate([devices.to_host(self.vae.decode(latents[i : i + 4])) for i in range(0, len(latents), 4)])

    def save(self, student: MMDiT, out: Path, settings: LADDRun) -> Path:
        """The student as it was found: a pipeline folder `pipeline` with its teacher, or a diffusers folder `transformer`."""
        from ..pipeline import SamplerSettings, save_pipeline

        if self.pipeline is None:
            with atomic_folder(out / "transformer", ("config.json", f"{STEM}.safetensors")) as folder:
                student.save_pretrained(folder)
            return out / "transformer"
        how = {
            "student": SamplerSettings(folder="student", steps=settings.sampling_steps, method=settings.sampling_method),
            "teacher": dataclasses.replace(self.pipeline.settings, folder="teacher"),
        }
        save_pipeline(out / "pipeline", {"student": student, "teacher": self.teacher}, self.vae, self.pipeline.text, how)
        return out / "pipeline"


def run(
    config: Mapping[str, Any], *, out: str | Path, resume: bool = False, dry_run: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Path | None:
    """Distils the teacher of a pipeline or diffusers folder from latent shards; sections [data], [ladd], [discriminator], [run].

    Returns the folder with the averaged student (Source.save), or None after a dry run, which prints sizes and the memory plan.
    """
    parts = common.sections(config, SECTIONS)
    settings: LADDRun = parts["run"]
    ladd_config: LADDConfig = parts["ladd"]
    source = Source.open(parts["data"].teacher, device, dtype)
    teacher, text = source.teacher, source.pipeline.text if source.pipeline else None
    shards = LatentShards(parts["data"].latents, text)
    origin = identity(teacher, source.vae, text)
    shards.check(**origin)
    if source.pipeline is None:
        common.warn_unused(config, "run", ("sampling_steps", "sampling_method"), "a diffusers folder does not keep them")
    if ladd_config.pair_weight and "seed" not in shards.arrays:
        raise ValueError(f"ladd.pair_weight needs the seeds of the latents' noise, but {shards.folder} has no array 'seed'")
    if ladd_config.pair_weight and shards.provenance.get("source") == "drawings":
        raise ValueError(f"ladd.pair_weight needs latents sampled from known noise, but {shards.folder} holds encoded drawings")
    shape = shards.latent_shape
    student = teacher.copy()
    heads = Discriminator(default_discriminator(teacher, parts["discriminator"]), device=device, dtype=dtype, seed=ladd_config.seed)
    noise_too, graph = parts["data"].allow_noise_latents, settings.cuda_graph
    trainer = LADD(student, teacher, heads, ladd_config, allow_noise_latents=noise_too, cuda_graph=graph)
    _warn_unused(config, ladd_config, heads.config)
    if dry_run:
        at_once = min(settings.batch, ladd_config.micro_batch or settings.batch)
        tokens = shards.batch(np.arange(1)).context.shape[1]
        kept = student.plan(at_once, shape[1], shape[2], tokens, keep=True) + teacher.plan(
            at_once, shape[1], shape[2], tokens, taps=heads.config.taps, keep=True, params=False
        )
        trained = student.num_parameters + heads.num_parameters
        moments = common.moments_bytes(ladd_config.student, student.num_parameters)
        moments += common.moments_bytes(ladd_config.discriminator, heads.num_parameters)
        print(
            f"student and teacher: {student.num_parameters:,} parameters, heads: {heads.num_parameters:,}; "
            f"{len(shards)} latents {list(shape)}; {settings.steps} steps of {settings.batch}\n"
            f"{common.memory_plan(student, trained, teacher.num_parameters, student.num_parameters, moments, kept)}"
        )
        return None
    book = common.Run(out, {**parts, "discriminator": to_dict(heads.config)}, settings, resume=resume, shown=("loss_d", "loss_g", "logit_gap"))
    book.restore(trainer)
    z = shards.batch(np.arange(min(1024, len(shards)))).latents
    common.tqdm_write(f"real latents: {len(shards)} from {shards.folder}, mean {z.mean():.3f}, deviation {z.std():.3f}")
    common.save_grid(book.out / "samples" / "real.png", source.pictures(z[:32]), columns=8)
    preview: Array = np.arange(min(32, len(shards)))
    watch = Watch(len(shards), settings.batch)
    waiting: list[tuple[int, Metrics]] = []  # steps whose metrics nobody has looked at
    for step in book:
        rows = epoch_rows(len(shards), settings.batch, ladd_config.seed, step)
        batch = shards.batch(rows)
        noise = _noise_of(shards, rows, shape) if ladd_config.pair_weight else None
        scale = common.cosine_tail(step, book.steps, settings.decay_share)
        metrics = trainer.step(batch.latents, batch.context, batch.pooled, noise=noise, rate_scale=scale)
        waiting.append((step, metrics))
        if book.due(step, settings.sample_every):
            _save_preview(book, step, trainer, shards, preview, shape, source)
        if trainer.student.device == "cpu" or step % settings.log_every == 0 or step == book.steps or book.saves(step):
            for one, numbers in waiting:
                watch(one, numbers)
            book.log_all(waiting)
            waiting.clear()
        book.checkpoint(step, trainer)
    if sha256(teacher._core.flat) != origin["teacher"]:
        raise RuntimeError("the teacher's weights changed during the run; nothing was saved from it")
    return source.save(trainer.ema_student(), book.out, settings)


def _warn_unused(config: Mapping[str, Any], c: LADDConfig, d: DiscriminatorConfig) -> None:
    for keys, used, why in (
        (("r1_interval", "r1_epsilon"), c.r1_weight, "ladd.r1_weight is 0"),
        (("warmup_times", "warmup_probabilities"), c.warmup_iterations, "ladd.warmup_iterations is 0"),
        (("pair_times",), c.pair_weight, "ladd.pair_weight is 0"),
    ):
        if not used:
            common.warn_unused(config, "ladd", keys, why)
    if d.norm == "none":
        common.warn_unused(config, "discriminator", ("num_groups",), 'discriminator.norm is "none"')
    if not d.condition_sigma and not d.condition_pooled:
        common.warn_unused(config, "discriminator", ("condition_dim",), "the heads have no condition")


def _save_preview(
    book: common.Run, step: int, trainer: LADD, shards: LatentShards, rows: Array, shape: tuple[int, int, int], source: Source
) -> None:
    """One step of the averaged student for the first rows' prompts, from the rows' own noise."""
    batch = shards.batch(rows)
    start = _noise_of(shards, rows, shape)
    v = devices.to_host(trainer.ema_student()(start, 1.0, batch.context, batch.pooled))
    common.save_grid(book.out / "samples" / f"step-{step:08d}.png", source.pictures(start - v), columns=8)
