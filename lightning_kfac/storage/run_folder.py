"""The folder of a run: who may write into it, and what it says of itself."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.storage.earlier import adopt_run
from lightning_kfac.storage.files import REPLACED, new_file, settle, timestamp, writing
from lightning_kfac.storage.locks import FolderLock
from lightning_kfac.storage.manifest import RANKS_AND_EVENTS, Entry, Manifest, files_below
from lightning_kfac.storage.results import append_result, read_results, replace_result, write_results

STATUS = "run.json"
CONFIG = "config.yaml"
RESULTS = "results.jsonl"
# What was done to an edited model, beside its weights.
EDIT_FILE = "edit.json"
EVENTS = "tensorboard"
FACTORS = "factors"
PREVIOUS = "previous"
# What an interrupted run goes on from.
STATE = "state"
# What `fit` writes and a new one replaces; the status last, so that a half-moved folder still says whose it is.
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
    RESULTS,
    CONFIG,
    STATUS,
)


class RunFolder:
    """A run's output folder. Its manifest says what this program wrote there; all else is left alone.

    Args:
        path: The folder.
        kind: Of the run: ``collection``, ``training``, ``crystallize``, or the command.
        outputs: Names of what a run of this kind writes there: nobody else's may be in their place.
        setting: The option that chooses the folder.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str = "collection",
        outputs: Sequence[str] = OUTPUTS,
        setting: str = "trainer.default_root_dir",
    ):
        self.path = Path(path)
        self.kind = kind
        self.outputs = outputs
        self.setting = setting
        self.manifest = Manifest(self.path)
        self._lock: FolderLock | None = None
        self._fits = False  # not merely measures
        self._made = False
        # Lightning opens this run's event file early, so the earlier run's have to be told apart.
        self._old_events = list(files_below(self.path / EVENTS))

    def lock(self) -> None:
        """Keeps other runs out of the folder; raises ``InputError`` where one is writing to it."""
        self._made = not self.path.exists()
        self._lock = FolderLock(self.path, self._elsewhere, self.setting)

    def unlock(self) -> None:
        """Lets others in again; of a run that wrote nothing, nothing stays."""
        if self._lock is None:
            return
        if self.manifest.kind is not None and not self._written():
            with suppress(OSError):
                self.manifest.path.unlink()
        self._lock.release()
        if self._made:
            with suppress(OSError):
                self.path.rmdir()

    @contextmanager
    def opened(self) -> Iterator["RunFolder"]:
        """The folder for a command that goes on in what it has begun: locked, checked and claimed."""
        self.lock()
        try:
            self.check(overwrite=True, replaces=())
            self.claim()
            yield self
            self.manifest.compact()
        finally:
            self.unlock()

    @property
    def interrupted(self) -> bool:
        """Whether a run was begun here and did not finish."""
        return self._status().get("status") == "running"

    def check(
        self, overwrite: bool, inputs: Iterable[str | Path | None] = (), replaces: Sequence[str] | None = None
    ) -> None:
        """Raises ``InputError`` where a run would replace something that it must not. Only for who has the lock.

        Args:
            overwrite: Allow it to replace a finished run; what will be replaced is said.
            inputs: Paths that the run will read: they must not lie in the folder's own outputs.
            replaces: Names of what the run does not go on with; by default all outputs.
        """
        with writing(self.path):
            self._adopt()
        held = self.manifest.kind
        if held not in (None, self.kind):
            what = f"{self.path} holds a run of another kind ({held}, this is {self.kind}); {self._elsewhere}"
            raise InputError(what, self.setting)
        advice = f"move it away, or {self._elsewhere}"
        self.manifest.check(*self.outputs, STATE, PREVIOUS, advice=advice, settings=(self.setting,))
        for path in inputs:
            if path and self._would_replace(Path(path)):
                raise InputError(f"{path} lies in the folder that this run would replace; choose another one")
        present = self._present(self.outputs if replaces is None else replaces)
        if not overwrite and present and not self.interrupted:
            raise InputError(
                f"{self.path} already holds a finished run; add overwrite to replace it, or {self._elsewhere}",
                "overwrite",
                self.setting,
            )
        if overwrite and present:
            replaced = ", ".join([*present, *self._present([STATE])])
            console.print(f"{self.path}: overwrite replaces {replaced} of an earlier run", markup=False)

    def claim(self, command: str | None = None) -> None:
        """Says that a run of this program writes here, before anything else appears.

        Args:
            command: For ``run.json``, of a run that can be interrupted.
        """
        with writing(self.path):
            if self.manifest.kind is None:
                self.manifest.create(self.kind)
            new = [name for name in self._shared_folders() if name not in self.manifest.entries]
            self.manifest.add({name: Entry("folder") for name in new})
            if command is not None and not self._status():
                self._write({"status": "running", "command": command, "started": timestamp()})

    def begin(self, command: str, config: str) -> None:
        """Moves what an earlier run left to ``previous/`` and writes the full config. Tokenized text stays."""
        self.claim()
        with writing(self.path):
            self.manifest.remove(STATE)
            # A kill before all is put aside leaves an interrupted run, which begins again.
            if status := self._status():
                (self.path / PREVIOUS).mkdir(exist_ok=True)
                with new_file(self.path / PREVIOUS / STATUS) as file:
                    file.write_text(json.dumps(status, indent=2), "utf-8")
            self._write({"status": "running", "command": command, "started": timestamp()})
            outputs = [self.path / name for name in self.outputs if name not in (EVENTS, STATUS)]
            for old in (*self._old_events, *outputs):
                if old.exists():
                    name = self.manifest.name(old)
                    self.manifest.move(name, f"{PREVIOUS}/{name}")
        self._open({"command": command, "started": timestamp()}, config)

    def resume(self, command: str, config: str) -> None:
        """Goes on with an interrupted run: all that it has collected stays; an edit is made again, maybe another."""
        self.claim()
        status = self._status()
        results = self.path / RESULTS
        for name in ("edited", "patch"):
            self.manifest.remove(name)
        if results.exists():
            kept = [row for row in read_results(results) if row.get("stage") == "baseline"]
            write_results(results, kept)
        resumed = [*status.get("resumed", []), timestamp()]
        self._open(status | {"command": command, "resumed": resumed}, config)

    def finish(self) -> None:
        """Marks the run as finished, and forgets the one before it and what would have been needed to go on."""
        self._write(self._status() | {"status": "finished", "finished": timestamp()})
        for name in (STATE, PREVIOUS):
            self.manifest.remove(name)
        self.manifest.compact()

    def note(self, command: str) -> None:
        """Says who wrote here, where no ``fit`` has; forgets what would have been needed to go on."""
        if not self._status():
            self._write({"status": "finished", "command": command, "finished": timestamp()})
        if not self.interrupted:
            self.manifest.remove(STATE)
        self.manifest.compact()

    def replace(self, *names: str) -> None:
        """Removes what an earlier run wrote under these names."""
        for name in names:
            self.manifest.remove(name)

    def add_result(self, row: dict[str, Any]) -> None:
        """Adds one evaluation to ``results.jsonl``; one of an interrupted ``fit`` takes the place of its forerunner."""
        path = self.path / RESULTS
        if self._fits:
            replace_result(path, row, ("stage", "rank"))
        else:
            append_result(path, row)

    @property
    def _elsewhere(self) -> str:
        return f"choose another folder with {self.setting}"

    def _adopt(self) -> None:
        """Takes over a folder of version 0.1, and clears away what kills have left of files."""
        adopt_run(self.path)
        for name, entry in self.manifest.entries.items():
            if entry.role == "part" and name.endswith(REPLACED):
                settle(self.path / name.removesuffix(REPLACED))
        self.manifest.remove_parts()

    def _present(self, names: Iterable[str]) -> list[str]:
        """What is there, folders with a slash behind."""
        paths = [self.path / name for name in names]
        return [f"{path.name}/" if path.is_dir() else path.name for path in paths if any(files_below(path))]

    def _shared_folders(self) -> list[str]:
        """Folders in which every rank, or TensorBoard, writes."""
        return [name for name in (*self.outputs, STATE) if name in (STATE, EVENTS, "mining")]

    def _written(self) -> bool:
        names = [name for name, entry in self.manifest.entries.items() if entry.role == "file"]
        return any((self.path / name).exists() for name in names) or any(
            RANKS_AND_EVENTS.fullmatch(path.name)
            for name in self._shared_folders()
            for path in files_below(self.path / name)
        )

    def _would_replace(self, path: Path) -> bool:
        """Whether a path lies in one of the outputs, which a new run puts aside."""
        return any(path.resolve().is_relative_to((self.path / name).resolve()) for name in self.outputs)

    def _open(self, status: dict[str, Any], config: str) -> None:
        with new_file(self.path / CONFIG) as file:
            file.write_text(config, "utf-8")
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
