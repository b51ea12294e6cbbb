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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, _purposes, losses
from .. import config as configs
from .. import device as devices
from ..config import LADDConfig, to_dict
from ..data.shards import looks_like_noise
from ..models import Discriminator, MMDiT
from ..weights import sha256
from . import common
from .resident import (
    Batch,
    Draws,
    FakePass,
    Inputs,
    LateMetrics,
    Metrics,
    Numbers,
    Part,
    Recorded,
    Status,
    StudentPass,
    Tally,
    add_logit_metrics,
)

Array = NDArray[Any]

DISCRIMINATOR, STUDENT = 1, 2  # who a device says has failed
GRAPHS = 4  # recorded steps that are kept: one a shape of the batch, and with R1 another one
NOISE_CHECKS = 4  # the first batches of "real" latents are held against N(0, 1) noise


class LADD:
    """The training step. student and teacher: MMDiT; the student is trained in place, the teacher is only read.

    Raises ValueError where the three do not fit together and for latents that are noise, and FloatingPointError (naming what)
    when a loss or gradient is not finite: then nothing was updated in that half of the step, nor by any step queued behind it.

    On a GPU a step is queued and not waited for: its metrics wait when they are looked at, and tell then what was not finite.
    cuda_graph: the second step of a shape is recorded, and all that follow replay it; the results are the same bits.
    """

    def __init__(
        self,
        student: MMDiT,
        teacher: MMDiT,
        discriminator: Discriminator,
        config: LADDConfig | Mapping[str, Any] | None = None,
        *,
        allow_noise_latents: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.student, self.teacher, self.discriminator = student, teacher, discriminator
        self.config = config if isinstance(config, LADDConfig) else configs.from_dict(LADDConfig, {} if config is None else config)
        self.allow_noise_latents = allow_noise_latents
        self._check_models()
        self.loss = losses.by_name(self.config.loss)
        d, g = discriminator._core, student._core
        seed = self.config.seed
        self.discriminator_optimizer = common.AdamW(
            [(d.flat_trainable, d.flat_grad)], self.config.discriminator, "the discriminator", seed=seed, purpose=_purposes.ROUNDING_HEADS
        )
        self.student_optimizer = common.AdamW(
            [(g.flat_trainable, g.flat_grad)], self.config.student, "the student", seed=seed, purpose=_purposes.ROUNDING
        )
        self.ema = common.EMA([g.flat_trainable], self.config.ema_decay)
        self.rate_scale = 1.0
        self.iteration = 0  # student updates
        self.passes = 0  # draws of times and noise
        self._device = student._device
        if cuda_graph and self._device is None:
            raise ValueError("cuda_graph needs models on a CUDA device, got models on the CPU")
        self._graphs: dict[Any, Recorded | None] | None = {} if cuda_graph else None
        self._inputs = Inputs(self._device)
        self._tallies: dict[int, Tally] = {}
        self._status = Status(self._device, 2)
        self._mark()

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
        return self._run(latents, context, pooled, noise, heads=True, student=True)

    def discriminator_step(self, latents: Any, context: Any, pooled: Any) -> Metrics:
        """One update of the heads alone."""
        return self._run(latents, context, pooled, None, heads=True, student=False)

    def student_step(self, latents: Any, context: Any, pooled: Any, *, noise: Any = None) -> Metrics:
        """One update of the student alone."""
        return self._run(latents, context, pooled, noise, heads=False, student=True)

    def _run(self, latents: Any, context: Any, pooled: Any, noise: Any, *, heads: bool, student: bool) -> Metrics:
        batch = self._batch(latents, context, pooled, noise, pairs=student)
        d_updates = (self.config.d_steps if student else 1) if heads else 0
        draws = [self._next_draws(len(batch[0])) for _ in range(max(1, d_updates))]
        first = self.discriminator_optimizer.updates
        r1_due = tuple(self.config.r1_weight > 0 and (first + i) % self.config.r1_interval == 0 for i in range(d_updates))
        numbers = self._numbers(draws, self._differs(context, pooled, batch), d_updates, student)
        if self._device is None:
            return self._compute(batch, numbers, r1_due, student).metrics()
        key = (tuple(None if x is None else x.shape for x in batch), r1_due)
        recorded = self._graphs is not None and d_updates == self.config.d_steps and student
        tally = self._replay(key, batch, numbers, r1_due) if recorded else self._compute(batch, numbers, r1_due, student)
        self.discriminator_optimizer.updates += d_updates
        if student:
            self.student_optimizer.updates += 1
            self.ema.updates += 1
            self.iteration += 1
        self._queued.append((self.discriminator_optimizer.updates, self.iteration, self.passes))
        return LateMetrics(self._status, tally, self._check)

    def _compute(self, batch: Batch, numbers: Numbers, r1_due: tuple[bool, ...], student: bool) -> Tally:
        """The updates themselves. On a device nothing here waits, and all that differs from step to step is read from `numbers`."""
        tally = self._tally(len(batch[0]))
        for draws, due, rates in zip(numbers.draws[:-1], r1_due, numbers.rates):
            self._discriminator_half(self._parts(batch, draws, numbers.differs), due, rates, tally)
            tally.forget()
        parts = self._parts(batch, numbers.draws[-1], numbers.differs)
        passes = None
        if r1_due and student and len(parts) == 1:  # the passes of several parts cannot be kept at once: the heads' update comes between
            first = self._student_pass(parts[0])
            passes = first, self._fake_pass(parts[0], first.x0, keep=True)
        if r1_due:
            self._discriminator_half(parts, r1_due[-1], numbers.rates[len(r1_due) - 1], tally, passes[1] if passes else None)
        if student:
            self._student_half(parts, numbers.rates[-1], numbers.decay, tally, passes)
        for model in (self.student, self.discriminator):
            model._core.ready()  # here, so that a step begins and ends with fresh working copies, recorded or not
        return tally

    def _tally(self, batch: int) -> Tally:
        c = self.config
        parts = -(-batch // (c.micro_batch or batch))
        count = (c.d_steps * (10 * len(self.discriminator.config.taps) + 6) + 8) * parts
        if count not in self._tallies:
            self._tallies[count] = Tally(self._device, count)
        self._tallies[count].begin()
        return self._tallies[count]

    def _replay(self, key: Any, batch: Batch, numbers: Numbers, r1_due: tuple[bool, ...]) -> Tally:
        """The step as it was recorded, on this batch. The first step of a kind is not recorded: libraries open and plans are made in it."""
        graphs, models = self._graphs, (self.student, self.teacher, self.discriminator)
        assert graphs is not None
        if key not in graphs:
            if len(graphs) == GRAPHS:
                graphs.clear()
            graphs[key] = None
            return self._compute(batch, numbers, r1_due, student=True)
        recorded = graphs[key]
        for model in models:
            model._core.ready()  # weights that were loaded or written since
        if recorded is None:
            z, y, p, e = batch
            held = z.copy(), y.copy(), p.copy(), None if e is None else e.copy()
            with devices.record(self.student.device) as graph:
                tally = self._compute(held, numbers, r1_due, student=True)
            recorded = graphs[key] = Recorded(graph, held, tally.alias())
        for to, given in zip(recorded.batch, batch, strict=True):
            if to is not None:
                to[...] = given
        recorded.graph.replay()
        return recorded.tally

    # ---- what a device decides, and when the host hears of it ----

    def _mark(self) -> None:
        """The host's counters are those of the device, which begins to count at 0."""
        self._base = (self.discriminator_optimizer.updates, self.iteration)
        self._queued: list[tuple[int, int, int]] = []  # counters behind each step since

    def check(self) -> None:
        """Waits for all steps and raises FloatingPointError if one met a number that was not finite; the counters are then those of that
        step, as on the CPU, and training may go on."""
        if self._device is not None:
            self._check(*self._status.read())

    def _check(self, who: int, norm: float, done: list[int]) -> None:
        heads, iteration = self._base[0] + done[0], self._base[1] + done[1]
        later = [counters for counters in self._queued if counters[0] > heads or counters[1] > iteration]
        if not who:
            self._queued = later
            return
        if not later:
            return  # told already
        self.passes = later[0][2]
        self.discriminator_optimizer.updates = heads
        self.iteration = self.student_optimizer.updates = self.ema.updates = iteration
        self._status.reset()
        self._mark()
        name = {DISCRIMINATOR: "discriminator", STUDENT: "student"}[who]
        raise FloatingPointError(
            f"the {name}'s loss or gradient is not finite at iteration {iteration + 1} (norm of the gradient {norm}); "
            "nothing was updated from it"
        )

    def _batch(self, latents: Any, context: Any, pooled: Any, noise: Any, pairs: bool = True) -> Batch:
        c, put = self.student.config, self.student._array
        z = put(latents, "latents", ("B", c.in_channels, "H", "W"), finite=True)
        patch = math.lcm(c.patch_size, self.teacher.config.patch_size)
        if z.shape[2] % patch or z.shape[3] % patch:
            raise ValueError(f"latents must have H and W that are multiples of patch_size = {patch}, got shape {list(z.shape)}")
        y = put(context, "context", (len(z), "T", c.joint_attention_dim), finite=True)
        p = put(pooled, "pooled", (len(z), c.pooled_projection_dim), finite=True)
        e = None if noise is None else put(noise, "noise", z.shape, finite=True)
        if self.config.pair_weight and e is None and pairs:
            raise ValueError("pair_weight needs noise=: what the teacher sampled each latent from")
        if self.passes < NOISE_CHECKS and not self.allow_noise_latents:
            seen = latents if isinstance(latents, np.ndarray) else devices.to_host(z)
            if looks_like_noise(seen):
                raise ValueError(
                    f"latents look like standard normal noise (mean {seen.mean():.3f}, deviation {seen.std():.3f}, neighbours uncorrelated), "
                    "not like pictures; pass allow_noise_latents=True if that is meant"
                )
        if self.config.misaligned_weight and len(z) < 2:
            raise ValueError("misaligned_weight needs at least two pictures a batch, got 1")
        return z, y, p, e

    def _differs(self, context: Any, pooled: Any, batch: Batch) -> Array:
        """Where the picture before it in the batch has another text. Text that comes from a device is waited for."""
        if not self.config.misaligned_weight:
            return np.ones(len(batch[0]), np.float32)
        y, p = (x if isinstance(x, np.ndarray) else devices.to_host(there) for x, there in ((context, batch[1]), (pooled, batch[2])))
        differs: Array = (y != np.roll(y, 1, axis=0)).any(axis=(1, 2)) | (p != np.roll(p, 1, axis=0)).any(axis=1)
        return differs.astype(np.float32)

    def _next_draws(self, batch: int) -> Draws:
        c, key = self.config, self.passes
        self.passes += 1
        warm = self.iteration < c.warmup_iterations
        times, probabilities = (c.warmup_times, c.warmup_probabilities) if warm else (c.student_times, c.student_probabilities)
        t = _purposes.generator(c.seed, _purposes.STUDENT_TIME, key).choice(
            np.array(times, np.float32), batch, p=np.array(probabilities) / sum(probabilities)
        )
        t = t.astype(np.float32)
        normal = _purposes.generator(c.seed, _purposes.T_HAT, key).standard_normal((2, batch))
        t_hat = (1 / (1 + np.exp(-(c.t_hat_mean + c.t_hat_std * normal)))).astype(np.float32)
        paired = ((t == 1) | (c.pair_times == "all")) & (c.pair_weight > 0)
        rest = 1 - t_hat[0]
        return Draws(key, t, t_hat[0], t_hat[0] if c.share_t_hat else t_hat[1], paired.astype(np.float32), -t, rest, np.sqrt(rest))

    def _numbers(self, draws: list[Draws], differs: Array, d_updates: int, student: bool) -> Numbers:
        """All that differs from step to step, on the device in one copy; on the CPU rates and decay are the optimizers' own."""
        if self._device is None:
            return Numbers(draws, differs, [None] * (d_updates + student), None)
        rates = [self.discriminator_optimizer.control(self.rate_scale, ahead=i) for i in range(d_updates)]
        rates += [self.student_optimizer.control(self.rate_scale)] * student
        each = len(draws[0].arrays())
        keys = [np.array([d.key], np.uint64) for d in draws]
        arrays = [*keys, *rates, self.ema.control(), differs, *(x for d in draws for x in d.arrays())]
        there = iter(self._inputs(arrays))
        counters, placed, decay, where = [next(there) for _ in keys], [next(there) for _ in rates], next(there), next(there)
        return Numbers([Draws(counter, *(next(there) for _ in range(each))) for counter in counters], where, placed, decay)

    def _parts(self, batch: Batch, draws: Draws, differs: Any = None) -> list[Part]:
        z, y, p, e = batch
        n = self.config.micro_batch or len(z)
        # Over the batch, so that the split does not matter.
        other_y, other_p = (devices.roll_rows(x) for x in (y, p)) if self.config.misaligned_weight else (y, p)
        out = []
        for i in range(0, len(z), n):
            rows = slice(i, min(i + n, len(z)))
            samples = np.arange(rows.start, rows.stop, dtype=np.int64)
            text = (y[rows], p[rows], other_y[rows], other_p[rows], None if differs is None else differs[rows])
            out.append(Part(z[rows], *text, samples, len(samples) / len(z), draws.rows(rows), None if e is None else e[rows]))
        return out

    # ---- passes through the networks ----

    def _student_pass(self, part: Part, keep: bool = True) -> StudentPass:
        """The student's x0. With pair_weight, rows that are paired start from the noise that the teacher's picture came from."""
        t, c = part.draws.t, self.config
        noise = part.noise if c.pair_weight else None
        if noise is not None and c.pair_times == "all":
            x_t = _core.interpolate(part.latents, noise, t)
        else:
            x_t = _core.renoise(part.latents, t, c.seed, _purposes.STUDENT_NOISE, part.draws.key, part.samples)
            if noise is not None:  # t is 1 there: the noise itself
                x_t = _core.interpolate(x_t, noise, part.draws.paired)
        v, saved = self.student._core.forward(x_t, t, part.context, part.pooled, keep=keep)
        return StudentPass(_core.predict_x0(x_t, v, t), saved)

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

    def _judge(
        self, logits: list[Any], role: losses.Role, name: str, part: Part, tally: Tally, weight: float = 1.0
    ) -> tuple[list[int], list[Any]]:
        """The loss of all heads' logits goes to metrics[name]. Returns where their numbers are, and the gradients times `weight`."""
        places, gradients = [], []
        for x in logits:
            place, memory = tally.take(3)  # the loss, the mean logit, the share of logits beyond the margin
            _, d = _core.adversarial_loss(x, self.loss.name, role, weight / len(logits), values=memory)
            tally.add(name, place, part.share / len(logits))
            places.append(place)
            gradients.append(d)
        return places, gradients

    def _discriminator_half(self, parts: list[Part], r1_due: bool, rates: Any, tally: Tally, fake: FakePass | None = None) -> None:
        """Hinge (or another loss) on real and fake features, backward into the heads only, AdamW. Nothing reaches teacher or student."""
        c = self.config
        _core.zero(self.discriminator._core.flat_grad)
        start = tally.used
        for i, part in enumerate(parts):
            given = fake or self._fake_pass(part, self._student_pass(part, keep=False).x0, keep=False)
            real, _ = self._features(self._renoised_real(part), part.draws.t_hat_real, part, keep=False)
            logits_real, saved_real = self._heads(real, part.draws.t_hat_real, part, update_u=i == 0)
            logits_fake, saved_fake = self._heads(given.features, part.draws.t_hat_fake, part)
            on_real, dreal = self._judge(logits_real, "real", "loss_d", part, tally)
            on_fake, dfake = self._judge(logits_fake, "fake", "loss_d", part, tally)
            saved_real.backward([_core.scale(d, part.share) for d in dreal], features=False)
            saved_fake.backward([_core.scale(d, part.share) for d in dfake], features=False)
            add_logit_metrics(tally, on_real, on_fake, part.share)
            if c.misaligned_weight:
                self._misaligned(part, tally)
            if r1_due:
                # ADD, arXiv 2311.17042: the squared gradient of the logits' sum at the heads' inputs, a mean over pictures.
                weight = c.r1_weight * c.r1_interval * part.share
                saved_real.r1(weight, c.r1_epsilon, out=tally.number("r1", part.share))
        optimizer, name = self.discriminator_optimizer, "grad_norm_d"
        if self._device is None:
            _finite("the discriminator's loss", tally.metrics()["loss_d"], self.iteration)
            tally.known[name] = optimizer.update(self.rate_scale, parts[0].draws.key)
        else:
            optimizer.queue(rates, tally, start, name, self._status, DISCRIMINATOR, parts[0].draws.key)

    def _misaligned(self, part: Part, tally: Tally) -> None:
        """Real pictures with another picture's text are fakes too, unless both have the same text: sharpens what the heads know of it."""
        other = dataclasses.replace(part, context=part.other_context, pooled=part.other_pooled)
        features, _ = self._features(self._renoised_real(part), part.draws.t_hat_real, other, keep=False)
        logits, saved = self._heads(features, part.draws.t_hat_real, other)
        _, gradients = self._judge(logits, "fake", "loss_misaligned", part, tally, self.config.misaligned_weight * part.share)
        saved.backward([_core.row_scale(d, part.differs) for d in gradients], features=False)

    def _student_half(
        self, parts: list[Part], rates: Any, decay: Any, tally: Tally, passes: tuple[StudentPass, FakePass] | None = None
    ) -> None:
        """From the updated heads back through the frozen teacher, the renoising and the student; AdamW and EMA."""
        _core.zero(self.student._core.flat_grad)
        start = tally.used
        for part in parts:
            student = passes[0] if passes else self._student_pass(part)
            fake = passes[1] if passes else self._fake_pass(part, student.x0, keep=True)
            logits, saved_heads = self._heads(fake.features, part.draws.t_hat_fake, part)
            _, dlogits = self._judge(logits, "generator", "loss_g", part, tally)
            dfeatures = saved_heads.backward([_core.scale(d, part.share) for d in dlogits], params=False)
            dnoised, _, _ = fake.saved.backward(dfeatures, params=False, context=False, pooled=False)
            dx0 = _core.row_scale(dnoised, part.draws.rest)
            self._distillation(part, student.x0, fake, dx0, tally)
            self._pairs(part, student.x0, dx0, tally)
            student.saved.backward(_core.row_scale(dx0, part.draws.minus_t), latents=False, context=False, pooled=False)
        optimizer, name = self.student_optimizer, "grad_norm_g"
        if self._device is not None:
            optimizer.queue(rates, tally, start, name, self._status, STUDENT, parts[0].draws.key)
            self.ema.queue(decay, rates)
            return
        known = tally.metrics()
        for loss in ("loss_g", "loss_distillation", "loss_pair"):
            _finite(f"the student's {loss}", known.get(loss, 0.0), self.iteration)
        tally.known[name] = optimizer.update(self.rate_scale, parts[0].draws.key)
        self.ema.update()
        self.iteration += 1

    def _distillation(self, part: Part, x0: Array, fake: FakePass, dx0: Array, tally: Tally) -> None:
        """ADD's term with c(t) = 1 - t: the teacher's x0 from the renoised student is the target; a mean over elements, not a sum."""
        weight = self.config.distillation_weight
        if not weight:
            return
        t_hat = part.draws.t_hat_fake
        v, _ = self.teacher._core.forward(fake.noised, t_hat, part.context, part.pooled)
        difference = x0.copy()
        _core.axpy(difference, _core.predict_x0(fake.noised, v, t_hat), -1.0)
        _core.axpy(dx0, _core.row_scale(difference, part.draws.rest), 2 * weight * part.share / x0.size)
        out = tally.number("loss_distillation", part.share / x0.size)
        devices.sum_squares(_core.row_scale(difference, part.draws.root), out=out)

    def _pairs(self, part: Part, x0: Array, dx0: Array, tally: Tally) -> None:
        """Squared distance to the very picture that the teacher made of this noise.

        With pair_times "all" the student's paths are straight lines from noise to picture, as reflow has them (Rectified Flow,
        arXiv 2209.03003), which Euler steps follow; with "start" its other times see noise of their own, as re-noising steps make it.
        """
        weight = self.config.pair_weight
        if not weight:
            return
        difference = x0.copy()
        _core.axpy(difference, part.latents, -1.0)
        difference = _core.row_scale(difference, part.draws.paired)
        _core.axpy(dx0, difference, 2 * weight * part.share / x0.size)
        devices.sum_squares(difference, out=tally.number("loss_pair", part.share / x0.size))

    # ---- state ----

    def ema_student(self) -> MMDiT:
        """A copy of the student with the averaged weights: what is sampled from and shipped."""
        model = self.student.copy()
        model._core.flat_trainable[:] = self.ema.values[0]
        return model

    def state(self) -> common.State:
        self.check()
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
        self._status.reset()
        self._mark()

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
