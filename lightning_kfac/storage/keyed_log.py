"""JSON lines that belong to one piece of work, so that it can go on after a stop."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_kfac.storage.json_files import row_of_line, sealed_line


class KeyedLog:
    """A file whose first line tells what the lines after it belong to.

    Each line has a checksum, and is on the disk before the next piece of work begins. A line that a kill has cut off or
    a disk has damaged does not count. Logs of version 0.1 have no checksums.

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
        known = next(_lines(self.path, sealed=False), {}).get(self.kind)
        return None if known is None else known == self.key

    @property
    def _sealed(self) -> bool:
        return next(_lines(self.path, sealed=True), {}).get(self.kind) == self.key

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines after the first."""
        yield from (row for row in _lines(self.path, self._sealed) if self.kind not in row)

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The same, each with the place of its first byte, by which ``at`` finds it again."""
        sealed = self._sealed
        with open(self.path, "rb") as file:
            place = 0
            for line in file:
                row = row_of_line(line, sealed)
                if row is not None and self.kind not in row:
                    yield place, row
                place += len(line)

    def at(self, place: int) -> dict[str, Any]:
        """The line that begins at a byte."""
        with open(self.path, "rb") as file:
            file.seek(place)
            return row_of_line(file.readline(), sealed=False) or {}

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line; what the file holds of other work is lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self._begun or bool(self.is_ours)
        head = "" if self._begun else "\n" if begun else sealed_line({self.kind: self.key}) + "\n"
        with open(self.path, "a" if begun else "w", encoding="utf-8") as file:
            file.write(f"{head}{sealed_line(row)}\n")  # the empty line ends what a kill has cut off
            file.flush()
            os.fsync(file.fileno())
        self._begun = True


def _lines(path: Path, sealed: bool) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            row = row_of_line(line, sealed)
            if row is not None:
                yield row
