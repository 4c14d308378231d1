"""Files and folders that appear under their name only when they are complete, and identities of what is in them."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lightning_kfac.errors import InputError
from lightning_kfac.storage.manifest import announce

CHUNK = 1 << 24
PARTIAL = ".part"
REPLACED = ".part-old"
# A folder that a function of the package wrote has one of these.
OURS = ("metadata.json", "edit.json", "restored.json", "config.json", "moments.safetensors")
# What a disk may say, and what to do about it.
TROUBLES = {
    errno.ENOSPC: "no space left on the device; free some",
    errno.EDQUOT: "the disk quota is used up; free some",
    errno.EFBIG: "files of this size are not allowed (ulimit -f); raise the limit",
    errno.EROFS: "the disk is read-only; make it writable",
    errno.ENODEV: "the disk is gone; bring it back",
    errno.ENXIO: "the disk is gone; bring it back",
    errno.ENOTCONN: "the disk is gone; bring it back",
    errno.ESTALE: "the disk was taken away and came back; open its folders again",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
    errno.EACCES: "permission denied; get it",
    errno.EPERM: "permission denied; get it",
}
# Reading says so too: only where nobody knows what was done to the file.
FAILING = TROUBLES | {errno.EIO: "the disk fails (input/output error); repair it"}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which replaces ``path`` when the block ends without an error.

    An older folder of the name stays until the new one is complete and on the disk; a kill in between loses
    neither, see ``settle``. On an error the new one is removed. Below a folder with a manifest, all files are listed
    there before they have their names.

    Raises:
        InputError: The disk is full or fails, or what would be replaced is not ours.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    replaced = path.with_name(path.name + REPLACED)
    settle(path)
    with writing(path):
        manifest = announce(path, partial, replaced)
    if manifest is None:
        for older in (path, partial, replaced):
            _check_older(older)
    try:
        with writing(path):
            for left in (partial, replaced):
                remove(left)
            partial.mkdir(parents=True)
            yield partial
            _as_others(partial)
            for inside in (*partial.rglob("*"), partial):
                sync(inside)
            if manifest is not None:
                manifest.add_folder(path, partial)
            put_in_place(partial, path)
            if manifest is not None:
                manifest.note(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove(replaced)


def put_in_place(partial: Path, path: Path) -> None:
    """Gives a new folder its name; an older one of the name is put aside, as ``NAME.part-old``."""
    while not _moved(partial, path):
        path.rename(path.with_name(path.name + REPLACED))
    sync(path.parent)


def settle(path: str | Path) -> None:
    """Puts the older folder back where a kill came after it was put aside and before the new one had its name."""
    path = Path(path)
    if not path.exists():
        with suppress(OSError):
            path.with_name(path.name + REPLACED).rename(path)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Gives a name to write to; the file replaces ``path`` when the block ends without an error, on the disk.

    Below a folder with a manifest, the file is listed there before it has its name.

    Raises:
        InputError: The disk is full or fails, or the file that would be replaced is not ours.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL}{secrets.token_hex(4)}")  # ids of processes repeat on other nodes
    try:
        with writing(path):
            manifest = announce(path, partial)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            if partial.stat().st_mode != mode:
                partial.chmod(mode)  # safetensors keeps new files to their owner, whatever the umask
            sync(partial)
            partial.replace(path)
            sync(path.parent)
            if manifest is not None:
                manifest.note(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _as_others(folder: Path) -> None:
    """Gives all files of a new folder the permissions that the umask gives (safetensors keeps them to their owner)."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def _check_older(path: Path) -> None:
    """Where no manifest says whose a folder is, files of ours must be in it, or none at all."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if names and not names.intersection(OURS) and not any(".safetensors" in name for name in names):
        raise InputError(f"{path}: is there already, and this program did not write it; choose another folder")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns the errors of a disk that is full, read-only or gone into an ``InputError``; others pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = trouble_of(error)
        if isinstance(error, FileNotFoundError) and not Path(path).parent.exists():
            why = "its folder is gone; bring the disk back"
        if why is None:
            raise
        other = getattr(error, "filename", None)
        if isinstance(other, str) and not Path(other).is_relative_to(Path(path).parent):
            raise InputError(f"{other}: {why}, then run the same command again") from error
        raise InputError(f"{path}: cannot be written: {why}, then run the same command again") from error


def trouble_of(error: BaseException) -> str | None:
    """What is wrong with the disk, and the mend; None where it is something else."""
    return TROUBLES.get(_error_number(error)) if isinstance(error, OSError | SafetensorError) else None


def disk_error(error: OSError) -> str | None:
    """One line for a disk that fails where nobody expected it; None for other errors."""
    why = FAILING.get(error.errno or 0)
    what = f"{error.filename}: cannot be used" if error.filename else "the output cannot be written"
    return why and f"{what}: {why}, then run the same command again"


def _error_number(error: OSError | SafetensorError) -> int:
    """The system's number of an error, which safetensors has in its text alone; 0 where there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    numbers = re.findall(r"os error (\d+)", str(error))
    return int(numbers[-1]) if numbers else 0


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def content_hash(files: Iterable[Path]) -> str:
    """Hash of names and contents, in the order given. 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()[:32]


def _moved(partial: Path, path: Path) -> bool:
    """Gives the new folder its name unless an older one has it: also one that a reader has just put back."""
    try:
        if path.exists():
            return False
        partial.rename(path)
    except OSError:
        if not path.exists():
            raise
        return False
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, where there is one; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
