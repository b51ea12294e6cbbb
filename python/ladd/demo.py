"""The demonstration: a one-step student distilled from the shipped teacher in some minutes, and a page that shows what came out.

    synthetic latents from the teacher  ->  LADD for `minutes`  ->  the same prompts and seeds through every model
    ->  a small quality table  ->  report.html, samples.png, metrics.json; the latents and the student in demo-work/

Everything is fitted to the machine: how many latents and how many measured pictures there are follows from the time of a first
forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report
from .config import load_json
from .evaluation import evaluate
from .evaluation.evaluate import Row
from .files import write_json

if TYPE_CHECKING:
    from .pipeline import Pipeline

FRESH = Row("distilled just now, 1 step", "fresh", 1)
# One column a prompt. The first comes twice: what a caption leaves open varies with the seed. The pilot is a combination of
# attributes that training never saw.
SHOWCASE = (
    "red apple",
    "red apple",
    "cat face",
    "rocket on a light blue background",
    "pizza",
    "butterfly on a pink background",
    "flag japan",
    "woman surfing medium skin tone",
    "man pilot dark skin tone",
)
# [ladd] of the few minutes there are: only the one step that the page shows is trained.
RECIPE: dict[str, Any] = {
    "student_times": [1.0],
    "student_probabilities": [1.0],
    "t_hat_mean": 0.0,
    "pair_weight": 1.0,
    "discriminator": {"lr": 4e-4},
}
STAGES = 4
GENERATE_STEPS = 20
REFERENCE_PICTURES = 2048
GENERATE_SECONDS = 150.0
EVALUATE_SECONDS = 120.0
_LATENTS = (128, 4096)  # fewest and most synthetic latents
_PICTURES = (48, 512)  # fewest and most pictures a row of the table


def demo_rows() -> tuple[Row, ...]:
    """Rows of the report: the published ones, less the autoencoder's, and the fresh student."""
    rows = [row for row in evaluate.default_rows() if row.source != "vae"]
    named = [dataclasses.replace(row, name=f"shipped {row.name}") if row.source == "student" else row for row in rows]
    return (*named, FRESH)


def forwards(row: Row) -> int:
    """Transformer forwards that a picture of this row takes."""
    return row.steps * (2 if row.guided else 1)


def fitting(seconds: float, seconds_each: float, multiple: int, limits: tuple[int, int]) -> int:
    """How many things of `seconds_each` fit into `seconds`: a multiple of `multiple`, within the limits."""
    low, high = limits
    count = int(seconds / max(seconds_each, 1e-9)) // multiple * multiple
    return max(-(-low // multiple) * multiple, min(count, high // multiple * multiple))


def seconds_a_forward(pipeline: Pipeline, batch: int) -> float:
    """Time of one transformer forward a picture (with its share of decoding), from a short run after one to warm up."""
    prompts, seeds = ["red apple"] * batch, list(range(batch))
    pipeline(prompts, steps=1, guidance_scale=1.0, seed=seeds, batch_size=batch)
    start = time.perf_counter()
    pipeline(prompts, steps=4, guidance_scale=1.0, seed=seeds, batch_size=batch)
    return (time.perf_counter() - start) / (4 * batch)


@dataclass(frozen=True)
class Shown:
    """The showcase pictures of one row, PIL."""

    row: Row
    images: list[Any]


def showcase(pipelines: Mapping[str, Pipeline], rows: Sequence[Row], guidance_scale: float) -> list[Shown]:
    """The same prompts and seeds through every row that samples."""
    seeds = list(range(len(SHOWCASE)))
    shown = []
    for row in rows:
        if row.source in pipelines:
            scale = guidance_scale if row.guided else 1.0
            result = pipelines[row.source](list(SHOWCASE), steps=row.steps, guidance_scale=scale, seed=seeds)
            shown.append(Shown(row, list(result.images)))
    return shown


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the page ----------------------------------------------------------------------------------------------------------

_LEAD = (
    "The teacher, a text-to-image diffusion transformer, needs dozens of steps for a sharp picture. Just now it wrote "
    "{latents} synthetic latents, and a copy of it was trained on them for {minutes:.1f} minutes by latent adversarial "
    "diffusion distillation: the frozen teacher's own features, seen through small heads, judge what the copy makes in a "
    "single step. All of it ran on the CPU."
)
_SECTIONS = {
    "pictures": "A column is one prompt and one seed, a row one model. Size, place and an unnamed background are free: they "
    "follow the seed, and may fall out differently in different models. The last prompt is a "
    "combination that training never saw.",
    "charts": "The two losses and the gap of the logits during the distillation just made, and the quality that each model "
    "reaches for its cost.",
}
_MEASURED = (
    "One seed, {pictures} pictures a row, the same prompts and picture seeds in every row: FID is biased upwards by few "
    "pictures, so compare the rows of one table only. FID and KID are taken in the features of a network that was trained "
    "on OpenMoji for this project; they compare with nothing else. Recall: share of a caption's words that the network sees "
    "in the picture. Background: named colours that were met. Diversity: spread of background, place and size within a "
    "prompt over that of real pictures. Nearest: median distance to the nearest training picture."
)
_CREDIT = (
    "The pictures are in the style of OpenMoji, the open-source emoji and icon project (CC BY-SA 4.0), on which teacher and "
    "student were trained."
)
Summary = Mapping[str, Mapping[str, Mapping[str, float]]]


def _mean(table: Summary, row: str, number: str) -> float:
    return table.get(row, {}).get(number, {}).get("mean", float("nan"))


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _charts(history: Sequence[Mapping[str, float]], table: Summary, rows: Sequence[Row]) -> list[report.Chart]:
    steps = [entry["step"] for entry in history]

    def curve(name: str, key: str) -> report.Series:
        return report.Series(name, steps, [entry.get(key, float("nan")) for entry in history])

    def points(name: str, source: str, guided: bool) -> report.Series:
        chosen = sorted((row for row in rows if row.source == source and row.guided == guided), key=forwards)
        return report.Series(name, [forwards(row) for row in chosen], [_mean(table, row.name, "fid") for row in chosen])

    fid = [
        points("teacher", "teacher", False),
        points("teacher, guided", "teacher", True),
        points("shipped student", "student", False),
        points("distilled just now", "fresh", False),
    ]
    return [
        report.Chart("Loss", [curve("discriminator", "loss_d"), curve("student", "loss_g")], "student update", smooth=True),
        report.Chart("Logits of real minus logits of fake", [curve("gap", "logit_gap")], "student update", smooth=True),
        report.Chart("FID, less is better", fid, "transformer forwards a picture", log_x=True, log_y=True, points=True),
    ]


def build_page(
    *,
    shown: Sequence[Shown],
    table: Summary,
    rows: Sequence[Row],
    history: Sequence[Mapping[str, float]],
    facts: Mapping[str, Any],
    published: Mapping[str, Any] | None,
) -> report.Page:
    """The report from what was measured; every number in its text is one of them."""
    one, fifty, four = FRESH.name, "teacher, 50 steps, guided", "teacher, 4 steps"
    quick, slow = _mean(table, one, "seconds"), _mean(table, fifty, "seconds")
    minutes = facts["seconds"]["distil"] / 60
    strips = []
    for entry in shown:
        seconds = _mean(table, entry.row.name, "seconds")
        strips.append(report.Strip(entry.row.name, entry.images, f"{_duration(seconds)} a picture", entry.row == FRESH))
    tables = [report.Table("Quality, measured here", _MEASURED.format(pictures=facts["pictures"]), table, frozenset({FRESH.name}))]
    if published is not None:
        settings = published["settings"]
        text = (
            f"Measured when it was made: {settings['pictures']} pictures a seed, mean ± standard deviation over {len(settings['seeds'])} seeds."
        )
        tables.append(report.Table("Quality of the shipped model", text, published["splits"]["train"]))
    teacher_fid = f"teacher: one step {_mean(table, 'teacher, 1 step', 'fid'):.1f}, four {_mean(table, four, 'fid'):.1f}"
    headline = [
        (_duration(quick), "a picture in one step"),
        (f"{slow / quick:.0f} ×", "the speed of fifty guided steps of the teacher"),
        (f"{_mean(table, one, 'fid'):.1f}", f"FID of one step of the fresh student ({teacher_fid})"),
        (f"{minutes:.1f} min", f"of distillation: {facts['updates']} updates on {facts['threads']} threads"),
    ]
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in facts["seconds"].items())
    return report.Page(
        title="A diffusion transformer, distilled into one step",
        lead=_LEAD.format(latents=facts["latents"], minutes=minutes),
        facts=headline,
        prompts=list(SHOWCASE),
        strips=strips,
        charts=_charts(history, table, rows),
        tables=tables,
        notes=[
            _CREDIT,
            f"ladd on {facts['threads']} threads ({facts['backend']}), batch {facts['batch']}, distilled in {facts['dtype']}; {spent}.",
        ],
        sections=_SECTIONS,
    )


# ---- the stages --------------------------------------------------------------------------------------------------------


def generate(model: str | Path, folder: Path, count: int, guidance_scale: float, batch: int, seed: int, dtype: str) -> None:
    """Latent shards from the teacher."""
    from .training import generate as generation

    settings = {
        "teacher": str(model),
        "count": count,
        "batch": batch,
        "shard": batch * max(1, 512 // batch),
        "steps": GENERATE_STEPS,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    generation.run({"run": settings}, out=folder, dtype=dtype)


def distil(
    model: str | Path, latents: Path, folder: Path, minutes: float, batch: int, seed: int, dtype: str
) -> tuple[Pipeline, list[dict[str, float]]]:
    """A fresh student and what was logged while it learned."""
    from .pipeline import Pipeline
    from .training import distill

    config = {
        "data": {"teacher": str(model), "latents": str(latents)},
        "ladd": {**RECIPE, "seed": seed},
        "run": {"steps": 1_000_000, "max_minutes": minutes, "batch": batch, "checkpoint_every": 0, "sample_every": 0},
    }
    pipeline = distill.run(config, out=folder, dtype=dtype)
    assert pipeline is not None  # only a dry run has none
    return Pipeline.from_pretrained(pipeline, model="student"), read_metrics(folder / "metrics.jsonl")


def published_table(model: str | Path) -> dict[str, Any] | None:
    """The evaluation.json that a model carries, if it does."""
    from .pipeline import pipeline_folder

    path = pipeline_folder(model) / "evaluation.json"
    return load_json(path) if path.exists() else None


# ---- the run -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage(seconds: dict[str, float], name: str, text: str) -> Iterator[None]:
    """Says what begins and keeps how long it took."""
    print(f"[{len(seconds) + 1}/{STAGES}] {text}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def write(folder: Path, page: report.Page, numbers: Mapping[str, Any]) -> None:
    """report.html, samples.png and metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_html(folder / "report.html", page)
    report.write_grid(folder / "samples.png", page.prompts, page.strips)
    write_json(folder / "metrics.json", evaluate.plain(numbers))


def measure(
    pipelines: Mapping[str, Pipeline],
    rows: Sequence[Row],
    pictures: int,
    guidance_scale: float,
    batch: int,
    classifier: str | Path | None,
) -> Summary:
    """The small quality table: one seed, the prompts of the training set."""
    from tqdm.auto import tqdm

    from .data.openmoji import train_records
    from .evaluation.classifier import FeatureNetwork

    network, records = FeatureNetwork.from_pretrained(classifier), train_records()
    against = evaluate.reference(network, records, REFERENCE_PICTURES)
    with tqdm(total=sum(map(forwards, rows)), desc="measuring", unit="forward", disable=None) as bar:
        cost = {row.name: forwards(row) for row in rows}
        table = evaluate.measure_rows(
            rows,
            pipelines,
            network=network,
            records=records,
            against=against,
            pictures=pictures,
            views=2,
            seed=0,
            guidance_scale=guidance_scale,
            batch=batch,
            report=lambda name: bar.update(cost[name]),
        )
    return evaluate.summarize([table])


def run(
    out: str | Path = "out/demo",
    minutes: float = 5.0,
    *,
    model: str | Path = "openmoji",
    latents: int | None = None,
    pictures: int | None = None,
    batch: int = 32,
    seed: int = 0,
    dtype: str = "float32",
    classifier: str | Path | None = None,
) -> dict[str, Any]:
    """Runs the demonstration into folder `out` and returns what metrics.json holds.

    latents, pictures: synthetic latents and measured pictures a row; None: as many as fit into GENERATE_SECONDS and
    EVALUATE_SECONDS. dtype: of the synthetic latents and of the distillation, "float32" or "bfloat16"; what the page shows is
    sampled in float32. What an earlier run left in `out` is made anew; other files there stay.
    """
    from . import _core

    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    folder, seconds = Path(out), dict[str, float]()
    pipelines = evaluate.load_pipelines(model)
    missing = {"teacher", "student"} - set(pipelines)
    if missing:
        raise ValueError(f'the demonstration compares with a "teacher" and a "student"; {model} has no {" and no ".join(sorted(missing))}')
    teacher = pipelines["teacher"]
    guidance_scale = float(teacher.guidance_scale)
    each = seconds_a_forward(teacher, batch)
    if latents is None:
        latents = fitting(GENERATE_SECONDS, each * 2 * GENERATE_STEPS, batch, _LATENTS)
    rows = demo_rows()
    if pictures is None:
        pictures = fitting(EVALUATE_SECONDS, each * sum(map(forwards, rows)), batch, _PICTURES)

    work = folder / "demo-work"  # a name of its own: it is removed, and `out` may be a folder that holds other runs
    shutil.rmtree(work, ignore_errors=True)
    with stage(seconds, "generate", f"the teacher writes {latents} synthetic latents, {GENERATE_STEPS} guided steps each"):
        generate(model, work / "latents", latents, guidance_scale, batch, seed, dtype)
    with stage(seconds, "distil", f"a fresh student learns from them for {minutes:g} minutes"):
        pipelines["fresh"], history = distil(model, work / "latents", work / "distillation", minutes, batch, seed, dtype)
    with stage(seconds, "sample", f"{len(SHOWCASE)} prompts through every model"):
        shown = showcase(pipelines, rows, guidance_scale)
    with stage(seconds, "measure", f"{pictures} pictures a row for the quality table"):
        table = measure(pipelines, rows, pictures, guidance_scale, batch, classifier)

    facts = {
        "model": str(model),
        "latents": latents,
        "pictures": pictures,
        "updates": len(history),
        "batch": batch,
        "dtype": dtype,
        "guidance_scale": guidance_scale,
        "threads": _core.get_num_threads(),
        "backend": _core.backend_name(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    numbers = {**facts, "table": table, "last": history[-1] if history else {}}
    page = build_page(shown=shown, table=table, rows=rows, history=history, facts=facts, published=published_table(model))
    write(folder, page, numbers)
    print(f"\nOpen {(folder / 'report.html').resolve()}")
    print(f"{folder / 'samples.png'} has the pictures, {folder / 'metrics.json'} the numbers")
    return numbers
