"""Every kernel of csrc/backend.h against float64, through the case table of kernel_rows/.

`python tests/test_kernels.py --check` runs the table without pytest (so that a subprocess can do it on another instruction set);
`python tests/test_kernels.py --time [word]` times the rows whose name holds the word, and a few of model size.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import kernel_rows
import numpy as np
import pytest
import support
from kernel_rows.row import Arrays, Row
from oracle import autodiff as ad
from oracle import philox

from ladd import _core

ROWS = {row.id: row for row in kernel_rows.all_rows()}
GUARD = 67  # elements of poison on either side of an output; odd, so that outputs are also unaligned
POISON = np.float32(-1.2345e33)


def cotangent(row: Row, y: np.ndarray) -> np.ndarray:
    return support.normal(99, *y.shape)


def gradients(row: Row, results: Arrays) -> Arrays:
    assert row.backward is not None
    return row.backward(row.inputs, results, cotangent(row, results["y"]))


def check(row: Row) -> None:
    """Forward and backward against the oracle; inputs are left alone."""
    before = {name: value.copy() for name, value in row.inputs.items()}
    leaves = support.leaves(row.inputs)
    wanted = row.oracle(leaves)
    results = row.forward(row.inputs, None)
    assert set(results) == set(wanted)
    bf16 = row.bf16 if _core.backend_name() == "avx512bf16" else None
    for name, value in wanted.items():
        reference = value.data if isinstance(value, ad.Tensor) else value
        assert results[name].dtype in (np.float32, np.float64)
        support.assert_close(results[name], reference, bf16 or row.tolerance, f"{row.id}: {name}", row.floors.get(name, 0.0))
    if row.backward is not None:
        wanted["y"].backward(cotangent(row, results["y"]))
        for name, value in gradients(row, results).items():
            reference = leaves[name].grad
            assert reference is not None
            support.assert_close(value, reference, bf16 or row.backward_tolerance, f"{row.id}: gradient of {name}", row.floors.get(name, 0.0))
    for name, value in before.items():
        assert support.same_bits(value, row.inputs[name]), f"{row.id}: input {name} was changed"


def test_every_kernel_has_a_row() -> None:
    header = (Path(__file__).parent.parent / "csrc" / "backend.h").read_text()
    names = set(re.findall(r"^  K\((\w+),", header, re.MULTILINE))
    assert len(names) > 40
    assert names == {name for row in ROWS.values() for name in row.kernels}


@pytest.mark.parametrize("name", ROWS)
def test_against_float64(name: str) -> None:
    check(ROWS[name])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.out])
def test_writes_all_of_its_output_and_nothing_else(name: str) -> None:
    row = ROWS[name]
    wanted = row.forward(row.inputs, None)
    size = wanted["y"].size
    room = np.full(size + 2 * GUARD, POISON, dtype=np.float32)
    out = room[GUARD : GUARD + size].reshape(wanted["y"].shape)
    out[...] = np.nan
    results = row.forward(row.inputs, out)
    assert np.all(room[:GUARD] == POISON) and np.all(room[GUARD + size :] == POISON), "wrote outside its output"
    assert results["y"] is out
    for key, value in wanted.items():
        assert support.same_bits(results[key], value), key


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.in_place])
def test_in_place_gives_the_same_bits(name: str) -> None:
    row = ROWS[name]
    assert row.in_place is not None
    wanted = row.forward(row.inputs, None)
    inputs = {key: value.copy() for key, value in row.inputs.items()}
    results = row.forward(inputs, inputs[row.in_place])
    for key, value in wanted.items():
        assert support.same_bits(results[key], value), key


def all_results() -> Iterator[tuple[str, np.ndarray]]:
    for row in ROWS.values():
        results = row.forward(row.inputs, None)
        yield from ((f"{row.id}: {name}", value) for name, value in results.items())
        if row.backward is not None:
            yield from ((f"{row.id}: gradient of {name}", value) for name, value in gradients(row, results).items())


def test_one_and_two_threads_give_the_same_bits() -> None:
    before = _core.get_num_threads()
    try:
        _core.set_num_threads(1)
        one = {name: value.copy() for name, value in all_results()}
        _core.set_num_threads(2)
        different = [name for name, value in all_results() if not support.same_bits(value, one[name])]
    finally:
        _core.set_num_threads(before)
    assert different == []


def instruction_sets() -> list[str]:
    """Those of this processor beside the one that serves this process."""
    found = ["plain"]
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
        found += ["avx2"] if {"avx2", "fma", "bmi2"} <= flags else []
        avx512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"} <= flags
        found += ["avx512"] if avx512 else []
        found += ["avx512bf16"] if avx512 and "avx512_bf16" in flags else []
    return [name for name in found if name != _core.backend_name()]


def run_with(instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LADD_CPU": instruction_set}
    return subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_every_instruction_set(instruction_set: str) -> None:
    done = run_with(instruction_set, "--check")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.startswith(instruction_set)


def random_digest() -> str:
    shape, key = (3, 40_001), (2**40 + 1, 6, 9)
    return hashlib.sha256(_core.normal(shape, *key).tobytes()).hexdigest()


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_random_numbers_are_the_same_on_every_instruction_set(instruction_set: str) -> None:
    done = run_with(instruction_set, "--random")
    assert done.stdout.strip() == random_digest(), done.stderr[-2000:]


def test_unknown_instruction_set_is_an_error() -> None:
    done = run_with("mmx", "--check")
    assert done.returncode != 0 and "LADD_CPU" in done.stderr and "mmx" in done.stderr


def test_timing_mode() -> None:
    done = run_with(_core.backend_name(), "--time", "gelu-17")
    assert done.returncode == 0 and re.search(r"^gelu-17 +forward +[\d.]+  backward +[\d.]+$", done.stdout, re.MULTILINE), done.stdout
    assert run_with(_core.backend_name(), "--fast").returncode == 2


def test_philox_known_answers() -> None:
    """The known-answer vectors of the Random123 distribution, for the oracle; the kernels are compared with the oracle."""
    full = 0xFFFFFFFF
    for counter, key, answer in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert tuple(int(word) for word in philox.philox(counter, key)) == answer


def test_normal_numbers_do_not_depend_on_the_batch() -> None:
    whole = _core.normal((5, 3, 7), 11, 2, 4)
    for b in range(5):
        part = _core.normal((1, 3, 7), 11, 2, 4, np.array([b], dtype=np.int64))
        assert support.same_bits(part[0], whole[b])
    others = [_core.normal((5, 3, 7), *key) for key in ((12, 2, 4), (11, 3, 4), (11, 2, 5))]
    assert all(not np.any(other == whole) for other in others)


def test_normal_numbers_are_normal() -> None:
    x = _core.normal((4, 250_000), 3, 2).astype(np.float64)
    assert abs(x.mean()) < 4e-3 and abs(x.var() - 1) < 6e-3
    assert abs((x**3).mean()) < 1.5e-2 and abs((x**4).mean() - 3) < 4e-2
    assert np.abs(np.corrcoef(x) - np.eye(4)).max() < 8e-3
    assert np.abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 4e-3
    assert 4.5 < np.abs(x).max() < 6.8


def test_nan_and_infinity_are_seen() -> None:
    for bad in (np.nan, np.inf):
        x = support.normal(1, 70_000)
        x[69_999] = bad
        assert not np.isfinite(_core.sum_squares(x))


def seconds(call: object) -> float:
    best, deadline = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - start)
    return best


def timings(word: str) -> None:
    print(f"{_core.backend_name()}, {_core.get_num_threads()} threads; microseconds, best of many")
    for row in [*ROWS.values(), *kernel_rows.model_sized_rows()]:
        if word in row.id:
            results = row.forward(row.inputs, None)
            line = f"{row.id:60s} forward {1e6 * seconds(lambda r=row: r.forward(r.inputs, None)):10.1f}"
            if row.backward is not None:
                dy = cotangent(row, results["y"])
                line += f"  backward {1e6 * seconds(lambda r=row, v=results, dy=dy: r.backward(r.inputs, v, dy)):10.1f}"
            print(line)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check"]:
        print(_core.backend_name())
        failures = 0
        for row in ROWS.values():
            try:
                check(row)
            except AssertionError as e:
                failures += 1
                print(e)
        test_one_and_two_threads_give_the_same_bits()
        print(f"{len(ROWS)} rows, {failures} failed")
        return 1 if failures else 0
    if arguments == ["--random"]:
        print(random_digest())
        return 0
    if arguments[:1] == ["--time"] and len(arguments) <= 2:
        timings(arguments[1] if len(arguments) == 2 else "")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
