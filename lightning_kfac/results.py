"""results.jsonl: one JSON object an evaluation, appended."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_kfac.files import new_file


def append_result(path: Path, row: Mapping) -> dict:
    """Appends one evaluation and returns what was written; NaN, which JSON lacks, becomes null."""
    row = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
    row |= {"timestamp": timestamp(), "version": version("lightning-kfac")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if file.tell():  # a run that was killed may have left half a line
            file.seek(0)
            if not file.read().endswith("\n"):
                file.write("\n")
        file.write(json.dumps(row) + "\n")
    return row


def replace_result(path: Path, row: Mapping, same: Sequence[str] | None) -> dict:
    """Appends one evaluation in the place of an earlier one that agrees with it in the fields ``same``."""
    rows = read_results(path) if same else []
    kept = [old for old in rows if any(old.get(key) != row.get(key) for key in same)]
    if len(kept) < len(rows):
        with new_file(path) as partial:
            partial.write_text("".join(json.dumps(old) + "\n" for old in kept), "utf-8")
    return append_result(path, row)


def read_results(path: Path) -> list[dict]:
    """All rows; lines that are not whole are left out. Empty where there is no file."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
