"""setup.py's half for CUDA: what it finds and refuses, which architectures it asks nvcc for, what it links. A script stands in for nvcc."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent
# Says its version, knows sm_80, sm_90, sm_90a and sm_120, writes down how it is called, and makes empty objects with their list of headers.
NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release $(cat "$0.release"), V0.0.0"; exit ;;
    --list-gpu-code) printf 'sm_80\\nsm_90\\nsm_120\\n'; exit ;;
esac
for word; do
    case "$word" in -gencode=*) case "${word##*code=}" in
        sm_80 | sm_90 | sm_90a | sm_120 | compute_*) ;;
        *) echo "nvcc fatal   : Unsupported gpu architecture '${word##*=}'" >&2; exit 1 ;;
    esac ;; esac
done
case "$1" in --dryrun) exit ;; esac
echo "$*" >> "$0.calls"
while [ $# -gt 0 ]; do
    case "$1" in
        -MF) listed=$2 ;;
        -c) source=$2 ;;
        -o) made=$2 ;;
    esac
    shift
done
: > "$made"
[ -z "$source" ] || echo "$made: $source" > "$listed"
"""


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """setup.py as a module that builds in an empty folder, without CUDA in sight."""
    monkeypatch.setattr("setuptools.setup", lambda **given: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    spec = importlib.util.spec_from_file_location("ladd_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    for name in ("LADD_CUDA", "LADD_CUDA_ARCHS", "LADD_CUDA_INCLUDE", "NVCCFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return module


def toolkit(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, release: str = "13.0", header: bool = True) -> Path:
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    (folder / "toolkit" / "include").mkdir(parents=True)
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    nvcc.with_suffix(".release").write_text(release)
    monkeypatch.setattr(setup, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(setup, "library_headers", lambda nvcc: [str(folder / "toolkit" / "include")])
    if header:
        (folder / "toolkit" / "include" / "cublasLt.h").touch()
    return nvcc


def test_no_toolkit(setup: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.cuda_toolkit() is None
    assert capsys.readouterr().out.startswith("building without CUDA: it needs nvcc, looked for in CUDA_HOME, PATH and /usr/local/cuda")
    monkeypatch.setenv("LADD_CUDA", "1")
    with pytest.raises(SystemExit, match=r"LADD_CUDA=1 needs nvcc, looked for in .* install the CUDA toolkit 12.4 or newer"):
        setup.cuda_toolkit()
    monkeypatch.setenv("LADD_CUDA", "yes")
    with pytest.raises(SystemExit, match="LADD_CUDA must be 0, 1 or unset, got 'yes'"):
        setup.cuda_toolkit()


@pytest.mark.parametrize(
    ("release", "header", "message"),
    [("11.8", True, r"needs nvcc 12.4 or newer, but .*nvcc is release 11.8"), ("13.0", False, "needs cublasLt.h, .*pip install nvidia-cublas")],
)
def test_a_toolkit_that_does_not_do(
    setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, header: bool, message: str
) -> None:
    """Whoever did not ask for CUDA gets a build for the CPU."""
    toolkit(setup, monkeypatch, tmp_path, release, header)
    assert setup.cuda_toolkit() is None
    monkeypatch.setenv("LADD_CUDA", "1")
    with pytest.raises(SystemExit, match=message):
        setup.cuda_toolkit()


def test_a_toolkit_is_used_unless_unwanted(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = toolkit(setup, monkeypatch, tmp_path)
    for wanted in (None, "1"):
        if wanted:
            monkeypatch.setenv("LADD_CUDA", wanted)
        found = setup.cuda_toolkit()
        assert found.nvcc == str(nvcc) and found.words == "sm_80, sm_90a and PTX for compute_80"
    monkeypatch.setenv("LADD_CUDA", "0")
    assert setup.cuda_toolkit() is None


@pytest.mark.parametrize(
    ("archs", "codes", "words"),
    [
        ("sm_90a", ["sm_90a", "compute_90"], "sm_90a and PTX for compute_90"),
        ("sm_120 sm_90", ["sm_120", "sm_90", "compute_90"], "sm_120, sm_90 and PTX for compute_90"),
        ("sm_80,sm_90a;sm_120", ["sm_80", "sm_90a", "sm_120", "compute_80"], "sm_80, sm_90a, sm_120 and PTX for compute_80"),
    ],
)
def test_architectures(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archs: str, codes: list[str], words: str) -> None:
    toolkit(setup, monkeypatch, tmp_path)
    monkeypatch.setenv("LADD_CUDA_ARCHS", archs)
    found = setup.cuda_toolkit()
    assert found.words == words
    assert found.targets == [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in codes]


@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("", "must name at least one architecture"),
        ("sm_75", "of at least sm_80, got 'sm_75'"),
        ("sm_90a hopper", "names like sm_80 or sm_90a, .*got 'hopper'"),
        ("sm_80 sm_999", "LADD_CUDA_ARCHS=sm_80 sm_999: nvcc fatal   : Unsupported gpu architecture 'sm_999'; .* compiles sm_80 sm_90 sm_120$"),
    ],
)
def test_architectures_that_cannot_be(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archs: str, message: str) -> None:
    """Told before anything is compiled."""
    toolkit(setup, monkeypatch, tmp_path)
    monkeypatch.setenv("LADD_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match=message):
        setup.cuda_toolkit()


def test_compiling_and_linking(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = toolkit(setup, monkeypatch, tmp_path)
    monkeypatch.setenv("LADD_CUDA_ARCHS", "sm_80 sm_120")
    monkeypatch.setenv("NVCCFLAGS", "-lineinfo")
    monkeypatch.setattr(setup, "TOOLKIT", setup.cuda_toolkit())
    for name in ("kernel.cu", "attention_forward.cu", "module.c"):
        (tmp_path / name).touch()
    extension = SimpleNamespace(name="ladd._cuda", sources=["kernel.cu", "attention_forward.cu", "module.c"])
    made = tmp_path / "made" / "_cuda.so"
    builder = SimpleNamespace(compiler=SimpleNamespace(compiler_so=[str(nvcc)]), get_ext_fullpath=lambda name: str(made))
    setup.BuildCore.build_cuda(builder, extension)
    calls = nvcc.with_suffix(".calls").read_text().splitlines()
    kernels = [call for call in calls if ".cu " in call]
    assert len(calls) == 4 and len(kernels) == 2 and made.is_file()
    for call in (*kernels, calls[-1]):
        assert "code=sm_80 " in call and "code=sm_120 " in call and "code=compute_80 " in call
    assert all("-lineinfo" in call and 'ARCHITECTURES="sm_80, sm_120 and PTX for compute_80"' in call for call in kernels)
    assert "-cudart static" in calls[-1] and [word for word in calls[-1].split() if word.startswith("-l")] == ["-ldl"]
    said = capsys.readouterr().out
    assert "3 files for sm_80, sm_120 and PTX for compute_80" in said and "nvcc attention_forward.cu (0 s)" in said
    setup.BuildCore.build_cuda(builder, extension)
    assert len(nvcc.with_suffix(".calls").read_text().splitlines()) == 5, "only the link is done again"


def test_a_failing_compiler_is_quoted(setup: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="failed with exit status 3"):
        setup.run([sys.executable, "-c", "print('what it said'); raise SystemExit(3)"], "compiling")
    said = capsys.readouterr().out
    assert "compiling (" in said and "what it said" in said and sys.executable in said


def test_setup_says_what_is_wrong_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--help"], cwd=ROOT, env={"LADD_CUDA": "2", "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "LADD_CUDA must be 0, 1 or unset, got '2'\n"
