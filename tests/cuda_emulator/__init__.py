"""The emulator of CUDA for the tests; emulator.h describes it, build.py compiles it."""

from __future__ import annotations

import ctypes
import shutil
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

from . import build

CAPSULE_NAME = ctypes.create_string_buffer(b"ladd.device_api")


@cache
def library(purpose: str) -> ctypes.CDLL:
    """A copy for each purpose: they share neither memory nor errors."""
    built = build.build()
    copy = built.with_stem(f"{built.stem}-{purpose}")
    if not copy.is_file() or copy.stat().st_mtime < built.stat().st_mtime:
        shutil.copyfile(built, copy)
    return ctypes.CDLL(str(copy))


def api(purpose: str) -> int:
    """The address of its ladd_device_api."""
    return ctypes.addressof((ctypes.c_char * 1).in_dll(library(purpose), "ladd_cuda_api"))


def install() -> None:
    """Makes the emulated device the one that device="cuda" finds. Launches then run in one order: the models are on trial, not the kernels."""
    if "ladd._cuda" not in sys.modules:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        module: Any = SimpleNamespace(provider=new(api("models"), CAPSULE_NAME, None))
        sys.modules["ladd._cuda"] = module
        library("models").ladd_emulator_set_orders(1)
