"""What a search has done so far, batch by batch, so that it can go on after a stop."""

import json
from collections.abc import Iterator
from pathlib import Path

from lightning_kfac.errors import InputError
from lightning_kfac.mining.search import Found

HEADER = "search"


class MiningLog:
    """One file a rank in a folder: a first line that tells which search it is, then a line for each batch done.

    A line that was cut off by a kill does not count; its batch is done again.

    Args:
        folder: Of the files; shared by all ranks.
        key: Identifies the search: model, corpus, windows.

    Raises:
        InputError: The folder holds another search.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key, self._begun = folder, key, False
        for path in self._paths():
            head = next(_lines(path), {})
            if head.get(HEADER, key) != key:
                raise InputError(
                    f"{folder} holds an unfinished search of another model, corpus or kind; add --overwrite to begin "
                    "anew, or choose another folder with --trainer.default_root_dir"
                )

    def done(self) -> frozenset[int]:
        """Numbers of the batches that are done."""
        return frozenset(row["batch"] for row in self.rows())

    def rows(self) -> Iterator[dict]:
        """The lines of all ranks, a batch once."""
        seen = set()
        for path in self._paths():
            lines = _lines(path)
            if next(lines, {}).get(HEADER) != self.key:
                continue  # damaged: nobody knows which search it is of
            for row in lines:
                if type(row.get("batch")) is int and row["batch"] not in seen and _readable(row):
                    seen.add(row["batch"])
                    yield row

    def append(self, rank: int, row: dict) -> None:
        """Adds a batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{rank}.jsonl"
        begun = self._begun or (path.exists() and next(_lines(path), {}).get(HEADER) == self.key)
        head = "" if self._begun else "\n" if begun else json.dumps({HEADER: self.key}) + "\n"
        with open(path, "a" if begun else "w", encoding="utf-8") as file:
            file.write(f"{head}{json.dumps(row)}\n")  # the empty line ends what a kill has cut off
        self._begun = True

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.jsonl"))


def _readable(row: dict) -> bool:
    """Whether what was found has the fields that belong to it; a line that a disk has damaged may not."""
    found = row.get("found", [])
    return isinstance(found, list) and all(isinstance(f, dict) and f.keys() == set(Found._fields) for f in found)


def _lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
