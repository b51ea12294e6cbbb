"""Which engine serves attention: the measured table, where it is read, and what a device does with it (a stand-in takes cuDNN's place)."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_device
import numpy as np
import pytest
from cuda_device import needs_emulator
from support import normal

import ladd
from ladd import _core, attention

ROW = {"device": "emulator", "capability": 90, "dtype": "bfloat16", "head_dim": 16, "pass": "forward", "tokens": [16, 40], "engine": "cudnn"}


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"rows": rows}))
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a JSON file expected"),
        ("[]", r'\{"rows": \[...\]\} expected'),
        ('{"rows": [3]}', "row 0: an object expected, got int"),
        (json.dumps({"rows": [ROW, {**ROW, "engine": "flash"}]}), "row 1: engine must be ladd or cudnn, got 'flash'"),
        (json.dumps({"rows": [{**ROW, "dtype": "float32"}]}), "dtype must be bfloat16 or float16, got 'float32'"),
        (json.dumps({"rows": [{**ROW, "pass": None}]}), "pass must be forward or backward, got None"),
        (json.dumps({"rows": [{**ROW, "tokens": [40, 16]}]}), r"tokens \[least, most\] must be positive integers"),
        (json.dumps({"rows": [{**ROW, "tokens": 40}]}), r"tokens \[least, most\] must be positive integers"),
        (json.dumps({"rows": [{**ROW, "head_dim": 64.0}]}), "head_dim and tokens"),
        (json.dumps({"rows": [{**ROW, "device": 1}]}), "device must be a name, got 1"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        attention.read(path)


def test_where_tables_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADD_ATTENTION_TABLE", raising=False)
    monkeypatch.setenv("LADD_CACHE", str(tmp_path))
    packaged = attention.rules("emulator", 90)
    assert attention.user_table() == tmp_path / "attention.json"
    table(tmp_path / "attention.json", {**ROW, "device": "another"}, ROW, {**ROW, "capability": 80, "device": "a third"})
    measured = ("bfloat16", 16, False, 16, 40, True)
    assert attention.rules("emulator", 90) == [measured, measured, *packaged], "the same device, then the same capability, then the package's"
    assert attention.rules("a third", 80) == [measured]
    monkeypatch.setenv("LADD_ATTENTION_TABLE", str(table(tmp_path / "named.json", {**ROW, "engine": "ladd"})))
    assert attention.rules("emulator", 90) == [(*measured[:-1], False)], "a table named by the environment is the only one"
    monkeypatch.setenv("LADD_ATTENTION_TABLE", str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"absent\.json: a JSON file expected"):
        attention.rules("emulator", 90)


def test_the_faster_engine_serves_up_to_halfway_to_the_next_measurement(tmp_path: Path) -> None:
    one = {"dtype": "bfloat16", "head_dim": 64, "pass": "forward"}
    times = [
        {**one, "tokens": 4096, "ladd_ms": 2.0, "cudnn_ms": 1.0},
        {**one, "tokens": 256, "ladd_ms": 0.1, "cudnn_ms": 0.2},
        {**one, "tokens": 1024, "ladd_ms": 0.3, "cudnn_ms": None},
        {**one, "pass": "backward", "tokens": 64, "ladd_ms": 0.3, "cudnn_ms": 0.2},
    ]
    rows = attention.rows_from_times("emulator", 90, times)
    assert [(r["pass"], r["tokens"], r["engine"]) for r in rows] == [
        ("forward", [16, 512], "ladd"),
        ("forward", [513, 2048], "ladd"),
        ("forward", [2049, 2**31 - 1], "cudnn"),
        ("backward", [16, 2**31 - 1], "cudnn"),
    ]
    path = table(tmp_path / "table.json", {**ROW, "device": "another"}, ROW)
    attention.write(path, rows, "emulator")
    assert attention.read(path) == [{**ROW, "device": "another"}, *rows]


@pytest.fixture
def counted() -> Iterator[Any]:
    """A fresh device, and how many calls cuDNN's stand-in has had."""
    library = cuda_device.library()
    values = {name: ctypes.c_int.in_dll(library, f"ladd_emulator_cudnn_{name}") for name in ("calls", "absent", "refused")}
    yield values
    values["absent"].value = values["refused"].value = 0


def attend(device: Any, tokens: int, dtype: str = "bfloat16") -> np.ndarray:
    """Forward and backward of two streams; the results in one array."""
    streams: Any = [
        tuple(ladd.device.as_array(normal(i, 1, n, 2, 16), "x", device=device, dtype=dtype) for i in range(3)) for n in (tokens - 5, 5)
    ]
    outs, lse = _core.attention_forward(streams)
    grads = _core.attention_backward(outs, streams, outs, lse)
    return np.concatenate([x.numpy() for group in (*((o,) for o in outs), *grads) for x in group], axis=1)


@needs_emulator
def test_a_device_follows_its_rules(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADD_CUDA_ATTENTION", raising=False)
    device = _core.Device(ladd.device._provider(), 0)

    def calls(tokens: int, dtype: str = "bfloat16") -> int:
        before = counted["calls"].value
        attend(device, tokens, dtype)
        return counted["calls"].value - before

    assert calls(20) == 0, "without a measurement ours serve"
    device.set_attention([("bfloat16", 16, False, 16, 18, False), ("bfloat16", 16, False, 16, 24, True), ("bfloat16", 16, True, 20, 24, True)])
    assert [calls(n) for n in (12, 18, 19, 24, 25)] == [0, 0, 1, 2, 0], "the first rule that fits decides, forward and backward each"
    assert calls(24, "float16") == 0
    monkeypatch.setenv("LADD_CUDA_ATTENTION", "ladd")
    ours = attend(device, 24)
    assert calls(24) == 0, "the environment passes over the table"
    monkeypatch.delenv("LADD_CUDA_ATTENTION")
    assert np.array_equal(attend(device, 24), ours), "the stand-in computes what ours do"
    counted["refused"].value = 16
    assert calls(24) == 0 and np.array_equal(attend(device, 24), ours), "ours take what cuDNN has no plan for"
    monkeypatch.setenv("LADD_CUDA_ATTENTION", "cudnn")
    with pytest.raises(RuntimeError, match="head_dim 16 refused"):
        attend(device, 24)


@needs_emulator
def test_rules_without_the_library(counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADD_CUDA_ATTENTION", raising=False)
    counted["absent"].value = 1
    device = _core.Device(ladd.device._provider(), 0)
    device.set_attention([("bfloat16", 16, False, 16, 100, True)])
    before = counted["calls"].value
    attend(device, 24)
    assert counted["calls"].value == before
    monkeypatch.setenv("LADD_CUDA_ATTENTION", "cudnn")
    with pytest.raises(RuntimeError, match="the library cudnn expected"):
        attend(device, 24)


@needs_emulator
def test_bad_rules_are_refused() -> None:
    device = _core.Device(ladd.device._provider(), 0)
    with pytest.raises(ValueError, match="at most 64 for one device expected, got 65"):
        device.set_attention([("bfloat16", 16, False, 16, 100, True)] * 65)
    with pytest.raises(TypeError, match="tuples expected, got int"):
        device.set_attention([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="dtype"):
        device.set_attention([("int8", 16, False, 16, 100, True)])


@needs_emulator
def test_opening_a_device_reads_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Any) -> None:
    monkeypatch.delenv("LADD_CUDA_ATTENTION", raising=False)
    monkeypatch.setattr(ladd.device, "_open", {})
    monkeypatch.setenv("LADD_ATTENTION_TABLE", str(table(tmp_path / "bad.json", {**ROW, "engine": "flash"})))
    with pytest.raises(ValueError, match=r"bad.json, row 0: engine must be"):
        ladd.device.get("cuda")
    monkeypatch.setenv("LADD_ATTENTION_TABLE", str(table(tmp_path / "good.json", ROW)))
    before = counted["calls"].value
    attend(ladd.device.get("cuda"), 24)
    assert counted["calls"].value == before + 1
