"""`make gpu`: builds for the GPU of this machine, runs the device's tests on it and measures, all within eight minutes and without a network.

    python benchmarks/gpu.py --out out/gpu             # writes cuda.json, cuda.md, rows.jsonl, attention.json and tests.log there

The measuring (benchmarks/cuda.py) is a process of its own. When it hangs in a row, or the GPU breaks under it, it is started again behind
that row, so that one bad kernel costs one row. When the time is over, what there is is written. Exit status: 0 if the tests passed and
no row failed, 1 if not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_cuda_device.py", "tests/test_cuda_kernels.py", "tests/test_cuda_models.py")
RESERVE = 10.0  # seconds at the end for the report
Row = dict[str, Any]


def gpu_architecture() -> str:
    """Of the first GPU, from the driver alone, since nothing is built yet: "sm_90". RuntimeError says what is missing."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("an NVIDIA GPU and its driver expected, but libcuda.so.1 is not there") from None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        raise RuntimeError(f"an NVIDIA GPU expected, but the driver shows none (status {status})")
    for attribute, value in ((75, major), (76, minor)):  # compute capability
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return f"sm_{major.value}{minor.value}"


def step(command: Sequence[str], seconds: float, log: Path | None = None, **environment: str) -> int | None:
    """The exit status, or None if it was stopped after so many seconds. log: the output goes there, too, and its end is printed."""
    print("+", " ".join(command), flush=True)
    output = log.open("w") if log else None
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    status = wait(child, seconds)
    if output and log:
        output.close()
        print("\n".join(log.read_text().splitlines()[-12:]), flush=True)
    return status


def wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        child.wait()
        return None


# ---- measuring ---------------------------------------------------------------------------------------------------------------------------


def measure(command: Sequence[str], rows: Path, end: float, row_seconds: float, environment: Mapping[str, str] = {}) -> None:
    """Runs the benchmark until it is through, again behind each row in which it hangs for `row_seconds` or dies, until `end`."""
    while (left := end - time.time()) > 0:
        started = len(_lines(rows))
        child = subprocess.Popen(
            [*command, "--rows", str(rows), "--minutes", str(left / 60)], cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
        )
        why = _watch(child, rows, end, row_seconds)
        if why is None:
            return
        word = "failed" if time.time() < end else "skipped"
        lines = _lines(rows)
        if lines and "begun" in lines[-1]:
            what, size, by = lines[-1]["begun"]
            _append(rows, **{"what": what, "size": size, "by": by, word: why})
            if size == "preparing":  # it would die there again
                _append(rows, what=f"end of {what}", size="", by=by, ended=True)
        elif len(lines) == started:
            _append(rows, **{"what": "the benchmark", "size": "", "by": "ladd", word: why})
            return


def _watch(child: subprocess.Popen[bytes], rows: Path, end: float, row_seconds: float) -> str | None:
    """None if it ended well, else why it did not."""
    seen, since = -1, time.time()
    while child.poll() is None:
        size = rows.stat().st_size if rows.is_file() else 0
        if size != seen:
            seen, since = size, time.time()
        over, hangs = time.time() > end + RESERVE / 2, time.time() - since > row_seconds
        if over or hangs:
            os.killpg(child.pid, 9)
            child.wait()
            return "stopped when the time was over" if over else f"stopped after {row_seconds:.0f} s without a result"
        time.sleep(0.05)
    return None if child.returncode == 0 else f"the process ended with status {child.returncode}"


def _lines(rows: Path) -> list[Row]:
    return [json.loads(text) for text in rows.read_text().splitlines()] if rows.is_file() else []


def _append(rows: Path, **row: Any) -> None:
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


# ---- report ------------------------------------------------------------------------------------------------------------------------------

MEASURED = {"GB/s": "copy (the measured bandwidth)", "TFLOP/s": "linear (the measured product)"}


def table(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Rates beside the measured copy and product; PyTorch's times beside ladd's of the same row."""
    out = [f"# {header['device']}, {header['dtype']}, ladd {header['ladd']}, torch {header['torch'] or 'not installed'}", ""]
    out += [f"Tests: {header['tests']}.", "", "| what | size | by | ms | GB/s | TFLOP/s | of the measured | ladd is faster by |"]
    out.append("|---|---|---|--:|--:|--:|--:|--:|")
    best = {key: next((row[key] for row in rows if row["what"] == what and key in row), 0.0) for key, what in MEASURED.items()}
    ours = {(row["what"], row["size"]): row["seconds"] for row in rows if row["by"] == "ladd" and "seconds" in row}
    for row in rows:
        head = f"| {row['what']} | {row['size']} | {row['by']} |"
        word = next((word for word in ("failed", "skipped") if word in row), None)
        if word:
            out.append(f"{head} {word}: {str(row[word]).replace('|', '/')} | | | | |")
        elif "MiB" in row:
            out.append(f"{head} {row['MiB']:.0f} MiB | | | | |")
        elif "seconds" in row:
            shares = [f"{100 * row[key] / best[key]:.0f} % of {key}" for key in best if key in row and best[key]]
            cells = [f"{row[key]:.1f}" if key in row else "" for key in best]
            mine = ours.get((row["what"], row["size"]))
            faster = f"{row['seconds'] / mine:.2f} x" if mine and row["by"] != "ladd" else ""
            out.append(f"{head} {1e3 * row['seconds']:.3f} | {cells[0]} | {cells[1]} | {', '.join(shares)} | {faster} |")
    return "\n".join(out) + "\n"


def report(out: Path, header: Mapping[str, Any]) -> int:
    """Writes cuda.json and cuda.md; 1 if the tests or a row failed, or nothing was measured."""
    rows = [row for row in _lines(out / "rows.jsonl") if "begun" not in row and "ended" not in row]
    (out / "cuda.json").write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    (out / "cuda.md").write_text(table(header, rows))
    count = {word: sum(word in row for row in rows) for word in ("seconds", "skipped", "failed")}
    print(f"tests {header['tests']}; {count['seconds']} rows measured, {count['skipped']} skipped, {count['failed']} failed: {out}/cuda.md")
    return 0 if header["tests"] == "passed" and count["seconds"] and not count["failed"] else 1


def about_device() -> dict[str, Any]:
    """Asked of a process of its own: a GPU that broke in this one would stay broken."""
    code = (
        "import json, ladd, importlib.util as u, importlib.metadata as m; d = ladd.device.get('cuda').info();"
        "torch = m.version('torch') if u.find_spec('torch') else None;"
        "print(json.dumps({'device': d['name'], 'about': d, 'ladd': ladd.__version__, 'torch': torch}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it, building and tests included")
    parser.add_argument("--row-seconds", type=float, default=150.0, help="a row that takes longer, its compiling included, is given up")
    given = parser.parse_args()
    end = time.time() + 60 * given.minutes - RESERVE
    try:
        architecture = gpu_architecture()
    except RuntimeError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    os.environ["PYTHONPATH"] = str(ROOT / "python")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    (out / "attention.json").unlink(missing_ok=True)
    archs = os.environ.get("LADD_CUDA_ARCHS") or architecture
    status = step([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], end - time.time(), LADD_CUDA="1", LADD_CUDA_ARCHS=archs)
    if status != 0:
        print(f"make gpu: the build {'took longer than all the time there is' if status is None else 'failed'}", file=sys.stderr)
        return 1
    try:
        header = {**about_device(), "dtype": given.dtype}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 1
    # A third of what is left, so that measurements are made whatever the tests do.
    status = step([sys.executable, "-m", "pytest", "-q", *TESTS], (end - time.time()) / 3, out / "tests.log", LADD_TEST_GPU="1")
    header["tests"] = "not finished in time" if status is None else "passed" if status == 0 else "failed"
    command = [sys.executable, "benchmarks/cuda.py", "--dtype", given.dtype, "--save-table", *([] if header["torch"] else ["--no-torch"])]
    measure(command, out / "rows.jsonl", end, given.row_seconds)
    return report(out, header)


if __name__ == "__main__":
    sys.exit(main())
