"""The folder of a run: who may write into it, and what it says of itself."""

import json
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from lightning_kfac.errors import InputError
from lightning_kfac.results import append_result, timestamp

STATUS = "run.json"
# What a run replaces; the status last, so that a half-moved folder still says whose it is.
EVENTS = "tensorboard"
OUTPUTS = (
    "factors",
    "domains",
    "snapshots",
    "edited",
    "patch",
    "model",
    "residuals",
    "crystallization.json",
    EVENTS,
    "comparison.json",
    "results.jsonl",
    "config.yaml",
    STATUS,
)
PREVIOUS = "previous"


class RunFolder:
    """A run's output folder.

    Args:
        path: ``trainer.default_root_dir``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # Lightning opens this run's event file early, so the earlier run's have to be told apart.
        self._old_events = [p for p in (self.path / EVENTS).rglob("*") if p.is_file()]

    def check(self, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
        """Raises ``InputError`` where a run would replace something that it must not.

        Args:
            overwrite: Allow it to replace a finished run.
            inputs: Paths that the run will read: they must not lie in the folder's own outputs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file; choose another folder with --trainer.default_root_dir")
        present = [name for name in OUTPUTS if (self.path / name).exists()]
        if present and STATUS not in present:
            raise InputError(
                f"{self.path} holds {present[0]}, but no run of this program wrote it; choose another folder with "
                "--trainer.default_root_dir"
            )
        for path in filter(None, inputs):
            inside = [name for name in OUTPUTS if Path(path).resolve().is_relative_to((self.path / name).resolve())]
            if inside:
                raise InputError(f"{path} lies in the folder that this run would replace; choose another one")
        if not overwrite and self._status().get("status") == "finished":
            raise InputError(
                f"{self.path} already holds a finished run; add --overwrite to replace it, or choose another folder "
                "with --trainer.default_root_dir"
            )

    def begin(self, command: str, config: str) -> None:
        """Moves what an earlier run left to ``previous/`` and writes the full config. Tokenized text stays."""
        previous = self.path / PREVIOUS
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for old in [*self._old_events, *(self.path / name for name in OUTPUTS if name != EVENTS)]:
                if old.exists():
                    place = previous / old.relative_to(self.path)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _remove(place)
                    old.rename(place)
            (self.path / "config.yaml").write_text(config, "utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._write({"status": "running", "command": command, "started": timestamp()})

    def finish(self) -> None:
        """Marks the run as finished, and forgets the one before it."""
        self._write(self._status() | {"status": "finished", "finished": timestamp()})
        _remove(self.path / PREVIOUS)

    def append_result(self, row: dict) -> None:
        """Appends one evaluation to ``results.jsonl``."""
        append_result(self.path / "results.jsonl", row)

    def _status(self) -> dict:
        try:
            return json.loads((self.path / STATUS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def _write(self, status: dict) -> None:
        partial = self.path / f"{STATUS}.part"
        partial.write_text(json.dumps(status | {"version": version("lightning-kfac")}, indent=2), "utf-8")
        partial.replace(self.path / STATUS)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
