"""Numbers that compare generated pictures with real ones, all in NumPy and float64.

N pictures, D features, W words of the feature network's vocabulary. A *group* is a prompt: pictures with the same group number
were made from the same prompt with different seeds. Distances in feature space mean something only between pictures that went
through the same feature network; see classifier.py for why they compare with no number published elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def _matrix(name: str, values: NDArray[np.floating], rows: int) -> Float64:
    """values as float64 [N,D] with at least `rows` rows and no NaN."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < rows or matrix.shape[1] < 1:
        raise ValueError(f"{name} must be [N,D] with N >= {rows}, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} contains NaN or infinity")
    return matrix


def _pair(x: NDArray[np.floating], y: NDArray[np.floating], rows: int) -> tuple[Float64, Float64]:
    a, b = _matrix("x", x, rows), _matrix("y", y, rows)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x and y must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return a, b


def sqrt_psd(matrix: Float64) -> Float64:
    """Symmetric square root of a positive semidefinite matrix [D,D]; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(matrix)
    root: Float64 = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def frechet_distance(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """FID: |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)) of the features x [N,D] and y [M,D].

    tr (Cx Cy)^(1/2) is taken as tr (A Cy A)^(1/2) with A = Cx^(1/2): that matrix is symmetric, so two symmetric
    eigenproblems are enough and no imaginary parts can appear. Biased upwards for few pictures: compare equal N only.
    """
    a, b = _pair(x, y, rows=2)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = sqrt_psd(cov_a)
    product = root @ cov_b @ root
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0.0)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return float(max(distance, 0.0))


def polynomial_mmd(x: Float64, y: Float64) -> float:
    """Unbiased squared MMD of x [N,D] and y [M,D] under the kernel k(a,b) = (a.b/D + 1)^3. May be slightly negative."""
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    kxx, kyy, kxy = (x @ x.T / d + 1.0) ** 3, (y @ y.T / d + 1.0) ** 3, (x @ y.T / d + 1.0) ** 3
    within_x = (kxx.sum() - np.trace(kxx)) / (n * (n - 1))
    within_y = (kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * kxy.mean())


def kernel_distance(
    x: NDArray[np.floating], y: NDArray[np.floating], *, subsets: int = 50, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and standard deviation of polynomial_mmd over random subsets of `size` pictures of each set.

    The default size is half of the smaller set, at most 1000. Unbiased for pictures that are drawn independently, so that sets of
    different sizes may be compared; several pictures of one prompt are nearer to each other than such pictures are, and raise it.
    """
    a, b = _pair(x, y, rows=4)
    smaller = min(len(a), len(b))
    size = min(1000, smaller // 2) if size is None else size
    if not 2 <= size <= smaller:
        raise ValueError(f"size must be between 2 and the smaller set's {smaller}, got {size}")
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    draw = np.random.default_rng(seed)
    values = [polynomial_mmd(a[draw.choice(len(a), size, replace=False)], b[draw.choice(len(b), size, replace=False)]) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def word_recall(scores: NDArray[np.floating], words: Sequence[NDArray[np.integer]]) -> Float64:
    """Share of each picture's caption words that the feature network sees in it. [N], NaN where a caption has none that it knows.

    scores [N,W] are the network's word scores and words[i] the word numbers of caption i. A picture with k words is granted
    the k best-scored words of the whole vocabulary and no more, so that scoring everything highly cannot win.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or len(words) != scores.shape[0]:
        raise ValueError(f"scores must be [N,W] with one row for each of the {len(words)} captions, got shape {scores.shape}")
    recall = np.full(len(words), np.nan)
    for row, numbers in enumerate(words):
        numbers = np.unique(numbers)
        if numbers.size:
            best = np.argpartition(-scores[row], numbers.size - 1)[: numbers.size]
            recall[row] = np.isin(numbers, best).mean()
    return recall


def mean_recall(scores: NDArray[np.floating], words: Sequence[NDArray[np.integer]]) -> float:
    """Mean of word_recall over the captions that have a known word; NaN where none has."""
    recall = word_recall(scores, words)
    return _mean(recall[np.isfinite(recall)])


@dataclass(frozen=True)
class Spread:
    """How much pictures of one prompt differ, averaged over prompts; see within_prompt_spread."""

    background: float  # probability that two pictures of a prompt have different background classes
    place: float  # standard deviation of the centre, root mean square over x and y
    scale: float  # standard deviation of the size
    features: float  # distance between the features of two pictures of a prompt


def _groups(group: NDArray[np.integer]) -> Iterator[NDArray[np.intp]]:
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if members.size >= 2:
            yield members


def _mean(values: Sequence[float] | Float64) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def within_prompt_spread(
    group: NDArray[np.integer],
    *,
    background: NDArray[np.integer],
    free: NDArray[np.bool_],
    place: NDArray[np.floating],
    scale: NDArray[np.floating],
    features: NDArray[np.floating],
) -> Spread:
    """Spread over the pictures of each prompt. All estimates are unbiased for any number >= 2 of pictures a prompt.

    group, background, free, scale [N]; place [N,2]; features [N,D]. free: the prompt leaves the background open; only such
    prompts count for `background`, because a prompt that names a colour ought to get it every time.
    """
    n = len(group)
    for name, array in (("background", background), ("free", free), ("place", place), ("scale", scale), ("features", features)):
        if len(array) != n:
            raise ValueError(f"{name} must have one row a picture ({n}), got {len(array)}")
    place, scale, features = (np.asarray(v, dtype=np.float64) for v in (place, scale, features))
    differs, places, scales, distances = [], [], [], []
    for members in _groups(np.asarray(group)):
        first, second = np.triu_indices(members.size, k=1)
        left, right = members[first], members[second]
        if free[members].all():
            differs.append(float((background[left] != background[right]).mean()))
        places.append(float(place[members].var(axis=0, ddof=1).mean()))
        scales.append(float(scale[members].var(ddof=1)))
        distances.append(float(np.linalg.norm(features[left] - features[right], axis=1).mean()))
    if not places:
        raise ValueError("no prompt has two or more pictures")
    return Spread(_mean(differs), float(np.sqrt(_mean(places))), float(np.sqrt(_mean(scales))), _mean(distances))


def relative_diversity(generated: Spread, real: Spread) -> dict[str, float]:
    """Spread of generated pictures over the spread of real pictures of the same prompts: 1 is as varied as reality.

    "overall" is the mean of background, place and scale, each cut at 1 so that too much of one cannot hide too little of another.
    """
    ratios = {}
    for name in ("background", "place", "scale", "features"):
        given, wanted = getattr(generated, name), getattr(real, name)
        ratios[name] = given / wanted if wanted > 0 else float("nan")
    varied = [min(ratios[name], 1.0) for name in ("background", "place", "scale") if np.isfinite(ratios[name])]
    ratios["overall"] = _mean(varied)
    return ratios


def nearest_distance(x: NDArray[np.floating], bank: NDArray[np.floating], *, chunk: int = 256) -> Float64:
    """Euclidean distance of each row of x [N,D] to its nearest row of bank [M,D]; [N].

    Candidates are found from |x|^2 - 2 x.b + |b|^2 in float32, which cancels; the winner's distance is taken directly.
    """
    points, bank = np.asarray(x, dtype=np.float32), np.asarray(bank, dtype=np.float32)
    if points.ndim != 2 or bank.ndim != 2 or points.shape[1] != bank.shape[1] or not len(bank):
        raise ValueError(f"x [N,D] and bank [M,D] must share D and bank must not be empty, got {points.shape} and {bank.shape}")
    squares = np.einsum("md,md->m", bank, bank)
    distance = np.empty(len(points))
    for start in range(0, len(points), chunk):
        rows = points[start : start + chunk]
        nearest = np.argmin(squares - 2.0 * (rows @ bank.T), axis=1)
        distance[start : start + chunk] = np.linalg.norm(rows.astype(np.float64) - bank[nearest], axis=1)
    return distance
