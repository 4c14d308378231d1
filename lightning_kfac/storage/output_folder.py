"""A folder that one command writes as a whole: an edited model, imported factors, figures."""

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.storage.earlier import adopt_output, kind_of_output
from lightning_kfac.storage.files import PARTIAL, REPLACED, put_in_place, remove, settle, writing
from lightning_kfac.storage.json_files import CHECKSUM, write_json
from lightning_kfac.storage.locks import LOCK, FolderLock
from lightning_kfac.storage.manifest import MANIFEST, RECORDS, Entry, Manifest, entry_of, files_below, manifest_above

# Below the place where the folder is made.
NEW = "new"


class OutputFolder:
    """Reserves the output of a command before the work, and gives it its name when the work is done.

    It is made in ``NAME.part``, which tells others that it is being written; so a disk that takes nothing shows at
    once. What an earlier run of the same command wrote stays until then; any other folder is refused.

    Args:
        path: The output.
        kind: The command.
        overwrite: Replace what an earlier run of the same command wrote.

    Attributes:
        new: The folder to write; it must be there when the block ends.

    Raises:
        InputError: The output is there already, another process is writing it, or its disk takes nothing.
    """

    def __init__(self, path: Path, kind: str, overwrite: bool):
        self.path = path.resolve() if path.is_symlink() else path
        self.kind = kind
        self.overwrite = overwrite
        self.place = self.path.with_name(self.path.name + PARTIAL)
        self.new = self.place / NEW
        self._lock: FolderLock | None = None

    def __enter__(self) -> "OutputFolder":
        self._check_place()
        self._check()  # also before anything is made
        try:
            self._lock = FolderLock(self.place, "choose another --output")
        except InputError:
            _remove_empty(self.place)
            raise
        try:
            with writing(self.path):
                self._prepare()
            self._check()  # another process may just have finished
        except BaseException:
            self._leave()
            raise
        if self.overwrite and self.path.exists():
            replaced = f"{_told(self.path)} of an earlier {self.kind}"
            console.print(f"{self.path}: overwrite replaces {replaced}", markup=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    self._finish()
        finally:
            self._leave()

    def _check_place(self) -> None:
        """Raises ``InputError`` where a folder that only looks like an unfinished one is in the way."""
        for place in (self.place, self.path.with_name(self.path.name + REPLACED)):
            foreign = [file for file in files_below(place) if file.name not in (LOCK, MANIFEST)]
            if Manifest(place).kind is None and foreign:
                raise InputError(f"{place}: in the way, and this program did not write it; move it away")

    def _check(self) -> None:
        settle(self.path)
        folder = self.path
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        run = manifest_above(folder)
        if run is not None and run.owns(folder):
            raise InputError(f"{folder} is already there, a part of the run in {run.folder}; choose another --output")
        if self.overwrite:
            with writing(folder):
                adopt_output(folder)
        manifest = Manifest(folder)
        ours = self.kind == (manifest.kind or kind_of_output(folder))
        if not (ours and self.overwrite):
            hint = "add --overwrite to replace it, or " if ours else ""
            raise InputError(f"{folder} is already there; {hint}choose another --output")
        manifest.check(".", advice="move it away, or choose another --output")

    def _prepare(self) -> None:
        """Removes what a kill has left, and lists all that is to come."""
        manifest = Manifest(self.place)
        older = self.path.with_name(self.path.name + REPLACED)
        if self.path.exists() and older.exists():
            Manifest(older).remove(".")
        if manifest.kind is not None:
            manifest.remove_parts()
        else:
            manifest.create(self.kind)
        manifest.add({NEW: Entry("part"), NEW + PARTIAL: Entry("part"), NEW + REPLACED: Entry("part")})

    def _finish(self) -> None:
        _write_list(self.new, self.kind)
        older = self.path.with_name(self.path.name + REPLACED)
        put_in_place(self.new, self.path)
        if older.exists():
            Manifest(older).remove(".")

    def _leave(self) -> None:
        """Removes the place of the work; of what somebody else has put there, nothing."""
        manifest = Manifest(self.place)
        manifest.remove_parts()
        remove(manifest.path)
        if self._lock is not None:
            self._lock.release()
        _remove_empty(self.place)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _write_list(folder: Path, kind: str) -> None:
    """Says in a new folder what is in it: in the record of a checkpoint, which holds no other file of ours."""
    names = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    record = next((folder / name for name, of in RECORDS.items() if of == kind and name in names), None)
    entries = {name: entry_of(path) for name, path in names.items() if path != record}
    if record is None:
        manifest = Manifest(folder)
        manifest.create(kind)
        manifest.add(entries)
        boards = {name.partition("/")[0] for name in names if "events.out.tfevents." in name}
        manifest.add({board: Entry("folder") for board in boards})
        return
    contents = json.loads(record.read_text("utf-8"))
    about = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in entries.items()}
    files = {name: {key: value for key, value in each.items() if value is not None} for name, each in about.items()}
    write_json(record, contents | {"files": files}, checksum=CHECKSUM in contents)


def _told(folder: Path) -> str:
    files = list(files_below(folder))
    size = sum(path.lstat().st_size for path in files)
    return f"{len(files)} files ({size / 1e6:,.1f} MB)"
