"""The folder of a run: who may write into it, and what it says of itself."""

import json
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import PARTIAL, new_file, remove, timestamp
from lightning_kfac.storage.locks import FolderLock
from lightning_kfac.storage.results import append_result, read_results, replace_result, write_results

STATUS = "run.json"
# What was done to an edited model, beside its weights.
EDIT_FILE = "edit.json"
# What a run replaces; the status last, so that a half-moved folder still says whose it is.
EVENTS = "tensorboard"
FACTORS = "factors"
OUTPUTS = (
    FACTORS,
    "domains",
    "snapshots",
    "edited",
    "patch",
    "model",
    "residuals",
    "crystallization.json",
    EVENTS,
    "comparison.json",
    "extraction.json",
    "results.jsonl",
    "config.yaml",
    STATUS,
)
PREVIOUS = "previous"
# What an interrupted run goes on from.
STATE = "state"


class RunFolder:
    """A run's output folder.

    Args:
        path: ``trainer.default_root_dir``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock: FolderLock | None = None
        self._fits = False  # not merely measures
        # Lightning opens this run's event file early, so the earlier run's have to be told apart.
        self._old_events = [p for p in (self.path / EVENTS).rglob("*") if p.is_file()]

    def lock(self) -> None:
        """Keeps other runs out of the folder; raises ``InputError`` where one is writing to it."""
        setting = "trainer.default_root_dir"
        self._lock = FolderLock(self.path, f"choose another folder with {setting}", setting)

    def unlock(self) -> None:
        """Lets others in again."""
        if self._lock is not None:
            self._lock.release()

    @property
    def interrupted(self) -> bool:
        """Whether a run was begun here and did not finish."""
        return self._status().get("status") == "running"

    def check(self, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
        """Raises ``InputError`` where a run would replace something that it must not.

        Args:
            overwrite: Allow it to replace a finished run.
            inputs: Paths that the run will read: they must not lie in the folder's own outputs.
        """
        present = [name for name in OUTPUTS if (self.path / name).exists()]
        if present and STATUS not in present:
            raise InputError(
                f"{self.path} holds {present[0]}, but no run of this program wrote it; choose another folder with "
                "trainer.default_root_dir",
                "trainer.default_root_dir",
            )
        for path in inputs:
            if path and self._would_replace(Path(path)):
                raise InputError(f"{path} lies in the folder that this run would replace; choose another one")
        if not overwrite and present and not self.interrupted:
            raise InputError(
                f"{self.path} already holds a finished run; add overwrite to replace it, or choose another folder "
                "with trainer.default_root_dir",
                "overwrite",
                "trainer.default_root_dir",
            )

    def claim(self, command: str) -> None:
        """Says that a run of this program writes here, before anything else appears in an empty folder."""
        if not self._status():
            self._write({"status": "running", "command": command, "started": timestamp()})

    def begin(self, command: str, config: str) -> None:
        """Moves what an earlier run left to ``previous/`` and writes the full config. Tokenized text stays."""
        previous = self.path / PREVIOUS
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove(self.path / STATE)
            previous.mkdir(exist_ok=True)
            # A kill before all is put aside leaves an interrupted run, which begins again.
            if (self.path / STATUS).exists():
                shutil.copy(self.path / STATUS, previous / STATUS)
            self._write({"status": "running", "command": command, "started": timestamp()})
            outputs = [self.path / name for name in OUTPUTS if name not in (EVENTS, STATUS)]
            for old in (*self._old_events, *outputs):
                if old.exists():
                    place = previous / old.relative_to(self.path)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    remove(place)
                    old.rename(place)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._open({"command": command, "started": timestamp()}, config)

    def resume(self, command: str, config: str) -> None:
        """Goes on with an interrupted run: all that it has collected stays; an edit is made again, maybe another."""
        status = self._status()
        results = self.path / "results.jsonl"
        for name in ("edited", "patch"):
            remove(self.path / name)
        if results.exists():
            kept = [row for row in read_results(results) if row.get("stage") == "baseline"]
            write_results(results, kept)
        resumed = [*status.get("resumed", []), timestamp()]
        self._open(status | {"command": command, "resumed": resumed}, config)

    def finish(self) -> None:
        """Marks the run as finished, and forgets the one before it and what would have been needed to go on."""
        self._write(self._status() | {"status": "finished", "finished": timestamp()})
        remove(self.path / STATE)
        remove(self.path / PREVIOUS)
        for left in self.path.glob(f"*{PARTIAL}*"):  # by a kill
            remove(left)

    def note(self, command: str) -> None:
        """Says who wrote here, where no ``fit`` has; forgets what would have been needed to go on."""
        if not self._status():
            self._write({"status": "finished", "command": command, "finished": timestamp()})
        if not self.interrupted:
            remove(self.path / STATE)

    def add_result(self, row: dict[str, Any]) -> None:
        """Adds one evaluation to ``results.jsonl``; one of an interrupted ``fit`` takes the place of its forerunner."""
        path = self.path / "results.jsonl"
        if self._fits:
            replace_result(path, row, ("stage", "rank"))
        else:
            append_result(path, row)

    def _would_replace(self, path: Path) -> bool:
        """Whether a path lies in one of the outputs, which a new run puts aside."""
        return any(path.resolve().is_relative_to((self.path / name).resolve()) for name in OUTPUTS)

    def _open(self, status: dict[str, Any], config: str) -> None:
        try:
            with new_file(self.path / "config.yaml") as file:
                file.write_text(config, "utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._write(status | {"status": "running"})
        self._fits = True

    def _status(self) -> dict[str, Any]:
        try:
            status = json.loads((self.path / STATUS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def _write(self, status: dict[str, Any]) -> None:
        with new_file(self.path / STATUS) as file:
            file.write_text(json.dumps(status | {"version": version("lightning-kfac")}, indent=2), "utf-8")
