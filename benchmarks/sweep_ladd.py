"""Short distillations that differ in one setting each, measured alike: which times, rates, heads and terms are worth a long run.

    python benchmarks/sweep_ladd.py out/sweep configs/openmoji/distill.toml --steps 400 \
        base "ladd.t_hat_mean=-1" "ladd.discriminator.lr=1e-3 ladd.pair_weight=0"

Every run starts from the same teacher, latents and seed. After it the averaged student makes the same pictures (by default 512) in one step, in
four re-noising steps and in four Euler steps. out/sweep/sweep.json and sweep.md hold FID, recall and diversity of all runs so far; a run
that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ladd.config import load_toml
from ladd.data import openmoji
from ladd.evaluation import evaluate
from ladd.evaluation.classifier import FeatureNetwork
from ladd.pipeline import Pipeline
from ladd.training import distill

KINDS = (("1 step", 1, "euler"), ("4 re-noise", 4, "renoise"), ("4 Euler", 4, "euler"))
NUMBERS = ("fid", "recall", "diversity_overall")


def measure(folder: Path, pictures: int, network: FeatureNetwork, against: evaluate.Reference) -> dict[str, dict[str, float]]:
    """FID, recall and diversity of the student of a pipeline folder, sampled in each of KINDS."""
    student = Pipeline.from_pretrained(folder, model="student")
    pipelines, rows = {}, []
    for name, steps, method in KINDS:
        settings = dataclasses.replace(student.settings, method=method)
        pipelines[name] = Pipeline(student.model, student.vae, student.text, settings)
        rows.append(evaluate.Row(name, name, steps))
    table = evaluate.measure_rows(
        rows,
        pipelines,
        network=network,
        records=openmoji.train_records(),
        against=against,
        pictures=pictures,
        views=2,
        seed=0,
        guidance_scale=1.0,
    )
    return {row: {number: table[row][number] for number in NUMBERS} for row in table}


def markdown(results: dict[str, Any]) -> str:
    """One line a run: FID / recall / diversity for each kind of sampling."""
    lines = ["| run | steps | " + " | ".join(name for name, _, _ in KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    for name, entry in results.items():
        cells = [" / ".join((f"{entry['table'][k]['fid']:.2f}", *(f"{entry['table'][k][n]:.3f}" for n in NUMBERS[1:]))) for k, _, _ in KINDS]
        lines.append(f"| {name} | {entry['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path, help="TOML of the distillation that all runs share")
    parser.add_argument("runs", nargs="+", help='overrides of one run, "key=value key=value"; "base" for none')
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what the training computes in (default: float32)")
    parser.add_argument("--common", default="", help="overrides of all runs, not part of their names")
    options = parser.parse_args()
    network = FeatureNetwork.from_pretrained(None)
    against = evaluate.reference(network, openmoji.train_records(), 4096)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sweep.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for run in options.runs:
        if run in results:
            continue
        changes = [*options.common.split(), *([] if run == "base" else run.split()), f"run.steps={options.steps}"]
        folder = options.out / "".join(c if c.isalnum() or c in "=.-" else "_" for c in run)
        shutil.rmtree(folder, ignore_errors=True)
        config = load_toml(options.config, changes)
        config.pop("stage", None)
        pipeline = distill.run(config, out=folder, dtype=options.dtype)
        assert pipeline is not None
        results[run] = {"steps": options.steps, "table": measure(pipeline, options.pictures, network, against)}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "sweep.md").write_text(markdown(results))
        print(markdown({run: results[run]}), flush=True)


if __name__ == "__main__":
    main()
