"""cuda/gemm.cu with the library that it is written for: its descriptions of products, its plans, its fall-backs.

No GPU takes part: nvcc compiles the real file, and tests/cuda_libraries/cublaslt.cpp stands for cuBLASLt, on host memory, and refuses
what cuBLASLt refuses. The kernels around it are in the case table (test_cuda_kernels.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_core import DTYPES, Context, decode, encode
from support import normal

ROOT = Path(__file__).resolve().parent.parent
NONE, BIAS, GELU, BIAS_GELU = range(4)


def headers() -> Path | None:
    """The folder of cublasLt.h: the toolkit's, or that of NVIDIA's wheel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (wheels.submodule_search_locations if wheels else None) or []]
    folders = [Path(nvcc).resolve().parent.parent / "include", *(root / "cu13" / "include" for root in roots)]
    if "LADD_CUDA_INCLUDE" in os.environ:
        folders += [Path(folder) for folder in os.environ["LADD_CUDA_INCLUDE"].split(":")]
    return next((folder for folder in folders if (folder / "cublasLt.h").is_file()), None)


pytestmark = pytest.mark.skipif(headers() is None, reason="nvcc and cublasLt.h (of nvidia-cublas) expected")


class Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "cab"),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "a_transposed", "b_transposed", "c_type", "accumulate", "epilogue")),
        ("bias", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    folder = ROOT / "build" / "cuda-libraries"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"gemm.{os.getpid()}.so"
    sources = [ROOT / "cuda" / "gemm.cu", ROOT / "tests" / "cuda_libraries" / "cublaslt.cpp"]
    command = ["nvcc", "-std=c++17", "-O1", "-arch=sm_80", "-Xcompiler", "-fPIC,-Wall,-Wextra", f"-I{headers()}", "-shared", "-o", str(made)]
    done = subprocess.run([*command, *map(str, sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = ctypes.CDLL(str(made))
    made.unlink()
    loaded.ladd_last_error.restype = ctypes.c_char_p
    loaded.ladd_test_state.restype = ctypes.c_void_p
    return loaded


class Gemm:
    """One state of the device, and products with it."""

    def __init__(self, tf32: bool = False) -> None:
        self.state = ctypes.c_void_p(library().ladd_test_state(int(tf32)))

    def counts(self) -> list[int]:
        counts = (ctypes.c_int * 3)()
        library().ladd_test_counts(counts)
        return list(counts)

    def __call__(self, dtype: str, product: Product) -> bool:
        context = Context(None, self.state, DTYPES.index(dtype), 4 if dtype == "float32" else 2, None, None)
        applied = ctypes.c_int(-1)
        if library().ladd_cuda_gemm(ctypes.byref(context), ctypes.byref(product), ctypes.byref(applied)) != 0:
            raise RuntimeError(library().ladd_last_error().decode())
        return bool(applied.value)


@pytest.fixture
def gemm() -> Iterator[Gemm]:
    library().ladd_test_without_epilogues(0)
    g = Gemm()
    before = g.counts()[1]
    yield g
    library().ladd_test_state_free(g.state)
    assert g.counts()[1] == before, "every description is given back with the state"


def placed(x: np.ndarray, shift: int = 0) -> np.ndarray:
    """A copy on 256 bytes, or `shift` elements behind."""
    room = np.zeros(x.nbytes + 256 + shift * x.itemsize, np.uint8)
    at = -room.ctypes.data % 256 + shift * x.itemsize
    view = room[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def call(
    gemm: Gemm,
    m: int,
    n: int,
    k: int,
    dtype: str = "bfloat16",
    transposed: tuple[int, int] = (0, 1),
    wide: bool = False,
    accumulate: bool = False,
    epilogue: int = NONE,
    shift: int = 0,
) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Whether the epilogue was applied, the results, and float64's."""
    a, b, bias = normal(1, m, k), normal(2, k, n), normal(3, n)
    a, b, bias = (decode(encode(x, dtype), dtype) for x in (a, b, bias))
    c_type = "float32" if wide else dtype
    start = normal(4, m, n) if accumulate else np.full((m, n), np.nan, np.float32)
    arrays = {
        "a": placed(encode(a.T if transposed[0] else a, dtype), shift),
        "b": placed(encode(b.T if transposed[1] else b, dtype), shift),
        "c": placed(encode(start, c_type), shift),
        "bias": placed(encode(bias, dtype), shift),
        "h": placed(encode(np.full((m, n), np.nan), dtype), shift),
    }
    pointer = {name: x.ctypes.data for name, x in arrays.items()}
    if epilogue not in (BIAS, BIAS_GELU):
        pointer["bias"] = None
    if epilogue not in (GELU, BIAS_GELU):
        pointer["h"] = None
    sizes = (m, n, k, *transposed, DTYPES.index(c_type), int(accumulate), epilogue)
    applied = gemm(dtype, Product(pointer["c"], pointer["a"], pointer["b"], *sizes, pointer["bias"], pointer["h"]))
    product = a.astype(np.float64) @ b.astype(np.float64) + (start if accumulate else 0)
    if applied and epilogue in (BIAS, BIAS_GELU):
        product = product + bias
    wanted = {"c": product}
    if applied and epilogue in (GELU, BIAS_GELU):
        wanted = {"h": product, "c": 0.5 * product * (1 + np.tanh(np.sqrt(2 / np.pi) * (product + 0.044715 * product**3)))}
    return applied, {name: decode(arrays[name], c_type if name == "c" else dtype) for name in wanted}, wanted


def check(results: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(results[name], value, rtol=tolerance, atol=tolerance * np.abs(value).max(), err_msg=name)


TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (16, 8, 24), (5, 64, 33)])
@pytest.mark.parametrize("transposed", [(0, 1), (0, 0), (1, 0), (1, 1)])
def test_products_of_every_layout(gemm: Gemm, dtype: str, size: tuple[int, int, int], transposed: tuple[int, int]) -> None:
    applied, results, wanted = call(gemm, *size, dtype, transposed)
    assert applied
    check(results, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_in_float32(gemm: Gemm, dtype: str) -> None:
    _, results, wanted = call(gemm, 9, 17, 31, dtype, (1, 0), wide=True, accumulate=True)
    check(results, wanted, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", [BIAS, GELU, BIAS_GELU])
def test_epilogues(gemm: Gemm, dtype: str, epilogue: int) -> None:
    applied, results, wanted = call(gemm, 5, 24, 16, dtype, epilogue=epilogue)
    assert applied
    check(results, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("epilogue", [BIAS, GELU, BIAS_GELU])
def test_what_has_no_epilogue_gets_the_plain_product(gemm: Gemm, epilogue: int) -> None:
    """The caller is told, and finishes the product."""
    for n, shift in ((24, 1), (23, 0)):  # a bias or h off 16 bytes; an h whose rows are no multiple of 8
        applied, results, wanted = call(gemm, 5, n, 16, epilogue=epilogue, shift=shift)
        assert applied == (shift == 0 and epilogue == BIAS)
        check(results, wanted, TOLERANCE["bfloat16"])
    library().ladd_test_without_epilogues(1)
    applied, results, wanted = call(gemm, 6, 24, 16, epilogue=epilogue)
    assert not applied
    check(results, wanted, TOLERANCE["bfloat16"])


def test_plans_are_kept_by_shape_type_epilogue_and_alignment(gemm: Gemm) -> None:
    def searches(*args: Any, **kwargs: Any) -> int:
        before = gemm.counts()[0]
        _, results, wanted = call(gemm, *args, **kwargs)
        check(results, wanted, 1e-2)
        return gemm.counts()[0] - before

    variants: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
        ((4, 8, 8), {}),
        ((8, 4, 8), {}),
        ((4, 8, 8), {"dtype": "float16"}),
        ((4, 8, 8), {"dtype": "float32"}),
        ((4, 8, 8), {"transposed": (1, 0)}),
        ((4, 8, 8), {"wide": True}),
        ((4, 8, 8), {"wide": True, "accumulate": True}),
        ((4, 8, 8), {"epilogue": BIAS}),
        ((4, 8, 8), {"epilogue": BIAS_GELU}),
        ((4, 8, 8), {"shift": 1}),
    ]
    assert [searches(*sizes, **settings) for sizes, settings in variants] == [1] * len(variants)
    assert [searches(*sizes, **settings) for sizes, settings in variants] == [0] * len(variants)


def test_more_shapes_than_the_table_holds(gemm: Gemm) -> None:
    for k in range(1, 2000):
        if k % 50:
            call(gemm, 1, 1, k)
        else:
            _, results, wanted = call(gemm, 1, 1, k)
            check(results, wanted, 1e-2)


def test_tf32_only_when_asked_and_only_for_float32(gemm: Gemm) -> None:
    asked = Gemm(tf32=True)
    try:
        seen = gemm.counts()[2]
        call(gemm, 4, 8, 8, "float32")
        call(asked, 4, 8, 8, "bfloat16")
        assert gemm.counts()[2] == seen
        call(asked, 4, 8, 8, "float32")
        assert gemm.counts()[2] == seen + 1
    finally:
        library().ladd_test_state_free(asked.state)
