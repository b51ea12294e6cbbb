"""Every kernel of cuda/ through the case table of kernel_rows/, in float32, bfloat16 and float16: on a GPU where ladd was built
for one and finds it, else by the emulator of tests/cuda_emulator.

Inputs are rounded to the compute type first, so that the float64 oracle sees the same numbers; what remains is how a kernel
computes and how often its result is rounded. `python tests/test_cuda_kernels.py [word]` runs the rows whose name holds the word
and prints the errors.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from functools import cache
from typing import Any

import cuda_core
import kernel_rows
import numpy as np
import pytest
import support
from kernel_rows.row import Arrays, Row
from oracle import autodiff as ad

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # of the compute type, relative
# Roundings to the compute type between the inputs and a result, where a kernel has more than the result's own: forward, backward.
ROUNDINGS = {"attention_forward": (2, 4), "linear_forward": (2, 1), "linear_gelu_forward": (3, 3)}
FLOAT32_ONLY = {"adamw", "sum_squares", "ema", "clip_factor", "r1_factors"}  # these work on masters, whatever the compute type


@cache
def rows(dtype: str, shift: int = 0) -> dict[str, Row]:
    """The case table on the device."""
    table = {}
    for row in kernel_rows.all_rows(cuda_core.Core(cuda_core.device(), dtype, shift)):
        if dtype != "float32" and row.kernels[0] in FLOAT32_ONLY:
            continue
        inputs = {name: round_input(name, x, dtype) for name, x in row.inputs.items()}
        table[row.id] = replace(row, inputs=inputs)
    return table


def round_input(name: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """Times stay float32 numbers on the host; everything else is in the compute type."""
    return x if x.dtype != np.float32 or name in ("t", "sigma") else cuda_core.rounded(x, dtype)


def cotangent(y: np.ndarray, dtype: str) -> np.ndarray:
    return cuda_core.rounded(support.normal(99, *y.shape), dtype)


def check(row: Row, dtype: str) -> dict[str, float]:
    """Forward and backward against the oracle; the errors as a share of what is allowed."""
    forward_roundings, backward_roundings = ROUNDINGS.get(row.kernels[0], (1, 1))
    leaves = support.leaves(row.inputs)
    wanted = row.oracle(leaves)
    results = row.forward(row.inputs, None)
    pairs: list[tuple[str, Any, Any, float]] = []
    allowed = row.tolerance + 1.02 * forward_roundings * HALF_ULP[dtype]
    assert set(results) == set(wanted)
    for name, value in wanted.items():
        pairs.append((name, results[name], value.data if isinstance(value, ad.Tensor) else value, allowed))
    if row.backward is not None:
        dy = cotangent(results["y"], dtype)
        wanted["y"].backward(dy)
        allowed = row.backward_tolerance + 1.02 * backward_roundings * HALF_ULP[dtype]
        for name, value in row.backward(row.inputs, results, dy).items():
            pairs.append((name, value, leaves[name].grad, allowed))
    for name, value, reference, allowed in pairs:
        support.assert_close(value, reference, allowed, f"{row.id} in {dtype}: {name}", row.floors.get(name, 0.0))
    return {name: support.error(value, reference) / max(allowed, 1e-30) for name, value, reference, allowed in pairs}


NAMES = [row.id for row in kernel_rows.all_rows()]
IN_PLACE = [row.id for row in kernel_rows.all_rows() if row.in_place and row.kernels[0] not in FLOAT32_ONLY]


@pytest.mark.parametrize("dtype", cuda_core.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name: str, dtype: str) -> None:
    if name in rows(dtype):
        check(rows(dtype)[name], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_off_alignment(name: str) -> None:
    """Buffers that start one element behind a 16-byte boundary: tensors of a flat buffer of parameters do."""
    row = rows("bfloat16", 1).get(name)
    if row is not None:
        check(row, "bfloat16")


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_gives_the_same_bits(name: str) -> None:
    row = rows("bfloat16")[name]
    assert row.in_place is not None
    wanted = row.forward(row.inputs, None)
    inputs: Arrays = {key: value.copy() for key, value in row.inputs.items()}
    results = row.forward(inputs, inputs[row.in_place])
    for key, value in wanted.items():
        assert support.same_bits(results[key], value), key


def main(word: str) -> None:
    for dtype in cuda_core.DTYPES:
        for shift in (0, 1):
            for row in rows(dtype, shift).values():
                if word in row.id:
                    start = time.perf_counter()
                    try:
                        told = "  ".join(f"{name} {share:.2f}" for name, share in check(row, dtype).items())
                    except (AssertionError, RuntimeError, pytest.skip.Exception) as e:
                        told = f"FAILED {e}"
                    print(f"{dtype:8s} shift {shift} {row.id:50s} {1e3 * (time.perf_counter() - start):7.1f} ms  {told}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
