"""Arrays at the border: whatever speaks DLPack or NumPy becomes a float32, C-contiguous ndarray, or an error says why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def as_float32(value: Any, name: str, shape: Sequence[int | str | None] | None = None, *, finite: bool = False) -> Array:
    """`value` as float32, without a copy where it already is. Letters in `shape` stand for any size and show in the error."""
    array = _as_numpy(value, name)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers (float32), got dtype {array.dtype}")
    result = np.ascontiguousarray(array, dtype=np.float32) if array.ndim else np.asarray(array, dtype=np.float32)
    if not result.flags.aligned:  # a field of a record, a view into a file
        result = result.copy()
    if shape is not None:
        check_shape(result.shape, name, shape)
    if finite and not np.isfinite(result).all():
        bad = int(result.size - np.isfinite(result).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {result.size} values")
    return result


def as_mask(value: Any) -> Array:
    """A mask of any shape as float32 in [0, 1]; booleans count as 0 and 1."""
    boolean = isinstance(value, np.ndarray) and value.dtype == np.bool_
    array = as_float32(value.astype(np.float32) if boolean else value, "mask", finite=True)
    if array.size and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"mask must be in [0, 1], got values from {array.min():g} to {array.max():g}")
    return array


def check_shape(given: Sequence[int], name: str, expected: Sequence[int | str | None]) -> None:
    """Raises unless `given` has the expected rank and the expected sizes where `expected` has numbers."""
    if len(given) != len(expected) or any(isinstance(e, int) and e != g for e, g in zip(expected, given)):
        shown = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{shown}], got {list(given)}")


def per_sample(value: Any, name: str, batch: int, low: float = 0.0, high: float = 1.0) -> Array:
    """A number, or one number a sample, as float32 [B] in [low, high]."""
    array = as_float32(value, name)
    if array.ndim == 0:
        array = np.full(batch, array, dtype=np.float32)
    if array.shape != (batch,):
        raise ValueError(f"{name} must be a number or have shape [{batch}], got {list(array.shape)}")
    if not ((array >= low) & (array <= high)).all():  # NaN fails too
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {array.tolist()}")
    return array


def named_views(flat: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Consecutive parts of a flat buffer as arrays of these shapes, by name."""
    views, start = {}, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        views[name] = flat[start : start + count].reshape(shape)
        start += count
    return views


def seeds_for(seeds: Any, batch: int) -> list[int]:
    """One seed an image: a list of `batch` integers, or one integer that stands for seed, seed + 1, ..."""
    if isinstance(seeds, (int, np.integer)) and not isinstance(seeds, bool):
        values = [int(seeds) + i for i in range(batch)]
    elif isinstance(seeds, (str, bytes)) or not hasattr(seeds, "__iter__"):
        raise TypeError(f"seeds must be an integer or {batch} integers, got {seeds!r}")
    else:
        values = []
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
                raise TypeError(f"seeds must be integers, got {seed!r}")
            values.append(int(seed))
    if len(values) != batch:
        raise ValueError(f"seeds must be one integer an image: expected {batch}, got {len(values)}")
    for seed in values:
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seeds must be in [0, 2**63), got {seed}")
    return values


def _as_numpy(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (int, float, np.generic)) and not isinstance(value, bool):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            if not hasattr(value, "__array__"):
                raise TypeError(f"{name} cannot be read by DLPack ({type(value).__name__}: {error}); move it to the CPU as float32") from None
    if hasattr(value, "__array__") or isinstance(value, (list, tuple)):
        try:
            return np.asarray(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} cannot become a float32 array ({type(value).__name__}: {error})") from None
    raise TypeError(f"{name} must be an array (NumPy, or anything with __dlpack__ or __array__), got {type(value).__name__}")
