"""Compiles cuda/*.cu against the emulator into the extension _cuda under build/.

Objects are made anew when a file that they include changes. `python tests/cuda_emulator/build.py` prints the library's path.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The compiler's checks trap where they fail; the emulator says in which kernel, block and thread.
CHECKS = "bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow"
FLAGS = [
    "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to leave a fiber
    f"-I{HERE}",
    f"-I{sysconfig.get_path('include')}",
]
CXX_FLAGS = ["-std=c++17", f"-fsanitize={CHECKS}", "-fsanitize-undefined-trap-on-error"]


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def is_fresh(made: Path, listed: Path) -> bool:
    try:
        needed = shlex.split(listed.read_text().replace("\\\n", " ").partition(":")[2])
        return bool(needed) and all((ROOT / name).stat().st_mtime < made.stat().st_mtime for name in needed)
    except OSError:
        return False


def compile_one(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}-{source.suffix[1:]}.o"
    if is_fresh(made, made.with_suffix(".d")):
        return made
    aside = made.with_suffix(f".{os.getpid()}.o")
    language = ["gcc", "-std=gnu11"] if source.suffix == ".c" else ["g++", *CXX_FLAGS, *(["-x", "c++"] if source.suffix == ".cu" else [])]
    run([*language, *FLAGS, "-MMD", "-MF", str(made.with_suffix(".d")), "-c", str(source), "-o", str(aside)])
    os.replace(aside, made)
    return made


def link(name: str, sources: list[Path]) -> Path:
    key = hashlib.sha256("\0".join([*FLAGS, *CXX_FLAGS]).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"cuda-emulated-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("LADD_JOBS", 0)) or os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_one(source, folder), sources))
    library = folder / name
    if not library.is_file() or any(made.stat().st_mtime > library.stat().st_mtime for made in objects):
        aside = library.with_suffix(f".{os.getpid()}.so")
        run(["g++", "-shared", "-o", str(aside), *map(str, objects), "-ldl"])
        os.replace(aside, library)
    return library


def build_extension() -> Path:
    """The extension ladd._cuda as it is, with the emulator in the place of CUDA's run time; made if it is not there or not new."""
    sources = [*sorted((ROOT / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp")), ROOT / "csrc" / "python" / "cuda" / "module.c"]
    return link("_cuda.so", sources)


if __name__ == "__main__":
    print(build_extension())
