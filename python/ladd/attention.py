"""Which engine serves attention on a GPU: ladd's own kernels or cuDNN's, by a table of measured times.

The table is JSON, `{"rows": [...]}`, of rows such as

    {"device": "NVIDIA H100 80GB HBM3", "capability": 90, "dtype": "bfloat16", "head_dim": 64, "pass": "forward",
     "tokens": [16, 2437], "engine": "cudnn", "ladd_ms": 0.31, "cudnn_ms": 0.24}

which says: on such a device, for heads of 64 and 16 to 2437 tokens (of all streams together), cuDNN was faster. It is read when a device
is opened: from the file that LADD_ATTENTION_TABLE names, else from attention.json in ladd's cache ($LADD_CACHE, else ~/.cache/ladd),
where `make gpu` writes what it measures, and then from the one in the package. Rows of the same device go before rows of another one with the
same compute capability. What no row covers is served by ladd's kernels, which need no second library and join no streams; they also
take over where a row says cuDNN and it is not installed or has no plan for a shape. LADD_CUDA_ATTENTION=cudnn or ladd passes over the table.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files

Rule = tuple[str, int, bool, int, int, bool]  # dtype, head_dim, backward, least and most tokens, cudnn
NAME = "attention.json"
MOST_TOKENS = 2**31 - 1
_CHOICES = {"dtype": ("bfloat16", "float16"), "pass": ("forward", "backward"), "engine": ("ladd", "cudnn")}


def user_table() -> Path:
    """Where `make gpu` writes and ladd reads what was measured on this machine."""
    named = os.environ.get("LADD_ATTENTION_TABLE")
    return Path(named) if named else Path(os.environ.get("LADD_CACHE") or Path.home() / ".cache" / "ladd") / NAME


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; ValueError says what is wrong with which."""
    try:
        given = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"attention table {path}: a JSON file expected, got {error}") from None
    rows = given.get("rows") if isinstance(given, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'attention table {path}: {{"rows": [...]}} expected')
    for i, row in enumerate(rows):
        _check(row, f"attention table {path}, row {i}")
    return rows


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object expected, got {type(row).__name__}")
    for key, allowed in _CHOICES.items():
        if row.get(key) not in allowed:
            raise ValueError(f"{where}: {key} must be {' or '.join(allowed)}, got {row.get(key)!r}")
    tokens = row.get("tokens")
    numbers = [row.get("capability"), row.get("head_dim"), *(tokens if isinstance(tokens, list) else [])]
    if len(numbers) != 4 or not all(type(n) is int and 0 < n <= MOST_TOKENS for n in numbers) or numbers[2] > numbers[3]:
        raise ValueError(f"{where}: capability, head_dim and tokens [least, most] must be positive integers, got {row}")
    if not isinstance(row.get("device"), str):
        raise ValueError(f"{where}: device must be a name, got {row.get('device')!r}")


def rules(device: str, capability: int) -> list[Rule]:
    """What the tables say about a device, the first that fits a call decides."""
    rows: list[dict[str, Any]] = []
    path = user_table()
    if "LADD_ATTENTION_TABLE" in os.environ or path.is_file():
        rows += read(path)
    if "LADD_ATTENTION_TABLE" not in os.environ:
        rows += read(Path(__file__).parent / NAME)
    return rules_of(rows, device, capability)


def rules_of(rows: Sequence[dict[str, Any]], device: str, capability: int) -> list[Rule]:
    """The rows for a device as `Device.set_attention` takes them."""
    fitting = [row for row in rows if row["device"] == device]
    fitting += [row for row in rows if row["device"] != device and row["capability"] == capability]
    return [(r["dtype"], r["head_dim"], r["pass"] == "backward", *r["tokens"], r["engine"] == "cudnn") for r in fitting]


def rows_from_times(device: str, capability: int, times: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows from measurements {dtype, head_dim, pass, tokens: a number, ladd_ms, cudnn_ms or None}: the faster engine, from halfway (in
    the logarithm) after the next smaller measured number of tokens to halfway before the next larger; the largest serves all above."""
    rows = []
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for one in times:
        groups.setdefault((one["dtype"], one["head_dim"], one["pass"]), []).append(one)
    for (dtype, head_dim, which), group in groups.items():
        ordered = sorted(group, key=lambda one: int(one["tokens"]))
        edges = [int((a["tokens"] * b["tokens"]) ** 0.5) for a, b in itertools.pairwise(ordered)]
        for one, least, most in zip(ordered, [16, *(edge + 1 for edge in edges)], [*edges, MOST_TOKENS]):
            faster = one["cudnn_ms"] is not None and one["cudnn_ms"] < one["ladd_ms"]
            row = {"device": device, "capability": capability, "dtype": dtype, "head_dim": head_dim, "pass": which, "tokens": [least, most]}
            rows.append({**row, "engine": "cudnn" if faster else "ladd", "ladd_ms": one["ladd_ms"], "cudnn_ms": one["cudnn_ms"]})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]], device: str) -> None:
    """`rows` in the place of what the table at `path` says about `device`; other devices' rows stay."""
    kept = [row for row in read(path) if row["device"] != device] if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"rows": [*kept, *rows]})
