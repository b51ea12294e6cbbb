"""Files and folders that are written whole or not at all: killed at any instant, what was there before remains, or all of the new is there.

A folder takes two renames: whoever is killed between them leaves the earlier one as .NAME.old, complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write to the path given here: on success it is flushed and renamed to `path`, on failure removed and `path` stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, table: Mapping[str, Any]) -> None:
    """ValueError for NaN and infinities, which JSON does not have."""
    write_bytes(path, (json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: Path, holds: Collection[str]) -> Iterator[Path]:
    """Yields a folder beside `path`; on success it is flushed and takes the name, else it is removed. Whoever sees `path` sees all of it.

    holds: names that such a folder has. One that is there already is replaced only if it has no others: they would be lost.
    """
    if path.is_dir():
        others = sorted(p.name for p in path.iterdir() if p.name not in holds)
        if others:
            raise FileExistsError(f"{path} holds {others[0]!r}, which would be lost; save to a new folder")
    elif path.exists():
        raise NotADirectoryError(f"{path} must be a folder, it is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.parent / f".{path.name}.tmp", path.parent / f".{path.name}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush(file)
        flush(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
