"""results.jsonl: one JSON object an evaluation, appended."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kfac.storage.files import new_file, timestamp, writing
from lightning_kfac.storage.manifest import announce


def append_result(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Appends one evaluation and returns what was written; NaN, which JSON lacks, becomes null."""
    row = _complete(row)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        announce(path)
        _append(path, row)
    return row


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with open(path, "ab+") as file:
        if file.tell():  # a run that was killed may have left half a line
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def replace_result(path: Path, row: Mapping[str, Any], same: Sequence[str]) -> dict[str, Any]:
    """Puts one evaluation in the place of an earlier one that agrees in the fields ``same``, or appends it."""
    rows = read_results(path)
    place = next((i for i, old in enumerate(rows) if all(old.get(key) == row.get(key) for key in same)), None)
    if place is None:
        return append_result(path, row)
    rows[place] = _complete(row)
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(old) + "\n" for old in rows), "utf-8")
    return rows[place]


def _complete(row: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
    return row | {"timestamp": timestamp(), "version": version("lightning-kfac")}


def read_results(path: Path) -> list[dict[str, Any]]:
    """All rows; lines that are not whole are left out. Empty where there is no file."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("point"), str | None):
            rows.append(row)
    return rows
