"""The emulator of CUDA for the tests; emulator.h describes it, build.py compiles it."""

from __future__ import annotations

import ctypes
import shutil
from functools import cache

from . import build


@cache
def library(purpose: str) -> ctypes.CDLL:
    """A copy for each purpose: they share neither memory nor errors."""
    built = build.build_extension()
    copy = built.with_stem(f"{built.stem}-{purpose}")
    if not copy.is_file() or copy.stat().st_mtime < built.stat().st_mtime:
        shutil.copyfile(built, copy)
    return ctypes.CDLL(str(copy))


def api(purpose: str) -> int:
    """The address of its ladd_device_api."""
    return ctypes.addressof((ctypes.c_char * 1).in_dll(library(purpose), "ladd_cuda_api"))
