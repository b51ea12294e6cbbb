"""The C core under the address and undefined-behaviour sanitizers: compiles tests/c with csrc and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FLAGS = ["-std=gnu11", "-g1", "-O1", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]


def compile_tests(folder: Path, *extra: str) -> Path:
    import scipy_openblas32

    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = compiler if shutil.which(compiler) else "cc"
    command = [compiler, *FLAGS, *SANITIZE, *extra, f"-I{scipy_openblas32.get_include_dir()}"]
    cpu = [ROOT / "csrc" / "cpu" / f"{name}.c" for name in ("isa_plain", "isa_avx2", "isa_avx512", "threads", "gemm", "dispatch")]
    models = [path for name in ("layers", "models") for path in sorted((ROOT / "csrc" / name).glob("*.c"))]
    sources = [*cpu, ROOT / "csrc" / "core.c", *models, *sorted((ROOT / "tests" / "c").glob("*.c"))]

    def one(source: Path) -> Path:
        made = folder / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run([*command, "-c", source, "-o", made], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    program = folder / "test_c"
    libraries = scipy_openblas32.get_lib_dir()
    link = [f"-L{libraries}", f"-l{scipy_openblas32.get_library()}", f"-Wl,-rpath,{libraries}", "-lm"]
    done = subprocess.run([compiler, *SANITIZE, "-pthread", *objects, "-o", program, *link], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, **environment: str) -> str:
    settings = {
        "ASAN_OPTIONS": "abort_on_error=0:allocator_may_return_null=1:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LSAN_OPTIONS": "print_suppressions=0",
    }
    done = subprocess.run([program], env={**os.environ, **settings, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_plain_build_is_clean(tmp_path: Path) -> None:
    assert run(compile_tests(tmp_path, "-DLADD_PLAIN_ONLY")) == "ok plain"


@pytest.mark.slow
def test_default_build_is_clean_on_every_instruction_set(tmp_path: Path) -> None:
    program = compile_tests(tmp_path)
    best = run(program).removeprefix("ok ")
    for name in ("avx2", "plain"):
        if name != best and (best == "avx512" or name == "plain"):
            assert run(program, LADD_CPU=name) == f"ok {name}"
