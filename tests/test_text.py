"""WordEncoder: words, what it does not know, gradients, folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import normal, same_bits

from ladd import WordEncoder, text

WORDS = ["apple", "cat", "dark", "face", "medium", "red", "skin", "tone", "é"]


def encoder(pooled_dim: int = 6, **options: Any) -> WordEncoder:
    return WordEncoder(WORDS, max_words=4, context_dim=6, pooled_dim=pooled_dim, **options)


def test_words() -> None:
    assert text.words("Woman Surfing: medium-dark skin_tone!") == ["woman", "surfing", "medium-dark", "skin", "tone"]
    assert text.words("keycap: # 10 * \u00c9 \ufb01n") == ["keycap", "#", "10", "*", "é", "fin"]
    assert text.words("cafe\u0301 \uff43at") == ["caf\u00e9", "cat"]  # one spelling for what looks alike
    assert text.words(" ... ") == []
    assert text.build_vocabulary(["red apple", "Apple", "a cat"], min_count=2) == ["apple"]
    with pytest.raises(TypeError, match="a prompt must be a string, got int"):
        text.words(3)  # type: ignore[arg-type]


def test_ids() -> None:
    ids = encoder().ids(["red apple", "", "red zebra", "cat face red apple dark"])
    assert ids.tolist() == [[8, 3, 0, 0], [2, 0, 0, 0], [8, 1, 0, 0], [4, 6, 8, 3]]
    with pytest.raises(TypeError, match="got one string"):
        encoder().ids("red apple")


def test_a_compound_is_one_word_where_training_had_it_as_one() -> None:
    e = WordEncoder(["dark", "medium", "medium-dark"], max_words=4)
    assert e.ids(["medium-dark", "medium dark", "dark-medium"]).tolist() == [[5, 0, 0, 0], [4, 3, 0, 0], [3, 4, 0, 0]]
    assert e.unknown_words("dark-eyed cat") == ["eyed", "cat"]


@pytest.mark.parametrize("pooled_dim", [6, 5])
def test_context_and_pooled(pooled_dim: int) -> None:
    e = encoder(pooled_dim)
    state = e.state_dict()
    assert ("pooled_embedding.weight" in state) == (pooled_dim != 6)
    words, places = state["word_embedding.weight"], state["position_embedding.weight"]
    table = state.get("pooled_embedding.weight", words)
    context, pooled = e.encode_ids(e.ids(["red apple", "", "red zebra"]))
    np.testing.assert_allclose(context[0], words[[8, 3, 0, 0]] + places, rtol=1e-6)
    np.testing.assert_allclose(pooled, [table[[8, 3]].mean(0), table[2], table[[8, 1]].mean(0)], rtol=1e-6)
    assert context.dtype == pooled.dtype == np.float32


def test_unknown_and_too_many_words_are_reported() -> None:
    e = encoder()
    assert e.unknown_words("a red ZEBRA zebra") == ["a", "zebra"]
    with pytest.warns(UserWarning, match="has not learned: a, zebra"):
        e.encode(["a red zebra"])
    with pytest.warns(UserWarning, match="has 5 words, only the first 4 are used"):
        e.encode(["red red red red red"])


@pytest.mark.parametrize("pooled_dim", [6, 5])
def test_backward(pooled_dim: int) -> None:
    """The encoder is linear in its weights, so one finite difference is exact: f(w + d) - f(w) = <gradient, d>."""
    e = encoder(pooled_dim)
    prompts = ["red red apple", "", "cat", "face skin tone red"]
    dcontext, dpooled = normal(1, 4, 4, 6), normal(2, 4, pooled_dim)

    def value() -> float:
        context, pooled = e.encode(prompts)
        return float((context.astype(np.float64) * dcontext).sum() + (pooled.astype(np.float64) * dpooled).sum())

    before = value()
    e.backward(dcontext, dpooled)
    once = e.flat_grad.copy()
    direction = normal(3, e.flat.size)
    e.flat[:] += direction
    assert value() - before == pytest.approx(float((once.astype(np.float64) * direction).sum()), abs=2e-4)
    e.backward(dcontext, dpooled, ids=e.ids(prompts))
    np.testing.assert_allclose(e.flat_grad, 2 * once, atol=1e-5)
    e.zero_grad()
    assert once.any() and not e.flat_grad.any()


def test_backward_refuses() -> None:
    e = encoder()
    with pytest.raises(RuntimeError, match="needs an encode"):
        e.backward(normal(1, 1, 4, 6), normal(2, 1, 6))
    e.encode(["red"])
    with pytest.raises(ValueError, match=r"dcontext must have shape \[1, 4, 6\], got \[2, 4, 6\]"):
        e.backward(normal(1, 2, 4, 6), normal(2, 1, 6))
    assert not e.flat_grad.any()
    for ids, message in ((np.zeros((1, 3), int), r"shape \[B, 4\]"), (np.full((1, 4), 99), r"ids must be in \[0, 12\), got 99 to 99")):
        with pytest.raises(ValueError, match=message):
            e.encode_ids(ids)


@pytest.mark.parametrize("pooled_dim", [6, 5])
def test_save_and_load(pooled_dim: int, tmp_path: Path) -> None:
    e = encoder(pooled_dim, seed=4)
    e.save_pretrained(tmp_path / "text_encoder")
    for path in (tmp_path, tmp_path / "text_encoder"):
        again = WordEncoder.from_pretrained(path)
        assert again.vocabulary == e.vocabulary and same_bits(again.flat, e.flat)
    twin = e.copy()
    assert same_bits(twin.flat, e.flat)
    twin.flat[:] = 0
    assert e.flat.any()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    table = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in table.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CLIPTextModelWithProjection"}, "another text encoder than WordEncoder"),
        ({"max_words": None}, "missing max_words"),
        ({"vocabulary": "red"}, "vocabulary must be a list of words"),
        ({"vocabulary": ["red"]}, "misshapen: word_embedding.weight"),
        ({"max_word": 3}, "unknown key 'max_word'"),
        ({"context_dim": -1}, "context_dim must be an integer"),
    ],
)
def test_bad_folders(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        WordEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [([], "at least one"), (["Red"], "got 'Red'"), (["two words"], "got 'two words'"), (["a", "b", "a"], "got 'a' twice"), ([1], "got 1")],
)
def test_bad_vocabularies(vocabulary: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WordEncoder(vocabulary)


def test_seeds() -> None:
    assert same_bits(encoder(seed=1).flat, encoder(seed=1).flat) and not same_bits(encoder(seed=1).flat, encoder(seed=2).flat)
