"""Pictures and masks as users have them (PIL, uint8 or float arrays) to the arrays that the autoencoder takes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .arrays import Array, as_float32, as_mask

KINDS = "a PIL picture, uint8 [H,W,3] or float [3,H,W] in [-1, 1]"


def _is_pil(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _items(image: Any) -> list[Any]:
    """A list or tuple item by item, anything else as one item."""
    items = list(image) if isinstance(image, (list, tuple)) else [image]
    if not items:
        raise ValueError(f"image must be {KINDS}, or a list of them, got an empty list")
    return items


def size_of(image: Any) -> tuple[int, int] | None:
    """(height, width) of an array; None for a PIL picture, which takes any size."""
    first = _items(image)[0]
    return None if _is_pil(first) else _array(first).shape[2:]


def load(image: Any, size: tuple[int, int], count: int) -> Array:
    """[B,3,H,W] in [-1, 1] with B = 1 or `count`. PIL pictures are resized to (height, width); arrays must have that size."""
    parts = [_from_pil(item, size) if _is_pil(item) else _array(item) for item in _items(image)]
    for part in parts:
        if part.shape[2:] != size:
            raise ValueError(f"image must be {size[0]} x {size[1]} pixels (height x width) as size says, got {part.shape[2]} x {part.shape[3]}")
    batch = np.concatenate(parts)
    if len(batch) not in (1, count):
        raise ValueError(f"image must be one picture for all, or one an image: expected 1 or {count}, got {len(batch)}")
    return batch


def _from_pil(picture: Any, size: tuple[int, int]) -> Array:
    from PIL import Image

    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return _array(np.asarray(_resized(picture.convert("RGB"), size)))


def _resized(picture: Any, size: tuple[int, int]) -> Any:
    from PIL import Image

    height, width = size
    across = picture.width * height, picture.height * width
    if max(across) > 1.05 * min(across):
        warnings.warn(
            f"the picture ({picture.height} x {picture.width}) is stretched to {height} x {width}: crop it first, or give another size",
            UserWarning, stacklevel=2,
        )  # fmt: skip
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def _array(value: Any) -> Array:
    """[B,3,H,W] in [-1, 1] from uint8 [(B,)H,W,3] or floats [(B,)3,H,W]."""
    shape, kind = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
    if kind.endswith("uint8") and shape is not None and len(shape) in (3, 4) and shape[-1] == 3:
        pixels = as_float32(value, "image") / np.float32(127.5) - np.float32(1)
        pixels = pixels.reshape(-1, *shape[-3:]).transpose(0, 3, 1, 2)
    elif "float" in kind and shape is not None and len(shape) in (3, 4) and shape[-3] == 3:
        pixels = as_float32(value, "image", finite=True).reshape(-1, *shape[-3:])
    else:
        given = type(value).__name__ if shape is None else f"{kind} {list(shape)}"
        raise ValueError(f"image must be {KINDS}, or a list of them, got {given}")
    if 0 in pixels.shape:
        raise ValueError(f"image must not be empty, got shape {list(shape)}")
    if pixels.min() < -1 or pixels.max() > 1:
        raise ValueError(f"image must be in [-1, 1], got values from {pixels.min():g} to {pixels.max():g}")
    return np.ascontiguousarray(pixels)


def load_mask(mask: Any, size: tuple[int, int]) -> Array:
    """[H,W] of zeros and ones: 1 from the middle grey on, where the picture is to be painted anew."""
    if _is_pil(mask):
        values = np.asarray(_resized(mask.convert("L"), size), np.float32) / np.float32(255)
    else:
        values = as_mask(mask)
        if values.shape != size:
            raise ValueError(f"mask must be {size[0]} x {size[1]} (height x width) like the picture, got shape {list(values.shape)}")
    return (values >= 0.5).astype(np.float32)
