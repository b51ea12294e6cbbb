"""A whole step of the autoencoder's and of the teacher's trainer against float64, and the distributions the teacher draws from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support
from oracle import autodiff as ad
from oracle import mmdit, philox, vae
from support import normal

import ladd
from ladd import _purposes, text
from ladd.config import AdamWConfig
from ladd.data import openmoji
from ladd.training import autoencoder, common, teacher

Array = np.ndarray
PLAIN = AdamWConfig(lr=0.0, clip_norm=0.0)


def gradients(flat: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """The tensors of a flat buffer, which lie one after the other."""
    out, at = {}, 0
    for name, shape in shapes.items():
        out[name] = flat[at : at + int(np.prod(shape))].reshape(shape)
        at += out[name].size
    assert at == flat.size
    return out


def check(found: dict[str, Array], leaves: dict[str, ad.Tensor]) -> None:
    wanted = {name: np.zeros(leaves[name].shape) if leaves[name].grad is None else leaves[name].grad for name in found}
    floor = 1e-4 * max(np.abs(g).max() for g in wanted.values() if g is not None)
    for name, value in found.items():
        support.assert_close(value, wanted[name], support.BACKWARD, f"gradient of {name}", floor)


def absolute(x: ad.Tensor) -> ad.Tensor:
    return ad.relu(x) + ad.relu(-x)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1e-2), (0.5, 0.0, 2.0, 1.0), (0.0, 0.3, 0.1, 0.0)], ids=str)
def test_a_step_of_the_autoencoder_equals_float64(weights: tuple[float, float, float, float]) -> None:
    """KL and the three terms of the reconstruction: values, and the gradient of every parameter of encoder and decoder."""
    l1, gradient, mse, kl = weights
    config = support.vae_config(block_out_channels=(8, 12), layers_per_block=1)
    model = ladd.AutoencoderKL(config, seed=4)
    model._core.flat_trainable[:] += np.float32(0.05) * normal(5, model._core.flat_trainable.size)
    model._core.tensors()["encoder.conv_out.bias"][config["latent_channels"]] = -60  # beyond the range of log variances
    run = autoencoder.AutoencoderRun(seed=3, l1_weight=l1, gradient_weight=gradient, mse_weight=mse, kl_weight=kl)
    images = np.tanh(normal(6, 2, 3, 8, 12))
    leaves = support.leaves(model.state_dict())
    moments = vae.encode(config, leaves, ad.Tensor(images))
    c = config["latent_channels"]
    mean, logvar = moments[:, :c], ad.clip(moments[:, c:], -30.0, 20.0)
    noise = philox.normal(mean.shape, 3, _purposes.VAE_POSTERIOR, 7, np.arange(2)).astype(np.float64)
    difference = vae.decode(config, leaves, mean + ad.exp(logvar * 0.5) * noise) - images
    loss = absolute(difference).mean() * l1 + (difference**2.0).mean() * mse
    rows, columns = difference[:, :, 1:] - difference[:, :, :-1], difference[..., 1:] - difference[..., :-1]
    loss = loss + (absolute(rows).mean() + absolute(columns).mean()) * gradient
    divergence = (mean**2.0 + ad.exp(logvar) - 1.0 - logvar).mean() * 0.5
    (loss + divergence * kl).backward()

    trainer = autoencoder.AutoencoderTrainer(model, PLAIN, run)
    metrics = trainer.step(images, 7)
    assert metrics["loss"] == pytest.approx(float(loss.data), rel=1e-5)
    assert metrics["kl"] == pytest.approx(float(divergence.data), rel=1e-5)
    core = model._core
    check(gradients(trainer.optimizer.buffers[0][1], {n: core.tensors()[n].shape for n in core.trainable_names()}), leaves)


def test_latents_of_the_finished_autoencoder_have_mean_0_and_deviation_1(tmp_path: Any) -> None:
    model = ladd.AutoencoderKL(support.vae_config(), seed=4)
    views = openmoji.Views(seed=1)
    run = autoencoder.AutoencoderRun(statistics_views=96)
    folder = autoencoder.finish(model, views, run, tmp_path / "vae")
    latents = ladd.AutoencoderKL.from_pretrained(folder).encode(views.batch(50, 96)[0], sample=True, seed=list(range(96)))
    assert abs(float(latents.mean())) < 0.05 and abs(float(latents.std()) - 1) < 0.05


def test_a_broken_bank_of_latents_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "cache_folder", lambda: tmp_path)
    made: list[int] = []

    def encode(vae: Any, views: Any, count: int) -> tuple[Array, list[str]]:
        made.append(count)
        return np.full((count, 4, 2, 2), 0.5, np.float16), ["red cat"] * count

    monkeypatch.setattr(teacher, "encode_views", encode)
    model, data = ladd.AutoencoderKL(support.vae_config()), teacher.TeacherData(views=6)

    def bank() -> int:
        latents, texts = teacher.latent_bank(model, data, 0, 64)
        assert latents.shape == (6, 4, 2, 2) and texts == ["red cat"] * 6
        return len(made)

    assert [bank(), bank()] == [1, 1]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"PK", np.ones(3).tobytes()):
        path.write_bytes(broken)
        before = len(made)
        assert [bank(), bank()] == [before + 1, before + 1]


WORDS = ("cat", "dog", "red", "sky")
MMDIT = support.mmdit_config(num_layers=2, qk_norm="rms_norm", joint_attention_dim=12, pooled_projection_dim=10)


def make_teacher(pooled: int = 10, **settings: Any) -> teacher.TeacherTrainer:
    model = ladd.MMDiT({**MMDIT, "pooled_projection_dim": pooled})
    model.load_state_dict({**model.state_dict(), **support.seeded_weights(mmdit.parameter_shapes(dict(model.config.to_dict())), 21)})
    words = ladd.WordEncoder(WORDS, max_words=4, context_dim=12, pooled_dim=pooled, seed=2)
    return teacher.TeacherTrainer(model, words, PLAIN, teacher.TeacherRun(seed=5, **settings))


@pytest.mark.parametrize("pooled", [10, 12], ids=["own table for pooled text", "one table"])
def test_a_step_of_the_teacher_equals_float64(pooled: int) -> None:
    """Velocity's squared error, the gradient of every parameter of the transformer and of the word vectors, dropped captions included."""
    trainer = make_teacher(pooled, text_dropout=0.5, time_mean=0.3, time_std=0.7)
    z, ids = normal(1, 5, 4, 6, 8), trainer.text.ids(["red cat", "dog", "blue sky", "red red dog sky", "cat"])
    step, seed = 9, 5
    dropped = _purposes.generator(seed, _purposes.TEXT_DROP, step).random(5) < 0.5
    assert 0 < dropped.sum() < 5
    shown = np.where(dropped[:, None], [[text.EMPTY, *[text.PADDING] * 3]], ids)
    t = 1 / (1 + np.exp(-(0.3 + 0.7 * _purposes.generator(seed, _purposes.TIMES, step).standard_normal(5))))
    t = t.astype(np.float32)
    noise = philox.normal(z.shape, seed, _purposes.TEACHER_NOISE, step, np.arange(5)).astype(np.float64)
    words, leaves = support.leaves(trainer.text.state_dict()), support.leaves(trainer.model.state_dict())
    one_hot = np.eye(len(WORDS) + len(text.SPECIAL))[shown]
    real = (shown != text.PADDING)[:, :, None]
    context = ad.Tensor(one_hot) @ words["word_embedding.weight"] + words["position_embedding.weight"]
    table = words.get("pooled_embedding.weight", words["word_embedding.weight"])
    vector = ad.Tensor((one_hot * real).sum(axis=1) / real.sum(axis=1)) @ table
    row = t.astype(np.float64)[:, None, None, None]
    x_t = ad.Tensor((1 - row) * z + row * noise)
    config = trainer.model.config.to_dict()
    loss = ((mmdit.forward(config, leaves, x_t, t, context, vector) - (noise - z)) ** 2.0).mean()
    loss.backward()

    assert trainer.step(z, ids, step)["loss"] == pytest.approx(float(loss.data), rel=1e-5)
    core = trainer.model._core
    check(gradients(trainer.optimizer.buffers[0][1], {n: core.tensors()[n].shape for n in core.trainable_names()}), leaves)
    check(gradients(trainer.optimizer.buffers[1][1], {n: w.shape for n, w in words.items()}), words)


def test_times_are_logit_normal_and_a_share_of_captions_is_dropped() -> None:
    trainer, seen = make_teacher(text_dropout=0.1, time_mean=0.5, time_std=0.8), []

    def forward(x_t: Array, t: Array, context: Array, pooled: Array, keep: bool) -> tuple[Array, Any]:
        seen.extend((t, context))
        raise StopIteration

    trainer.model = SimpleNamespace(_array=lambda a, *_: a, _core=SimpleNamespace(forward=forward))  # type: ignore[assignment]
    count = 20_000
    with pytest.raises(StopIteration):
        trainer.step(np.zeros((count, 1, 1, 1), np.float32), np.repeat(trainer.text.ids(["red cat"]), count, axis=0), 1)
    times, context = seen
    logits = np.log(times / (1 - times.astype(np.float64)))
    assert logits.mean() == pytest.approx(0.5, abs=0.03) and logits.std() == pytest.approx(0.8, abs=0.03)
    empty = (context == trainer.text.encode([""])[0]).all(axis=(1, 2))
    assert empty.mean() == pytest.approx(0.1, abs=0.01)
    assert abs(np.corrcoef(empty, logits)[0, 1]) < 0.03


def test_the_rate_falls_along_half_a_cosine() -> None:
    assert [common.cosine_tail(step, 100, 0.4) for step in (1, 60)] == [1.0, 1.0]
    assert [common.cosine_tail(step, 100, 0.4) for step in (70, 80, 100)] == pytest.approx([0.5 + 0.5 * 0.5**0.5, 0.5, 0.0])
    assert [common.cosine_tail(step, 100, tail) for step, tail in ((50, 1.0), (100, 0.0))] == pytest.approx([0.5, 1.0])
