"""Compiles csrc/ into ladd._core and puts OpenBLAS beside it. Everything else is in pyproject.toml.

Objects are kept in build/objects-*, one folder a compiler and set of flags, and are made anew when a file that they include
changes (the compiler writes down which). CFLAGS and LDFLAGS of the environment come last, so they win; LADD_JOBS sets how many
files are compiled at once.
"""

import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libscipy_openblas.so"
LICENCE = "libscipy_openblas.LICENSE.txt"
CPU = ["threads", "gemm", "dispatch", "isa_plain", "isa_avx2", "isa_avx512", "isa_avx512bf16"]  # the isa_*.c include the kernel files
FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
]


def sources() -> list[str]:
    folders = [path for name in ("layers", "models", "python") for path in sorted((ROOT / "csrc" / name).glob("*.c"))]
    paths = [ROOT / "csrc" / "core.c", *(ROOT / "csrc" / "cpu" / f"{name}.c" for name in CPU), *folders]
    return [str(path.relative_to(ROOT)) for path in paths]


class BuildCore(build_ext):
    def run(self) -> None:
        super().run()
        places = [Path(self.build_lib) / "ladd"]
        if self.inplace or self.editable_mode:
            places.append(ROOT / "python" / "ladd")
        for place in places:
            if place.is_dir():
                vendor_openblas(place)

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise SystemExit("ladd is built with GCC or Clang on Linux")
        import numpy
        import scipy_openblas32

        includes = [numpy.get_include(), scipy_openblas32.get_include_dir(), sysconfig.get_path("include")]
        if not Path(includes[2], "Python.h").is_file():
            raise SystemExit(f"Python.h expected in {includes[2]}, but it is not there; install Python's headers (Debian: python3-dev)")
        command = [
            *self.compiler.compiler_so,
            *FLAGS,
            "-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION",
            "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION",
            *shlex.split(os.environ.get("CFLAGS", "")),
        ]
        # Not in the key: where the headers lie, which differs in every isolated build; the objects' own lists of headers tell.
        key = hashlib.sha256("\0".join([*command, sys.version]).encode()).hexdigest()[:12]
        folder = ROOT / "build" / f"objects-{key}"
        command += [f"-I{path}" for path in includes]
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("LADD_JOBS", 0)) or os.cpu_count()) as pool:
            # The three files that hold all kernels take longest: they go first.
            longest_first = sorted(ext.sources, key=lambda name: "isa_" not in name)
            objects = list(pool.map(lambda name: compile_one(command, name, folder), longest_first))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [
            f"-L{scipy_openblas32.get_lib_dir()}",
            f"-l{scipy_openblas32.get_library()}",
            "-lm",
            "-pthread",
            "-Wl,-rpath,$ORIGIN",
        ]
        # Python's own rpath is a place on this machine; an extension needs nothing from there.
        linker = [word for word in self.compiler.linker_so if not word.startswith("-Wl,-rpath")]
        run([*linker, *objects, "-o", str(target), *libraries, *shlex.split(os.environ.get("LDFLAGS", ""))])


def compile_one(command: list[str], source: str, folder: Path) -> str:
    made = folder / (source.replace("/", "_")[:-2] + ".o")
    listed = made.with_suffix(".d")
    if not is_fresh(made, listed):
        # Written aside and renamed, so that two builds at once, or a killed one, leave no half object.
        aside = made.with_suffix(f".{os.getpid()}.o")
        started = time.time()
        run([*command, "-MMD", "-MF", str(listed), "-c", source, "-o", str(aside)])
        os.utime(aside, (started, started))  # a file saved while the compiler ran is newer than the object
        os.replace(aside, made)
    return str(made)


def is_fresh(made: Path, listed: Path) -> bool:
    """Whether the object is newer than every file that the compiler read for it."""
    try:
        needed = shlex.split(listed.read_text().replace("\\\n", " ").partition(":")[2])
        return bool(needed) and all((ROOT / name).stat().st_mtime < made.stat().st_mtime for name in needed)
    except OSError:
        return False


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with exit status {done.returncode}")


def vendor_openblas(place: Path) -> None:
    """The library and its licence, copied beside the extension, which finds it by its rpath."""
    import scipy_openblas32

    licence = next(f for f in importlib.metadata.files("scipy-openblas32") or [] if f.name == "LICENSE.txt")
    for source, name in ((Path(scipy_openblas32.get_lib_dir()) / LIBRARY, LIBRARY), (licence.locate(), LICENCE)):
        target = place / name
        if not target.exists() or target.stat().st_size != Path(source).stat().st_size:
            aside = place / f"{name}.{os.getpid()}"
            shutil.copyfile(source, aside)
            os.replace(aside, target)


# depends: without it a change in a header alone would not call build_extension at all.
depends = [str(path.relative_to(ROOT)) for pattern in ("*.h", "*.c", "*.inc") for path in sorted((ROOT / "csrc").rglob(pattern))]
setup(ext_modules=[Extension("ladd._core", sources(), depends=depends)], cmdclass={"build_ext": BuildCore})
