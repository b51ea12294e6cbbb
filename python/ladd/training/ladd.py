"""Latent adversarial diffusion distillation (LADD, arXiv 2403.12015): one update of the heads and one of the student from shared passes.

    x_t = (1 - t) z0 + t e,   x0_hat = x_t - t v_student(x_t, t)                       t from the student's time set
    fake = (1 - t_hat) x0_hat + t_hat e',   real = (1 - t_hat) z0 + t_hat e''          t_hat logit-normal, independent of t
    L_D = mean l_real(D(F(real))) + mean l_fake(D(F(fake)))                            F: frozen teacher's image tokens, D: one head a tap
    L_G = mean l_generator(D(F(fake)))

z0 is a latent that the teacher made with guidance. Means are over all logits of all heads, one a token. The step costs six
teacher forwards where separate updates cost eight: the student's forward and the teacher's pass over the fake serve both
updates, first that of the heads, then that of the student through the updated heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes, losses
from .. import config as configs
from .. import device as devices
from ..config import DiscriminatorConfig, LADDConfig, to_dict
from ..data.shards import LatentShards, epoch_rows, identity, looks_like_noise
from ..files import atomic_folder
from ..models import AutoencoderKL, Discriminator, MMDiT
from ..sampling import METHODS
from ..weights import STEM, sha256
from . import common
from .watch import Watch

if TYPE_CHECKING:
    from ..pipeline import Pipeline

Array = NDArray[Any]
Metrics = dict[str, float]

NOISE_CHECKS = 4  # the first batches of "real" latents are held against N(0, 1) noise


@dataclass
class Draws:
    """The random scalars of one pass; arrays of noise are drawn by key where they are used."""

    key: int
    t: Array  # [B] student times
    t_hat_fake: Array  # [B]
    t_hat_real: Array  # [B]

    def rows(self, part: slice) -> Draws:
        return Draws(self.key, self.t[part], self.t_hat_fake[part], self.t_hat_real[part])


@dataclass
class Part:
    """Some rows of a batch, and their place in it: noise is keyed by the place, so it does not depend on the split."""

    latents: Array  # [b,C,H,W]
    context: Array  # [b,T,J]
    pooled: Array  # [b,P]
    other_context: Array  # [b,T,J] text of the picture before it in the batch
    other_pooled: Array  # [b,P]
    noise: Array | None  # [b,C,H,W] what the teacher started from; None: unknown
    samples: Array  # [b] int64
    share: float  # b / B
    draws: Draws


@dataclass
class StudentPass:
    x0: Array
    saved: Any


@dataclass
class FakePass:
    features: list[Array]
    noised: Array
    saved: Any


class LADD:
    """The training step. student and teacher: MMDiT; the student is trained in place, the teacher is only read.

    Raises ValueError where the three do not fit together and for latents that are noise, and FloatingPointError (naming what)
    when a loss or gradient is not finite: then nothing was updated in that half of the step.
    """

    def __init__(
        self,
        student: MMDiT,
        teacher: MMDiT,
        discriminator: Discriminator,
        config: LADDConfig | Mapping[str, Any] | None = None,
        *,
        allow_noise_latents: bool = False,
    ) -> None:
        self.student, self.teacher, self.discriminator = student, teacher, discriminator
        self.config = config if isinstance(config, LADDConfig) else configs.from_dict(LADDConfig, {} if config is None else config)
        self.allow_noise_latents = allow_noise_latents
        self._check_models()
        self.loss = losses.by_name(self.config.loss)
        d, g = discriminator._core, student._core
        self.discriminator_optimizer = common.AdamW([(d.flat_trainable, d.flat_grad)], self.config.discriminator, "the discriminator")
        self.student_optimizer = common.AdamW([(g.flat_trainable, g.flat_grad)], self.config.student, "the student")
        self.ema = common.EMA([g.flat_trainable], self.config.ema_decay)
        self.rate_scale = 1.0
        self.iteration = 0  # student updates
        self.passes = 0  # draws of times and noise

    def __repr__(self) -> str:
        return f"<ladd.LADD of {self.student!r}, {self.discriminator!r}, {self.iteration} updates>"

    def _check_models(self) -> None:
        for name, kind in (("student", MMDiT), ("teacher", MMDiT), ("discriminator", Discriminator)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a ladd.{kind.__name__}, got {type(getattr(self, name)).__name__}")
        s, t, d = self.student.config, self.teacher.config, self.discriminator.config
        if self.student is self.teacher or self.student._core is self.teacher._core:
            raise ValueError("student and teacher must be two models (student = teacher.copy()): the teacher must not change")
        for model in (self.teacher, self.discriminator):
            if (model.device, model.dtype) != (self.student.device, self.student.dtype):
                raise ValueError(
                    f"student, teacher and discriminator must be on one device in one dtype, got {self.student.dtype} on "
                    f"{self.student.device} and {model.dtype} on {model.device}"
                )
        if self.config.r1_weight and self.discriminator.dtype != "float32":
            raise ValueError(
                f"r1_weight needs models of dtype float32 (its finite difference is lost in rounding), got {self.discriminator.dtype}"
            )
        for name in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
            if getattr(s, name) != getattr(t, name):
                raise ValueError(f"student and teacher must have the same {name}, got {getattr(s, name)} and {getattr(t, name)}")
        if s.in_channels != s.out_channels:
            raise ValueError(f"in_channels must equal out_channels, got {s.in_channels} and {s.out_channels}")
        if d.feature_dim != t.inner_dim:
            raise ValueError(f"discriminator.feature_dim must be the teacher's width {t.inner_dim}, got {d.feature_dim}")
        if d.taps[-1] >= t.num_layers:
            raise ValueError(f"discriminator.taps must be below the teacher's {t.num_layers} blocks, got {d.taps}")
        if d.condition_pooled and d.pooled_dim != t.pooled_projection_dim:
            raise ValueError(f"discriminator.pooled_dim must be the teacher's {t.pooled_projection_dim}, got {d.pooled_dim}")

    # ---- the step ----

    def step(self, latents: Any, context: Any, pooled: Any, *, noise: Any = None, rate_scale: float = 1.0) -> Metrics:
        """One update of the heads (d_steps of them) and one of the student.

        latents [B,C,H,W] from the teacher, context [B,T,J], pooled [B,P]; noise [B,C,H,W]: what each latent was sampled from, only
        for pair_weight. rate_scale multiplies both learning rates (a schedule).
        """
        self.rate_scale = rate_scale
        batch = self._batch(latents, context, pooled, noise)
        for _ in range(self.config.d_steps - 1):
            self._update_discriminator(batch)
        parts = self._parts(batch, self._next_draws(len(batch[0])))
        if len(parts) > 1:  # the passes of all parts cannot be kept at once: the heads' update comes between
            return {**self._discriminator_half(parts), **self._student_half(parts)}
        part = parts[0]
        student = self._student_pass(part)
        fake = self._fake_pass(part, student.x0, keep=True)
        metrics = self._discriminator_half(parts, fake)
        return {**metrics, **self._student_half(parts, (student, fake))}

    def discriminator_step(self, latents: Any, context: Any, pooled: Any) -> Metrics:
        """One update of the heads alone."""
        return self._update_discriminator(self._batch(latents, context, pooled, None))

    def student_step(self, latents: Any, context: Any, pooled: Any, *, noise: Any = None) -> Metrics:
        """One update of the student alone."""
        batch = self._batch(latents, context, pooled, noise)
        return self._student_half(self._parts(batch, self._next_draws(len(batch[0]))))

    def _update_discriminator(self, batch: tuple[Array, Array, Array, Array | None]) -> Metrics:
        return self._discriminator_half(self._parts(batch, self._next_draws(len(batch[0]))))

    def _batch(self, latents: Any, context: Any, pooled: Any, noise: Any) -> tuple[Array, Array, Array, Array | None]:
        c, put = self.student.config, self.student._array
        z = put(latents, "latents", ("B", c.in_channels, "H", "W"), finite=True)
        patch = math.lcm(c.patch_size, self.teacher.config.patch_size)
        if z.shape[2] % patch or z.shape[3] % patch:
            raise ValueError(f"latents must have H and W that are multiples of patch_size = {patch}, got shape {list(z.shape)}")
        y = put(context, "context", (len(z), "T", c.joint_attention_dim), finite=True)
        p = put(pooled, "pooled", (len(z), c.pooled_projection_dim), finite=True)
        e = None if noise is None else put(noise, "noise", z.shape, finite=True)
        if self.config.pair_weight and e is None:
            raise ValueError("pair_weight needs noise=: what the teacher sampled each latent from")
        if self.passes < NOISE_CHECKS and not self.allow_noise_latents and looks_like_noise(seen := devices.to_host(z)):
            raise ValueError(
                f"latents look like standard normal noise (mean {seen.mean():.3f}, deviation {seen.std():.3f}, neighbours uncorrelated), "
                "not like pictures; pass allow_noise_latents=True if that is meant"
            )
        if self.config.misaligned_weight and len(z) < 2:
            raise ValueError("misaligned_weight needs at least two pictures a batch, got 1")
        return z, y, p, e

    def _next_draws(self, batch: int) -> Draws:
        c, key = self.config, self.passes
        self.passes += 1
        warm = self.iteration < c.warmup_iterations
        times, probabilities = (c.warmup_times, c.warmup_probabilities) if warm else (c.student_times, c.student_probabilities)
        t = _purposes.generator(c.seed, _purposes.STUDENT_TIME, key).choice(
            np.array(times, np.float32), batch, p=np.array(probabilities) / sum(probabilities)
        )
        normal = _purposes.generator(c.seed, _purposes.T_HAT, key).standard_normal((2, batch))
        t_hat = (1 / (1 + np.exp(-(c.t_hat_mean + c.t_hat_std * normal)))).astype(np.float32)
        return Draws(key, t.astype(np.float32), t_hat[0], t_hat[0] if c.share_t_hat else t_hat[1])

    def _parts(self, batch: tuple[Array, Array, Array, Array | None], draws: Draws) -> list[Part]:
        z, y, p, e = batch
        n = self.config.micro_batch or len(z)
        other_y, other_p = devices.roll_rows(y), devices.roll_rows(p)  # over the batch, so that the split does not matter
        out = []
        for i in range(0, len(z), n):
            rows = slice(i, min(i + n, len(z)))
            samples = np.arange(rows.start, rows.stop, dtype=np.int64)
            text = (y[rows], p[rows], other_y[rows], other_p[rows])
            out.append(Part(z[rows], *text, None if e is None else e[rows], samples, len(samples) / len(z), draws.rows(rows)))
        return out

    # ---- passes through the networks ----

    def _student_pass(self, part: Part, keep: bool = True) -> StudentPass:
        t = part.draws.t
        paired = self._paired(t)
        if part.noise is not None and paired.all():
            x_t = _core.interpolate(part.latents, part.noise, t)
        else:
            x_t = _core.renoise(part.latents, t, self.config.seed, _purposes.STUDENT_NOISE, part.draws.key, part.samples)
            if part.noise is not None:
                for i in np.flatnonzero(paired):
                    x_t[i : i + 1] = part.noise[i : i + 1]
        v, saved = self.student._core.forward(x_t, t, part.context, part.pooled, keep=keep)
        return StudentPass(_core.predict_x0(x_t, v, t), saved)

    def _paired(self, t: Array) -> NDArray[np.bool_]:
        """Which rows [B] start from the noise that the teacher's picture came from: those that pair_weight compares with this picture."""
        c = self.config
        paired: NDArray[np.bool_] = (t == 1) | (c.pair_times == "all")
        return paired & (c.pair_weight > 0)

    def _features(self, noised: Array, t_hat: Array, part: Part, keep: bool) -> tuple[list[Array], Any]:
        taps = self.discriminator.config.taps
        return self.teacher._core.forward(noised, t_hat, part.context, part.pooled, taps=taps, keep=keep, params=False)

    def _fake_pass(self, part: Part, x0: Array, keep: bool) -> FakePass:
        purpose = _purposes.RENOISE_REAL if self.config.share_noise else _purposes.RENOISE_FAKE
        noised = _core.renoise(x0, part.draws.t_hat_fake, self.config.seed, purpose, part.draws.key, part.samples)
        features, saved = self._features(noised, part.draws.t_hat_fake, part, keep)
        return FakePass(features, noised, saved)

    def _renoised_real(self, part: Part) -> Array:
        return _core.renoise(part.latents, part.draws.t_hat_real, self.config.seed, _purposes.RENOISE_REAL, part.draws.key, part.samples)

    def _heads(self, features: list[Array], t_hat: Array, part: Part, *, update_u: bool = False, keep: bool = True) -> tuple[list[Array], Any]:
        d = self.discriminator.config
        p = self.teacher.config.patch_size
        grid = (part.latents.shape[2] // p, part.latents.shape[3] // p)
        return self.discriminator._core.forward(
            features, t_hat, part.pooled if d.condition_pooled else None, grid, update_u=update_u, keep=keep
        )

    # ---- the two halves ----

    def _discriminator_half(self, parts: list[Part], fake: FakePass | None = None) -> Metrics:
        """Hinge (or another loss) on real and fake features, backward into the heads only, AdamW. Nothing reaches teacher or student."""
        c = self.config
        _core.zero(self.discriminator._core.flat_grad)
        r1_due = c.r1_weight > 0 and self.discriminator_optimizer.updates % c.r1_interval == 0
        total: Metrics = {}
        for i, part in enumerate(parts):
            given = fake or self._fake_pass(part, self._student_pass(part, keep=False).x0, keep=False)
            real, _ = self._features(self._renoised_real(part), part.draws.t_hat_real, part, keep=False)
            logits_real, saved_real = self._heads(real, part.draws.t_hat_real, part, update_u=i == 0)
            logits_fake, saved_fake = self._heads(given.features, part.draws.t_hat_fake, part)
            value, dreal, dfake = self.loss.discriminator(logits_real, logits_fake)
            saved_real.backward([_core.scale(d, part.share) for d in dreal], features=False)
            saved_fake.backward([_core.scale(d, part.share) for d in dfake], features=False)
            metrics = {"loss_d": value, **_logit_metrics(logits_real, logits_fake)}
            if c.misaligned_weight:
                metrics["loss_misaligned"] = self._misaligned(part)
            if r1_due:
                # ADD, arXiv 2311.17042: the squared gradient of the logits' sum at the heads' inputs, a mean over pictures.
                metrics["r1"] = saved_real.r1(c.r1_weight * c.r1_interval * part.share, c.r1_epsilon)
            for name, number in metrics.items():
                total[name] = total.get(name, 0.0) + part.share * number
        _finite("the discriminator's loss", total["loss_d"], self.iteration)
        total["grad_norm_d"] = self.discriminator_optimizer.update(self.rate_scale)
        return total

    def _misaligned(self, part: Part) -> float:
        """Real pictures with another picture's text are fakes too, unless both have the same text: sharpens what the heads know of it."""
        other = dataclasses.replace(part, context=part.other_context, pooled=part.other_pooled)
        (y, p), (other_y, other_p) = [map(devices.to_host, (x.context, x.pooled)) for x in (part, other)]
        differs = (y != other_y).any(axis=(1, 2)) | (p != other_p).any(axis=1)
        features, _ = self._features(self._renoised_real(part), part.draws.t_hat_real, other, keep=False)
        logits, saved = self._heads(features, part.draws.t_hat_real, other)
        weight = self.config.misaligned_weight * part.share / len(logits)
        value, gradients = 0.0, []
        for x in logits:
            one, d = _core.adversarial_loss(x, self.loss.name, "fake", weight)
            value += one / len(logits)
            gradients.append(_core.row_scale(d, differs.astype(np.float32)))
        saved.backward(gradients, features=False)
        return value

    def _student_half(self, parts: list[Part], passes: tuple[StudentPass, FakePass] | None = None) -> Metrics:
        """From the updated heads back through the frozen teacher, the renoising and the student; AdamW and EMA."""
        _core.zero(self.student._core.flat_grad)
        total: Metrics = {}
        for part in parts:
            student = passes[0] if passes else self._student_pass(part)
            fake = passes[1] if passes else self._fake_pass(part, student.x0, keep=True)
            t, t_hat = part.draws.t, part.draws.t_hat_fake
            logits, saved_heads = self._heads(fake.features, t_hat, part)
            value, dlogits = self.loss.generator(logits)
            dfeatures = saved_heads.backward([_core.scale(d, part.share) for d in dlogits], params=False)
            dnoised, _, _ = fake.saved.backward(dfeatures, params=False, context=False, pooled=False)
            dx0 = _core.row_scale(dnoised, 1 - t_hat)
            metrics = {"loss_g": value}
            metrics |= self._distillation(part, student.x0, fake, dx0)
            metrics |= self._pairs(part, student.x0, dx0)
            student.saved.backward(_core.row_scale(dx0, -t), latents=False, context=False, pooled=False)
            for name, number in metrics.items():
                total[name] = total.get(name, 0.0) + part.share * number
        for name in ("loss_g", "loss_distillation", "loss_pair"):
            _finite(f"the student's {name}", total.get(name, 0.0), self.iteration)
        total["grad_norm_g"] = self.student_optimizer.update(self.rate_scale)
        self.ema.update()
        self.iteration += 1
        return total

    def _distillation(self, part: Part, x0: Array, fake: FakePass, dx0: Array) -> Metrics:
        """ADD's term with c(t) = 1 - t: the teacher's x0 from the renoised student is the target; a mean over elements, not a sum."""
        weight = self.config.distillation_weight
        if not weight:
            return {}
        t_hat = part.draws.t_hat_fake
        v, _ = self.teacher._core.forward(fake.noised, t_hat, part.context, part.pooled)
        difference = x0.copy()
        _core.axpy(difference, _core.predict_x0(fake.noised, v, t_hat), -1.0)
        _core.axpy(dx0, _core.row_scale(difference, 1 - t_hat), 2 * weight * part.share / x0.size)
        return {"loss_distillation": devices.sum_squares(_core.row_scale(difference, np.sqrt(1 - t_hat))) / x0.size}

    def _pairs(self, part: Part, x0: Array, dx0: Array) -> Metrics:
        """Squared distance to the very picture that the teacher made of this noise.

        With pair_times "all" the student's paths are straight lines from noise to picture, as reflow has them (Rectified Flow,
        arXiv 2209.03003), which Euler steps follow; with "start" its other times see noise of their own, as re-noising steps make it.
        """
        weight = self.config.pair_weight
        if not weight:
            return {}
        difference = x0.copy()
        _core.axpy(difference, part.latents, -1.0)
        difference = _core.row_scale(difference, self._paired(part.draws.t).astype(np.float32))
        _core.axpy(dx0, difference, 2 * weight * part.share / x0.size)
        return {"loss_pair": devices.sum_squares(difference) / x0.size}

    # ---- state ----

    def ema_student(self) -> MMDiT:
        """A copy of the student with the averaged weights: what is sampled from and shipped."""
        model = self.student.copy()
        model._core.flat_trainable[:] = self.ema.values[0]
        return model

    def state(self) -> common.State:
        return common.join_states(
            student=({"flat": self.student._core.flat}, {}),
            discriminator=({"flat": self.discriminator._core.flat}, {}),
            student_optimizer=self.student_optimizer.state(),
            discriminator_optimizer=self.discriminator_optimizer.state(),
            ema=self.ema.state(),
            counters=({}, {"iteration": self.iteration, "passes": self.passes}),
        )

    def load_state(self, state: common.State) -> None:
        self.student._core.flat[:] = state[0]["student.flat"]
        self.discriminator._core.flat[:] = state[0]["discriminator.flat"]
        for name in ("student_optimizer", "discriminator_optimizer", "ema"):
            getattr(self, name).load_state(*common.part_of(state, name))
        self.iteration = int(state[1]["counters"]["iteration"])
        self.passes = int(state[1]["counters"]["passes"])

    def save(self, path: str | Path) -> None:
        """Everything the next step depends on, written aside and renamed: killed at any instant, the last complete checkpoint remains."""
        teacher = sha256(self.teacher._core.flat)
        common.save_state(Path(path), self.state(), config=to_dict(self.config), teacher=teacher)

    def load(self, path: str | Path) -> None:
        """Continues to the bit from what save wrote with the same teacher and configuration; on error nothing has changed."""
        state, header = common.read_state(Path(path))
        if header.get("teacher") != sha256(self.teacher._core.flat):
            raise ValueError(f"{path} was saved with another teacher")
        if header.get("config") != to_dict(self.config):
            raise ValueError(f"{path} was saved with another configuration: {header.get('config')}")
        common.check_state(state, self.state(), str(path))
        self.load_state(state)


def _finite(what: str, value: float, iteration: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value} at iteration {iteration + 1}; nothing was updated from it")


def _logit_metrics(real: list[Array], fake: list[Array]) -> Metrics:
    """What shows a discriminator too strong or too weak: the gap of the logits, per head too, and the share of saturated hinge terms."""
    real, fake = [devices.to_host(x) for x in real], [devices.to_host(x) for x in fake]
    r, f = (np.concatenate([x.reshape(-1) for x in logits]) for logits in (real, fake))
    gaps = {f"logit_gap_{i}": float(a.mean() - b.mean()) for i, (a, b) in enumerate(zip(real, fake, strict=True))}
    return {
        "logit_real": float(r.mean()),
        "logit_fake": float(f.mean()),
        "logit_gap": float(r.mean() - f.mean()),
        "saturated": float(((r > 1).mean() + (f < -1).mean()) / 2),
        **gaps,
    }


# ---- a run ----------------------------------------------------------------------------------------------------------------------------


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

    def __post_init__(self) -> None:
        configs.check_run(self)
        configs.check_ints(self, sampling_steps=1)
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
    trainer = LADD(student, teacher, heads, ladd_config, allow_noise_latents=parts["data"].allow_noise_latents)
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
    for step in book:
        rows = epoch_rows(len(shards), settings.batch, ladd_config.seed, step)
        batch = shards.batch(rows)
        noise = _noise_of(shards, rows, shape) if ladd_config.pair_weight else None
        scale = common.cosine_tail(step, book.steps, settings.decay_share)
        metrics = trainer.step(batch.latents, batch.context, batch.pooled, noise=noise, rate_scale=scale)
        watch(step, metrics)
        if book.due(step, settings.sample_every):
            _save_preview(book, step, trainer, shards, preview, shape, source)
        book.log(step, metrics)
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
