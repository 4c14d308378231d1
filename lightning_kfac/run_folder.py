"""The folder of a run: who may write into it, and what it says of itself."""

import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from lightning_kfac.errors import InputError

STATUS = "run.json"
OUTPUTS = ("factors", "edited", "model", "tensorboard", "results.jsonl", "memorized.jsonl", "config.yaml", STATUS)


class RunFolder:
    """A run's output folder.

    Args:
        path: ``trainer.default_root_dir``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check(self, overwrite: bool) -> None:
        """Raises ``InputError`` where a finished run would be lost."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file; choose another folder with --trainer.default_root_dir")
        if not overwrite and self._status().get("status") == "finished":
            raise InputError(
                f"{self.path} already holds a finished run; add --overwrite true to replace it, or choose another "
                "folder with --trainer.default_root_dir"
            )

    def begin(self, command: str, config: str) -> None:
        """Clears what an earlier run left and writes the full config. Tokenized text stays."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in OUTPUTS:
                old = self.path / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            (self.path / "config.yaml").write_text(config, "utf-8")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._write({"status": "running", "command": command, "started": timestamp()})

    def finish(self) -> None:
        """Marks the run as finished."""
        self._write(self._status() | {"status": "finished", "finished": timestamp()})

    def append_result(self, row: dict) -> None:
        """Appends one evaluation to ``results.jsonl``."""
        row = row | {"timestamp": timestamp(), "version": version("lightning-kfac")}
        with open(self.path / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _status(self) -> dict:
        try:
            return json.loads((self.path / STATUS).read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def _write(self, status: dict) -> None:
        partial = self.path / f"{STATUS}.part"
        partial.write_text(json.dumps(status | {"version": version("lightning-kfac")}, indent=2), "utf-8")
        partial.replace(self.path / STATUS)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
