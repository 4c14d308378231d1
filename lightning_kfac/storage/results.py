"""results.jsonl: one JSON object an evaluation, appended.

Rows that a sweep goes on from (those with a field ``point``) carry a checksum.

In the file ``extraction`` and ``leaks`` are objects with objects in them; in memory their figures are keys like all
others (``quotes/extraction.expected_at.10``), so whatever shows figures shows them.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kfac.storage.files import new_file, timestamp, writing
from lightning_kfac.storage.json_files import row_of_line, sealed_line
from lightning_kfac.storage.manifest import announce

OBJECTS = ("extraction", "leaks")
POINT = "point"


def append_result(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Appends one evaluation and returns what was written; NaN, which JSON lacks, becomes null."""
    row = _complete(row)
    line = _line(row)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        announce(path)
        _append(path, line)
    return row


def _append(path: Path, line: str) -> None:
    with open(path, "ab+") as file:
        if file.tell():  # a run that was killed may have left half a line
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def replace_result(path: Path, row: Mapping[str, Any], same: Sequence[str]) -> dict[str, Any]:
    """Puts one evaluation in the place of an earlier one that agrees in the fields ``same``, or appends it."""
    rows = read_results(path)
    place = next((i for i, old in enumerate(rows) if all(old.get(key) == row.get(key) for key in same)), None)
    if place is None:
        return append_result(path, row)
    rows[place] = _complete(row)
    write_results(path, rows)
    return rows[place]


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Puts rows that were read in the place of all that a file holds."""
    with new_file(path) as partial:
        partial.write_text("".join(map(_line, rows)), "utf-8")


def _line(row: Mapping[str, Any]) -> str:
    """One row as the file holds it."""
    nested: dict[str, Any] = {}
    for key, value in row.items():
        prefix, slash, name = key.rpartition("/")
        root, *groups = name.split(".", 2)
        if root not in OBJECTS or not groups:
            nested[key] = value
            continue
        group, *inner = groups
        place = nested.setdefault(f"{prefix}{slash}{root}", {})
        if inner:
            place = place.setdefault(group, {})
        place[inner[0] if inner else group] = value
    return (sealed_line(nested) if POINT in nested else json.dumps(nested)) + "\n"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """What ``_line`` made a line of; objects of any other form stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.rpartition("/")[2] not in OBJECTS or not isinstance(value, dict):
            flat[key] = value
            continue
        for group, inner in value.items():
            parts = {f".{name}": one for name, one in inner.items()} if isinstance(inner, dict) else {"": inner}
            flat |= {f"{key}.{group}{name}": one for name, one in parts.items()}
    return flat


def _complete(row: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
    return row | {"timestamp": timestamp(), "version": version("lightning-kfac")}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All rows; lines that are not whole are left out. Empty where there is no file."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        row = row_of_line(line, sealed=False)
        if row is not None and isinstance(row.get(POINT), str | None):
            rows.append(_flat(row))
    return rows
