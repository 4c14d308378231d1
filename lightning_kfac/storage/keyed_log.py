"""JSON lines that belong to one piece of work, so that it can go on after a stop."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class KeyedLog:
    """A file whose first line tells what the lines after it belong to.

    A line that was cut off by a kill does not count.

    Args:
        path: The file; it appears with the first line that is appended.
        kind: What the first line calls the key.
        key: Identifies the work.

    Example:
        >>> import tempfile
        >>> log = KeyedLog(Path(tempfile.mkdtemp()) / "log.jsonl", "search", "0f3a")
        >>> log.append({"batch": 3})
        >>> list(log.rows()), log.is_ours
        ([{'batch': 3}], True)
    """

    def __init__(self, path: Path, kind: str, key: str):
        self.path = path
        self.kind = kind
        self.key = key
        self._begun = False

    @property
    def is_ours(self) -> bool | None:
        """Whether the file belongs to this work; None where there is none, or none whole enough to tell."""
        known = next(_lines(self.path), {}).get(self.kind)
        return None if known is None else known == self.key

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines after the first."""
        yield from (row for row in _lines(self.path) if self.kind not in row)

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The same, each with the place of its first byte, by which ``at`` finds it again."""
        with open(self.path, "rb") as file:
            place = 0
            for line in file:
                row = _row(line)
                if row is not None and self.kind not in row:
                    yield place, row
                place += len(line)

    def at(self, place: int) -> dict[str, Any]:
        """The line that begins at a byte."""
        with open(self.path, "rb") as file:
            file.seek(place)
            return _row(file.readline()) or {}

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line; what the file holds of other work is lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self._begun or bool(self.is_ours)
        head = "" if self._begun else "\n" if begun else json.dumps({self.kind: self.key}) + "\n"
        with open(self.path, "a" if begun else "w", encoding="utf-8") as file:
            file.write(f"{head}{json.dumps(row)}\n")  # the empty line ends what a kill has cut off
        self._begun = True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        yield from (row for row in map(_row, file) if row is not None)


def _row(line: str | bytes) -> dict[str, Any] | None:
    """A line's object; None where it is cut off, damaged, or something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
