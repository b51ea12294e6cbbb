"""Whole models, samplers and training steps on a device, against the same on the CPU.

float32: relative error (of norms) of 3e-6 forward and 2e-5 backward, where sums are taken in another order. bfloat16 keeps 8 bits of a
number: some forty layers in a row each round their result by up to 2^-9, together some 2^-9 * sqrt(40) = 1.2e-2, and cancellation doubles
it: 4e-2 forward, 8e-2 backward; float16 keeps 11: an eighth of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cuda_device
import numpy as np
import pytest
import support
from cuda_device import needs_device
from oracle import mmdit
from support import mmdit_config, normal
from test_ladd_step import ADAMW, DISC, MMDIT, data
from tiny import tiny_pipeline

import ladd
from ladd.config import LADDConfig
from ladd.training import autoencoder, teacher

pytestmark = needs_device

FORWARD = {"float32": 3e-6, "bfloat16": 4e-2, "float16": 5e-3}
BACKWARD = {"float32": 2e-5, "bfloat16": 8e-2, "float16": 1e-2}
VAE = ladd.AutoencoderKLConfig(latent_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)


@pytest.fixture(autouse=True)
def opened() -> ladd.device.Device:
    return cuda_device.device()


def host(x: Any) -> np.ndarray:
    return ladd.device.to_host(x)


def assert_near(got: Any, wanted: Any, tolerance: float, what: str) -> None:
    got, wanted = host(got).astype(np.float64), host(wanted).astype(np.float64)
    assert got.shape == wanted.shape, what
    error = np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-20)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.1e}"


def transformers(dtype: str, seed: int = 21, config: dict[str, Any] = MMDIT) -> tuple[ladd.MMDiT, ladd.MMDiT]:
    """The same weights on the CPU and on the device."""
    on_cpu, there = ladd.MMDiT(config), ladd.MMDiT(config, device="cuda", dtype=dtype)
    weights = {**on_cpu.state_dict(), **support.seeded_weights(mmdit.parameter_shapes(config), seed)}
    on_cpu.load_state_dict(weights)
    there.load_state_dict(weights)
    return on_cpu, there


def test_the_same_initial_values() -> None:
    for make in (
        lambda **place: ladd.MMDiT(MMDIT, seed=3, **place),
        lambda **place: ladd.Discriminator(ladd.DiscriminatorConfig(**DISC), seed=3, **place),
        lambda **place: ladd.AutoencoderKL(VAE, seed=3, **place),
    ):
        here, there = make(), make(device="cuda", dtype="bfloat16")
        assert there.device == "cuda:0" and there.dtype == "bfloat16" and "bfloat16 on cuda:0" in repr(there)
        twin = there.copy().state_dict()
        for name, value in here.state_dict().items():
            assert np.array_equal(value, there.state_dict()[name]) and np.array_equal(value, twin[name]), name


@pytest.mark.parametrize("dtype", ladd.device.DTYPES)
@pytest.mark.parametrize("taps", [None, (0, 2)])
def test_transformer(dtype: str, taps: tuple[int, ...] | None) -> None:
    here, there = transformers(dtype)
    z, y, p = data()
    outputs = [model.vjp(z, [0.2, 0.5, 0.9], y, p, taps=taps) for model in (here, there)]
    pairs = list(zip(*(out if taps else [out] for out, _ in outputs)))
    for i, (wanted, got) in enumerate(pairs):
        assert isinstance(got, ladd.DeviceArray) and got.dtype == dtype
        assert_near(got, wanted, FORWARD[dtype], f"output {i}")
    cotangents = [normal(50 + i, *wanted.shape) for i, (wanted, _) in enumerate(pairs)]
    (wanted, got) = (pullback(cotangents if taps else cotangents[0]) for _, pullback in outputs)
    for name in ("latents", "context", "pooled"):
        assert_near(getattr(got, name), getattr(wanted, name), BACKWARD[dtype], f"gradient of {name}")
    assert_near(there.flat_grad, here.flat_grad, BACKWARD[dtype], "gradients of the parameters")
    if dtype == "float32":
        for name, value in here.gradients().items():
            if np.linalg.norm(value):
                assert_near(there.gradients()[name], value, 1e-4, name)
    there.zero_grad()
    assert not host(there.flat_grad).any()
    assert there.plan(3, 8, 6, 5, keep=True) < here.plan(3, 8, 6, 5, keep=True) or dtype == "float32"


@pytest.mark.parametrize("dtype", ladd.device.DTYPES)
def test_written_weights_count_at_once(dtype: str) -> None:
    """Through tensors(), flat views, the optimizer and DLPack alike: no stale working copy."""
    _, there = transformers(dtype)
    z, y, p = data()

    def velocity() -> np.ndarray:
        return host(there(z, 0.5, y, p))

    before = velocity()
    there.flat[:] = host(there.flat) * np.float32(1.5)
    after = velocity()
    assert not np.array_equal(before, after)
    there._core.tensors()["proj_out.weight"][...] = 0
    there._core.tensors()["proj_out.bias"][...] = 0
    assert not velocity().any()
    there.load_state_dict({**there.state_dict(), "proj_out.bias": np.ones_like(there.state_dict()["proj_out.bias"])})
    assert np.array_equal(velocity(), np.ones_like(before))


@pytest.mark.parametrize("dtype", ladd.device.DTYPES)
def test_heads(dtype: str) -> None:
    config = ladd.DiscriminatorConfig(**DISC)
    here, there = ladd.Discriminator(config, seed=5), ladd.Discriminator(config, seed=5, device="cuda", dtype=dtype)
    features = [normal(i, 3, 12, 16) for i in range(2)]
    pooled, sigma = normal(9, 3, 10), [0.1, 0.6, 0.8]
    (wanted, pull_wanted), (got, pull_got) = (d.vjp(features, sigma, pooled, grid=(4, 3), update_u=True) for d in (here, there))
    for i in range(2):
        assert_near(got[i], wanted[i], FORWARD[dtype], f"logits {i}")
    cotangent = [normal(20 + i, 3, 4, 3) for i in range(2)]
    for i, (a, b) in enumerate(zip(pull_got(cotangent), pull_wanted(cotangent))):
        assert_near(a, b, BACKWARD[dtype], f"gradient of features {i}")
    assert_near(there.flat_grad, here.flat_grad, BACKWARD[dtype], "gradients of the parameters")
    for name, value in here.state_dict().items():
        if name.endswith("_u"):
            assert_near(there.state_dict()[name], value, 1e-5, name)


@pytest.mark.parametrize("dtype", ladd.device.DTYPES)
def test_autoencoder(dtype: str) -> None:
    here, there = ladd.AutoencoderKL(VAE, seed=4), ladd.AutoencoderKL(VAE, seed=4, device="cuda", dtype=dtype)
    images = np.tanh(normal(3, 2, 3, 16, 16))
    assert_near(there.encode(images, sample=True, seed=1), here.encode(images, sample=True, seed=1), FORWARD[dtype], "latents")
    latents = host(here.encode(images))
    assert_near(there.decode(latents), here.decode(latents), FORWARD[dtype], "pictures")
    assert_near(there.decode(ladd.device.as_array(latents, "z", device=cuda_device.device())), here.decode(latents), FORWARD[dtype], "again")
    (wanted, pull_wanted), (got, pull_got) = (v.vjp(images, sample=True, seed=2) for v in (here, there))
    assert_near(got.images, wanted.images, FORWARD[dtype], "reconstruction")
    cotangent = normal(5, *wanted.images.shape)
    assert_near(pull_got(cotangent), pull_wanted(cotangent), BACKWARD[dtype], "gradient of the images")
    assert_near(there.flat_grad, here.flat_grad, BACKWARD[dtype], "gradients of the parameters")


def trainers(dtype: str, **changes: Any) -> tuple[ladd.LADD, ladd.LADD]:
    made = []
    (s0, s1), (t0, t1) = transformers(dtype, 22), transformers(dtype, 21)
    for student, judge, place in ((s0, t0, {}), (s1, t1, {"device": "cuda", "dtype": dtype})):
        heads = ladd.Discriminator(ladd.DiscriminatorConfig(**DISC), seed=5, **place)
        config = LADDConfig(**{"seed": 77, "student": ADAMW, "discriminator": ADAMW, "share_t_hat": False, **changes})
        made.append(ladd.LADD(student, judge, heads, config))
    return made[0], made[1]


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro batches": {"micro_batch": 2},
    "all terms": {"misaligned_weight": 0.5, "distillation_weight": 0.7, "pair_weight": 0.4, "r1_weight": 0.3, "r1_interval": 1, "d_steps": 2},
}


@pytest.mark.parametrize("name", STEPS)
def test_ladd_step(name: str, tmp_path: Path) -> None:
    here, there = trainers("float32", **STEPS[name])
    z, y, p = data()
    noise = {"noise": normal(30, *z.shape)} if "pair_weight" in STEPS[name] else {}
    frozen = host(there.teacher.flat).copy()
    for _ in range(2):
        wanted, got = here.step(z, y, p, **noise), there.step(z, y, p, **noise)
        assert wanted.keys() == got.keys()
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key
    assert_near(there.student.flat, here.student.flat, 1e-5, "student")
    assert_near(there.discriminator.flat, here.discriminator.flat, 1e-5, "heads")
    assert_near(there.ema_student().flat, here.ema_student().flat, 1e-5, "average")
    assert np.array_equal(host(there.teacher.flat), frozen)
    there.save(tmp_path / "saved")
    again = trainers("float32", **STEPS[name])[1]
    again.load(tmp_path / "saved")
    assert again.step(z, y, p, **noise) == there.step(z, y, p, **noise)
    assert np.array_equal(host(again.student.flat), host(there.student.flat)), "resume is exact to the bit"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ladd_step_in_16_bits(dtype: str) -> None:
    here, there = trainers(dtype)
    z, y, p = data()
    put = [ladd.device.as_array(a, "batch", device=cuda_device.device(), dtype=dtype) for a in (z, y, p)]
    start = here.student.flat.copy()
    wanted, got = here.step(z, y, p), there.step(*put)
    for key in ("loss_d", "loss_g", "logit_real", "logit_fake"):
        assert got[key] == pytest.approx(wanted[key], rel=5e-2, abs=2e-2), key
    moved = host(there.student.flat) - start
    direction = here.student.flat - start
    cosine = float(moved @ direction / (np.linalg.norm(moved) * np.linalg.norm(direction)))
    assert cosine > 0.97, f"the step goes where the CPU's goes; cosine {cosine:.3f}"


def test_parts_on_different_devices() -> None:
    here, there = trainers("float32")
    with pytest.raises(ValueError, match="student, teacher and discriminator must be on one device in one dtype"):
        ladd.LADD(there.student, here.teacher, there.discriminator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["euler", "renoise"])
def test_sampling(dtype: str, method: str) -> None:
    here, there = transformers(dtype)
    _, y, p = data()
    options: dict[str, Any] = {
        "size": (8, 6),
        "steps": 2,
        "method": method,
        "guidance_scale": 2.0,
        "negative": (y[:1], p[:1]),
        "seeds": [3, 4, 5],
    }
    wanted, got = ladd.sample(here, y, p, **options), ladd.sample(there, y, p, **options)
    assert isinstance(got, ladd.DeviceArray) and got.dtype == "float32"
    assert_near(got, wanted, FORWARD[dtype], "latents")
    put = [ladd.device.as_array(a, "text", device=cuda_device.device()) for a in (y, p)]
    assert np.array_equal(host(ladd.sample(there, *put, **options)), host(got)), "text may be on the device"


def test_pipeline(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "pipeline")
    here, there = ladd.Pipeline.from_pretrained(folder), ladd.Pipeline.from_pretrained(folder, device="cuda")
    wanted, got = (pipe(["red heart", "cat"], steps=2, seed=3) for pipe in (here, there))
    assert isinstance(got.latents, np.ndarray)
    assert_near(got.latents, wanted.latents, 1e-5, "latents")
    for a, b in zip(got.images, wanted.images):
        assert np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max() <= 1
    there.model.save_pretrained(tmp_path / "saved")
    assert np.array_equal(ladd.MMDiT.from_pretrained(tmp_path / "saved").flat, here.model.flat)


def test_teacher_and_autoencoder_training(tmp_path: Path) -> None:
    text = ladd.WordEncoder(["cat", "heart"], max_words=4, context_dim=12, pooled_dim=10)
    config = mmdit_config(num_layers=1)
    ids = text.ids(["cat", "heart"])
    z = normal(1, 2, config["in_channels"], 8, 8)
    results = []
    for place in ({}, {"device": "cuda"}):
        model = ladd.MMDiT(config, seed=1, **place)
        trainer = teacher.TeacherTrainer(model, text.copy(), ADAMW, teacher.TeacherRun(text_dropout=0.0))
        results.append((trainer.step(z, ids, 1), trainer.step(z, ids, 2), model, trainer.text.flat))
    for wanted, got in zip(results[0][:2], results[1][:2]):
        assert got == pytest.approx(wanted, rel=1e-4)
    assert_near(results[1][2].flat, results[0][2].flat, 1e-5, "teacher")
    assert_near(results[1][3], results[0][3], 1e-5, "text encoder")

    images = np.tanh(normal(2, 2, 3, 16, 16))
    metrics, weights = [], []
    for place in ({}, {"device": "cuda"}):
        vae = ladd.AutoencoderKL(VAE, seed=2, **place)
        vae_trainer = autoencoder.AutoencoderTrainer(vae, ADAMW, autoencoder.AutoencoderRun())
        metrics.append([vae_trainer.step(images, i) for i in (1, 2)])
        weights.append(host(vae.flat))
    for wanted, got in zip(*metrics):
        assert got == pytest.approx(wanted, rel=1e-3)
    assert_near(weights[1], weights[0], 1e-5, "autoencoder")
