"""The command line: what each command writes, one-line errors with exit status 2, overrides, dry runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import mmdit_config, same_bits
from tiny import tiny_pipeline

import ladd
from ladd import cli

AUTOENCODER = """
stage = "autoencoder"
[model]
block_out_channels = [8, 8]
latent_channels = 4
norm_num_groups = 4
use_quant_conv = false
use_post_quant_conv = false
mid_block_add_attention = false
[run]
steps = 2
batch = 2
image_size = 32
statistics_views = 4
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def ladd_cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs the command line in this process: -> (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    yield run


def test_sample_writes_a_sheet(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    out = tmp_path / "deep" / "sheet.png"
    status, text, _ = ladd_cli("sample", "red apple", "cat face", "--model", pipeline, "--num", 2, "--seed", 5, "--out", out)
    assert status == 0 and text.strip() == str(out)
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (128, 128, 3)
    alone = ladd.Pipeline.from_pretrained(pipeline)(["red apple", "red apple", "cat face", "cat face"], seed=5).images
    assert all(same_bits(np.asarray(alone[i]), sheet[i // 2 * 64 :, i % 2 * 64 :][:64, :64]) for i in range(4))


def test_sample_writes_a_folder(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    options = ("--model", pipeline, "--which", "teacher", "--steps", 2, "--guidance-scale", 3, "--size", 32, 64, "--seed", 7)
    status, text, _ = ladd_cli("sample", "red apple", "--num", 2, "--out", tmp_path / "all", *options)
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["00000-seed7.png", "00001-seed8.png"]
    assert text.split() == [str(tmp_path / "all" / n) for n in ("00000-seed7.png", "00001-seed8.png")]
    assert Image.open(tmp_path / "all" / "00000-seed7.png").size == (64, 32)


def test_unknown_words_are_a_warning(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    status, _, error = ladd_cli("sample", "a zyzzyva apple", "--model", pipeline, "--steps", 1, "--out", tmp_path / "x.png")
    assert status == 0
    assert error.strip() == "ladd: warning: words that the model has not learned: zyzzyva"


def test_info(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    status, text, _ = ladd_cli("info")
    assert status == 0 and json.loads(text)["version"] == ladd.__version__
    status, text, _ = ladd_cli("info", pipeline)
    table = json.loads(text)
    assert status == 0 and table["default"] == "student" and set(table["models"]) == {"student", "teacher"}
    model = ladd.MMDiT.from_pretrained(pipeline / "student")
    assert table["models"]["student"]["elements"] == model.flat.size
    assert table["models"]["teacher"]["sampling"]["guidance_scale"] == 2.5
    assert table["vae"]["class"] == "AutoencoderKL"
    status, text, _ = ladd_cli("info", pipeline / "student" / "diffusion_pytorch_model.safetensors")
    assert status == 0 and json.loads(text)["config"]["qk_norm"] == "rms_norm"


def test_export_of_a_whole_pipeline(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    status, text, _ = ladd_cli("export", pipeline, tmp_path / "half", "--dtype", "float16")
    assert status == 0 and text.strip() == str(tmp_path / "half")
    for name in ("student", "teacher"):
        old, new = (ladd.Pipeline.from_pretrained(p, model=name) for p in (pipeline, tmp_path / "half"))
        assert old.settings == new.settings
        assert same_bits(new.model.flat, old.model.flat.astype(np.float16).astype(np.float32))
    assert sum(p.stat().st_size for p in (tmp_path / "half").rglob("*.safetensors")) < 0.6 * sum(
        p.stat().st_size for p in pipeline.rglob("*.safetensors")
    )


def test_export_to_a_single_file_and_back(tmp_path: Path, ladd_cli: Any) -> None:
    model = ladd.MMDiT(mmdit_config(qk_norm="rms_norm", dual_attention_layers=(0,)), seed=3)
    model.save_pretrained(tmp_path / "model")
    single = tmp_path / "new" / "single.safetensors"
    assert ladd_cli("export", tmp_path / "model", single, "--layout", "single-file")[0] == 0
    assert ladd_cli("export", single, tmp_path / "back")[0] == 0
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path / "back").flat, model.flat)


def test_export_of_one_part(pipeline: Path, tmp_path: Path, ladd_cli: Any) -> None:
    assert ladd_cli("export", pipeline, tmp_path / "teacher", "--which", "teacher")[0] == 0
    assert same_bits(ladd.MMDiT.from_pretrained(tmp_path / "teacher").flat, ladd.MMDiT.from_pretrained(pipeline / "teacher").flat)
    assert ladd_cli("export", pipeline / "vae", tmp_path / "vae", "--dtype", "bfloat16")[0] == 0
    assert ladd.AutoencoderKL.from_pretrained(tmp_path / "vae").config == ladd.AutoencoderKL.from_pretrained(pipeline / "vae").config


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_train_with_overrides(tmp_path: Path, ladd_cli: Any) -> None:
    config = write(tmp_path, AUTOENCODER)
    out = tmp_path / "run"
    status, text, error = ladd_cli("train", config, "--out", out, "--set", "run.steps=3", "--set", "optimizer.lr=1e-3")
    assert status == 0, error
    assert text.strip().splitlines()[-1] == str(out / "vae")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert ladd.AutoencoderKL.from_pretrained(out / "vae").config.block_out_channels == (8, 8)


def test_dry_run_writes_nothing(tmp_path: Path, ladd_cli: Any) -> None:
    status, text, _ = ladd_cli("train", write(tmp_path, AUTOENCODER), "--out", tmp_path / "run", "--dry-run")
    assert status == 0 and "parameters" in text
    assert not (tmp_path / "run").exists()


LICENSE = Path(__file__).parent.parent / "LICENSE"  # a file without a suffix
ERRORS: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (("sample", "x", "--model", "nowhere"), "no folder 'nowhere'"),
    "no steps": (("sample", "x", "--model", "PIPELINE", "--steps", "0"), "steps must be an integer in [1, 100000], got 0"),
    "no such transformer": (("sample", "x", "--model", "PIPELINE", "--which", "pupil"), "model must be one of student, teacher"),
    "bad guidance": (("sample", "x", "--model", "PIPELINE", "--guidance-scale", "0.5"), "guidance_scale must be 0 or 1"),
    "bad size": (("sample", "x", "--model", "PIPELINE", "--size", "64", "63"), "size must be (height, width), multiples of 16"),
    "bad picture type": (("sample", "x", "--out", "x.jpg"), "--out must be a .png file or a folder, got x.jpg"),
    "no threads": (("info", "--threads", "0"), "0"),
    "no file": (("info", "nowhere"), "no file or folder 'nowhere'"),
    "not a model": (("info", "RUN"), "must be a .safetensors file"),
    "no configuration": (("train", "none.toml", "--out", "x"), "none.toml: No such file or directory"),
    "output that is a file": (("train", "RUN", "--out", "RUN"), "--out must be a folder, got the file"),
    "pictures into a file": (("sample", "x", "--model", "PIPELINE", "--out", str(LICENSE)), "--out must be a folder, got the file"),
    "a table into a file": (("evaluate", "PIPELINE", "--out", "RUN"), "--out must be a folder, got the file"),
    "no model to measure": (("evaluate", "nowhere", "--out", "x"), "no folder 'nowhere' with a pipeline"),
    "another command's stage": (("distill", "RUN", "--out", "x"), "stage must be 'distill' for `ladd distill`, got 'autoencoder'"),
    "unknown section": (("train", "RUN", "--out", "x", "--set", "modle.x=1"), "unknown key 'modle'; did you mean 'model'"),
    "unknown key": (("train", "RUN", "--out", "x", "--set", "run.step=1"), "[run]: unknown key 'step'; did you mean 'steps'"),
    "wrong value": (("train", "RUN", "--out", "x", "--set", "optimizer.lr=fast"), "lr must be a number, got str 'fast'"),
    "wrong type": (("train", "RUN", "--out", "x", "--set", "run.steps=many"), "[run].steps must be an integer, got str 'many'"),
    "true is no number": (("train", "RUN", "--out", "x", "--set", "run.batch=true"), "[run].batch must be an integer, got bool True"),
    "no steps to train": (("train", "RUN", "--out", "x", "--set", "run.steps=0"), "AutoencoderRun.steps must be at least 1, got 0"),
    "a share above 1": (("train", "RUN", "--out", "x", "--set", "run.decay_share=2"), "decay_share must be a finite number in [0, 1], got 2.0"),
    "bad override": (("train", "RUN", "--out", "x", "--set", "steps"), "must look like section.key=value"),
    "export over something": (("export", "PIPELINE", "PIPELINE"), "exists already"),
    "export of a part that is not there": (("export", "PIPELINE", "x", "--which", "pupil"), "model must be one of"),
    "single file of an autoencoder": (("export", "VAE", "x.safetensors", "--layout", "single-file"), "writes a transformer"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name: str, pipeline: Path, tmp_path: Path, ladd_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    known = {"PIPELINE": str(pipeline), "VAE": str(pipeline / "vae"), "RUN": str(write(tmp_path, AUTOENCODER))}
    status, text, error = ladd_cli(*(known.get(a, a) for a in arguments))
    assert (status, text) == (2, "")
    assert error.startswith("ladd: error: ") and error.count("\n") == 1 and message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml"], "a failed command left something behind"


def test_traceback_on_request(ladd_cli: Any) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["info", "nowhere", "--traceback"])


@pytest.mark.parametrize("arguments", [(), ("sing",), ("train",), ("sample", "x", "--steps", "many"), ("export", "a", "b", "--dtype", "int8")])
def test_usage_errors(arguments: tuple[str, ...], ladd_cli: Any) -> None:
    status, _, error = ladd_cli(*arguments)
    assert status == 2 and "usage: ladd" in error


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


def test_the_module_is_the_command() -> None:
    assert run_python("-m", "ladd", "--version").stdout.strip() == f"ladd {ladd.__version__}"
    done = run_python("-m", "ladd", "info", "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_and_import_load_nothing_heavy() -> None:
    code = "import sys, ladd, ladd.cli\nladd.cli.parser()\nprint(*sys.modules)"
    loaded = run_python("-c", code).stdout.split()
    assert "ladd.cli" in loaded
    assert not {"numpy", "PIL", "tqdm", "safetensors", "ladd._core"} & set(loaded)


def test_import_is_quick() -> None:
    code = "import time; t = time.process_time(); import ladd; print(time.process_time() - t)"  # not the clock: other work may run beside
    assert min(float(run_python("-c", code).stdout) for _ in range(3)) < 0.15


def test_all_names_can_be_reached() -> None:
    for name in ladd.__all__:
        assert getattr(ladd, name) is not None
    assert set(ladd.__all__) <= set(dir(ladd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ladd.nothing  # noqa: B018
