"""Latent shards: what LADD trains on, as safetensors files with an index that says where they come from.

    {prefix}-00000.safetensors   latents[n,C,H,W] (float16 or float32) and seed[n]; the text either as prompts (metadata, JSON)
                                 for a text encoder of the project, or as context[n,T,J] and pooled[n,P] from any other
    index.json                   provenance (teacher, autoencoder, scaling, guidance, steps, schedule, shift, text encoder),
                                 the count and the files

Writing is atomic and resumable: a file is complete when the index names it. Reading is by rows, straight from the files: a data
set may be larger than the memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_file, write_json
from ..weights import Entry, read_bytes, read_header, sha256

if TYPE_CHECKING:
    from ..models import AutoencoderKL, MMDiT
    from ..text import WordEncoder

Array = NDArray[Any]

FORMAT = 1
_FLOATS, _INTEGERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}, {"I64": "<i8", "I32": "<i4", "U64": "<u8", "U32": "<u4"}
_DTYPES = {"latents": _FLOATS, "context": _FLOATS, "pooled": _FLOATS, "seed": _INTEGERS, "guidance_scale": _FLOATS}


class TextEncoder(Protocol):
    """As much of text.WordEncoder as shards need."""

    def encode(self, prompts: Sequence[str]) -> tuple[Array, Array]: ...


@dataclass
class Batch:
    """Rows of a data set, as float32."""

    latents: Array  # [B,C,H,W]
    context: Array  # [B,T,J]
    pooled: Array  # [B,P]


def identity(model: MMDiT, vae: AutoencoderKL, text: WordEncoder | None = None) -> dict[str, Any]:
    """What latents and a run that trains on them must share: teacher, autoencoder and scaling; text encoder, where it is one of the project."""
    shared = {
        "teacher": sha256(model.flat),
        "vae": sha256(vae.flat),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
    }
    return shared if text is None else {**shared, "text_encoder": sha256(text.flat)}


def looks_like_noise(latents: Array) -> bool:
    """Whether latents [B,C,H,W] are statistically standard normal noise.

    Scaled latents of pictures have mean 0 and deviation 1 too, but neighbouring pixels are correlated; independent normal numbers are not.
    """
    x = np.asarray(latents, np.float64)
    tolerance = max(0.05, 4 / np.sqrt(x.size))
    if abs(x.mean()) > tolerance or abs(x.std() - 1) > tolerance:
        return False
    z = x - x.mean()
    pairs = [(z[..., 1:], z[..., :-1]), (z[..., 1:, :], z[..., :-1, :])]
    correlations = [abs((a * b).mean() / z.var()) for a, b in pairs if a.size]
    excess = (z**4).mean() / z.var() ** 2 - 3
    return all(c < tolerance for c in correlations) and abs(excess) < 4 * tolerance


class ShardWriter:
    """Appends shards to a folder. Opened again with the same provenance it continues after the last complete shard; `count` says where."""

    def __init__(self, folder: str | Path, provenance: Mapping[str, Any], *, prefix: str = "latents") -> None:
        self.folder = Path(folder)
        self.prefix = prefix
        self.provenance = json.loads(json.dumps(dict(provenance)))
        self.files: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "index.json").exists():
            index = read_index(self.folder)
            difference = _difference(index["provenance"], self.provenance)
            if difference:
                raise ValueError(f"{self.folder} holds shards of another origin ({difference}); choose another folder")
            self.files = index["shards"]

    @property
    def count(self) -> int:
        """Rows that are safely written."""
        return sum(f["count"] for f in self.files)

    def write(self, arrays: Mapping[str, Any], prompts: Sequence[str] | None = None) -> None:
        """Adds one shard. arrays: latents, and seed, context, pooled where there are any; all with the same number of rows."""
        from safetensors.numpy import save_file

        arrays = {name: np.asarray(a) for name, a in arrays.items()}
        latents = arrays["latents"]
        n = len(latents)
        if n == 0 or latents.ndim != 4:
            raise ValueError(f"latents must have shape [n >= 1, C, H, W], got {list(latents.shape)}")
        for name, a in arrays.items():
            if name in _DTYPES and a.dtype.kind not in ("iu" if name == "seed" else "f"):
                raise TypeError(f"{name} must hold {'integers' if name == 'seed' else 'floating-point numbers'}, got dtype {a.dtype}")
            if len(a) != n:
                raise ValueError(f"{name} must have {n} rows as latents have, got {len(a)}")
        if (prompts is None) == ("context" not in arrays or "pooled" not in arrays):
            raise ValueError("a shard needs either prompts or both context and pooled")
        if prompts is not None and len(prompts) != n:
            raise ValueError(f"there must be {n} prompts as there are latents, got {len(prompts)}")
        if not np.isfinite(latents).all():
            raise ValueError("latents must be finite, got NaN or infinite values")
        name = f"{self.prefix}-{len(self.files):05d}.safetensors"
        metadata = {"format": "ladd-latents"} | ({} if prompts is None else {"prompts": json.dumps(list(prompts))})
        with atomic_file(self.folder / name) as temporary:
            save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, temporary, metadata)
        self.files.append({"file": name, "count": n})
        index = {"format": FORMAT, "provenance": self.provenance, "count": self.count, "shards": self.files}
        write_json(self.folder / "index.json", index)


def read_index(folder: str | Path) -> dict[str, Any]:
    """index.json, checked for form."""
    path = Path(folder) / "index.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no latent shards: index.json is missing (make them with `ladd generate`)")
    try:
        index: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    ok = isinstance(index, dict) and index.get("format") == FORMAT and isinstance(index.get("provenance"), dict)
    if not ok or not isinstance(index.get("shards"), list) or not all(_is_shard(s) for s in index["shards"]):
        raise ValueError(f"{path} must hold format {FORMAT}, provenance and shards [{{file, count}}]")
    return index


def _is_shard(entry: Any) -> bool:
    file, count = (entry.get("file"), entry.get("count")) if isinstance(entry, dict) else (None, None)
    return isinstance(file, str) and Path(file).name == file and type(count) is int and count > 0


def _difference(have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    keys = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    return "; ".join(f"{k}: {have.get(k)!r} there, {want.get(k)!r} here" for k in keys)


class LatentShards:
    """Rows of a folder of shards. `text` turns the prompts of prompt shards into context and pooled."""

    def __init__(self, folder: str | Path, text: TextEncoder | None = None) -> None:
        self.folder = Path(folder)
        self.text = text
        index = read_index(folder)
        self.provenance: dict[str, Any] = index["provenance"]
        if not index["shards"]:
            raise ValueError(f"{self.folder} holds no latents yet")
        self._files: list[tuple[Path, os.stat_result]] = []
        self._entries: list[dict[str, Entry]] = []
        self._prompts: list[list[str]] = []
        shape: list[int] | None = None
        for entry in index["shards"]:
            path = self.folder / entry["file"]
            try:
                entries, metadata = read_header(path)
                prompts = json.loads(metadata.get("prompts", "[]"))
                self._files.append((path, path.stat()))
            except (OSError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{path} is not a readable shard: {error}") from None
            self._check(path, entries, prompts, entry["count"])
            found = list(entries["latents"].shape[1:])
            if shape is not None and found != shape:
                raise ValueError(f"{path}: latents must have shape {shape} as in the first shard, got {found}")
            shape = found
            if self._entries and ("context" in entries) != ("context" in self._entries[0]):
                raise ValueError(f"{path} must hold {'context' if prompts else 'prompts'} as the first shard does; they are of two kinds")
            self._entries.append(entries)
            self._prompts.append(prompts)
        self._ends = np.cumsum([entry["count"] for entry in index["shards"]])

    def _check(self, path: Path, entries: Mapping[str, Entry], prompts: list[str], count: int) -> None:
        if "latents" not in entries or len(entries["latents"].shape) != 4:
            raise ValueError(f"{path} must hold latents [n,C,H,W]")
        for name, entry in entries.items():
            shape, dtype = list(entry.shape), entry.dtype
            if dtype not in _DTYPES.get(name, (dtype,)):
                raise ValueError(f"{path}: {name} must be one of {', '.join(_DTYPES[name])}, got {dtype}")
            if 0 in shape:
                raise ValueError(f"{path}: {name} must have sizes of at least 1, got shape {shape}")
            if shape[:1] != [count]:
                raise ValueError(f"{path}: {name} must have {count} rows as the index says, got shape {shape}")
            if len(shape) != {"context": 3, "pooled": 2}.get(name, len(shape)):
                raise ValueError(f"{path}: context must have shape [n,T,J] and pooled [n,P], got {name} {shape}")
        if "context" in entries and "pooled" in entries:
            return
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{path}: prompts must be a list of strings, got {str(prompts)[:80]!r}")
        if len(prompts) != count:
            raise ValueError(f"{path} must hold context and pooled, or {count} prompts; got {len(prompts)} prompts")
        if self.text is None:
            raise ValueError(f"{path} holds prompts: a text encoder is needed to read it")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that every shard holds: latents and text, and maybe seed and guidance_scale."""
        return sorted(set.intersection(set(_DTYPES), *(set(entries) for entries in self._entries)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        c, h, w = self._entries[0]["latents"].shape[1:]
        return int(c), int(h), int(w)

    def prompts(self, rows: Sequence[int] | Array) -> list[str]:
        """Prompts of rows; an error where the shards hold encoded text only."""
        out = []
        for shard, i in map(self._locate, rows):
            if not self._prompts[shard]:
                raise ValueError(f"{self.folder} holds encoded text, not prompts")
            out.append(self._prompts[shard][i])
        return out

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, int(row - (self._ends[shard - 1] if shard else 0))

    def rows(self, name: str, rows: Sequence[int] | Array) -> Array:
        """Rows of one of the arrays that shards are made of, stacked, in the dtype that is stored."""
        return np.stack([self._row(name, *self._locate(row)) for row in rows])

    def _row(self, name: str, shard: int, i: int) -> Array:
        (path, opened), entry = self._files[shard], self._entries[shard][name]
        now = path.stat()
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (opened.st_ino, opened.st_size, opened.st_mtime_ns):
            raise ValueError(f"{path} was changed while it was in use: its rows may be others now")
        size = entry.bytes // entry.shape[0]
        row: Array = np.frombuffer(read_bytes(path, name, entry.offset + i * size, size), _DTYPES[name][entry.dtype])
        return row.reshape(entry.shape[1:])

    def batch(self, rows: Sequence[int] | Array) -> Batch:
        """Latents with their text."""
        latents = self.rows("latents", rows).astype(np.float32)
        if self.text is not None and self._prompts[0]:
            context, pooled = self.text.encode(self.prompts(rows))
        else:
            context, pooled = (self.rows(n, rows).astype(np.float32) for n in ("context", "pooled"))
        return Batch(latents, np.ascontiguousarray(context), np.ascontiguousarray(pooled))

    def check(self, **expected: Any) -> None:
        """Raises unless the provenance holds these values: latents of another autoencoder or text encoder would train without a sign."""
        have = {k: self.provenance.get(k) for k in expected}
        difference = _difference(have, json.loads(json.dumps(expected)))
        if difference:
            raise ValueError(f"{self.folder} does not fit this run ({difference})")


def epoch_rows(count: int, batch: int, seed: int, step: int) -> Array:
    """Rows of step (counted from 1): each row once an epoch, in an order that depends on (seed, epoch) only; batches run across epochs."""
    from .. import _purposes

    first = (step - 1) * batch
    out = np.empty(batch, np.int64)
    for i in range(batch):
        epoch, place = divmod(first + i, count)
        if i == 0 or place == 0:
            order = _purposes.generator(seed, _purposes.DATA, epoch).permutation(count)
        out[i] = order[place]
    return out
