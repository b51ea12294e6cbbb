"""Pipelines: folders with one and two transformers, prompts to pictures, batches that change nothing, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import same_bits
from tiny import tiny_pipeline

import ladd
from ladd.pipeline import SamplerSettings, grid, model_names, save_pipeline, to_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def student(folder: Path) -> ladd.Pipeline:
    return ladd.Pipeline.from_pretrained(folder)


def test_the_default_and_the_named_model(folder: Path, student: ladd.Pipeline) -> None:
    teacher = ladd.Pipeline.from_pretrained(folder, model="teacher")
    assert model_names(folder) == ["student", "teacher"]
    assert (student.settings.steps, student.settings.method, student.guidance_scale) == (4, "renoise", 1.0)
    assert (teacher.settings.steps, teacher.settings.method, teacher.guidance_scale) == (10, "euler", 2.5)
    assert not same_bits(student.model.flat, teacher.model.flat) and same_bits(student.vae.flat, teacher.vae.flat)


def test_pictures_are_the_decoded_samples(folder: Path) -> None:
    teacher = ladd.Pipeline.from_pretrained(folder, model="teacher")
    result = teacher(["red apple", "cat face"], seed=[5, 9], steps=3, negative_prompt="pizza")
    context, pooled = teacher.text.encode(["red apple", "cat face"])
    latents = ladd.sample(
        teacher.model, context, pooled, size=(16, 16), steps=3, guidance_scale=2.5, negative=teacher.text.encode(["pizza"]), seeds=[5, 9]
    )
    assert same_bits(result.latents, latents)
    assert (result.prompts, result.seeds) == (["red apple", "cat face"], [5, 9])
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert all(same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, to_images(teacher.vae.decode(latents))))
    assert result._repr_png_().startswith(b"\x89PNG")


def test_pixels_round_half_to_even_and_are_cut() -> None:
    values = np.float32([-3, -1, 0, 1 / 255, 1, 3])
    image = to_images(np.broadcast_to(values, (1, 3, 1, 6)))[0]
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_batches_do_not_change_the_pictures(student: ladd.Pipeline) -> None:
    prompts = ["red apple", "cat face", "pizza"]
    whole = student(prompts, num_images_per_prompt=2, seed=3, batch_size=16)
    parts = student(prompts, num_images_per_prompt=2, seed=3, batch_size=4)
    assert same_bits(parts.latents, whole.latents)
    assert not same_bits(student("red apple", seed=3).latents, student("pizza", seed=3).latents)  # the prompt counts
    assert whole.prompts == ["red apple"] * 2 + ["cat face"] * 2 + ["pizza"] * 2 and whole.seeds == [3, 4, 5, 6, 7, 8]
    alone = student("cat face", seed=6)
    assert same_bits(alone.latents[0], whole.latents[3])


def test_settings_of_the_call_win(student: ladd.Pipeline) -> None:
    one = student("red apple", steps=1)
    assert one.sigmas.tolist() == [1, 0]
    assert same_bits(one.latents, student("red apple", sigmas=[1, 0]).latents)
    assert not same_bits(student("red apple").latents, student("red apple", method="euler").latents)
    assert student("red apple", size=(32, 48)).images[0].size == (48, 32)


def test_lists_that_the_model_was_trained_on() -> None:
    settings = SamplerSettings(sigmas={"2": [1.0, 0.4, 0.0]}, shift=3.0)
    assert settings.list_for(2).tolist() == np.float32([1, 0.4, 0]).tolist()
    np.testing.assert_allclose(settings.list_for(4), [1, 0.9, 0.75, 0.5, 0], atol=1e-6)


def test_guidance_and_negative_prompts_one_an_image(student: ladd.Pipeline) -> None:
    """Each picture has the bits that it has alone, guided or not."""
    prompts, negative, scales = ["red apple", "cat face", "pizza"], ["pizza", "", "cat face"], [3.0, 1.0, 2.5]
    together = student(prompts, guidance_scale=scales, negative_prompt=negative, seed=4, batch_size=2)
    for i in (0, 2):
        alone = student(prompts[i], guidance_scale=scales[i], negative_prompt=negative[i], seed=4 + i)
        assert same_bits(together.latents[i], alone.latents[0])
    assert same_bits(together.latents[1], student("cat face", seed=5).latents[0])
    twice = student(prompts, guidance_scale=2, negative_prompt=negative, num_images_per_prompt=2, seed=4)
    assert same_bits(twice.latents[4], student("pizza", guidance_scale=2, negative_prompt="cat face", seed=8).latents[0])


def test_a_negative_prompt_without_guidance_is_reported(student: ladd.Pipeline) -> None:
    with pytest.warns(UserWarning, match="negative_prompt has no effect: guidance is off"):
        student("red apple", negative_prompt="pizza", steps=1)


def test_a_callback_sees_every_step_and_can_stop(student: ladd.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    student(
        ["red apple"] * 3, steps=2, batch_size=2, callback=lambda state: seen.append((state["step"], state["steps"], state["denoised"].shape))
    )
    assert seen == [(0, 2, (2, 4, 16, 16)), (1, 2, (2, 4, 16, 16)), (0, 2, (1, 4, 16, 16)), (1, 2, (1, 4, 16, 16))]

    def stop(state: ladd.sampling.State) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        student("red apple", callback=stop)
    image = student("red apple", steps=1).images[0]
    capsys.readouterr()
    student("red apple", image=image, strength=0.5, steps=4, progress=True)
    assert "2/2" in capsys.readouterr().err  # only the steps that are run


def test_representations_are_short(student: ladd.Pipeline) -> None:
    assert repr(student(["red apple", "pizza"], steps=1, seed=7)) == "<ladd.PipelineOutput, 2 pictures of 64x64, 1 step>"
    assert repr(student).startswith("<ladd.Pipeline of <ladd.MMDiT, ") and repr(student).endswith(" on cpu>, 4 steps of renoise>")


def test_unknown_words_are_reported(student: ladd.Pipeline) -> None:
    with pytest.warns(UserWarning, match="has not learned: zyzzyva"):
        student("zyzzyva apple", steps=1)


def test_a_folder_of_one_transformer(folder: Path, tmp_path: Path) -> None:
    """Without ladd.json: transformer/ with the scheduler's shift and diffusers' times."""
    pipe = ladd.Pipeline.from_pretrained(folder)
    save_pipeline(tmp_path / "p", {"t": pipe.model}, pipe.vae, pipe.text, {"t": SamplerSettings(shift=3.0)})
    (tmp_path / "p" / "ladd.json").unlink()
    plain = ladd.Pipeline.from_pretrained(tmp_path / "p")
    assert plain.settings == SamplerSettings(guidance_scale=7.0, schedule="diffusers", shift=3.0)
    assert same_bits(plain.model.flat, pipe.model.flat)
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    with pytest.raises(ValueError, match=r"its only model|model must be one of transformer"):
        ladd.Pipeline.from_pretrained(tmp_path / "p", model="student")


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": []}, ValueError, "at least one, got an empty list"),
    ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got int"),
    ({"size": 64}, ValueError, r"size must be \(height, width\), multiples of 16 up to 128 pixels, got 64"),
    ({"prompt": ["a", 3]}, TypeError, "a prompt must be a string, got int"),
    ({"steps": 0}, ValueError, r"steps must be an integer in \[1, 100000\], got 0"),
    ({"steps": 2, "sigmas": [1, 0]}, ValueError, "either steps or sigmas"),
    ({"sigmas": [1, 1, 0]}, ValueError, "sigmas must descend"),
    ({"sigmas": 3, "steps": 2}, ValueError, "either steps or sigmas, got steps=2 and sigmas=3"),
    ({"guidance_scale": "2"}, ValueError, "guidance_scale must be 0 or 1 .* got '2'"),
    ({"guidance_scale": [2, 3]}, ValueError, r"one an image, shape \[1\], got \[2\]"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "one for all, or one a prompt: expected 1, got 2"),
    ({"negative_prompt": 3}, TypeError, "negative_prompt must be a string or a list of strings, got int"),
    ({"seed": [1, 2]}, ValueError, "expected 1, got 2"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be"),
    ({"batch_size": 0}, ValueError, "batch_size must be"),
    ({"size": (64, 60)}, ValueError, r"multiples of 16 up to 128 pixels, got \(64, 60\)"),
    ({"size": (64, 256)}, ValueError, "up to 128 pixels"),
    ({"guidance_scale": 0.3}, ValueError, "guidance_scale must be 0 or 1"),
    ({"method": "heun"}, ValueError, "method must be one of"),
]


@pytest.mark.parametrize(("values", "kind", "message"), BAD_CALLS)
def test_bad_calls(student: ladd.Pipeline, values: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        student(**{"prompt": "red apple", **values})


def test_folders_that_are_no_pipelines(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"student is no pipeline: vae/, text_encoder/ and a transformer's folder expected"):
        ladd.Pipeline.from_pretrained(folder / "student")
    (tmp_path / "vae").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModelWithProjection"]}')
    with pytest.raises(ValueError, match=r"another text encoder than WordEncoder; encode the text with it and call ladd\.sample"):
        ladd.Pipeline.from_pretrained(tmp_path)


def test_parts_that_do_not_fit(student: ladd.Pipeline) -> None:
    words = ladd.WordEncoder(["red"], context_dim=5, pooled_dim=12)
    with pytest.raises(ValueError, match="the transformer's context width is 12, the other part's 5"):
        ladd.Pipeline(student.model, student.vae, words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default": "pupil"}, "default .* got 'pupil'"),
        ({"models": {}}, "must hold models"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"models": {"student": {"stepz": 4}}}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"models": {"student": {"folder": "../up"}}}, "must be the name of a folder"),
        ({"models": {"student": {"sigmas": {"3": [1, 0]}}}}, "must have 3 steps, got 1"),
        ({"models": {"student": {"method": "heun"}}}, "method must be one of"),
        ({"models": {"student": {"guidance_scale": -1}}}, "guidance_scale must be"),
    ],
)
def test_bad_ladd_json(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "ladd.json").write_text(json.dumps({**json.loads((folder / "ladd.json").read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ladd.Pipeline.from_pretrained(tmp_path)


def test_a_folder_with_the_shipped_model_s_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmoji").symlink_to(folder)
    here = ladd.Pipeline.from_pretrained("./openmoji").model.config
    assert here == ladd.Pipeline.from_pretrained(Path("openmoji")).model.config
    with pytest.warns(UserWarning, match="is the model that comes with the package, not the folder of that name here"):
        assert ladd.Pipeline.from_pretrained("openmoji").model.config != here


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        ladd.Pipeline.from_pretrained("stabilityai/sd-turbo")


def test_a_failed_save_leaves_the_old_folder(folder: Path, tmp_path: Path) -> None:
    pipe = ladd.Pipeline.from_pretrained(folder)
    settings = {"t": SamplerSettings()}
    save_pipeline(tmp_path / "p", {"t": pipe.model}, pipe.vae, pipe.text, settings)
    before = {p: p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file()}
    broken = pipe.text.copy()
    broken.flat[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        save_pipeline(tmp_path / "p", {"t": pipe.model}, pipe.vae, broken, settings)
    assert before == {p: p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(ValueError, match="same names"):
        save_pipeline(tmp_path / "q", {"t": pipe.model}, pipe.vae, pipe.text, {"s": SamplerSettings()})
    with pytest.raises(ValueError, match="a folder of its own"):
        save_pipeline(tmp_path / "q", {"t": pipe.model}, pipe.vae, pipe.text, {"t": SamplerSettings(folder="vae")})


def test_grid() -> None:
    images = to_images(np.linspace(-1, 1, 5 * 3 * 4 * 6, dtype=np.float32).reshape(5, 3, 4, 6))
    assert grid(images).size == (18, 8) and grid(images, columns=5).size == (30, 4)
    assert np.asarray(grid(images))[4:, 12:].min() == 255
    with pytest.raises(ValueError, match="at least one"):
        grid([])
