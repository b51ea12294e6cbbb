"""The demonstration from end to end on a tiny model, and its arithmetic."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from ladd import demo
from ladd.data import openmoji
from ladd.evaluation import classifier
from ladd.evaluation.evaluate import Row


def test_showcase_prompts_are_what_the_text_says() -> None:
    names = {record.name: record.split for record in openmoji.records()}
    splits = [names[prompt.partition(" on a ")[0]] for prompt in demo.SHOWCASE]
    assert splits[:-1] == ["train"] * (len(splits) - 1)
    assert splits[-1] == "combination"
    colors = [prompt.partition(" on a ")[2].removesuffix(" background") for prompt in demo.SHOWCASE]
    assert {color for color in colors if color} <= set(openmoji.BACKGROUNDS)


def test_fitting_keeps_to_multiples_and_limits() -> None:
    assert demo.fitting(100.0, 0.5, 32, (64, 4096)) == 192
    assert demo.fitting(1.0, 0.5, 32, (65, 4096)) == 96  # never fewer than the least
    assert demo.fitting(1e9, 0.5, 32, (64, 1000)) == 992
    assert demo.forwards(Row("a", "teacher", 50, True)) == 100
    assert demo.forwards(Row("a", "student", 4)) == 4


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: Any) -> Any:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_demo_from_latents_to_page(tiny_folder: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "REFERENCE_PICTURES", 64)
    monkeypatch.setattr(demo, "GENERATE_STEPS", 2)
    vocabulary = sorted({word for record in openmoji.train_records() for word in classifier.content_words(record.name)})
    config = classifier.FeatureNetworkConfig(tuple(vocabulary), openmoji.BACKGROUNDS, channels=(8, 8, 16, 16, 16, 16), features=16)
    classifier.FeatureNetwork(config, seed=2).save(tmp_path / "classifier")
    out = tmp_path / "out"
    (out / "latents").mkdir(parents=True)  # of another run: not the demonstration's to remove
    settings: dict[str, Any] = {"model": tiny_folder, "latents": 16, "pictures": 8, "batch": 8, "classifier": tmp_path / "classifier"}
    numbers = demo.run(out, 0.005, **settings)
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["updates"] == numbers["updates"] >= 12
    assert set(stored["table"]) == {row.name for row in demo.demo_rows()}
    assert stored["table"]["distilled just now, 1 step"]["fid"]["mean"] > 0
    assert set(stored["seconds"]) == {"generate", "distil", "sample", "measure"}
    page = (out / "report.html").read_text()
    sampled = [row for row in demo.demo_rows() if row.source != "real"]
    assert page.count("data:image/png;base64,") == len(sampled) * len(demo.SHOWCASE)
    assert page.count("<svg") == 3
    assert "they compare with nothing else" in page
    width, height = Image.open(out / "samples.png").size
    assert width > 128 * len(demo.SHOWCASE) and height > 128 * len(sampled)
    # The student that the page shows is not the teacher any more, and a second run begins anew.
    student, teacher = (demo.evaluate.load_pipelines(out / "demo-work" / "distillation" / "pipeline")[name] for name in ("student", "teacher"))
    assert not np.array_equal(student.model.flat, teacher.model.flat)
    assert demo.run(out, 0.005, **settings)["latents"] == 16
    assert (out / "latents").is_dir()


def test_demo_needs_both_models(tiny_folder: Any, tmp_path: Any) -> None:
    shutil.copytree(tiny_folder, tmp_path / "half")
    table = json.loads((tmp_path / "half" / "ladd.json").read_text())
    del table["models"]["teacher"]
    (tmp_path / "half" / "ladd.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="half has no teacher"):
        demo.run(tmp_path / "out", model=tmp_path / "half")


def test_demo_refuses_no_time(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="minutes must be positive, got 0"):
        demo.run(tmp_path, 0)
