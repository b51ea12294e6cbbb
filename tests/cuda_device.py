"""A CUDA device for tests: the extension ladd._cuda compiled against the emulator of tests/cuda_emulator; with LADD_TEST_GPU=1 the built
one, on a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import cuda_emulator
import pytest

import ladd

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MEMORY = 256 << 20  # of the emulated device, so that running out of it is quick
ON_GPU = os.environ.get("LADD_TEST_GPU") == "1"
needs_device = pytest.mark.skipif(not ON_GPU and shutil.which("g++") is None, reason="the emulator is compiled with g++")
needs_emulator = pytest.mark.skipif(ON_GPU or shutil.which("g++") is None, reason="the emulator's own")


@cache
def library() -> ctypes.CDLL:
    """The emulated extension in the place of ladd._cuda. A launch runs in one order and unguarded: the kernels are tried elsewhere."""
    before = os.environ.get("LADD_EMULATOR_MEMORY")
    os.environ["LADD_EMULATOR_MEMORY"] = str(MEMORY)  # read when the library is loaded
    opened = cuda_emulator.library("models")
    if before is None:
        del os.environ["LADD_EMULATOR_MEMORY"]
    opened.ladd_emulator_set_orders(1)
    opened.ladd_emulator_set_guard(0)
    new: Any = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new(cuda_emulator.api("models"), b"ladd.device_api", None)
    ladd.device._provider = lambda: capsule  # type: ignore[assignment]
    return opened


def device() -> ladd.device.Device:
    if not ON_GPU:
        library()
    opened = ladd.device.get("cuda")
    assert opened is not None
    return opened


def benchmark(name: str) -> Any:
    """A module of benchmarks/, importable by the others of its folder."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
