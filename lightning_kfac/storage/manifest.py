"""What this program wrote in a folder: the one list that decides what may be replaced or removed there.

``manifest.jsonl`` begins with the kind of run; then comes a line for each file, before the file appears, and once more
with size and checksum when it is there. Whatever no line names belongs to somebody else.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_kfac.errors import InputError

MANIFEST = "manifest.jsonl"
FORMAT = 1
# A file of which somebody may have made their own is known by its contents too, where reading them costs nothing.
LARGEST_SUMMED = 1 << 20
# What every rank, and TensorBoard, writes in folders of ours under names that nobody else gives.
RANKS_AND_EVENTS = re.compile(
    r"(rank-\d+\.(jsonl|bin|safetensors)|checkpoint\.json|\d+-[0-9a-f]{32}\.safetensors"
    r"|events\.out\.tfevents\.\d+\..+|hparams\.yaml)(\.part[0-9a-f]{8})?"
)
KIND = re.compile(r"[a-z_]{1,20}")
UNFINISHED = re.compile(r"\.part[0-9a-f]{8}$")
# What a collection keeps in state/ where no manifest says so.
OF_FACTORS = re.compile(r"(layer_\d{4}\.safetensors|metadata\.json|moments\.safetensors)(\.part[0-9a-f]{8})?")
# A checkpoint holds what its source holds and one file of ours, which has the list (field ``files``).
RECORDS = {"edit.json": "apply", "restored.json": "restore"}

Role = Literal["file", "folder", "part"]


class Entry(NamedTuple):
    """One line.

    Attributes:
        role: ``file``; ``folder`` for one in which ranks and TensorBoard write; ``part`` for what a kill may leave,
            with all that is in it.
        size: In bytes; None where the file grows.
        sha256: Of small files that do not change by themselves.
    """

    role: Role = "file"
    size: int | None = None
    sha256: str | None = None


class Manifest:
    """The list of one folder.

    Args:
        folder: The folder, which need not be there.

    Example:
        >>> import tempfile
        >>> manifest = Manifest(Path(tempfile.mkdtemp()))
        >>> manifest.create("sweep")
        >>> manifest.add({"results.jsonl": Entry()})
        >>> manifest.kind, manifest.owns(manifest.folder / "results.jsonl"), manifest.owns(manifest.folder / "notes")
        ('sweep', True, False)
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / MANIFEST

    @property
    def kind(self) -> str | None:
        """The kind of run that wrote here; None where there is no manifest of ours."""
        return _contents(self.folder)[0]

    @property
    def entries(self) -> Mapping[str, Entry]:
        """By path in the folder."""
        return _contents(self.folder)[1]

    def create(self, kind: str) -> None:
        """Begins the list; raises ``InputError`` where another program has a file of its name."""
        if self.path.is_file() and self.path.stat().st_size:
            raise InputError(f"{self.path}: this program did not write it; move it away, or choose another folder")
        self._append([{"manifest": FORMAT, "kind": kind}])

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Lists files and folders, on the disk before they may appear."""
        self._append([_line(name, entry) for name, entry in entries.items()])

    def compact(self) -> None:
        """Forgets what is no longer there: a file that somebody puts in its place is theirs."""
        known = self.entries
        lines: list[dict[str, Any]] = [{"manifest": FORMAT, "kind": self.kind}]
        lines += [_line(name, entry) for name, entry in known.items() if os.path.lexists(self.folder / name)]
        partial = self.path.with_name(MANIFEST + ".part")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    # -- whose a file is ---------------------------------------------------------------------------------

    def name(self, path: Path) -> str:
        """A path as the list has it."""
        return path.absolute().relative_to(self.folder.absolute()).as_posix()

    def owns(self, path: Path) -> bool:
        """Whether this program wrote a file, or may write it now because nobody else has."""
        name = self.name(path)
        if name in (MANIFEST, MANIFEST + ".part"):
            return True
        entries = self.entries
        own = entries.get(name)
        if own is not None and (own.role != "folder" or (path.is_dir() and not path.is_symlink())):
            return True
        grows = any(entries[place].role == "folder" for place in _above(name) if place in entries)
        return self._is_part(name) or (grows and RANKS_AND_EVENTS.fullmatch(path.name) is not None)

    def changed(self, path: Path) -> bool:
        """Whether somebody has changed a small file since it was written."""
        entry = self.entries.get(self.name(path))
        return entry is not None and entry.sha256 is not None and path.is_file() and entry != entry_of(path)

    def check(self, *names: str, advice: str = "move it away", settings: Iterable[str] = ()) -> None:
        """Raises ``InputError`` for the first file at or below these names that is not ours, or no longer.

        Args:
            advice: What the user can do.
            settings: Those that the advice names.
        """
        for name in names:
            for path in files_below(self.folder / name):
                if not self.owns(path):
                    raise InputError(f"{path}: no run of this program wrote it; {advice}", *settings)
                if self.changed(path):
                    raise InputError(f"{path}: somebody has changed it since it was written; {advice}", *settings)

    # -- for those who write ------------------------------------------------------------------------------

    def announce(self, path: Path, *parts: Path) -> None:
        """Lists a file that is about to be written, and the unfinished ones on the way to it.

        Raises:
            InputError: A file of this name is there, and not ours.
        """
        entries: dict[str, Entry] = {}
        if os.path.lexists(path):
            self._check_replaceable(path)
        own = self.entries.get(self.name(path))
        if not self.owns(path) or (own is not None and own.sha256 is not None):
            entries[self.name(path)] = Entry()  # what it will hold is not known yet
        entries |= {self.name(part): Entry("part") for part in parts if not self.owns(part)}
        for part in parts:
            if os.path.lexists(part) and not self.owns(part):
                raise InputError(f"{part}: in the way, and no run of this program wrote it; move it away")
        if entries:
            self.add(entries)

    def add_folder(self, path: Path, complete: Path) -> None:
        """Lists a folder and all that is in it before it gets its name.

        Args:
            path: Its name.
            complete: Where it is now.
        """
        if not self._is_part(self.name(path)):
            files = {self.name(path / file.relative_to(complete)): Entry() for file in files_below(complete)}
            self.add({self.name(path): Entry("folder"), **files})

    def note(self, path: Path) -> None:
        """Adds size and checksum of what is whole now, a file or a folder with all that is in it."""
        files = [file for file in files_below(path) if file.is_file() and self.name(file) in self.entries]
        if files:
            self.add({self.name(file): entry_of(file) for file in files})

    def move(self, name: str, to: str) -> None:
        """Puts an entry elsewhere in the folder, in the place of what of ours is there."""
        below = f"{name}/"
        moved = {
            to + place[len(name) :]: entry for place, entry in self.entries.items() if (place + "/").startswith(below)
        }
        self.add(moved or {to: Entry()})
        self.remove(to)
        (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).rename(self.folder / to)

    def remove(self, name: str) -> None:
        """Removes what is ours at or below a name, and folders that are empty then; never by way of a link."""
        if not any((self.folder / place).is_symlink() for place in _above(name)):
            remove_files(self.folder / name, self.owns)

    def remove_parts(self) -> None:
        """Removes what kills have left. Only for who has locked the folder."""
        for name, entry in self.entries.items():
            if entry.role == "part":
                self.remove(name)
            elif entry.role == "folder":
                remove_files(self.folder / name, lambda file: self.owns(file) and bool(UNFINISHED.search(file.name)))

    def _is_part(self, name: str) -> bool:
        entries = self.entries
        return any(place in entries and entries[place].role == "part" for place in (*_above(name), name))

    def _check_replaceable(self, path: Path) -> None:
        for file in files_below(path):
            if not self.owns(file):
                raise InputError(f"{file}: in the way, and no run of this program wrote it; move it away")

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with open(self.path, "ab+") as file:
            cut_off = b""
            if file.tell():  # by a kill
                file.seek(-1, os.SEEK_END)
                cut_off = b"" if file.read() == b"\n" else b"\n"
            file.write(cut_off + b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def manifest_above(path: Path) -> Manifest | None:
    """The manifest of the nearest folder above a path that has one."""
    folders = (folder for folder in path.absolute().parents if (folder / MANIFEST).is_file())
    return next((Manifest(folder) for folder in folders if Manifest(folder).kind is not None), None)


def announce(path: Path, *parts: Path) -> Manifest | None:
    """Lists a file before it is written, see ``Manifest.announce``; the manifest, where a folder above has one."""
    manifest = manifest_above(path)
    if manifest is not None:
        manifest.announce(path, *parts)
    return manifest


def remove_ours(path: Path) -> None:
    """Removes what this program wrote at or below a path, and folders that are empty then.

    Where no manifest says what that is (a collection in a user's Trainer), the names of ranks' and factors' files do.
    """
    manifest = manifest_above(path)
    remove_files(path, _has_our_name if manifest is None else manifest.owns)


def remove_files(path: Path, ours: Callable[[Path], bool]) -> None:
    """Removes the files at or below a path that are ours, and folders that are empty then; what resists stays."""
    found = [file for file in files_below(path) if ours(file)]
    for file in sorted(found, key=lambda file: file.name in (MANIFEST, *RECORDS)):  # what says whose they are goes last
        with suppress(OSError):
            file.unlink()
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()


def files_below(path: Path) -> Iterator[Path]:
    """The path itself where it is a file or a link, otherwise all files and links below it."""
    if path.is_symlink() or path.is_file() or (os.path.lexists(path) and not path.is_dir()):
        yield path
        return
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in sorted([*files, *links]))


def entry_of(path: Path) -> Entry:
    """Size and, of a small file, checksum."""
    size = path.stat().st_size
    small = size <= LARGEST_SUMMED and not path.is_symlink()
    return Entry("file", size, hashlib.sha256(path.read_bytes()).hexdigest() if small else None)


def _has_our_name(path: Path) -> bool:
    return bool(RANKS_AND_EVENTS.fullmatch(path.name) or OF_FACTORS.fullmatch(path.name))


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts))]


def _leads_inside(name: str) -> bool:
    """Somebody else may have written the list: no path of it leads out of the folder."""
    return not set(name.split("/")) & {"", ".", ".."}


def _line(name: str, entry: Entry) -> dict[str, Any]:
    about = {"size": entry.size, "sha256": entry.sha256}
    return {"path": name, "role": entry.role, **{key: value for key, value in about.items() if value is not None}}


def _contents(folder: Path) -> tuple[str | None, Mapping[str, Entry]]:
    for name, read in {MANIFEST: _read_manifest, **dict.fromkeys(RECORDS, _read_record)}.items():
        with suppress(OSError):
            state = (folder / name).stat()
            found = read(folder / name, state.st_size, state.st_mtime_ns)
            if found[0] is not None:
                return found
    return None, {}


@lru_cache(maxsize=16)
def _read_manifest(path: Path, size: int, time: int) -> tuple[str | None, Mapping[str, Entry]]:
    """Kind and entries, read again when the file has changed."""
    entries: dict[str, Entry] = {}
    kind = None
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            row = json.loads(line)
            if number == 0 and row["manifest"] == FORMAT and KIND.fullmatch(row["kind"]):
                kind = row["kind"]
            elif number and _leads_inside(row["path"]):
                entries[row["path"]] = Entry(row["role"], row.get("size"), row.get("sha256"))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut off by a kill
    return kind, entries if kind is not None else {}


@lru_cache(maxsize=16)
def _read_record(path: Path, size: int, time: int) -> tuple[str | None, Mapping[str, Entry]]:
    """The same of a checkpoint that was written as a whole."""
    try:
        files = json.loads(path.read_bytes())["files"]
        entries = {name: Entry("file", about["size"], about.get("sha256")) for name, about in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}
    return RECORDS[path.name], {path.name: Entry(), **entries}
