"""Philox4x32-10 (Salmon et al. 2011) and normal numbers made from it by Box-Muller in double precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def philox(counter: Sequence[Array | int], key: Sequence[int]) -> list[Array]:
    """Four words for each counter; counter words may be arrays of one shape."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> WORD) ^ c1 ^ np.uint64(k0), p1 & LOW, (p0 >> WORD) ^ c3 ^ np.uint64(k1), p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def normal(shape: Sequence[int], seed: int, purpose: int, step: int, samples: Array) -> Array:
    """Row b holds the numbers of sample samples[b]: words 0, 1 of block i make elements 4i, 4i+1, words 2, 3 the next two."""
    mask = 0xFFFFFFFF
    key = [int(word) for word in philox((purpose, step & mask, step >> 32, 0), (seed & mask, seed >> 32))[:2]]
    count = int(np.prod(shape[1:], dtype=np.int64))
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    rows = []
    for sample in samples:
        high_low = (np.full_like(block, int(sample) & mask), np.full_like(block, int(sample) >> 32))
        x0, x1, x2, x3 = (word.astype(np.float64) for word in philox((block & LOW, block >> WORD, *high_low), key))
        out = np.empty((block.size, 4))
        for column, u, angle in ((0, x0, x1), (2, x2, x3)):
            radius, turn = np.sqrt(-2 * np.log((u + 0.5) / 2**32)), 2 * np.pi * angle / 2**32
            out[:, column], out[:, column + 1] = radius * np.cos(turn), radius * np.sin(turn)
        rows.append(out.ravel()[:count])
    return np.stack(rows).reshape(shape)
