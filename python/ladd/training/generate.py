"""Synthetic latents: guided samples of a teacher for prompts in the style of training, as latent shards with provenance.

LADD needs no other data: guidance, which a one-step student cannot use, enters through these latents (LADD paper, section 3.2).
Latent i of a run is the sample of seed * 2^32 + i, whatever the batch, and a stopped run goes on after the last complete shard.
With several guidance scales each latent draws one, which is stored beside it (SANA-Sprint draws from 4, 4.5 and 5, arXiv 2503.09641).
For comparison `source = "drawings"` encodes real pictures in the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _purposes, sampling
from .. import config as configs
from .. import device as devices
from ..data import openmoji
from ..data.shards import ShardWriter, identity
from ..pipeline import Pipeline
from . import common

Array = NDArray[Any]


@dataclass(frozen=True)
class GenerateRun:
    """[run]: which teacher, how many latents, how they are sampled."""

    teacher: str = "openmoji"  # pipeline folder
    source: str = "teacher"  # "teacher": its samples; "drawings": encoded pictures (steps, guidance and the like are not used)
    count: int = 8192
    batch: int = 64
    shard: int = 1024  # latents a file
    steps: int = 25
    guidance_scale: float | tuple[float, ...] = 3.0  # one number, or a list of which each latent draws one
    schedule: str = "uniform"
    shift: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("teacher", "drawings"):
            raise ValueError(f'run.source must be "teacher" or "drawings", got {self.source!r}')
        configs.check_ints(self, count=1, batch=1, shard=1, seed=0)
        sampling.sigmas(self.steps, schedule=self.schedule, shift=self.shift)
        scales = self.guidance_scale if isinstance(self.guidance_scale, (list, tuple)) else (self.guidance_scale,)
        if not scales or any(isinstance(g, bool) or not isinstance(g, (int, float)) or not 1 <= g < 1e6 for g in scales):
            raise ValueError(f"run.guidance_scale must be a number of at least 1 (off) or a list of them, got {self.guidance_scale!r}")
        if self.shard % self.batch:
            raise ValueError(f"run.shard must be a multiple of run.batch = {self.batch}, got {self.shard}")

    def scales(self, rows: range) -> Array:
        """The guidance scale of each of these latents; it depends on (seed, latent) only."""
        if not isinstance(self.guidance_scale, (list, tuple)):
            return np.full(len(rows), self.guidance_scale, np.float32)
        choices = np.array(self.guidance_scale, np.float32)
        return choices[[int(_purposes.generator(self.seed, _purposes.GUIDANCE, i).integers(len(choices))) for i in rows]]


SECTIONS: dict[str, type] = {"run": GenerateRun}


def run(
    config: Mapping[str, Any], *, out: str | Path, resume: bool = True, dry_run: bool = False, device: str = "cpu", dtype: str = "float32"
) -> Path | None:
    """Writes shards into `out`; section [run]. Returns the folder, or None after a dry run."""
    from tqdm.auto import tqdm

    r: GenerateRun = common.sections(config, SECTIONS)["run"]
    if r.source == "drawings":
        common.warn_unused(config, "run", ("steps", "guidance_scale", "schedule", "shift"), 'run.source is "drawings"')
    pipe = Pipeline.from_pretrained(r.teacher, model="teacher", device=device, dtype=dtype)
    size = pipe.model.config.sample_size
    if dry_run:
        if r.source == "drawings":
            print(f"{r.count} latents of drawings in batches of {r.batch}")
            return None
        memory = pipe.model.plan(2 * r.batch, size, size, pipe.text.max_words)
        print(f"{r.count} latents of {r.steps} guided steps in batches of {r.batch}; activations {memory / 2**20:.0f} MiB")
        return None
    how: dict[str, Any] = {"source": "drawings", "seed": r.seed}
    if r.source == "teacher":
        how = {k: getattr(r, k) for k in ("guidance_scale", "steps", "schedule", "shift", "seed")}
    folder = Path(out)
    if folder.joinpath("index.json").exists() and not resume:
        raise FileExistsError(f"{folder} already holds shards; resume, or choose another folder")
    writer = ShardWriter(folder, {**identity(pipe.model, pipe.vae, pipe.text), **how, "size": [size, size]})
    # Other views than the teacher's training saw.
    views = openmoji.Views(seed=r.seed + (1 << 20), size=size * pipe.vae.config.spatial_factor)
    make = _sampler(pipe, r) if r.source == "teacher" else _encoder(pipe)
    with tqdm(total=r.count, initial=min(writer.count, r.count), desc="generating", unit="latent", disable=None) as bar:
        while writer.count < r.count:
            first, n = writer.count, min(r.shard, r.count - writer.count)
            drawn = views.draw(first, n)
            seeds = [(r.seed << 32) + first + i for i in range(n)]
            scales = r.scales(range(first, first + n))
            latents = []
            try:
                for start in range(0, n, r.batch):
                    part = slice(start, min(start + r.batch, n))
                    latents.append(make(drawn[part], seeds[part], scales[part]).astype(np.float16))
                    bar.update(len(latents[-1]))
            except KeyboardInterrupt:
                common.tqdm_write(f"interrupted: {writer.count} of {r.count} latents are in {folder}; resume the run for the rest")
                raise
            arrays: dict[str, Array] = {"latents": np.concatenate(latents), "seed": np.array(seeds, np.int64)}
            if r.source == "teacher":
                arrays["guidance_scale"] = scales
            writer.write(arrays, [view.text for view in drawn])
    return folder


Maker = Callable[[Sequence[openmoji.View], Sequence[int], Array], Array]  # views, seeds, guidance scales -> latents


def _sampler(pipe: Pipeline, r: GenerateRun) -> Maker:
    """Guided samples for the captions of views, one seed each."""
    size = pipe.model.config.sample_size
    times = sampling.sigmas(r.steps, schedule=r.schedule, shift=r.shift)
    negative = pipe.text.encode([""])

    def make(views: Sequence[openmoji.View], seeds: Sequence[int], scales: Array) -> Array:
        context, pooled = pipe.text.encode([view.text for view in views])
        latents = sampling.sample(
            pipe.model, context, pooled, size=(size, size), sigmas=times, guidance_scale=scales, negative=negative, seeds=seeds
        )
        return devices.to_host(latents)

    return make


def _encoder(pipe: Pipeline) -> Maker:
    """Latents of the views themselves: real pictures instead of samples."""
    size = pipe.model.config.sample_size * pipe.vae.config.spatial_factor

    def make(views: Sequence[openmoji.View], seeds: Sequence[int], scales: Array) -> Array:
        return devices.to_host(pipe.vae.encode(np.stack([view.render(size) for view in views]), sample=True, seed=seeds))

    return make
