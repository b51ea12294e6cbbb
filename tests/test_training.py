"""The trainers: resumed equals uninterrupted to the bit, parts of a batch equal the batch, bad data is refused, kills lose nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tqdm.auto

import ladd
from ladd import _core, _purposes
from ladd.config import AdamWConfig, LADDConfig
from ladd.data import shards
from ladd.training import autoencoder, common, distill, generate, teacher
from ladd.training import watch as watching
from ladd.training.ladd import LADD

Array = np.ndarray

MMDIT = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
    "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 12, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "use_quant_conv": False,
    "use_post_quant_conv": False, "mid_block_add_attention": False,
}  # fmt: skip
TEXT = {"max_words": 16, "context_dim": 12, "pooled_dim": 12}


def stirred(model: Any, seed: int) -> Any:
    """A model whose zero-initialised parts are not zero, so that every gradient path carries something."""
    flat = model._core.flat_trainable
    flat += np.random.default_rng(seed).standard_normal(flat.size).astype(np.float32) * np.float32(0.05)
    return model


def smooth(batch: int, seed: int = 0) -> Array:
    """Latents with correlated neighbours, as pictures have."""
    z = np.random.default_rng(seed).standard_normal((batch, 4, 4, 4)).astype(np.float32)
    return np.ascontiguousarray(np.repeat(np.repeat(z, 2, 2), 2, 3))


def data(batch: int = 6, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed + 100)
    context = rng.standard_normal((batch, 5, 12)).astype(np.float32)
    return smooth(batch, seed), context, rng.standard_normal((batch, 12)).astype(np.float32)


def trainer(**settings: Any) -> LADD:
    model = stirred(ladd.MMDiT(MMDIT, seed=1), 1)
    heads = ladd.Discriminator(
        ladd.DiscriminatorConfig(feature_dim=16, taps=(0, 1), pooled_dim=12, width=8, num_groups=2, condition_dim=4), seed=2
    )
    return LADD(model.copy(), model, heads, LADDConfig(**settings))


ALL_TERMS = {"r1_weight": 1e-4, "misaligned_weight": 0.5, "distillation_weight": 0.2, "d_steps": 2}


@pytest.mark.parametrize("settings", [{}, ALL_TERMS, {"micro_batch": 4, "loss": "lsgan"}, {"pair_weight": 0.5, "pair_times": "all"}], ids=str)
def test_resumed_ladd_equals_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    noise = np.random.default_rng(9).standard_normal((6, 4, 8, 8)).astype(np.float32) if "pair_weight" in settings else None
    whole, first, second = trainer(**settings), trainer(**settings), trainer(**settings)
    for i in range(4):
        whole.step(*data(seed=i), noise=noise)
    for i in range(2):
        first.step(*data(seed=i), noise=noise)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    for i in range(2, 4):
        second.step(*data(seed=i), noise=noise)
    for name, expected in whole.state()[0].items():
        assert np.array_equal(expected, second.state()[0][name]), name


@pytest.mark.parametrize("settings", [{}, {**ALL_TERMS, "d_steps": 1}], ids=str)
def test_micro_batches_equal_one_batch(settings: dict[str, Any]) -> None:
    # A rate that moves weights by their gradient, not by its sign: AdamW's first step would turn rounding into a whole step.
    plain = AdamWConfig(lr=1e-3, beta1=0.0, beta2=0.99, eps=1.0, clip_norm=0.0)
    one, parts = (trainer(student=plain, discriminator=plain, micro_batch=n, **settings) for n in (0, 2))
    before = one.student._core.flat.copy()
    a, b = one.step(*data()), parts.step(*data())
    assert a["loss_d"] == pytest.approx(b["loss_d"], rel=1e-5)
    assert a["loss_g"] == pytest.approx(b["loss_g"], rel=1e-4)
    moved = one.student._core.flat - before
    assert np.abs(moved).max() > 0
    assert np.abs(moved - (parts.student._core.flat - before)).max() < 2e-4 * np.abs(moved).max()


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_without_beta1_no_first_moment_is_kept_and_nothing_changes(clip: float) -> None:
    start = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    results = []
    for kept in (False, True):
        p, g = start.copy(), np.zeros_like(start)
        optimizer = common.AdamW([(p, g)], AdamWConfig(lr=1e-2, beta1=0.0, weight_decay=0.1, clip_norm=clip), "x")
        assert sorted(optimizer.state()[0]) == ["v0"]
        if kept:
            optimizer.m = [np.zeros_like(p)]
        for step in range(3):
            g[:] = np.random.default_rng(step).standard_normal(1000).astype(np.float32)
            optimizer.update()
        results.append((p, optimizer.v[0]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results, strict=True))
    assert sorted(common.AdamW([(p, g)], AdamWConfig(beta1=0.5), "x").state()[0]) == ["m0", "v0"]


def test_who_changes_and_who_does_not() -> None:
    t = trainer(**ALL_TERMS)
    teacher_before, student_before, heads_before = (m._core.flat.copy() for m in (t.teacher, t.student, t.discriminator))
    for i in range(3):
        t.step(*data(seed=i))
    assert np.array_equal(t.teacher._core.flat, teacher_before)
    assert not np.array_equal(t.student._core.flat, student_before)
    assert not np.array_equal(t.discriminator._core.flat, heads_before)
    averaged = t.ema_student()._core.flat_trainable
    assert not np.array_equal(averaged, t.student._core.flat_trainable)
    assert np.abs(averaged - t.student._core.flat_trainable).max() < np.abs(student_before[: averaged.size] - averaged).max() * 10


def test_discriminator_step_leaves_the_student_alone_and_the_reverse() -> None:
    t = trainer()
    student, heads = t.student._core.flat.copy(), t.discriminator._core.flat.copy()
    t.discriminator_step(*data())
    assert np.array_equal(t.student._core.flat, student)
    assert not np.array_equal(t.discriminator._core.flat, heads)
    heads = t.discriminator._core.flat.copy()
    t.student_step(*data())
    assert np.array_equal(t.discriminator._core.flat, heads)
    assert not np.array_equal(t.student._core.flat, student)


def test_misaligned_pairs_of_the_same_text_teach_nothing() -> None:
    plain = AdamWConfig(lr=1e-3, beta1=0.0, eps=1.0, clip_norm=0.0)
    z, context, pooled = data()
    alike = np.repeat(context[:1], len(z), 0), np.repeat(pooled[:1], len(z), 0)
    after = []
    for texts, weight in ((alike, 0.0), (alike, 1.0), ((context, pooled), 0.0), ((context, pooled), 1.0)):
        t = trainer(discriminator=plain, misaligned_weight=weight)
        t.discriminator_step(z, *texts)
        after.append(t.discriminator._core.flat.copy())
    assert np.array_equal(after[0], after[1])
    assert not np.array_equal(after[2], after[3])


def test_what_an_interrupted_step_left_does_not_reach_the_next() -> None:
    clean, dirty = trainer(), trainer()
    for model in (dirty.student, dirty.discriminator):
        model._core.flat_grad[:] = 3.0
    for t in (clean, dirty):
        t.step(*data())
    assert np.array_equal(clean.student._core.flat, dirty.student._core.flat)
    assert np.array_equal(clean.discriminator._core.flat, dirty.discriminator._core.flat)


def test_times_of_the_student_and_t_hat_are_independent() -> None:
    t = trainer(t_hat_mean=0.5, t_hat_std=0.8, warmup_iterations=1, warmup_times=(0.5,), warmup_probabilities=(1.0,))
    assert set(t._next_draws(64).t) == {0.5}
    t.iteration = 1
    draws = t._next_draws(20000)
    shares = {float(v): float((draws.t == v).mean()) for v in (1.0, 0.75, 0.5, 0.25)}
    assert shares == pytest.approx({1.0: 0.7, 0.75: 0.1, 0.5: 0.1, 0.25: 0.1}, abs=0.02)
    logits = np.log(draws.t_hat_fake / (1 - draws.t_hat_fake))
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.03)
    assert abs(float(np.corrcoef(logits, draws.t)[0, 1])) < 0.03
    assert np.array_equal(draws.t_hat_fake, draws.t_hat_real)


def test_noise_is_refused_as_real_latents() -> None:
    t = trainer()
    _, context, pooled = data(64)
    noise = np.random.default_rng(0).standard_normal((64, 4, 8, 8)).astype(np.float32)
    before = t.discriminator._core.flat.copy()
    with pytest.raises(ValueError, match="look like standard normal noise"):
        t.step(noise, context, pooled)
    assert np.array_equal(t.discriminator._core.flat, before)
    t.allow_noise_latents = True
    t.step(noise, context, pooled)


def test_bad_input_changes_nothing() -> None:
    t = trainer()
    z, context, pooled = data()
    before = {k: v.copy() for k, v in t.state()[0].items()}
    bad = z.copy()
    bad[0, 0, 0, 0] = np.nan
    for arguments, message in (
        ((bad, context, pooled), "finite"),
        ((z[:, :3], context, pooled), r"latents must have shape \[B, 4, H, W\]"),
        ((z[..., :-1], context, pooled), r"latents must have H and W that are multiples of patch_size = 2"),
        ((z, context[:3], pooled), "context must have shape"),
        ((z, context, pooled[:, :4]), "pooled must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            t.step(*arguments)
    for name, value in before.items():
        assert np.array_equal(value, t.state()[0][name]), name
    with pytest.raises(ValueError, match="needs noise="):
        trainer(pair_weight=1.0).step(z, context, pooled)
    with pytest.raises(ValueError, match="at least two pictures"):
        trainer(misaligned_weight=1.0).step(*data(1))


@pytest.mark.parametrize("times", ["start", "all"])
def test_pairs_start_from_the_noise_of_their_picture(times: str) -> None:
    z, context, pooled = data(8)
    noise = np.random.default_rng(5).standard_normal(z.shape).astype(np.float32)
    t = trainer(pair_weight=2.0, pair_times=times, student_times=(1.0, 0.5), student_probabilities=(0.5, 0.5))
    batch = t._batch(z, context, pooled, noise)
    part = t._parts(batch, t._next_draws(8))[0]
    t.passes = 0
    drawn = part.draws.t
    assert set(drawn.tolist()) == {1.0, 0.5}
    own = _core.renoise(z, drawn, 0, _purposes.STUDENT_NOISE, 0)
    line = (1 - drawn[:, None, None, None]) * z + drawn[:, None, None, None] * noise
    paired = (drawn == 1) | (times == "all")
    x_t = np.where(paired[:, None, None, None], line, own).astype(np.float32)
    x0 = x_t - drawn[:, None, None, None] * t.student(x_t, drawn, context, pooled)
    difference = (x0 - z)[paired]
    expected = float(np.square(difference, dtype=np.float64).sum() / z.size)
    assert t.step(z, context, pooled, noise=noise)["loss_pair"] == pytest.approx(expected, rel=1e-5)


def test_not_finite_gradients_are_named_and_not_applied() -> None:
    t = trainer()
    t.student._core.flat_trainable[0] = np.inf
    before = t.student._core.flat.copy()
    with pytest.raises((FloatingPointError, ValueError)):
        t.step(*data())
    assert np.array_equal(t.student._core.flat, before)


def test_parts_that_do_not_fit() -> None:
    t = trainer()
    with pytest.raises(ValueError, match="two models"):
        LADD(t.teacher, t.teacher, t.discriminator)
    narrow = ladd.Discriminator(ladd.DiscriminatorConfig(feature_dim=8, taps=(0,), pooled_dim=12, width=8))
    with pytest.raises(ValueError, match="feature_dim must be the teacher's width 16"):
        LADD(t.student, t.teacher, narrow)
    deep = ladd.Discriminator(ladd.DiscriminatorConfig(feature_dim=16, taps=(0, 7), pooled_dim=12, width=8))
    with pytest.raises(ValueError, match="below the teacher's 2 blocks"):
        LADD(t.student, t.teacher, deep)


def test_a_configuration_may_be_a_table() -> None:
    t = trainer()
    parts = t.student, t.teacher, t.discriminator
    assert LADD(*parts, {"student": {"lr": 0.5}}).config.student.lr == 0.5
    with pytest.raises(ValueError, match="unknown key 'los'; did you mean 'loss'"):
        LADD(*parts, {"los": "hinge"})
    with pytest.raises(TypeError, match="LADDConfig must be a table of keys and values, got int"):
        LADD(*parts, 3)  # type: ignore[arg-type]
    assert repr(t).startswith("<ladd.LADD of <ladd.MMDiT, ") and repr(t).endswith(", 0 updates>")


def test_load_refuses_what_does_not_belong(tmp_path: Path) -> None:
    t = trainer()
    t.step(*data())
    t.save(tmp_path / "state")
    other = trainer(t_hat_mean=0.0)
    with pytest.raises(ValueError, match="another configuration"):
        other.load(tmp_path / "state")
    stranger = trainer()
    stranger.teacher._core.flat[0] += 1
    with pytest.raises(ValueError, match="another teacher"):
        stranger.load(tmp_path / "state")
    described = tmp_path / "state" / "state.json"
    text, before = described.read_text(), t.student._core.flat.copy()
    described.write_text(text.replace('"passes"', '"passez"'))
    t.step(*data(seed=1))
    moved = t.student._core.flat.copy()
    with pytest.raises(ValueError, match="counters of 'counters' must be integers"):
        t.load(tmp_path / "state")
    assert np.array_equal(t.student._core.flat, moved)
    described.write_text(text)
    t.load(tmp_path / "state")
    assert np.array_equal(t.student._core.flat, before)
    weights = tmp_path / "state" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = t.student._core.flat.copy()
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        t.load(tmp_path / "state")
    assert np.array_equal(t.student._core.flat, before)


# ---- checkpoints and shards -----------------------------------------------------------------------------------------------------------

SAVER = """
import sys, itertools
from pathlib import Path
import numpy as np
from ladd.training import common
for n in itertools.count(1):
    common.save_state(Path(sys.argv[1]), ({"a": np.full(200_000, n, np.float32), "b": np.full(7, n, np.float32)}, {"n": n}), step=n)
    print(n, flush=True)
"""


def test_a_kill_at_any_instant_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    for i in range(8):
        path = tmp_path / f"run{i}" / "state"
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = int(process.stdout.readline())
        time.sleep(0.003 * i)
        os.kill(process.pid, signal.SIGKILL)
        said = max([said, *map(int, process.stdout.read().split())])
        process.wait()
        (arrays, counters), header = common.read_state(path)
        assert counters["n"] >= said
        assert header["step"] == counters["n"]
        assert (arrays["a"] == counters["n"]).all() and (arrays["b"] == counters["n"]).all()


def test_shards_resume_and_know_where_they_come_from(tmp_path: Path) -> None:
    origin = {"teacher": "abc", "guidance_scale": 3.0}
    z = smooth(6).astype(np.float16)
    writer = shards.ShardWriter(tmp_path, origin)
    writer.write({"latents": z[:4], "seed": np.arange(4)}, ["a"] * 4)
    (tmp_path / ".latents-00001.safetensors.tmp").write_bytes(b"half a file")  # what a kill leaves
    again = shards.ShardWriter(tmp_path, origin)
    assert again.count == 4
    again.write({"latents": z[4:], "seed": np.arange(4, 6)}, ["b"] * 2)
    with pytest.raises(ValueError, match=r"guidance_scale: 3\.0 there, 4\.0 here"):
        shards.ShardWriter(tmp_path, {**origin, "guidance_scale": 4.0})
    text = ladd.WordEncoder(["a", "b"], max_words=4, context_dim=12, pooled_dim=12)
    read = shards.LatentShards(tmp_path, text)
    assert len(read) == 6 and read.latent_shape == (4, 8, 8)
    batch = read.batch([5, 0])
    assert np.array_equal(batch.latents, z[[5, 0]].astype(np.float32))
    assert read.prompts([5, 0]) == ["b", "a"]
    read.check(teacher="abc")
    with pytest.raises(ValueError, match="does not fit this run"):
        read.check(teacher="xyz")
    with pytest.raises(ValueError, match="text encoder is needed"):
        shards.LatentShards(tmp_path)
    file = tmp_path / "latents-00001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a readable shard"):
        shards.LatentShards(tmp_path, text)


class Counter:
    """The least that a run can train."""

    def __init__(self) -> None:
        self.value = np.zeros(3, np.float32)

    def state(self) -> common.State:
        return {"value": self.value}, {"counter": {"n": int(self.value[0])}}

    def load_state(self, state: common.State) -> None:
        self.value[:] = state[0]["value"]


def test_a_killed_run_goes_on_after_its_last_checkpoint(tmp_path: Path) -> None:
    settings = distill.LADDRun(steps=10, checkpoint_every=4)

    def go(resume: bool, stop_before: int = 99, **changes: Any) -> common.Run:
        chosen = dataclasses.replace(settings, **changes)
        book, model = common.Run(tmp_path, {"run": chosen}, chosen, resume=resume, shown=()), Counter()
        book.restore(model)
        for step in book:
            if step == stop_before:
                break
            model.value += 1
            book.log(step, {"value": float(model.value[0])})
            book.checkpoint(step, model)
        return book

    go(resume=False, stop_before=7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "val')  # the line during which the run was killed
    (tmp_path / ".step-00000008.tmp").mkdir()
    with pytest.raises(FileExistsError, match="already holds a run"):
        go(resume=False)
    with pytest.raises(ValueError, match=r"run\.batch: 32 -> 16"):
        go(resume=True, batch=16)
    assert go(resume=True).first == 5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in lines] == [(n, float(n)) for n in range(1, 11)]
    assert [p.name for p in common.checkpoints(tmp_path)] == ["step-00000008", "step-00000010"]
    assert not (tmp_path / ".step-00000008.tmp").exists()


RUN_HEADER: dict[str, Any] = {"config": {}, "step": 4, "steps": 0, "max_minutes": 0, "counters": {"counter": {"n": 1}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not a readable checkpoint: .* is not valid JSON"),
        ("\udcff", "not a readable checkpoint: .* is not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        (json.dumps({**RUN_HEADER, "counters": 3}), "counters must be a table, got 3"),
        (json.dumps({**RUN_HEADER, "counters": {}}), "the counters of 'counter' must be integers"),
        (json.dumps({**RUN_HEADER, "config": []}), r"not the checkpoint of a run: config is \[\]"),
        (json.dumps({**RUN_HEADER, "config": {"run": 1}}), "its config must hold tables"),
        (json.dumps({**RUN_HEADER, "step": "4"}), "step is '4'"),
        (json.dumps({k: v for k, v in RUN_HEADER.items() if k != "max_minutes"}), "max_minutes is None"),
    ],
)
def test_a_checkpoint_whose_header_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    settings = distill.LADDRun(steps=10)
    model, path = Counter(), tmp_path / "step-00000004"
    common.save_state(path, model.state())
    (path / "state.json").write_text(text, errors="surrogateescape")
    book = common.Run(tmp_path, {}, settings, resume=True, shown=())
    with pytest.raises(ValueError, match=message):
        book.restore(model)
    assert not model.value.any() and book.first == 1


@pytest.mark.parametrize(
    ("arrays", "prompts", "message"),
    [
        ({"extra": np.array(3.0, np.float32)}, '["a", "a"]', r"extra must have 2 rows as the index says, got shape \[\]"),
        ({"context": np.zeros((2, 5), np.float32), "pooled": np.zeros((2, 3), np.float32)}, "[]", r"got context \[2, 5\]"),
        ({}, '{"a": 1}', "prompts must be a list of strings, got \"{'a': 1}\""),
        ({}, "[1, 2]", "prompts must be a list of strings"),
        ({}, "[" * 100_000, "not a readable shard"),
        ({"context": np.zeros((2, 4, 12), np.float32), "pooled": np.zeros((2, 12), np.float32)}, "[]", "they are of two kinds"),
    ],
)
def test_shards_of_another_form(tmp_path: Path, arrays: dict[str, Array], prompts: str, message: str) -> None:
    from safetensors.numpy import save_file

    shards.ShardWriter(tmp_path, {}).write({"latents": smooth(2)}, ["a", "a"])
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"].append({"file": "other.safetensors", "count": 2})
    (tmp_path / "index.json").write_text(json.dumps(index))
    save_file({"latents": smooth(2), **arrays}, tmp_path / "other.safetensors", {"prompts": prompts})
    with pytest.raises(ValueError, match=message):
        shards.LatentShards(tmp_path, ladd.WordEncoder(["a"], max_words=4, context_dim=12, pooled_dim=12))


def test_the_bar_shows_what_was_asked_for_and_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]
        def set_postfix(self, values: Any, refresh: bool = True) -> None:
            shown.append(values)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    settings = distill.LADDRun(steps=2, batch=50)
    book, model = common.Run(tmp_path, {"run": settings}, settings, resume=False, shown=("loss_d", "logit_gap")), Counter()
    book.restore(model)
    for step in book:
        time.sleep(0.05)
        book.log(step, {"loss_d": 2.0, "loss_g": 1.0, "logit_gap": 0.125})
    assert [list(values) for values in shown] == [["loss_d", "logit_gap", "samples/s"]] * 2
    assert shown[0]["logit_gap"] == "0.125" and 0 < float(shown[1]["samples/s"]) <= 1000
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert line["samples_per_second"] == pytest.approx(50 / line["seconds"], rel=1e-2) and line["loss_g"] == 1.0


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_saves_the_step_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, presses: int) -> None:
    settings = distill.LADDRun(steps=9, checkpoint_every=100, max_minutes=5)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a machine's runner may have it ignored

    def go(stop_at: int) -> int:
        book, model = common.Run(tmp_path, {"run": settings}, settings, resume=True, shown=()), Counter()
        book.restore(model)
        for step in book:
            if step == stop_at:
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
            model.value += 1
            book.log(step, {})
            book.checkpoint(step, model)
        assert model.value[0] == 9
        return book.first

    try:
        with pytest.raises(KeyboardInterrupt):
            go(stop_at=3)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        saved = [p.name for p in common.checkpoints(tmp_path)]
        message = capfd.readouterr().err
        assert "interrupted: this step ends and is saved" in message
        if presses == 1:
            assert saved == ["step-00000003"] and f"step 3 of 9 is saved in {tmp_path / saved[0]}: resume" in message
            assert go(stop_at=0) == 4
        else:
            assert saved == [] and go(stop_at=0) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_distillation_warns_of() -> None:
    def said(steps: int, latents: int, **metrics: float) -> list[str]:
        watch = watching.Watch(latents, 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, steps + 1):
                watch(step, {"logit_gap": 0.02, "saturated": 0.01, **metrics})
        return [str(w.message) for w in caught]

    assert said(600, 1000) == []
    assert [text[:42] for text in said(600, 10)] == ["each of the 10 latents has been seen 100 t"]
    assert said(499, 1000, logit_gap=0.001) == []
    assert [text[:38] for text in said(600, 1000, logit_gap=0.001)] == ["the heads do not tell real from fake: "]
    assert [text[:29] for text in said(200, 1000, saturated=0.95)] == ["the discriminator has won: 95"]


def test_settings_without_effect_are_named() -> None:
    config = {"ladd": {"r1_interval": 4, "pair_times": "all", "seed": 1}, "discriminator": {"norm": "none", "num_groups": 4}}
    heads = ladd.DiscriminatorConfig(feature_dim=16, taps=(0,), pooled_dim=4, norm="none", num_groups=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distill._warn_unused(config, ladd.LADDConfig(r1_interval=4, pair_times="all"), heads)
        distill._warn_unused(config, ladd.LADDConfig(r1_interval=4, r1_weight=1, pair_times="all", pair_weight=1), heads)
    assert [str(w.message) for w in caught] == [
        "ladd.r1_interval has no effect: ladd.r1_weight is 0",
        "ladd.pair_times has no effect: ladd.pair_weight is 0",
        *['discriminator.num_groups has no effect: discriminator.norm is "none"'] * 2,
    ]


def test_a_time_budget_plans_the_steps_once(tmp_path: Path) -> None:
    settings = distill.LADDRun(steps=1000, checkpoint_every=5, max_minutes=0.3 / 60)

    def go(stop_before: int = 9999) -> int:
        book, model = common.Run(tmp_path, {"run": settings}, settings, resume=True, shown=()), Counter()
        book.restore(model)
        for step in book:
            if step == stop_before:
                break
            time.sleep(0.005)
            model.value += 1
            book.log(step, {})
            book.checkpoint(step, model)
        return book.steps

    planned = go(stop_before=18)
    assert common.Run.PROBE < planned < 100
    assert go() == planned
    assert common.checkpoints(tmp_path)[-1].name == f"step-{planned:08d}"


def test_rows_of_an_epoch_come_once() -> None:
    rows = np.concatenate([shards.epoch_rows(10, 4, 3, step) for step in range(1, 6)])
    assert sorted(rows[:10]) == list(range(10)) and sorted(rows[10:]) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:])


# ---- the chain of runs ----------------------------------------------------------------------------------------------------------------

RUN = {"batch": 3, "decay_share": 0.0, "checkpoint_every": 1, "sample_every": 2}


def states(folder: Path) -> dict[str, Array]:
    (arrays, _), _ = common.read_state(common.checkpoints(folder)[-1])
    return arrays


def both_ways(module: Any, config: dict[str, Any], out: Path) -> Any:
    """Runs four steps at once, and two plus two, and compares the last checkpoints."""

    def with_steps(n: int) -> dict[str, Any]:
        return {**config, "run": {**config["run"], "steps": n}}

    result = module.run(with_steps(4), out=out / "whole")
    module.run(with_steps(2), out=out / "parts")
    module.run(with_steps(4), out=out / "parts", resume=True)
    expected, found = states(out / "whole"), states(out / "parts")
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.array_equal(expected[name], found[name]), name
    with pytest.raises(FileExistsError, match="already holds a run"):
        module.run(with_steps(4), out=out / "whole")
    lines = (out / "parts" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert module.run(with_steps(4), out=out / "nothing", dry_run=True) is None
    assert not (out / "nothing").exists()
    return result


def test_the_whole_chain_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADD_CACHE", str(tmp_path / "cache"))
    adam = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99}
    vae = both_ways(autoencoder, {"model": VAE, "optimizer": adam, "run": {**RUN, "statistics_views": 8}}, tmp_path / "ae")
    pipeline = both_ways(
        teacher,
        {
            "data": {"autoencoder": str(vae), "views": 12},
            "model": {**MMDIT, "pos_embed_max_size": 16},
            "text": TEXT,
            "optimizer": adam,
            "run": RUN,
        },
        tmp_path / "teacher",
    )
    settings = {"teacher": str(pipeline), "count": 10, "batch": 2, "shard": 4, "steps": 2, "guidance_scale": 2.0}
    folder = generate.run({"run": settings}, out=tmp_path / "latents")
    assert folder is not None
    generate.run({"run": {**settings, "count": 4}}, out=tmp_path / "again")
    generate.run({"run": settings}, out=tmp_path / "again")
    encoder = ladd.Pipeline.from_pretrained(pipeline, model="teacher").text
    one, two = (shards.LatentShards(f, encoder) for f in (folder, tmp_path / "again"))
    assert len(one) == len(two) == 10
    assert one.prompts(range(10)) == two.prompts(range(10))
    assert np.array_equal(one.rows("latents", range(10)), two.rows("latents", range(10)))
    other_batch = generate.run({"run": {**settings, "batch": 4}}, out=tmp_path / "fours")
    assert other_batch is not None
    assert shards.LatentShards(other_batch, encoder).prompts(range(10)) == one.prompts(range(10))
    several = generate.run({"run": {**settings, "guidance_scale": [2.0, 4.0]}}, out=tmp_path / "several")
    assert several is not None
    mixed = shards.LatentShards(several, encoder)
    scales = mixed.rows("guidance_scale", range(10))
    assert mixed.provenance["guidance_scale"] == [2.0, 4.0] and set(scales) == {2.0, 4.0}
    assert np.array_equal(scales, generate.GenerateRun(guidance_scale=(2.0, 4.0)).scales(range(10)))
    same = [i for i in range(10) if scales[i] == 2.0]
    np.testing.assert_allclose(mixed.rows("latents", same), one.rows("latents", same), atol=2e-3)
    other = [i for i in range(10) if scales[i] == 4.0]
    assert other and all(not np.array_equal(mixed.rows("latents", [i]), one.rows("latents", [i])) for i in other)
    with pytest.warns(UserWarning, match=r'run.steps, run.guidance_scale have no effect: run.source is "drawings"'):
        drawings = generate.run({"run": {**settings, "source": "drawings"}}, out=tmp_path / "drawings")
    assert drawings is not None
    real = shards.LatentShards(drawings, encoder)
    assert real.prompts(range(10)) == one.prompts(range(10)) and real.latent_shape == one.latent_shape
    assert not np.array_equal(real.rows("latents", range(10)), one.rows("latents", range(10)))
    with pytest.raises(ValueError, match="another origin"), pytest.warns(UserWarning, match="no effect"):
        generate.run({"run": {**settings, "source": "drawings"}}, out=folder)
    for scale, given in (([], "[]"), ([2.0, 0.5], "[2.0, 0.5]"), (0, "0"), ("3", "'3'")):
        with pytest.raises(
            ValueError, match=r"guidance_scale must be a number of at least 1 \(off\) or a list of them, got " + re.escape(given)
        ):
            generate.run({"run": {**settings, "guidance_scale": scale}}, out=tmp_path / "none", dry_run=True)
    config = {
        "data": {"teacher": str(pipeline), "latents": str(folder), "allow_noise_latents": True},
        "ladd": {"student": {"lr": 1e-3}, "pair_weight": 0.1},
        "discriminator": {"width": 8, "num_groups": 2, "condition_dim": 4}, "run": RUN,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "teacher" / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [[line[f"loss_{name}"] for name in ("seen", "heldout_base", "heldout_combination")] for line in lines if "loss_seen" in line]
    assert len(losses) == 2 and 0.3 < np.min(losses) and np.max(losses) < 10 and len(set(losses[1])) == 3
    result = both_ways(distill, config, tmp_path / "ladd")
    with pytest.raises(ValueError, match="holds encoded drawings"):
        distill.run({**config, "data": {**config["data"], "latents": str(drawings)}}, out=tmp_path / "y")
    student = ladd.Pipeline.from_pretrained(result, model="student")
    images = student(["red apple", "cat face"], steps=1, seed=[5, 6]).images
    alone = student("cat face", steps=1, seed=6).images
    difference = np.asarray(images[1], np.int16) - np.asarray(alone[0], np.int16)
    assert np.abs(difference).max() <= 1  # alone and in a batch: the same up to rounding
    assert (tmp_path / "ladd" / "whole" / "samples" / "step-00000004.png").exists()
    with pytest.raises(ValueError, match="unknown key 'stepz'"):
        distill.run({**config, "run": {**RUN, "stepz": 1}}, out=tmp_path / "x")
