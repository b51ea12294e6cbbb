"""Weights on disk: safetensors files, diffusers' folders and Stability's single files, in and out.

Reading trusts nothing: the header is checked against the file's size before any tensor is touched, tensors are read by plain
reads (a file that is cut while it is open is an error, not a crash), 16- and 8-bit floats become float32. Writing is atomic (files.py).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, as_float32
from .config import AutoencoderKLConfig, MMDiTConfig, from_dict, load_json
from .device import to_host
from .files import atomic_file, write_json

STEM = "diffusion_pytorch_model"
SAVE_DTYPES = ("float32", "float16", "bfloat16")
_MAX_HEADER = 100_000_000  # the format's own limit

# ---- number formats -----------------------------------------------------------------------------------------------


def _e4m3_table() -> Array:
    """Values of the 256 bytes of F8_E4M3: bias 7, no infinities, 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    sign, exponent, mantissa = np.where(byte & 0x80, -1.0, 1.0), byte >> 3 & 15, (byte & 7) / 8.0
    value = sign * np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    value[[0x7F, 0xFF]] = np.nan
    return value.astype(np.float32)


def _bf16_to_f32(raw: NDArray[Any]) -> Array:
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


_F32: Callable[[NDArray[Any]], Array] = lambda raw: raw.astype(np.float32)  # noqa: E731
# format name -> (type of the bytes, conversion to float32)
_FORMATS: dict[str, tuple[str, Callable[[NDArray[Any]], Array]]] = {
    "F64": ("<f8", _F32),
    "F32": ("<f4", lambda raw: raw.astype(np.float32, copy=False)),
    "F16": ("<f2", _F32),
    "BF16": ("<u2", _bf16_to_f32),
    "F8_E4M3": ("u1", lambda raw: _e4m3_table()[raw]),
    "F8_E5M2": ("u1", lambda raw: (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)),
    "I64": ("<i8", _F32),
    "I32": ("<i4", _F32),
    "I16": ("<i2", _F32),
    "I8": ("i1", _F32),
    "U64": ("<u8", _F32),
    "U32": ("<u4", _F32),
    "U16": ("<u2", _F32),
    "U8": ("u1", _F32),
    "BOOL": ("u1", _F32),
}


def to_bfloat16(array: Array) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16 (ties to even) of finite float32 values."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


# ---- one safetensors file -----------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What a file's header says of one tensor."""

    dtype: str  # a name of the format, such as F16
    shape: tuple[int, ...]
    offset: int  # in the file
    bytes: int


class TensorRef:
    """A tensor that is still on disk: its shape is known, `read()` (or NumPy's conversion) fetches it as float32."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Array], source: str) -> None:
        self.shape, self._read, self.source = shape, read, source

    def read(self) -> Array:
        array = self._read()
        if array.shape != self.shape:
            raise ValueError(f"{self.source}: expected shape {list(self.shape)}, read {list(array.shape)}")
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.read(), dtype=dtype)

    def then(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> TensorRef:
        """The tensor that `change` makes of this one, still unread."""
        return TensorRef(shape, lambda: np.ascontiguousarray(change(self.read())), self.source)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} appears twice")
        table[key] = value
    return table


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """What a file says of its tensors, and its metadata. ValueError if it is cut, its header does not parse, or its offsets do not fit."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > _MAX_HEADER or 8 + length > size:
            raise ValueError(
                f"{path} is not a complete safetensors file: it has {size} bytes and "
                + (f"says its header has {length}" if len(head) == 8 else "no header")
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header must be an object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__ must be an object, got {type(metadata).__name__}")
    data = size - 8 - length
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        begin, end, shape, dtype = _check_entry(path, name, entry, data)
        spans.append((begin, end))
        entries[name] = Entry(dtype, shape, 8 + length + begin, end - begin)
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"{path}: tensors {'overlap' if begin < at else 'leave a gap'} at byte {at} of the data")
        at = end
    if at != data:
        raise ValueError(f"{path}: the header describes {at} bytes of data, the file has {data}")
    return entries, metadata


def read_safetensors(path: str | Path) -> dict[str, TensorRef]:
    """The tensors of one file, unread, once its header is checked."""
    path = Path(path)
    entries, _ = read_header(path)
    return {name: TensorRef(entry.shape, _reader(path, name, entry), f"{path}: {name}") for name, entry in entries.items()}


def _check_entry(path: Path, name: str, entry: Any, data: int) -> tuple[int, int, tuple[int, ...], str]:
    def is_sizes(value: object) -> TypeGuard[list[int]]:
        return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value)

    if not isinstance(entry, dict):
        raise ValueError(f"{path}: tensor {name!r}: the header entry must be an object, got {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _FORMATS:
        raise ValueError(f"{path}: tensor {name!r}: dtype must be one of {', '.join(_FORMATS)}, got {dtype!r}")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise ValueError(f"{path}: tensor {name!r}: bad shape {shape!r} or data_offsets {offsets!r}")
    begin, end = offsets
    expected = math.prod(shape) * np.dtype(_FORMATS[dtype][0]).itemsize
    if not begin <= end <= data or end - begin != expected:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} in {dtype} needs {expected} bytes, the header gives bytes {begin} to {end} of {data}"
        )
    return begin, end, tuple(shape), dtype


def read_bytes(path: Path, name: str, offset: int, count: int) -> bytearray:
    """Bytes of one tensor, by a plain read: a file that is cut meanwhile is an error, where mapped memory would end the process."""
    buffer = bytearray(count)
    with path.open("rb") as file:
        file.seek(offset)
        got = file.readinto(buffer)
    if got != count:
        raise ValueError(f"{path}: tensor {name!r} is cut: expected {count} bytes, read {got}")
    return buffer


def _reader(path: Path, name: str, entry: Entry) -> Callable[[], Array]:
    kind, convert = _FORMATS[entry.dtype]
    return lambda: convert(np.frombuffer(read_bytes(path, name, entry.offset, entry.bytes), dtype=kind)).reshape(entry.shape)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Array], *, dtype: str = "float32", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes float32 tensors as float32, float16 or bfloat16, one by one; a value that the format cannot hold is an error.

    The library's own writer knows NumPy's types only, and bfloat16 is none of them.
    """
    if dtype not in SAVE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(SAVE_DTYPES)}, got {dtype!r}")
    code, width = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * width
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(_encode(np.ascontiguousarray(tensor, dtype=np.float32), dtype, f"{path}: {name}").data)


def _encode(array: Array, dtype: str, what: str) -> NDArray[Any]:
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has NaN or infinite values; it is not written")
    if dtype == "float32":
        return array
    largest = 65504.0 if dtype == "float16" else 3.3895313892515355e38
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] = array.astype(np.float16) if dtype == "float16" else to_bfloat16(array)
    wide = narrow.astype(np.float32) if dtype == "float16" else _bf16_to_f32(narrow)
    if not np.isfinite(wide).all():
        raise ValueError(f"{what} has values up to {np.abs(array).max():g}, {dtype} holds {largest:g}")
    return narrow


# ---- folders ------------------------------------------------------------------------------------------------------


def model_folder(path: str | Path, subfolder: str) -> Path:
    """The folder with config.json: `path` itself, or `path`/`subfolder`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {str(path)!r} (models are read from disk; nothing is downloaded)")
    for folder in (path, path / subfolder):
        if (folder / "config.json").is_file():
            return folder
    inside = f", neither itself nor in {subfolder}/" if subfolder else ""
    others = sorted(p.parent.name for p in path.glob("*/config.json"))
    hint = f"; one of its folders may be meant: {', '.join(others)}" if others else ""
    raise FileNotFoundError(f"{path} has no config.json{inside}{hint}")


def read_folder(folder: Path, *, stem: str = STEM, variant: str | None = None) -> dict[str, TensorRef]:
    """The tensors of a diffusers folder, one file or shards. Without `variant`: the plain files, else the only variant."""
    tags = [variant] if variant is not None else [None, *_variants(folder, stem)]
    for tag in tags:
        dot = f".{tag}" if tag else ""
        single, index = folder / f"{stem}{dot}.safetensors", folder / f"{stem}.safetensors.index{dot}.json"
        if single.is_file():
            return read_safetensors(single)
        if index.is_file():
            return _read_shards(folder, index)
    pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
    hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise FileNotFoundError(f"{folder} has no {stem}{'.' + variant if variant else ''}.safetensors and no index of shards{hint}")


def _variants(folder: Path, stem: str) -> list[str]:
    names = [p.name[len(stem) + 1 : -len(".safetensors")] for p in folder.glob(f"{stem}.*.safetensors")]
    names += [p.name[len(stem) + len(".safetensors.index.") : -len(".json")] for p in folder.glob(f"{stem}.safetensors.index.*.json")]
    found = sorted({n for n in names if n and "." not in n and "-of-" not in n})
    if len(found) > 1:
        raise ValueError(f"{folder} has the variants {', '.join(found)}; name one by variant=")
    return found


def _read_shards(folder: Path, index: Path) -> dict[str, TensorRef]:
    table = load_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise ValueError(f"{index}: weight_map must be an object that gives a file name for each tensor")
    files: dict[str, dict[str, TensorRef]] = {}
    for name in sorted(set(table.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: shards must lie in the same folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name!r}, which is missing")
        files[name] = read_safetensors(folder / name)
    tensors: dict[str, TensorRef] = {}
    for name, file in table.items():
        if name not in files[file]:
            raise ValueError(f"{index}: tensor {name!r} should be in {file}, which does not have it")
        tensors[name] = files[file][name]
    stray = sorted(n for shard in files.values() for n in shard if n not in tensors)
    if stray:
        raise ValueError(f"{index} does not list the tensors {_some(stray)} of its shards")
    return tensors


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def finite_weights(name: str, value: Any) -> Array:
    """`value` as float32; NaN and infinities are errors: a model that has them gives nothing but NaN."""
    array = as_float32(value, name)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"weights must be finite, {name} has {bad} NaN or infinite values")
    return array


def sha256(*arrays: Array) -> str:
    """Hash of the bytes of arrays: the identity of weights in provenance and checks."""
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(np.ascontiguousarray(to_host(a)).view(np.uint8).data)
    return digest.hexdigest()


def check_names(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str, strict: bool = True) -> None:
    """Raises one ValueError that lists missing, unexpected and misshapen tensors; without `strict` misshapen ones alone."""
    problems = []
    missing = sorted(n for n in expected if n not in given)
    unexpected = sorted(n for n in given if n not in expected)
    misshapen = [f"{n} (expected {list(s)}, got {list(given[n])})" for n, s in expected.items() if n in given and tuple(given[n]) != tuple(s)]
    if strict and missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if strict and unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {_some(misshapen)}")
    if problems:
        raise ValueError(f"weights do not fit {what}: " + "; ".join(problems))


# ---- finding a model: folder or single file -----------------------------------------------------------------------

C = TypeVar("C", MMDiTConfig, AutoencoderKLConfig)
P = TypeVar("P")


def _read_config(folder: Path, cls: type[P], class_name: str) -> P:
    table = load_json(folder / "config.json")
    if table.get("_class_name", class_name) != class_name:
        raise ValueError(f"{folder / 'config.json'} describes a {table['_class_name']}, expected {class_name}")
    return from_dict(cls, {k: v for k, v in table.items() if not k.startswith("_")}, str(folder / "config.json"))


def _load(
    path: str | Path,
    subfolder: str,
    cls: type[C],
    class_name: str,
    config: C | None,
    variant: str | None,
    single: Callable[[dict[str, TensorRef], str], dict[str, TensorRef]],
    derive: Callable[[Mapping[str, tuple[int, ...]], str], C],
) -> tuple[C, dict[str, TensorRef]]:
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} must be a .safetensors file or a folder")
        tensors = single(read_safetensors(path), str(path))
        return config or derive({n: t.shape for n, t in tensors.items()}, str(path)), tensors
    folder = model_folder(path, subfolder)
    config = config or _read_config(folder, cls, class_name)
    return config, read_folder(folder, variant=variant)


def load_mmdit(path: str | Path, *, config: MMDiTConfig | None = None, variant: str | None = None) -> tuple[MMDiTConfig, dict[str, TensorRef]]:
    """Configuration and unread tensors (diffusers' names) of a transformer, from a folder or a single file of either layout."""
    from .single_file import mmdit_config, mmdit_from_single

    return _load(path, "transformer", MMDiTConfig, "SD3Transformer2DModel", config, variant, mmdit_from_single, mmdit_config)


def load_autoencoder(
    path: str | Path, *, config: AutoencoderKLConfig | None = None, variant: str | None = None
) -> tuple[AutoencoderKLConfig, dict[str, TensorRef]]:
    """As load_mmdit, for the autoencoder."""
    from .single_file import autoencoder_config, autoencoder_from_single, rename_legacy

    config, tensors = _load(path, "vae", AutoencoderKLConfig, "AutoencoderKL", config, variant, autoencoder_from_single, autoencoder_config)
    return config, rename_legacy(tensors)


def load_plain(path: str | Path, cls: type[P], class_name: str) -> tuple[P, dict[str, TensorRef]]:
    """Configuration and unread tensors of a folder that save_model wrote, for a model that no other library has."""
    folder = model_folder(path, "")
    return _read_config(folder, cls, class_name), read_folder(folder)


def save_model(
    path: str | Path, class_name: str, config: Mapping[str, Any], tensors: Mapping[str, Array], *, dtype: str, stem: str = STEM
) -> None:
    """A diffusers folder: weights first, then the config.json that makes the folder loadable."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Files of an earlier save in another form would be read instead of the new ones.
    stale = [p.name for p in folder.glob(f"{stem}*.safetensors*") if p.name != f"{stem}.safetensors"]
    if stale:
        raise FileExistsError(f"{folder} holds weights of another form ({stale[0]}); save to an empty folder")
    write_safetensors(folder / f"{stem}.safetensors", tensors, dtype=dtype)
    write_json(folder / "config.json", {"_class_name": class_name, **config})
