"""Compiles csrc/ into ladd._core and puts OpenBLAS beside it; with nvcc also cuda/ into ladd._cuda. Everything else is in pyproject.toml.

LADD_CUDA=1 wants ladd._cuda (a missing toolkit is an error), LADD_CUDA=0 leaves it out; without it, it is built where nvcc and cublasLt.h are
found. LADD_CUDA_ARCHS names its architectures, "sm_80 sm_90a" by default; PTX of the lowest serves newer ones. NVCCFLAGS go to nvcc.

Objects are kept in build/objects-*, one folder a compiler and set of flags, and are made anew when a file that they include
changes (the compiler writes down which). CFLAGS and LDFLAGS of the environment come last, so they win; LADD_JOBS sets how many
files are compiled at once.
"""

import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter", "-Wno-deprecated-gpu-targets"]
CUDA_ARCHS = "sm_80 sm_90a"
CUDA_OLDEST = (12, 4)


def find_nvcc() -> str | None:
    """From CUDA_HOME, the path, or where toolkits are installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes[:2] if home] + [shutil.which("nvcc"), str(Path(homes[2], "bin", "nvcc"))]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def library_headers(nvcc: str) -> list[str]:
    """Where the headers of CUDA's libraries may lie: LADD_CUDA_INCLUDE, the toolkit, NVIDIA's wheels, which carry them too."""
    places = [Path(place) for place in os.environ.get("LADD_CUDA_INCLUDE", "").split(os.pathsep) if place]
    places += [Path(nvcc).resolve().parent.parent / "include", Path("/usr/local/cuda/include")]
    for entry in map(Path, filter(None, sys.path)):
        places += sorted(entry.glob("nvidia/*/include"))
        places += [entry / "include"] if (entry / "include" / "cudnn_frontend.h").is_file() else []
    return [str(place) for place in dict.fromkeys(places) if place.is_dir()]


class Toolkit(NamedTuple):
    nvcc: str
    version: str  # what nvcc says of itself
    headers: list[str]
    targets: list[str]  # -gencode options
    words: str  # the same for people


def cuda_toolkit() -> Toolkit | None:
    """None where ladd._cuda is not wanted or cannot be built. Without cuDNN's headers it lacks that engine of attention."""
    wanted = os.environ.get("LADD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"LADD_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc, oldest = find_nvcc(), "{}.{}".format(*CUDA_OLDEST)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release (\d+)\.(\d+)", version)
    headers = library_headers(nvcc) if nvcc else []
    if not nvcc:
        missing = f"nvcc, looked for in CUDA_HOME, PATH and /usr/local/cuda: install the CUDA toolkit {oldest} or newer"
    elif not release or tuple(map(int, release.groups())) < CUDA_OLDEST:
        missing = f"nvcc {oldest} or newer, but {nvcc} is {release[0] if release else 'of no known release'}"
    elif not any(Path(place, "cublasLt.h").is_file() for place in headers):
        missing = (
            "cublasLt.h, which this toolkit lacks: pip install nvidia-cublas, and build with --no-build-isolation (or set LADD_CUDA_INCLUDE)"
        )
    else:
        return Toolkit(nvcc, version, headers, *cuda_targets(nvcc))
    if wanted == "1":
        raise SystemExit(f"LADD_CUDA=1 needs {missing}")
    print(f"building without CUDA: it needs {missing}", flush=True)
    return None


def cuda_targets(nvcc: str) -> tuple[list[str], str]:
    """nvcc's -gencode options and the architectures in words."""
    archs = os.environ.get("LADD_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").replace(";", " ").split()
    if not archs:
        raise SystemExit("LADD_CUDA_ARCHS must name at least one architecture, such as sm_90a")
    for arch in archs:
        if not re.fullmatch(r"sm_\d{2,3}[af]?", arch) or number(arch) < 80:
            raise SystemExit(f"LADD_CUDA_ARCHS must be names like sm_80 or sm_90a, of at least sm_80, got {arch!r}")
    lowest = min(map(number, archs))
    targets = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    tried = subprocess.run([nvcc, "--dryrun", *targets, "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    if tried.returncode:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        said = next((line for line in tried.stderr.splitlines() if "fatal" in line), tried.stderr).strip()
        raise SystemExit(f"LADD_CUDA_ARCHS={' '.join(archs)}: {said}; {nvcc} compiles {' '.join(known)}")
    return targets, f"{', '.join(archs)} and PTX for compute_{lowest}"


def number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


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
        if ext.name == "ladd._cuda":
            self.build_cuda(ext)
        else:
            self.build_core(ext)

    def build_cuda(self, ext: Extension) -> None:
        """cuda/ by nvcc, the module by the C compiler; CUDA's run time is linked in, its libraries are not."""
        assert TOOLKIT is not None
        nvcc, version, headers, targets, words = TOOLKIT
        define = f'-DLADD_CUDA_ARCHITECTURES="{words}"'
        command = [nvcc, *CUDA_FLAGS, *targets, define, *(f"-I{place}" for place in headers), *shlex.split(os.environ.get("NVCCFLAGS", ""))]
        module = [*self.compiler.compiler_so, *FLAGS, f"-I{sysconfig.get_path('include')}", *shlex.split(os.environ.get("CFLAGS", ""))]
        key = hashlib.sha256("\0".join([*command, *module, version, sys.version]).encode()).hexdigest()[:12]
        folder = ROOT / "build" / f"cuda-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"ladd._cuda: {len(ext.sources)} files for {words}, by {nvcc}; this takes minutes", flush=True)
        with ThreadPoolExecutor(int(os.environ.get("LADD_JOBS", 0)) or os.cpu_count()) as pool:
            # The attention's files take longest: they go first.
            ordered = sorted(ext.sources, key=lambda name: "attention_" not in name)
            objects = list(pool.map(lambda name: compile_one(module if name.endswith(".c") else command, name, folder), ordered))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [nvcc, "-shared", "-cudart", "static", *targets, "-Xlinker", "--exclude-libs,ALL", "-o", str(target), *objects, "-ldl"]
        run(link, f"{Path(nvcc).name} -o {target}")

    def build_core(self, ext: Extension) -> None:
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
        link = [*linker, *objects, "-o", str(target), *libraries, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run(link, f"{linker[0]} -o {target}")


def compile_one(command: list[str], source: str, folder: Path) -> str:
    made = folder / (source.replace("/", "_").rpartition(".")[0] + ".o")
    listed = made.with_suffix(".d")
    if not is_fresh(made, listed):
        # Written aside and renamed, so that two builds at once, or a killed one, leave no half object.
        aside = made.with_suffix(f".{os.getpid()}.o")
        started = time.time()
        run([*command, "-MMD", "-MF", str(listed), "-c", source, "-o", str(aside)], f"{Path(command[0]).name} {source}")
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


def run(command: list[str], words: str) -> None:
    """`words` is what is printed of it, unless it fails."""
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{words} ({time.time() - started:.0f} s)", flush=True)
    if done.stdout:
        print(done.stdout, flush=True)
    if done.returncode:
        print(shlex.join(command), flush=True)
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


def depends(*folders: str) -> list[str]:
    """Without it a change in a header alone would not call build_extension at all."""
    patterns = ("*.h", "*.c", "*.inc", "*.cu", "*.cuh")
    return [str(path.relative_to(ROOT)) for folder in folders for pattern in patterns for path in sorted((ROOT / folder).rglob(pattern))]


TOOLKIT = cuda_toolkit() if {"build_ext", "build", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv) else None
extensions = [Extension("ladd._core", sources(), depends=depends("csrc"))]
if TOOLKIT:
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cuda").glob("*.cu"))
    extensions.append(Extension("ladd._cuda", [*kernels, "csrc/python/cuda/module.c"], depends=depends("csrc", "cuda")))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildCore})
