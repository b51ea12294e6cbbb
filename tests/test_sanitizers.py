"""The C core under sanitizers: tests/c with csrc, for wrong addresses, undefined behaviour and data races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
FLAGS = ["-std=gnu11", "-g1", "-O1", "-fno-omit-frame-pointer", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"]

pytestmark = pytest.mark.slow


def compile_tests(folder: Path, *sanitize: str) -> Path:
    import scipy_openblas32

    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = compiler if shutil.which(compiler) else "cc"
    command = [compiler, *FLAGS, *sanitize, f"-I{scipy_openblas32.get_include_dir()}"]
    cpu = [
        ROOT / "csrc" / "cpu" / f"{name}.c" for name in ("isa_plain", "isa_avx2", "isa_avx512", "isa_avx512bf16", "threads", "gemm", "dispatch")
    ]
    models = [path for name in ("layers", "models") for path in sorted((ROOT / "csrc" / name).glob("*.c"))]
    sources = [*cpu, ROOT / "csrc" / "core.c", *models, *sorted((ROOT / "tests" / "c").glob("*.c"))]

    def one(source: Path) -> Path:
        made = folder / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run([*command, "-c", source, "-o", made], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, f"warnings:\n{done.stderr}"
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    program = folder / "test_c"
    libraries = scipy_openblas32.get_lib_dir()
    link = [f"-L{libraries}", f"-l{scipy_openblas32.get_library()}", f"-Wl,-rpath,{libraries}", "-lm"]
    done = subprocess.run([compiler, *sanitize, "-pthread", *objects, "-o", program, *link], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(*command: str | Path, **environment: str) -> str:
    settings = {
        "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "allocator_may_return_null=1:die_after_fork=0",  # the tests fork on purpose
    }
    done = subprocess.run(command, env={**os.environ, **settings, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout.strip()


def test_plain_build_has_no_wrong_address_or_undefined_behaviour(tmp_path: Path) -> None:
    assert run(compile_tests(tmp_path, *ADDRESS, "-DLADD_PLAIN_ONLY")) == "ok plain"


def test_no_instruction_set_has_wrong_addresses_or_undefined_behaviour(tmp_path: Path) -> None:
    program = compile_tests(tmp_path, *ADDRESS)
    names = ["plain", "avx2", "avx512"]
    best = run(program).removeprefix("ok ")
    for name in names[: names.index(best)]:
        assert run(program, LADD_CPU=name) == f"ok {name}"


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = compile_tests(tmp_path, *THREAD, "-DLADD_PLAIN_ONLY")
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []  # the thread sanitizer needs its own places in memory
    assert run(*fixed_addresses, program) == "ok plain"
