"""WordEncoder: text by a table of learned word vectors, trained together with the teacher.

A caption's words become ids of a vocabulary; the context is a vector a word plus a vector a place, the pooled text is the mean over the
caption's words. Small enough for any machine, and honest about what it does not know: unknown words are reported.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import _core, _purposes
from .arrays import Array, as_float32, named_views
from .config import check_keys, load_json
from .weights import check_names, finite_weights, model_folder, read_folder, save_model

PADDING, UNKNOWN, EMPTY = 0, 1, 2
SPECIAL = ("<padding>", "<unknown>", "<empty>")
_STEM = "model"
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[#*&+]")


def words(text: str) -> list[str]:
    """The words of a caption: runs of letters and digits in lower case, joined by hyphens or not, and the few signs that name pictures."""
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a string, got {type(text).__name__}")
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def build_vocabulary(captions: Iterable[str], *, min_count: int = 1) -> list[str]:
    """The words of training captions in alphabetical order, those that occur at least `min_count` times."""
    counts = Counter(word for caption in captions for word in words(caption))
    return sorted(word for word, count in counts.items() if count >= min_count)


class WordEncoder:
    """Word vectors E[V,J], place vectors [T,J], and for pooled text a table of its own [V,P]: E itself when P equals J."""

    def __init__(self, vocabulary: Sequence[str], *, max_words: int = 16, context_dim: int = 128, pooled_dim: int = 128, seed: int = 0) -> None:
        for name, value in (("max_words", max_words), ("context_dim", context_dim), ("pooled_dim", pooled_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
                raise ValueError(f"{name} must be an integer in [1, 65536], got {value!r}")
        vocabulary = tuple(vocabulary)
        if not vocabulary or not all(isinstance(word, str) and words(word) == [word] for word in vocabulary):
            bad = next((w for w in vocabulary if not isinstance(w, str) or words(w) != [w]), None)
            raise ValueError(f"vocabulary must hold single words in lower case, at least one, got {bad!r}")
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError(f"vocabulary must hold each word once, got {Counter(vocabulary).most_common(1)[0][0]!r} twice")
        self.vocabulary, self.max_words, self.context_dim, self.pooled_dim = vocabulary, max_words, context_dim, pooled_dim
        self._ids = {word: i for i, word in enumerate(vocabulary, start=len(SPECIAL))}
        rows = len(vocabulary) + len(SPECIAL)
        self._shapes = {"word_embedding.weight": (rows, context_dim), "position_embedding.weight": (max_words, context_dim)}
        if pooled_dim != context_dim:
            self._shapes["pooled_embedding.weight"] = (rows, pooled_dim)
        self.flat: Array = np.zeros(sum(r * c for r, c in self._shapes.values()), dtype=np.float32)
        self.flat_grad: Array = np.zeros_like(self.flat)
        self._tensors, self._grads = named_views(self.flat, self._shapes), named_views(self.flat_grad, self._shapes)
        self._last: NDArray[np.int64] | None = None
        for i, (name, tensor) in enumerate(self._tensors.items()):
            # Words differ from the start; places begin as a small change to them.
            deviation = 0.1 if name.startswith("position") else 1.0
            tensor[...] = _core.normal((1, *tensor.shape), seed, _purposes.INIT, i)[0] * np.float32(deviation)

    def __repr__(self) -> str:
        return f"<ladd.WordEncoder, {len(self.vocabulary)} words, {self.num_parameters:,} parameters>"

    # ---- text to arrays ----

    def _words(self, prompt: str) -> list[str]:
        """The words of a prompt as training saw them: "medium-dark" stays one word if it was one there, "heart-eyes" else becomes two."""
        return [part for word in words(prompt) for part in ([word] if word in self._ids else word.split("-"))]

    def ids(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids [B,T] of prompts, padded with 0; words beyond T are cut."""
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        ids = np.zeros((len(prompts), self.max_words), dtype=np.int64)
        for row, prompt in zip(ids, prompts):
            found = [self._ids.get(word, UNKNOWN) for word in self._words(prompt)][: self.max_words] or [EMPTY]
            row[: len(found)] = found
        return ids

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that no training caption had, each once."""
        return list(dict.fromkeys(word for word in self._words(prompt) if word not in self._ids))

    def encode(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """(context [B,T,J], pooled [B,P]). Unknown words and words beyond the last place are reported as a UserWarning."""
        ids = self.ids(prompts)
        unknown = list(dict.fromkeys(word for prompt in prompts for word in self.unknown_words(prompt)))
        if unknown:
            warnings.warn(f"words that the model has not learned: {', '.join(unknown)}", UserWarning, stacklevel=2)
        longest = max((len(self._words(prompt)) for prompt in prompts), default=0)
        if longest > self.max_words:
            warnings.warn(f"a prompt has {longest} words, only the first {self.max_words} are used", UserWarning, stacklevel=2)
        return self.encode_ids(ids)

    def encode_ids(self, ids: NDArray[np.int64]) -> tuple[Array, Array]:
        """As encode, for ids [B,T] of ids()."""
        ids = np.asarray(ids)
        rows = self._shapes["word_embedding.weight"][0]
        if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.shape[1] != self.max_words:
            raise ValueError(f"ids must be integers of shape [B, {self.max_words}], got {ids.dtype} {list(ids.shape)}")
        if ids.size and (ids.min() < 0 or ids.max() >= rows):
            raise ValueError(f"ids must be in [0, {rows}), got {ids.min()} to {ids.max()}")
        self._last = ids.astype(np.int64)
        context = self._tensors["word_embedding.weight"][ids] + self._tensors["position_embedding.weight"]
        real, count = self._real(ids)
        table = self._tensors.get("pooled_embedding.weight", self._tensors["word_embedding.weight"])
        pooled = (table[ids] * real[:, :, None]).sum(axis=1, dtype=np.float32) / count[:, None]
        return context, pooled

    @staticmethod
    def _real(ids: NDArray[np.int64]) -> tuple[Array, Array]:
        """1 where there is a word [B,T], and how many there are [B]."""
        real = (ids != PADDING).astype(np.float32)
        return real, np.maximum(real.sum(axis=1), np.float32(1))

    def backward(self, dcontext: Any, dpooled: Any, ids: NDArray[np.int64] | None = None) -> None:
        """Adds to flat_grad the gradients of what encode returned for `ids` (those of the last call if not given)."""
        ids = self._last if ids is None else np.asarray(ids)
        if ids is None:
            raise RuntimeError("backward needs an encode before it, or ids=")
        dc = as_float32(dcontext, "dcontext", (*ids.shape, self.context_dim))
        dp = as_float32(dpooled, "dpooled", (len(ids), self.pooled_dim))
        real, count = self._real(ids)
        each = real[:, :, None] * (dp / count[:, None])[:, None, :]
        self._grads["position_embedding.weight"] += dc.sum(axis=0)
        # np.add.at adds row after row in the order of the ids: the same bits every time.
        if "pooled_embedding.weight" in self._grads:
            np.add.at(self._grads["word_embedding.weight"], ids.reshape(-1), dc.reshape(-1, self.context_dim))
            np.add.at(self._grads["pooled_embedding.weight"], ids.reshape(-1), each.reshape(-1, self.pooled_dim))
        else:
            np.add.at(self._grads["word_embedding.weight"], ids.reshape(-1), (dc + each).reshape(-1, self.context_dim))

    # ---- weights ----

    @property
    def num_parameters(self) -> int:
        return int(self.flat.size)

    def zero_grad(self) -> None:
        self.flat_grad[:] = 0

    def state_dict(self) -> dict[str, Array]:
        return {name: tensor.copy() for name, tensor in self._tensors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all tensors by name; on an error nothing has changed."""
        arrays = {name: finite_weights(name, value) for name, value in state.items()}
        check_names(self._shapes, {n: a.shape for n, a in arrays.items()}, "this WordEncoder")
        for name, array in arrays.items():
            self._tensors[name][...] = array

    def copy(self) -> Self:
        twin = type(self)(self.vocabulary, max_words=self.max_words, context_dim=self.context_dim, pooled_dim=self.pooled_dim)
        twin.flat[:] = self.flat
        return twin

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32") -> None:
        """A folder text_encoder/: config.json (with the vocabulary) and model.safetensors."""
        config = {
            "max_words": self.max_words,
            "context_dim": self.context_dim,
            "pooled_dim": self.pooled_dim,
            "vocabulary": list(self.vocabulary),
        }
        save_model(path, type(self).__name__, config, self._tensors, dtype=dtype, stem=_STEM)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """From a folder that save_pretrained wrote, or from one that has it as text_encoder/."""
        folder = model_folder(path, "text_encoder")
        table = load_json(folder / "config.json")
        if table.pop("_class_name", None) != cls.__name__:
            raise ValueError(f"{folder} holds another text encoder than {cls.__name__}; encode the text with it and call ladd.sample")
        keys = ("max_words", "context_dim", "pooled_dim", "vocabulary")
        check_keys(str(folder / "config.json"), table, keys)
        missing = [key for key in keys if key not in table]
        if missing or not isinstance(table["vocabulary"], list):
            raise ValueError(f"{folder / 'config.json'}: {f'missing {missing[0]}' if missing else 'vocabulary must be a list of words'}")
        encoder = cls(table.pop("vocabulary"), **table)
        encoder.load_state_dict(dict(read_folder(folder, stem=_STEM)))
        return encoder
