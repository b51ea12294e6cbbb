"""`make gpu` without a GPU: the whole benchmark at toy size on the emulator, and its driver with processes that hang, die and run late."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cuda_device import BENCHMARKS, benchmark, needs_emulator

from ladd import attention

TESTS = Path(__file__).resolve().parent
ON_EMULATOR = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(BENCHMARKS)!r}]
import cuda_device
cuda_device.library()
import cuda
sys.exit(cuda.main(sys.argv[1:]))
"""
HEADER = {"device": "a GPU", "dtype": "bfloat16", "ladd": "0", "torch": None, "tests": "passed"}


gpu, cuda_work = benchmark("gpu"), benchmark("cuda_work")


@needs_emulator
@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size(tmp_path: Path) -> None:
    command, rows = [sys.executable, "-c", ON_EMULATOR, "--tiny", "--no-torch"], tmp_path / "rows.jsonl"
    # One row is known already, as if an earlier process had died behind it, and one section is done.
    known = {"what": "add", "size": "[16,32]", "by": "ladd", "failed": "earlier"}
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in (known, {"what": "end of forward of SD3-medium", "size": "", "by": "ladd", "ended": True}))
    )
    gpu.measure(command, rows, time.time() + 1200, 600)
    assert gpu.report(tmp_path, HEADER) == 1, "a row failed"
    written = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert [row for row in written if "failed" in row] == [known] and not any("skipped" in row for row in written)
    names = [row["what"] for row in written]
    assert len({(row["what"], row["size"], row["by"]) for row in written}) == len(written)
    parts = {"attention_backward, ", "linear_backward, ", "attention, ", "conv2d_backward, ", "spectral_norm_backward", "copy"}
    for work in cuda_work.works(cuda_work.TINY):
        assert work.name in names or any(work.name.startswith(part) for part in parts), f"{work.name} is not measured"
    for what in ("LADD step", "forward", "sample, 1 step", "sample, 4 steps", "memory of the LADD step", "memory of forward and sampling"):
        assert what in names, what
    assert {row["size"].partition(",")[0] for row in written if row["what"] == "forward"} == {"SD3.5-medium"}
    rules = attention.rules_of(attention.read(tmp_path / "attention.json"), "emulator", 90)
    assert {rule[:3] for rule in rules} == {(dtype, 16, backward) for dtype in ("bfloat16", "float16") for backward in (False, True)}
    table = (tmp_path / "cuda.md").read_text()
    assert "% of GB/s" in table and "| add | [16,32] | ladd | failed: earlier |" in table and "MiB" in table


def child(code: str) -> list[str]:
    """A benchmark of a few lines: `rows` is the file, `done` what is in it."""
    head = "import json, os, sys, time\nrows = open(sys.argv[2], 'a', buffering=1)\ndone = open(sys.argv[2]).read()\n"
    tell = "def tell(**row): rows.write(json.dumps(row) + '\\n')\ndef begin(name): tell(begun=[name, 'x', 'ladd'])\n"
    return [sys.executable, "-c", head + tell + code]


def outcome(tmp_path: Path, code: str, seconds: float = 60, row_seconds: float = 30) -> list[dict[str, Any]]:
    gpu.measure(child(code), tmp_path / "rows.jsonl", time.time() + seconds, row_seconds)
    return [row for row in gpu._lines(tmp_path / "rows.jsonl") if "begun" not in row]


def test_a_process_that_dies_is_started_again_behind_the_row(tmp_path: Path) -> None:
    code = "if 'bad' not in done:\n  begin('bad')\n  os.abort()\nbegin('good')\ntell(what='good', size='x', by='ladd', seconds=1.0)"
    bad, good = outcome(tmp_path, code)
    assert bad == {"what": "bad", "size": "x", "by": "ladd", "failed": "the process ended with status -6"} and good["what"] == "good"


def test_a_process_that_hangs_is_started_again_behind_the_row(tmp_path: Path) -> None:
    code = "if 'bad' not in done:\n  begin('bad')\n  time.sleep(600)\ntell(what='good', size='x', by='ladd', seconds=1.0)"
    bad, good = outcome(tmp_path, code, row_seconds=3)
    assert bad["failed"] == "stopped after 3 s without a result" and good["what"] == "good"


def test_a_process_that_makes_nothing_is_not_started_for_ever(tmp_path: Path) -> None:
    assert outcome(tmp_path, "sys.exit(7)") == [
        {"what": "the benchmark", "size": "", "by": "ladd", "failed": "the process ended with status 7"}
    ]


def test_what_cannot_be_prepared_is_passed_over(tmp_path: Path) -> None:
    code = "if 'end of part' in done: sys.exit(0)\ntell(begun=['part', 'preparing', 'ladd'])\nos._exit(9)"
    rows = outcome(tmp_path, code)
    assert [row["what"] for row in rows] == ["part", "end of part"] and rows[0]["failed"] == "the process ended with status 9"


def test_the_time_is_kept_and_what_there_is_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE", 0.2)
    code = "tell(what='good', size='x', by='ladd', seconds=1.0)\nbegin('long')\ntime.sleep(600)"
    start = time.time()
    good, late = outcome(tmp_path, code, seconds=4)
    assert time.time() - start < 60 and good["seconds"] == 1.0 and late["skipped"] == "stopped when the time was over"
    assert gpu.report(tmp_path, HEADER) == 0
    assert gpu.report(tmp_path, {**HEADER, "tests": "failed"}) == 1


def test_steps_end_in_time(tmp_path: Path) -> None:
    assert gpu.step([sys.executable, "-c", "import time; time.sleep(600)"], 0.5, tmp_path / "log") is None
    assert (
        gpu.step([sys.executable, "-c", "import os, sys; print(os.environ['LADD_X']); sys.exit(3)"], 60, tmp_path / "log", LADD_X="seen") == 3
    )
    assert (tmp_path / "log").read_text() == "seen\n"


def test_the_table_compares_with_what_was_measured_and_with_pytorch(tmp_path: Path) -> None:
    rows = [
        {"what": gpu.MEASURED["GB/s"], "size": "512 MiB", "by": "ladd", "seconds": 0.001, "GB/s": 2000.0},
        {"what": "add", "size": "x", "by": "ladd", "seconds": 0.002, "GB/s": 1500.0},
        {"what": "forward", "size": "SD3", "by": "ladd", "seconds": 0.01},
        {"what": "forward", "size": "SD3", "by": "torch.compile", "seconds": 0.015},
        {"what": "sample", "size": "SD3", "by": "torch eager", "failed": "out of | memory"},
    ]
    lines = gpu.table(HEADER, rows).splitlines()
    assert lines[-4].endswith("| 2.000 | 1500.0 |  | 75 % of GB/s |  |") and lines[-2].endswith("| 15.000 |  |  |  | 1.50 x |")
    assert "failed: out of / memory" in lines[-1]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_without_a_gpu_it_ends_at_once(tmp_path: Path) -> None:
    try:
        gpu.gpu_architecture()
    except RuntimeError as error:
        done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and done.stderr == f"make gpu: {error}\n" and "NVIDIA GPU" in done.stderr
        assert not (tmp_path / "out").exists()
    else:
        pytest.skip("there is a GPU")
