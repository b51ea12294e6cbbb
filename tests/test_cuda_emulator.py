"""The emulator of CUDA itself: it finds the faults that it is there for, and its tensor-core functions and number types are right."""

from __future__ import annotations

import ctypes
import re
import shutil
from functools import cache

import numpy as np
import pytest
import support
from cuda_core import rounded
from cuda_emulator import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

N = 256


@cache
def library() -> ctypes.CDLL:
    sources = [build.HERE / "faults" / "faults.cu", *sorted(build.HERE.glob("*.cpp"))]
    loaded = ctypes.CDLL(str(build.link("faults.so", sources)))
    loaded.fault_sentence.restype = ctypes.c_char_p
    return loaded


class Memory:
    """An array on the emulated device."""

    def __init__(self, x: np.ndarray) -> None:
        self.shape, self.dtype, self._as_parameter_ = x.shape, x.dtype, ctypes.c_void_p()
        assert library().fault_alloc(ctypes.byref(self._as_parameter_), ctypes.c_size_t(x.nbytes)) == 0
        assert library().fault_copy(self, x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(x.nbytes)) == 0

    def __del__(self) -> None:
        library().fault_free(self)

    def read(self) -> np.ndarray:
        x = np.empty(self.shape, self.dtype)
        assert library().fault_copy(x.ctypes.data_as(ctypes.c_void_p), self, ctypes.c_size_t(x.nbytes)) == 0
        return x


def run(which: str) -> tuple[np.ndarray, str]:
    """(out, the error's sentence) of the kernel on 0, 1, 2, ..."""
    out, given = Memory(np.zeros(N, np.float32)), Memory(np.arange(N, dtype=np.float32))
    library().fault_run(which.encode(), out, given)
    return out.read(), library().fault_sentence().decode()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("missing barrier", "depend on the order"),
        ("threads write one place", "depend on the order"),
        ("blocks write one place", "depend on the order"),
        ("half at a barrier", r"32 wait at __syncthreads \(line \d+\), 0 in a warp operation .*32 have ended"),
        ("two barriers", "one barrier for all threads expected, got lines"),
        ("lanes missing", "32 in a warp operation"),
        ("lane not in its mask", "a mask with the calling lane 16 expected"),
        ("read beyond", r"kernel read_beyond, block \(0, 0, 0\), thread .*outside of the buffer of 1024 bytes"),
        ("write behind", "write outside of the buffer of 1024 bytes.*4 bytes before"),
        ("misaligned", "misaligned access"),
        ("static index", r"kernel static_index, block \(0, 0, 0\), thread \(32, 0, 0\): .*index outside of an array"),
        ("dynamic index", "past the end of dynamic shared memory"),
        ("block too large", "no device takes"),
        ("grid too large", "no device takes"),
        ("shared memory not asked for", "at most 49152 bytes"),
    ],
)
def test_faults_are_named(which: str, message: str) -> None:
    _, sentence = run(which)
    assert sentence
    assert re.search(message, sentence), sentence


def test_sound_kernels_run() -> None:
    out, sentence = run("barrier")
    assert sentence == "" and np.array_equal(out.reshape(4, 64), np.arange(256, dtype=np.float32).reshape(4, 64)[:, ::-1])
    out, sentence = run("asynchronous copy")
    wanted = np.where(np.arange(256) < 240, np.arange(256), 0)[::-1]  # copies that are not valid give zeros
    assert sentence == "" and np.array_equal(out, wanted)


def test_unwritten_memory_is_nan() -> None:
    out, _ = run("unwritten")
    assert np.isnan(out[:64]).all()
    out, _ = run("copy without wait")
    assert np.isnan(out).all(), "a copy landed before it was waited for"


def test_pointers_of_the_host_are_refused() -> None:
    x = np.zeros(N, np.float32)
    assert library().fault_run(b"barrier", Memory(x), x.ctypes.data_as(ctypes.c_void_p)) != 0
    assert "argument 2 points to no device memory" in library().fault_sentence().decode()


def test_freed_memory_is_refused() -> None:
    out, given = Memory(np.zeros(N, np.float32)), Memory(np.zeros(N, np.float32))
    assert library().fault_free(given) == 0
    assert library().fault_run(b"barrier", out, given) != 0
    assert library().fault_free(given) != 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensor_core_product(dtype: str) -> None:
    a, b, d = rounded(support.normal(1, 16, 16), dtype), rounded(support.normal(2, 16, 8), dtype), Memory(np.zeros((16, 8), np.float32))
    bits = [x.astype(np.float16).view(np.uint16) if dtype == "float16" else (x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    assert library().fault_multiply(int(dtype == "float16"), d, Memory(bits[0]), Memory(bits[1])) == 0
    support.assert_close(d.read(), a.astype(np.float64) @ b.astype(np.float64), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding(dtype: str) -> None:
    """Every number of the type, the middle between neighbours and what lies just beside it, overflow, NaN."""
    bits = np.arange(2**16, dtype=np.uint32)
    exact = bits.astype(np.uint16).view(np.float16).astype(np.float32) if dtype == "float16" else (bits << 16).view(np.float32)
    exact = exact[np.isfinite(exact)]
    with np.errstate(over="ignore"):
        middle = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
    middle = middle[np.isfinite(middle)]
    x = np.concatenate([exact, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))])
    x = np.concatenate([x, np.float32([65519.99, 65520, 1e38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 0, -0.0])])
    y = Memory(np.zeros(x.size, np.float32))
    assert library().fault_round(int(dtype == "float16"), y, Memory(x), x.size) == 0
    wanted = rounded(x, dtype)
    assert np.array_equal(np.isnan(y.read()), np.isnan(x))
    real = ~np.isnan(x)
    assert support.same_bits(y.read()[real], wanted[real])
