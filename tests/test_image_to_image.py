"""Pictures as a pipeline's input: image to image, masks, an inpainting transformer, the command line, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import normal, same_bits
from tiny import tiny_pipeline

import ladd
from ladd import cli, pictures
from ladd.pipeline import to_images

Array = np.ndarray
PIXELS = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
AS_FLOAT = (PIXELS.astype(np.float32) / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1)[None]
MASK = np.zeros((64, 64), np.float32)
MASK[17:47, 22:] = 1  # its edges lie between the latents' pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ladd.Pipeline:
    return ladd.Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def inpainting(pipe: ladd.Pipeline) -> ladd.Pipeline:
    """The same parts with a transformer that takes latents, mask and the masked picture's latents."""
    model = ladd.MMDiT({**pipe.model.config.to_dict(), "in_channels": 9}, seed=4)
    model.load_state_dict({**model.state_dict(), "proj_out.weight": normal(5, *model.state_dict()["proj_out.weight"].shape)})
    return ladd.Pipeline(model, pipe.vae, pipe.text, pipe.settings)


def test_a_picture_is_encoded_noised_and_sampled_from(pipe: ladd.Pipeline) -> None:
    result = pipe(["red apple", "cat face"], image=PICTURE, strength=0.5, seed=7)
    context, pooled = pipe.text.encode(["red apple", "cat face"])
    expected = ladd.sample(
        pipe.model, context, pooled, steps=4, method="renoise", latents=pipe.vae.encode(AS_FLOAT), strength=0.5, seeds=[7, 8]
    )
    assert same_bits(result.latents, expected)
    assert all(same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(result.images, to_images(pipe.vae.decode(expected))))


def test_forms_of_a_picture(pipe: ladd.Pipeline) -> None:
    forms = [PICTURE, PIXELS, AS_FLOAT, AS_FLOAT[0], [PICTURE], [PIXELS], PIXELS[None]]
    results = [pipe("red apple", image=form, strength=0.5).latents for form in forms]
    assert all(same_bits(results[0], other) for other in results[1:])
    several = pipe(["red apple"] * 3, image=[PIXELS, PICTURE, 0 * PIXELS], strength=0.5, seed=[1, 1, 1], batch_size=2).latents
    assert same_bits(several[0], several[1])
    assert np.abs(several[0] - several[2]).max() > 0.01


def test_strength_is_how_far_from_the_picture(pipe: ladd.Pipeline) -> None:
    same = pipe("red apple", image=PICTURE, strength=0)
    assert same_bits(same.latents, pipe.vae.encode(AS_FLOAT))
    assert same_bits(pipe("red apple", image=PICTURE).latents, pipe("red apple", image=PICTURE, strength=0.6, steps=4).latents)
    with pytest.warns(UserWarning, match="1 steps at strength 0.6 start from pure noise: the picture has no influence"):
        pipe("red apple", image=PICTURE, steps=1)
    assert pipe("red apple", image=PICTURE, steps=8, strength=0.5).sigmas.size == 9
    one = ladd.Pipeline(pipe.model, pipe.vae, pipe.text, dataclasses.replace(pipe.settings, steps=1))
    assert one("red apple").sigmas.size == 2 and one("red apple", image=PICTURE).sigmas.size == 5  # one step has no share to run


def test_pil_pictures_take_the_size_of_the_result(pipe: ladd.Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("red apple", image=PICTURE.resize((128, 128)), strength=0.5).images[0].size == (64, 64)
        assert pipe("red apple", image=PICTURE.resize((48, 32)), size=(32, 48), strength=0.5).images[0].size == (48, 32)
        assert pipe("red apple", image=PIXELS[:32], strength=0.5).images[0].size == (64, 32)
    with pytest.warns(UserWarning, match=r"the picture \(64 x 32\) is stretched to 64 x 64"):
        pipe("red apple", image=PICTURE.resize((32, 64)), strength=0.5)


def test_transparent_is_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (pictures.load(clear, (16, 16), 1) == 1).all()
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (pictures.load(palette, (16, 16), 1) == 1).all()
    gray = Image.new("L", (16, 16), 0)
    assert (pictures.load(gray, (16, 16), 1) == -1).all()


def test_a_mask_keeps_the_picture_to_the_bit(pipe: ladd.Pipeline) -> None:
    result = pipe("red apple", image=PICTURE, mask=MASK, seed=2)
    out = np.asarray(result.images[0])
    assert same_bits(out[MASK == 0], PIXELS[MASK == 0])
    assert (out[MASK == 1] != PIXELS[MASK == 1]).mean() > 0.5
    context, pooled = pipe.text.encode(["red apple"])
    latents = pipe.vae.encode(AS_FLOAT)
    expected = ladd.sample(pipe.model, context, pooled, steps=4, method="renoise", latents=latents, mask=MASK[::4, ::4], seeds=2)
    assert same_bits(result.latents, expected)
    forms = [MASK > 0, Image.fromarray((255 * MASK).astype(np.uint8)), MASK.astype(np.uint8), 0.4 * (1 - MASK) + 0.6 * MASK]
    assert all(same_bits(pipe("red apple", image=PICTURE, mask=form, seed=2).latents, expected) for form in forms)


def test_an_inpainting_transformer_gets_the_masked_picture(inpainting: ladd.Pipeline) -> None:
    result = inpainting(["red apple"] * 3, image=PICTURE, mask=MASK, seed=2, batch_size=2)
    context, pooled = inpainting.text.encode(["red apple"] * 3)
    masked = inpainting.vae.encode(AS_FLOAT * (1 - MASK))
    options: dict[str, Any] = {"steps": 4, "method": "renoise", "mask": MASK[::4, ::4], "masked_latents": masked, "seeds": 2}
    expected = ladd.sample(inpainting.model, context, pooled, **options)
    assert same_bits(result.latents, expected)
    assert same_bits(np.asarray(result.images[1])[MASK == 0], PIXELS[MASK == 0])
    half = inpainting("red apple", image=PICTURE, mask=MASK, seed=2, strength=0.5)
    expected = ladd.sample(inpainting.model, context[:1], pooled[:1], latents=inpainting.vae.encode(AS_FLOAT), strength=0.5, **options)
    assert same_bits(half.latents, expected)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "strength alone": ({"strength": 0.5}, ValueError, "strength needs image, the picture to change"),
    "mask alone": ({"mask": MASK}, ValueError, "mask needs image"),
    "strength of 1.5": ({"image": PICTURE, "strength": 1.5}, ValueError, r"strength must be a number in \[0, 1\], got 1.5"),
    "a path": ({"image": "apple.png"}, ValueError, r"image must be a PIL picture, uint8 \[H,W,3\] or float \[3,H,W\] .* got str"),
    "an empty list": ({"image": []}, ValueError, "got an empty list"),
    "two for one": ({"image": [PICTURE, PICTURE]}, ValueError, "one picture for all, or one an image: expected 1 or 1, got 2"),
    "gray array": ({"image": PIXELS[..., 0]}, ValueError, r"got uint8 \[64, 64\]"),
    "integers": ({"image": PIXELS.astype(np.int64)}, ValueError, r"got int64 \[64, 64, 3\]"),
    "floats to 255": ({"image": AS_FLOAT[0] * 255}, ValueError, r"image must be in \[-1, 1\], got values from -255 to 255"),
    "NaN": ({"image": np.full((3, 64, 64), np.nan)}, ValueError, "image must be finite"),
    "half a patch": ({"image": PIXELS[:60]}, ValueError, r"multiples of 16 up to 128 pixels, got \(60, 64\)"),
    "too large": ({"image": np.zeros((3, 64, 256), np.float32)}, ValueError, "up to 128 pixels"),
    "size against array": ({"image": PIXELS, "size": (32, 64)}, ValueError, r"image must be 32 x 64 pixels .* got 64 x 64"),
    "different arrays": ({"prompt": ["a", "b"], "image": [PIXELS, PIXELS[:32]]}, ValueError, "image must be 64 x 64 pixels .* got 32 x 64"),
    "mask of another size": ({"image": PICTURE, "mask": MASK[:32]}, ValueError, r"mask must be 64 x 64 .* got shape \[32, 64\]"),
    "mask to 255": ({"image": PICTURE, "mask": 255 * MASK}, ValueError, r"mask must be in \[0, 1\], got values from 0 to 255"),
    "nothing to paint": ({"image": PICTURE, "mask": 0 * MASK}, ValueError, "mask must be 1 in at least one of the latents' pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(pipe: ladd.Pipeline, name: str) -> None:
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        pipe(**{"prompt": "red apple", **changes})


def test_what_an_inpainting_pipeline_needs(inpainting: ladd.Pipeline) -> None:
    with pytest.raises(ValueError, match="an inpainting transformer: it needs image and mask"):
        inpainting("red apple")
    with pytest.raises(ValueError, match="an inpainting transformer: image needs mask"):
        inpainting("red apple", image=PICTURE)
    wrong = ladd.MMDiT({**inpainting.model.config.to_dict(), "in_channels": 8})
    with pytest.raises(ValueError, match="the transformer's latent channels is 8, the other part's 4"):
        ladd.Pipeline(wrong, inpainting.vae, inpainting.text)


def test_the_command_line(folder: Path, pipe: ladd.Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PICTURE.save(tmp_path / "in.png")
    Image.fromarray((255 * MASK).astype(np.uint8)).save(tmp_path / "mask.png")
    common = ["sample", "red apple", "--model", str(folder), "--out", str(tmp_path / "out.png")]
    assert cli.main([*common, "--image", str(tmp_path / "in.png"), "--strength", "0.5", "--seed", "7"]) == 0
    assert same_bits(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(pipe("red apple", image=PICTURE, strength=0.5, seed=7).images[0]))
    assert cli.main([*common, "--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    assert same_bits(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(pipe("red apple", image=PICTURE, mask=MASK).images[0]))
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    for arguments, message in (
        (["--mask", str(tmp_path / "mask.png")], "--mask needs --image"),
        (["--strength", "0.5"], "--strength needs --image"),
        (["--image", str(tmp_path / "none.png")], f"no picture {tmp_path / 'none.png'}"),
        (["--image", str(tmp_path)], "is not a readable picture"),
        (["--image", str(tmp_path / "cut.png")], "cut.png is not a readable picture"),
        (["--image", str(tmp_path / "text.png")], "text.png is not a readable picture"),
    ):
        capsys.readouterr()
        assert cli.main([*common, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
