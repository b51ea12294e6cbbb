"""A whole distillation step against the float64 oracle, and what must hold for any step: frozen teacher, same bits, exact resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
from oracle import ladd_step, mmdit, philox
from support import mmdit_config, normal, same_bits

import ladd
from ladd import _core, _purposes
from ladd.config import AdamWConfig, LADDConfig
from ladd.training.resident import Tally, add_logit_metrics

Array = np.ndarray
BATCH, HEIGHT, WIDTH, TEXT = 3, 8, 6, 5
MMDIT = mmdit_config(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0,))
DISC: dict[str, Any] = {
    "feature_dim": 16,
    "taps": (0, 2),
    "pooled_dim": 10,
    "width": 8,
    "num_groups": 2,
    "condition_dim": 6,
}
# A large eps makes the first update a smooth function of the gradient; with a small one it is the gradient's sign.
ADAMW = AdamWConfig(lr=3e-3, beta1=0.5, eps=1e-2, weight_decay=0.02, clip_norm=0.7)


def make_trainer(**changes: Any) -> ladd.LADD:
    teacher, student = ladd.MMDiT(MMDIT), ladd.MMDiT(MMDIT)
    for model, seed in ((teacher, 21), (student, 22)):
        model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit.parameter_shapes(MMDIT), seed)})
    heads = ladd.Discriminator(ladd.DiscriminatorConfig(**DISC), seed=5)
    config = LADDConfig(**{"seed": 77, "student": ADAMW, "discriminator": ADAMW, "share_t_hat": False, **changes})
    return ladd.LADD(student, teacher, heads, config)


def data(seed: int = 1) -> tuple[Array, Array, Array]:
    smooth = normal(seed, BATCH, 4, 1, 1) + np.float32(0.3) * normal(seed + 1, BATCH, 4, HEIGHT, WIDTH)
    return smooth, normal(seed + 2, BATCH, TEXT, 12), normal(seed + 3, BATCH, 10)


def run_oracle(trainer: ladd.LADD, batch: tuple[Array, Array, Array], pair_noise: Array | None = None) -> ladd_step.Result:
    """What the first step of this trainer has to do; call it before the step."""
    c = trainer.config
    times = ladd.LADD(trainer.student, trainer.teacher, trainer.discriminator, c)._next_draws(BATCH)
    shape, samples, seed = batch[0].shape, np.arange(BATCH), c.seed
    fake_purpose = _purposes.RENOISE_REAL if c.share_noise else _purposes.RENOISE_FAKE
    noise = [philox.normal(shape, seed, purpose, 0, samples) for purpose in (_purposes.STUDENT_NOISE, fake_purpose, _purposes.RENOISE_REAL)]
    paired = None
    if pair_noise is not None:
        paired = (times.t == 1) | (c.pair_times == "all")
        noise[0] = np.where(paired[:, None, None, None], pair_noise, noise[0])
    assert np.array_equal(times.t_hat_fake, times.t_hat_real) == c.share_t_hat
    draws = ladd_step.Draws(times.t, noise[0], times.t_hat_fake, noise[1], times.t_hat_real, noise[2])
    optimizer = ladd_step.Optimizer(ADAMW.lr, ADAMW.beta1, ADAMW.beta2, ADAMW.eps, ADAMW.weight_decay, ADAMW.clip_norm)
    disc_config = trainer.discriminator.config.to_dict()
    weights = (trainer.student.state_dict(), trainer.teacher.state_dict(), trainer.discriminator.state_dict())
    terms = ladd_step.Terms(c.misaligned_weight, c.distillation_weight, c.pair_weight, paired)
    return ladd_step.run((MMDIT, MMDIT, disc_config), weights, batch, draws, c.loss, (optimizer, optimizer), terms)


def first_gradients(optimizer: Any, core: Any) -> dict[str, Array]:
    """The gradients of the first update, taken back out of the first moment: m = (1 - beta1) clip g."""
    flat, at, out = optimizer.m[0] / np.float32(1 - ADAMW.beta1), 0, {}
    for name in core.trainable_names():
        shape = core.tensors()[name].shape
        out[name] = flat[at : at + int(np.prod(shape))].reshape(shape)
        at += int(np.prod(shape))
    return out


def clipped(gradients: dict[str, Array]) -> tuple[dict[str, Array], float]:
    norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
    return {name: g * min(1.0, ADAMW.clip_norm / norm) for name, g in gradients.items()}, norm


HALVES = {"student_times": (1.0, 0.5), "student_probabilities": (0.5, 0.5), "seed": 78}  # the first three times are not all the same
STEPS: list[dict[str, Any]] = [
    {"loss": "hinge"},
    {"loss": "logistic"},
    {"loss": "lsgan"},
    {"loss": "bce"},
    {"share_t_hat": True, "share_noise": True},
    {"misaligned_weight": 0.5, "distillation_weight": 0.3, "loss": "logistic"},
    {"misaligned_weight": 0.5, "distillation_weight": 0.3, "micro_batch": 2},
    {"pair_weight": 0.7, **HALVES},
    {"pair_weight": 0.7, "pair_times": "all", "micro_batch": 1, **HALVES},
]


@pytest.mark.parametrize("options", STEPS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_step_equals_the_oracle(options: dict[str, Any]) -> None:
    trainer, batch = make_trainer(**options), data()
    noise = normal(8, *batch[0].shape) if "pair_weight" in options else None
    wanted = run_oracle(trainer, batch, noise)
    metrics = trainer.step(*batch, noise=noise)
    for name, value in wanted.terms.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert abs(metrics["loss_d"] - wanted.d_loss) < 1e-5 * abs(wanted.d_loss)
    assert abs(metrics["loss_g"] - wanted.g_loss) < 1e-4 * abs(wanted.g_loss) + 1e-5
    for what, gradients, optimizer, core, norm in (
        ("discriminator", wanted.d_gradients, trainer.discriminator_optimizer, trainer.discriminator._core, metrics["grad_norm_d"]),
        ("student", wanted.student_gradients, trainer.student_optimizer, trainer.student._core, metrics["grad_norm_g"]),
    ):
        references, reference_norm = clipped(gradients)
        assert abs(norm - reference_norm) < 1e-4 * reference_norm
        found = first_gradients(optimizer, core)
        floor = 1e-4 * max(np.abs(g).max() for g in references.values())
        assert set(found) == set(references)
        for name, reference in references.items():
            support.assert_close(found[name], reference, support.BACKWARD, f"gradient of the {what}'s {name}", floor)
    for what, reference_weights, model in (
        ("discriminator", wanted.d_weights, trainer.discriminator),
        ("student", wanted.student_weights, trainer.student),
    ):
        for name, value in model.state_dict().items():
            support.assert_close(value, reference_weights[name], 1e-4, f"the {what}'s {name} after its update")


def test_several_updates_of_the_heads_for_one_of_the_student() -> None:
    """d_steps = 3 is two updates of the heads alone before a step, to the bit."""
    many, single = make_trainer(d_steps=3), make_trainer()
    assert many.step(*data())["loss_d"] != single.discriminator_step(*data())["loss_d"]
    single.discriminator_step(*data())
    single.step(*data())
    assert all(same_bits(a, b) for a, b in zip(everything(many), everything(single), strict=True))
    assert many.discriminator_optimizer.updates == 3 and many.student_optimizer.updates == 1


def test_what_the_logits_tell() -> None:
    real, fake = [np.float32([[2.0, 0.5]]), np.float32([[-1.0, 3.5]])], [np.float32([[-2.0, 1.5]]), np.float32([[-3.0, -0.5]])]
    tally, places = Tally(None, 12), []
    for logits, role in ((real, "real"), (fake, "fake")):
        for x in logits:
            place, memory = tally.take(3)
            _core.adversarial_loss(x, "hinge", role, values=memory)
            places.append(place)
    add_logit_metrics(tally, places[:2], places[2:], 1.0)
    assert tally.metrics() == pytest.approx(
        {"logit_real": 1.25, "logit_fake": -1.0, "logit_gap": 2.25, "saturated": 0.5, "logit_gap_0": 1.5, "logit_gap_1": 3.0}
    )


def test_a_schedule_scales_both_rates() -> None:
    half = dataclasses.replace(ADAMW, lr=ADAMW.lr / 2)
    scaled, slow = make_trainer(), make_trainer(student=half, discriminator=half)
    scaled.step(*data(), rate_scale=0.5)
    slow.step(*data())
    assert all(same_bits(a, b) for a, b in zip(everything(scaled), everything(slow), strict=True))


def test_the_average_of_the_student() -> None:
    """What is sampled from: the weights' average, over what there is in the beginning, then with the configured decay."""
    trainer, wanted = make_trainer(ema_decay=0.25), None
    for step in range(1, 5):
        before = trainer.student._core.flat_trainable.astype(np.float64)
        wanted = before if wanted is None else wanted
        trainer.step(*data(step))
        decay = min(0.25, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * trainer.student._core.flat_trainable
    support.assert_close(trainer.ema_student()._core.flat_trainable, wanted, 1e-6, "the average")
    assert [min(0.25, (1 + n) / (10 + n)) for n in (1, 2)] == [2 / 11, 0.25]  # both parts of the rule were met


def test_student_equals_teacher_in_the_first_forward() -> None:
    """With the heads' rate at 0 and a student that is the teacher, the generator's loss is that of the heads as they were."""
    trainer = make_trainer(discriminator=AdamWConfig(lr=0.0))
    trainer.student.load_state_dict(trainer.teacher.state_dict())
    batch = data(9)
    wanted = run_oracle(trainer, batch)
    metrics = trainer.step(*batch)
    assert abs(metrics["loss_d"] - wanted.d_loss) < 1e-5 * abs(wanted.d_loss)


def test_only_student_and_heads_change() -> None:
    trainer = make_trainer()
    before = {name: getattr(trainer, name).state_dict() for name in ("student", "teacher", "discriminator")}
    batch = data()
    copies = [x.copy() for x in batch]
    for _ in range(2):
        trainer.step(*batch)
    assert all(same_bits(a, b) for a, b in zip(batch, copies, strict=True)), "the batch was changed"
    after = {name: getattr(trainer, name).state_dict() for name in before}
    assert all(same_bits(value, after["teacher"][name]) for name, value in before["teacher"].items())
    assert not any(value.any() for value in trainer.teacher.gradients().values()), "the teacher received gradients"
    table = "pos_embed.pos_embed"
    for model in ("student", "discriminator"):
        still = [name for name, value in before[model].items() if same_bits(value, after[model][name]) and name != table]
        assert [name for name in still if not name.endswith("out.weight_u")] == []  # a vector of one number stays 1 or -1
    trainer.discriminator_step(*batch)
    assert all(same_bits(value, after["student"][name]) for name, value in trainer.student.state_dict().items())
    heads = trainer.discriminator.state_dict()
    trainer.student_step(*batch)
    assert all(same_bits(value, heads[name]) for name, value in trainer.discriminator.state_dict().items())


def everything(trainer: ladd.LADD) -> list[Array]:
    return list(trainer.state()[0].values())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "logistic", "d_steps": 2, "share_t_hat": True, "share_noise": True},
    {"r1_weight": 1e-3, "misaligned_weight": 0.5, "distillation_weight": 0.3},
    {"micro_batch": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_one_and_two_threads_give_the_same_bits(options: dict[str, Any]) -> None:
    results, metrics = [], []
    before = _core.get_num_threads()
    try:
        for threads in (1, 2):
            _core.set_num_threads(threads)
            trainer = make_trainer(**options)
            metrics.append([trainer.step(*data(step)) for step in range(1, 4)])
            results.append([x.copy() for x in everything(trainer)])
    finally:
        _core.set_num_threads(before)
    assert metrics[0] == metrics[1]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_resuming_equals_never_having_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    whole = make_trainer(**options)
    for step in range(1, 3):
        whole.step(*data(step))
    whole.save(tmp_path / "checkpoint")
    resumed = make_trainer(**options)
    resumed.load(tmp_path / "checkpoint")
    for step in range(3, 5):
        assert whole.step(*data(step)) == resumed.step(*data(step))
    assert all(same_bits(a, b) for a, b in zip(everything(whole), everything(resumed), strict=True))


@pytest.mark.parametrize("options", [{}, {"distillation_weight": 0.3, "share_noise": True}], ids=["default", "distillation"])
def test_micro_batches_equal_one_batch(options: dict[str, Any]) -> None:
    whole, parts = make_trainer(**options), make_trainer(**options, micro_batch=1)
    for step in range(1, 3):
        one, two = whole.step(*data(step)), parts.step(*data(step))
        for name, value in one.items():
            assert abs(value - two[name]) < 1e-4 * max(abs(value), 0.1), name
    for a, b in zip(everything(whole), everything(parts), strict=True):
        support.assert_close(b, a, 3e-4, "state")


@pytest.mark.parametrize("share", [False, True])
def test_r1_is_added_to_the_heads_gradient(share: bool) -> None:
    """The step's gradient with R1 is the one without it plus what the heads say of the real features."""
    options: dict[str, Any] = {"r1_interval": 2, "micro_batch": 2} if share else {}
    trainer, plain, batch = make_trainer(r1_weight=0.5, **options), make_trainer(**options), data()
    for t in (trainer, plain):
        t.discriminator_optimizer.config = AdamWConfig(lr=0.0, beta1=0.0, clip_norm=0.0)
    metrics = trainer.discriminator_step(*batch)
    assert "r1" not in plain.discriminator_step(*batch)
    gradient = trainer.discriminator_optimizer.m[0].astype(np.float64) - plain.discriminator_optimizer.m[0]
    times = make_trainer()._next_draws(BATCH)
    noised = _core.renoise(batch[0], times.t_hat_real, trainer.config.seed, _purposes.RENOISE_REAL, 0)
    features = trainer.teacher.features(noised, times.t_hat_real, *batch[1:], taps=DISC["taps"])
    core = trainer.discriminator._core
    core.flat_grad[:] = 0
    _, saved = core.forward(features, times.t_hat_real, batch[2], (4, 3), keep=True)
    penalty = saved.r1(1.0 if share else 0.5, 1e-4)
    assert metrics["r1"] == pytest.approx(penalty, rel=1e-5)
    support.assert_close(gradient, core.flat_grad, 1e-3, "the gradient of R1")
    assert "r1" in trainer.discriminator_step(*batch) or share


def test_bad_batches_are_errors_and_change_nothing() -> None:
    trainer, (latents, context, pooled) = make_trainer(), data()
    before = [x.copy() for x in everything(trainer)]
    nan = latents.copy()
    nan[0, 0, 0, 0] = np.nan
    calls: list[tuple[Any, ...]] = [
        (latents[:, :3], context, pooled),
        (latents, context[:2], pooled),
        (latents, context, pooled[:, :4]),
        (nan, context, pooled),
        (normal(1, BATCH, 4, 32, 32), context, pooled),
        (None, context, pooled),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            trainer.step(*call)
    assert all(same_bits(a, b) for a, b in zip(before, everything(trainer), strict=True))


def test_latents_that_are_noise_are_refused() -> None:
    trainer = make_trainer()
    with pytest.raises(ValueError, match="noise"):
        trainer.step(normal(1, 64, 4, HEIGHT, WIDTH), normal(2, 64, TEXT, 12), normal(3, 64, 10))


def test_models_that_do_not_fit_are_refused() -> None:
    good = make_trainer()
    with pytest.raises(ValueError, match="teacher"):
        ladd.LADD(good.teacher, good.teacher, good.discriminator)
    with pytest.raises(TypeError, match=r"discriminator must be a ladd\.Discriminator, got MMDiT"):
        ladd.LADD(good.student, good.teacher, good.student)  # type: ignore[arg-type]
    wide = ladd.Discriminator(ladd.DiscriminatorConfig(**{**DISC, "feature_dim": 17}))
    with pytest.raises(ValueError, match="feature_dim"):
        ladd.LADD(good.student, good.teacher, wide)
    deep = ladd.Discriminator(ladd.DiscriminatorConfig(**{**DISC, "taps": (0, 3)}))
    with pytest.raises(ValueError, match="taps"):
        ladd.LADD(good.student, good.teacher, deep)
