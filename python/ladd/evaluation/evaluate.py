"""The quality table of a model: real pictures, autoencoder reconstructions, the teacher and the student at several step counts.

Every row of the table sees the same prompts and the same picture seeds. A prompt set has `views` pictures a prompt; the real
pictures of a prompt vary in what its caption leaves open, and they are the measure of what a model's pictures of that prompt
should vary in.

    fid, kid      against a fixed set of real training views, in the features of the project's own network: comparable with
                  nothing but tables made with the same network (classifier.py). So few pictures, and several of one prompt, raise
                  both: by how much is what the row of real pictures shows
    recall        share of the caption's content words that the network sees in the picture; "of real": over its share in real
                  pictures of the same prompts
    background    share of the prompts that name a background colour and get it
    diversity     spread of background, place and scale within a prompt, over the real spread (metrics.relative_diversity), as the
                  network reads them: what it misreads counts as spread, in blurred pictures more than in the real ones that they
                  are measured by. It says nothing of the drawing itself, of which real pictures of a prompt have just one
    nearest       median distance to the nearest of the bank, which is the reference set and one white, centred view of each training
                  drawing; in features and in pixels. It finds copies of such views, whole pictures: far below what real pictures
                  of the same prompts have would mean them. A known drawing at another place is no copy in this sense, and a blurred
                  picture is nearer to all of them in pixels: read it beside FID
    seconds       a picture, wall clock, at the batch size that is stated

Real pictures are rounded to 8 bits like everything that comes out of a pipeline, so that no row has an advantage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import _purposes
from ..device import to_host
from ..files import write_bytes, write_json
from . import metrics
from .classifier import FeatureNetwork, Prediction

if TYPE_CHECKING:
    from ..data.openmoji import Record, View
    from ..pipeline import Pipeline

Array = NDArray[np.float32]
SPLITS = ("train", "base", "combination")
_REFERENCE_SEED = 1_000_003  # of the real set that FID and KID compare with: no evaluation seed draws the same views
# Picture seeds of evaluation seed s: far above those of `ladd generate`, so that no student is measured on noise that it was trained on.
_FIRST_PICTURE_SEED, _SEED_STRIDE = 1 << 62, 1_000_000


@dataclass(frozen=True)
class Row:
    """One line of the table. source: "real", "vae", or the key of a pipeline; steps and guided only for pipelines."""

    name: str
    source: str
    steps: int = 0
    guided: bool = False


def default_rows() -> tuple[Row, ...]:
    """The rows of the published table."""
    return (
        Row("real pictures", "real"),
        Row("autoencoder", "vae"),
        Row("teacher, 50 steps, guided", "teacher", 50, True),
        Row("teacher, 4 steps, guided", "teacher", 4, True),
        Row("teacher, 4 steps", "teacher", 4),
        Row("teacher, 2 steps", "teacher", 2),
        Row("teacher, 1 step", "teacher", 1),
        Row("student, 4 steps", "student", 4),
        Row("student, 2 steps", "student", 2),
        Row("student, 1 step", "student", 1),
    )


# ---- prompts and real pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the style of training with their real pictures; `group` numbers the prompts."""

    views: list[View]
    group: NDArray[np.int64]

    @property
    def texts(self) -> list[str]:
        return [view.text for view in self.views]

    @property
    def named(self) -> NDArray[np.bool_]:
        """Which prompts name their background."""
        return np.array([view.text != view.record.name for view in self.views])


def prompt_set(records: Sequence[Record], pictures: int, views: int, seed: int) -> PromptSet:
    """`pictures` // `views` prompts with `views` real pictures each.

    Records are taken at even distances along their cumulative weight, from a random start: as likely as in training, but spread
    evenly over the concepts, which makes the numbers less noisy than independent draws do. A prompt is what training would draw for
    its record. Its further pictures have the same record and caption and are drawn from what training shows under this caption: a
    named background stays, an open one is white or any colour with the training's conditional odds.
    """
    from ..data import openmoji

    _check_counts(pictures, views)
    prompts = pictures // views
    colors = tuple(openmoji.PALETTE)
    coloured_and_open = (1 - openmoji.WHITE_PROBABILITY) * (1 - openmoji.NAMED_PROBABILITY)
    white = openmoji.WHITE_PROBABILITY / (openmoji.WHITE_PROBABILITY + coloured_and_open)
    low, high = openmoji.SCALE_RANGE
    start = _purposes.generator(seed, _purposes.DATA).random()
    places = (np.arange(prompts) + start) / prompts
    chosen = np.searchsorted(np.cumsum(openmoji.weights(records)), places, side="right")
    out: list[View] = []
    for number, index in enumerate(np.minimum(chosen, len(records) - 1)):
        first = openmoji.Views([records[index]], seed=seed).draw(number, 1)[0]
        out.append(first)
        draw = _purposes.generator(seed, _purposes.AUGMENT, number)
        for _ in range(views - 1):
            u = draw.random(5)
            background = first.background
            if first.text == first.record.name:
                background = "white" if u[0] < white else colors[int(u[1] * len(colors))]
            place = float(u[3]), float(u[4])
            out.append(openmoji.View(first.record, background, float(low + (high - low) * u[2]), place, first.text))
    return PromptSet(out, np.repeat(np.arange(prompts), views))


def _check_counts(pictures: int, views: int) -> None:
    if views < 2 or pictures < 2 * views:
        raise ValueError(f"views must be at least 2 and pictures at least twice as many, got {views} and {pictures}")


def to_bytes(images: Array) -> NDArray[np.uint8]:
    """[N,3,H,W] in [-1,1] rounded to 8 bits."""
    rounded: NDArray[np.uint8] = np.clip(np.rint((np.asarray(images) + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return rounded


def from_bytes(images: NDArray[np.uint8]) -> Array:
    """8-bit [N,3,H,W] -> [-1,1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def real_pictures(views: Sequence[View]) -> NDArray[np.uint8]:
    return to_bytes(np.stack([view.render() for view in views]))


def as_array(images: Sequence[Any], size: int) -> NDArray[np.uint8]:
    """PIL pictures as [N,3,size,size]; other sizes are resized, because the feature network has one size only."""
    arrays = []
    for image in images:
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size))
        arrays.append(np.asarray(image, np.uint8).transpose(2, 0, 1))
    return np.stack(arrays)


def _small(images: NDArray[np.uint8]) -> Array:
    """Pictures at half size as vectors whose Euclidean distance is the root mean square difference on the scale [-1,1]."""
    n, c, h, w = images.shape
    halved = from_bytes(images).reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)).reshape(n, -1)
    small: Array = halved / np.float32(np.sqrt(halved.shape[1]))
    return small


@dataclass(frozen=True)
class Reference:
    """Real training views: a random set for FID and KID, and the bank for nearest neighbours, which has one view of every training
    drawing more."""

    features: Array  # [R,F]
    bank_features: Array  # [R + records,F]
    bank_pixels: Array  # [R + records,3*H*W/4]


def reference(network: FeatureNetwork, records: Sequence[Record], pictures: int) -> Reference:
    """Draws and reads the reference set in pieces, so that memory does not grow with the pictures' pixels."""
    from ..data.openmoji import View, Views

    drawn = Views(records, seed=_REFERENCE_SEED).draw(0, pictures)
    more = [View(record, "white", 0.85, (0.5, 0.5), record.name) for record in records]
    features, pixels = [], []
    for start in range(0, pictures + len(more), 512):
        images = real_pictures((drawn + more)[start : start + 512])
        features.append(network.predict(from_bytes(images)).features)
        pixels.append(_small(images))
    everything = np.concatenate(features)
    return Reference(everything[:pictures], everything, np.concatenate(pixels))


# ---- one row ---------------------------------------------------------------------------------------------------------


def measure(
    network: FeatureNetwork,
    images: NDArray[np.uint8],
    prompts: PromptSet,
    against: Reference,
    real: Prediction,
    target: Array | None = None,
) -> dict[str, float]:
    """All numbers of one set of pictures. real: the network's reading of the real pictures of the same prompts.
    target: features that FID and KID compare with, where it is not the training reference."""
    seen = network.predict(from_bytes(images))
    target = against.features if target is None else target
    words = [network.word_numbers(view.record.name) for view in prompts.views]
    recall, real_recall = (metrics.mean_recall(p.words, words) for p in (seen, real))
    wanted = np.array([network.config.backgrounds.index(view.background) for view in prompts.views])
    named = prompts.named
    given, truth = (
        metrics.within_prompt_spread(prompts.group, background=p.background, free=~named, place=p.place, scale=p.scale, features=p.features)
        for p in (seen, real)
    )
    kid, kid_deviation = metrics.kernel_distance(seen.features, target)
    result = {
        "fid": metrics.frechet_distance(seen.features, target),
        "kid": kid,
        "kid_subset_std": kid_deviation,
        "recall": recall,
        "recall_of_real": recall / real_recall if real_recall > 0 else float("nan"),
        "background": float((seen.background == wanted)[named].mean()) if named.any() else float("nan"),
        "nearest_features": float(np.median(metrics.nearest_distance(seen.features, against.bank_features))),
        "nearest_pixels": float(np.median(metrics.nearest_distance(_small(images), against.bank_pixels))),
    }
    result.update({f"diversity_{name}": value for name, value in metrics.relative_diversity(given, truth).items()})
    return result


def sample(
    pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], row: Row, guidance_scale: float, size: int, batch: int
) -> NDArray[np.uint8]:
    """Pictures of one row, a batch at a time."""
    out = []
    for start in range(0, len(texts), batch):
        piece = slice(start, start + batch)
        scale = guidance_scale if row.guided else 1.0
        prompts, own = list(texts[piece]), list(seeds[piece])
        result = pipeline(prompts, steps=row.steps, guidance_scale=scale, seed=own, batch_size=batch)
        out.append(as_array(result.images, size))
    return np.concatenate(out)


def reconstruct(pipeline: Pipeline, images: NDArray[np.uint8], batch: int) -> NDArray[np.uint8]:
    """Real pictures through the autoencoder and back."""
    pieces = [from_bytes(images[start : start + batch]) for start in range(0, len(images), batch)]
    return np.concatenate([to_bytes(to_host(pipeline.vae.decode(pipeline.vae.encode(piece)))) for piece in pieces])


def measure_rows(
    rows: Sequence[Row],
    pipelines: Mapping[str, Pipeline],
    *,
    network: FeatureNetwork,
    records: Sequence[Record],
    against: Reference,
    pictures: int,
    views: int,
    seed: int,
    guidance_scale: float,
    batch: int = 32,
    own_target: int = 0,
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, float]]:
    """The table of one seed: numbers by row name. own_target: compare FID and KID with so many real views of `records` themselves
    (held-out pictures are not distributed as training pictures are), 0: with the training reference. report: called with the name of
    each row that is done."""
    from ..data.openmoji import Views

    prompts = prompt_set(records, pictures, views, seed)
    originals = real_pictures(prompts.views)
    real = network.predict(from_bytes(originals))
    target = None
    if own_target:
        drawn = Views(records, seed=_REFERENCE_SEED).draw(0, own_target)
        target = network.predict(from_bytes(real_pictures(drawn))).features
    seeds = [_FIRST_PICTURE_SEED + seed * _SEED_STRIDE + i for i in range(len(prompts.views))]
    table = {}
    for row in rows:
        start = time.perf_counter()
        if row.source == "real":
            images = originals
        elif row.source == "vae":
            images = reconstruct(next(iter(pipelines.values())), originals, batch)
        else:
            images = sample(pipelines[row.source], prompts.texts, seeds, row, guidance_scale, network.config.size, batch)
        elapsed = time.perf_counter() - start
        table[row.name] = measure(network, images, prompts, against, real, target)
        if row.source != "real":
            table[row.name]["seconds"] = elapsed / len(images)
        report(row.name)
    return table


# ---- the whole table -------------------------------------------------------------------------------------------------


def summarize(tables: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over seeds of every number: row -> number -> {"mean", "std"}."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for row in tables[0]:
        summary[row] = {}
        for name in tables[0][row]:
            values = np.array([table[row][name] for table in tables])
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            summary[row][name] = {"mean": float(values.mean()), "std": spread}
    return summary


def bar(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any] | None:
    """Whether the student does what distillation is for, on the means over seeds; None where the rows it needs were not measured.

    One student step must beat the teacher's own four steps, guided or not. Four student steps must come within 20 % of the FID
    of the teacher's fifty guided steps, at 90 % or more of its prompt recall and of its within-prompt diversity.
    """
    names = {
        "one": "student, 1 step",
        "four": "student, 4 steps",
        "teacher_four": "teacher, 4 steps",
        "teacher_four_guided": "teacher, 4 steps, guided",
        "teacher_fifty": "teacher, 50 steps, guided",
    }
    if any(name not in summary for name in names.values()):
        return None

    def value(row: str, number: str) -> float:
        return summary[names[row]][number]["mean"]

    one = {row: value(row, "fid") for row in ("one", "teacher_four", "teacher_four_guided")}
    four = {
        "fid_ratio": value("four", "fid") / max(value("teacher_fifty", "fid"), 1e-12),
        "fid_ratio_above_real": _above_real(summary, names["four"], names["teacher_fifty"]),
        "recall_ratio": value("four", "recall") / max(value("teacher_fifty", "recall"), 1e-12),
        "diversity_ratio": value("four", "diversity_overall") / max(value("teacher_fifty", "diversity_overall"), 1e-12),
    }
    one_met = one["one"] < min(one["teacher_four"], one["teacher_four_guided"])
    four_met = four["fid_ratio"] <= 1.2 and four["recall_ratio"] >= 0.9 and four["diversity_ratio"] >= 0.9
    return {
        "one_step": {
            "student_fid": one["one"],
            "teacher_4_fid": one["teacher_four"],
            "teacher_4_guided_fid": one["teacher_four_guided"],
            "met": bool(one_met),
        },
        "four_steps": {**four, "allowed": {"fid_ratio": 1.2, "recall_ratio": 0.9, "diversity_ratio": 0.9}, "met": bool(four_met)},
        "met": bool(one_met and four_met),
    }


def _above_real(summary: Mapping[str, Mapping[str, Mapping[str, float]]], row: str, other: str) -> float:
    """The ratio of two rows' FID, each less that of real pictures, which is the bias of so few. NaN where that says nothing."""
    real, one, two = (summary.get(name, {}).get("fid", {}).get("mean", math.nan) for name in ("real pictures", row, other))
    return (one - real) / (two - real) if two > real else math.nan


COLUMNS = (
    ("fid", "FID", "{:.2f}"),
    ("kid", "KID", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("recall_of_real", "of real", "{:.2f}"),
    ("background", "background", "{:.3f}"),
    ("diversity_overall", "diversity", "{:.2f}"),
    ("diversity_background", "of background", "{:.2f}"),
    ("diversity_place", "of place", "{:.2f}"),
    ("diversity_scale", "of scale", "{:.2f}"),
    ("nearest_features", "nearest, features", "{:.2f}"),
    ("nearest_pixels", "nearest, pixels", "{:.3f}"),
    ("seconds", "s a picture", "{:.4f}"),
)


def cell(entry: Mapping[str, float] | None, pattern: str) -> str:
    """ "mean ± std" as text; a dash where there is no number."""
    if entry is None or not np.isfinite(entry["mean"]):
        return "–"
    text = pattern.format(entry["mean"])
    return f"{text} ± {pattern.format(entry['std'])}" if entry["std"] else text


def markdown(result: Mapping[str, Any]) -> str:
    """The result of run() as a page of tables."""
    settings = result["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    lines = [
        f"# Quality of `{settings['model']}`",
        "",
        f"{settings['pictures']} pictures a seed ({settings['views']} a prompt), mean ± standard deviation over seeds {seeds}; "
        f"guidance scale {settings['guidance_scale']:g}; batch {settings['batch']}, "
        f"{settings['threads']} threads ({settings['backend']}).",
        "FID and KID are taken in the features of the project's own network, trained on OpenMoji: they compare with nothing",
        "outside tables made with it. Both are raised by so few pictures: the row of real pictures shows by how much.",
        "Diversity 1 is the spread of real pictures of the same prompts.",
    ]
    titles = {
        "train": "Prompts of the training set",
        "base": "Held-out base emoji (whole concepts that training never saw)",
        "combination": "Held-out combinations of attributes (skin tone x person)",
    }
    for split, summary in result["splits"].items():
        lines += ["", f"## {titles[split]}", ""]
        if split != "train":
            lines += [
                f"{settings['held_out_pictures']} pictures a seed; FID and KID against real views of these held-out drawings.",
                "",
            ]
        lines += ["| | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for row, numbers in summary.items():
            lines.append(f"| {row} | " + " | ".join(cell(numbers.get(key), pattern) for key, _, pattern in COLUMNS) + " |")
    goal = result["bar"]
    if goal is not None:
        one, four = goal["one_step"], goal["four_steps"]
        excess = four["fid_ratio_above_real"]
        above = f"; x{excess:.2f} of what lies above real pictures" if math.isfinite(excess) else ""
        lines += [
            "",
            "## The bar",
            "",
            f"- One student step against the teacher's four: FID {one['student_fid']:.2f} against {one['teacher_4_fid']:.2f} "
            f"unguided and {one['teacher_4_guided_fid']:.2f} guided: **{'met' if one['met'] else 'not met'}**.",
            f"- Four student steps against the teacher's fifty guided: FID x{four['fid_ratio']:.2f} (at most 1.2{above}), recall "
            f"x{four['recall_ratio']:.2f} and diversity x{four['diversity_ratio']:.2f} (at least 0.9): "
            f"**{'met' if four['met'] else 'not met'}**.",
        ]
    return "\n".join(lines) + "\n"


def load_pipelines(model: str | Path, **place: str) -> dict[str, Pipeline]:
    """The transformers of a model by name; measured are those named "teacher" and "student". place: device and dtype."""
    from ..pipeline import Pipeline, model_names, pipeline_folder

    folder = pipeline_folder(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} with a pipeline (models are read from disk; nothing is downloaded)")
    found = {name: Pipeline.from_pretrained(folder, model=name, **place) for name in model_names(folder) if name in ("teacher", "student")}
    if not found:
        raise ValueError(f'{folder} must hold a "teacher" or a "student", got {", ".join(model_names(folder))}')
    return found


def run(
    model: str | Path = "openmoji",
    out: str | Path | None = None,
    *,
    pictures: int = 1024,
    held_out_pictures: int = 256,
    views: int = 2,
    seeds: Sequence[int] = (0, 1, 2),
    reference_pictures: int = 4096,
    splits: Sequence[str] = SPLITS,
    rows: Sequence[Row] | None = None,
    guidance_scale: float | None = None,
    batch: int = 32,
    classifier: str | Path | None = None,
    pipelines: Mapping[str, Pipeline] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a model ("openmoji", a folder, or given `pipelines`) and writes out/evaluation.json and out/evaluation.md.

    rows: None: default_rows(), as far as the model has their transformer.
    guidance_scale: of the guided rows; None: the one that the teacher's pipeline was published with. classifier: folder of the
    feature network, None: the shipped one.
    device, dtype: where pictures are made; the network that judges them is on the CPU. -> the settings, a table a split, the bar.
    """
    from tqdm.auto import tqdm

    from .. import _core
    from ..data.openmoji import heldout_records, train_records

    wrong = [split for split in splits if split not in SPLITS]
    if wrong or not splits:
        raise ValueError(f"splits must be some of {', '.join(SPLITS)}, got {list(splits)}")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= _REFERENCE_SEED:
        raise ValueError(f"seeds must be different numbers in [0, {_REFERENCE_SEED}), got {list(seeds)}")
    for count in (pictures, held_out_pictures):
        _check_counts(count, views)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    network = FeatureNetwork.from_pretrained(classifier)
    pipelines = load_pipelines(model, device=device, dtype=dtype) if pipelines is None else pipelines
    places = sorted({f"{pipe.model.dtype} on {pipe.model.device}" for pipe in pipelines.values()})
    rows = tuple(row for row in default_rows() if row.source in {"real", "vae", *pipelines}) if rows is None else tuple(rows)
    unknown = sorted({row.source for row in rows} - {"real", "vae", *pipelines})
    if unknown:
        raise ValueError(f"rows need the pipelines {', '.join(unknown)}; given: {', '.join(pipelines)}")
    if guidance_scale is None:
        guidance_scale = float(pipelines["teacher"].guidance_scale) if "teacher" in pipelines else 1.0
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)  # before hours of work that a file in its place would waste
    train = train_records()
    against = reference(network, train, reference_pictures)
    result: dict[str, Any] = {
        "settings": {
            "model": str(model),
            "pictures": pictures,
            "held_out_pictures": held_out_pictures,
            "views": views,
            "seeds": list(seeds),
            "reference_pictures": reference_pictures,
            "guidance_scale": guidance_scale,
            "batch": batch,
            "computed_in": ", ".join(places),
            "threads": _core.get_num_threads(),
            "backend": _core.backend_name(),
            "rows": [asdict(row) for row in rows],
        },
        "splits": {},
        "seeds": {},
    }
    with tqdm(total=len(splits) * len(seeds) * len(rows), desc="evaluate", unit="row", disable=not progress) as progress_bar:

        def step(name: str) -> None:
            progress_bar.set_postfix_str(name)
            progress_bar.update()

        for split in splits:
            held_out = split != "train"
            tables = [
                measure_rows(
                    rows,
                    pipelines,
                    network=network,
                    records=heldout_records(split) if held_out else train,
                    against=against,
                    pictures=held_out_pictures if held_out else pictures,
                    views=views,
                    seed=seed,
                    guidance_scale=guidance_scale,
                    batch=batch,
                    own_target=reference_pictures // 2 if held_out else 0,
                    report=step,
                )
                for seed in seeds
            ]
            result["seeds"][split] = {str(seed): table for seed, table in zip(seeds, tables, strict=True)}
            result["splits"][split] = summarize(tables)
    result["bar"] = bar(result["splits"]["train"]) if "train" in splits else None
    if out is not None:
        write_json(Path(out, "evaluation.json"), plain(result))
        write_bytes(Path(out, "evaluation.md"), markdown(result).encode())
    return result


def plain(value: Any) -> Any:
    """NaN and infinities, which JSON does not have, become null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
