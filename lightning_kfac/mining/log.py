"""What a search has done so far, batch by batch, so that it can go on after a stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.mining.search import Found
from lightning_kfac.storage.files import writing
from lightning_kfac.storage.keyed_log import KeyedLog


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
        self.folder = folder
        self.key = key
        self._own: KeyedLog | None = None
        if any(log.is_ours is False for log in self._logs()):
            raise InputError(
                f"{folder} holds an unfinished search of another model, corpus or kind; add overwrite to begin "
                "anew, or choose another folder with trainer.default_root_dir",
                "overwrite",
                "trainer.default_root_dir",
            )

    def done(self) -> frozenset[int]:
        """Numbers of the batches that are done."""
        return frozenset(row["batch"] for row in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of all ranks, a batch once."""
        seen = set()
        for log in self._logs():
            if not log.is_ours:
                continue  # damaged: nobody knows which search it is of
            for row in log.rows():
                if type(row.get("batch")) is int and row["batch"] not in seen and _readable(row):
                    seen.add(row["batch"])
                    yield row

    def in_order(self) -> Iterator[dict[str, Any]]:
        """The same lines in the order of the batches; memory holds their places in the files, and one of them."""
        places: dict[int, tuple[KeyedLog, int]] = {}
        for log in self._logs():
            for place, row in log.numbered() if log.is_ours else ():
                if type(row.get("batch")) is int and _readable(row):
                    places.setdefault(row["batch"], (log, place))
        for _, (log, place) in sorted(places.items(), key=lambda entry: entry[0]):
            yield log.at(place)

    def append(self, rank: int, row: dict[str, Any]) -> None:
        """Adds a batch."""
        self._own = self._own or self._log(self.folder / f"rank-{rank}.jsonl")
        with writing(self._own.path):
            self._own.append(row)

    def _logs(self) -> list[KeyedLog]:
        return [self._log(path) for path in sorted(self.folder.glob("rank-*.jsonl"))]

    def _log(self, path: Path) -> KeyedLog:
        return KeyedLog(path, "search", self.key)


def _readable(row: dict[str, Any]) -> bool:
    """Whether what was found has the fields that belong to it; a line that a disk has damaged may not."""
    found = row.get("found", [])
    return isinstance(found, list) and all(isinstance(f, dict) and f.keys() == set(Found._fields) for f in found)
