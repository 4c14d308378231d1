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

CHUNK = 1 << 24
PARTIAL = ".part"
REPLACED = ".part-old"
FULL = {
    errno.ENOSPC: "no space left on the device; free some",
    errno.EDQUOT: "the disk quota is used up; free some",
    errno.EFBIG: "files of this size are not allowed (ulimit -f); raise the limit",
}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which replaces ``path`` when the block ends without an error.

    An older folder of the name stays until the new one is complete and on the disk; a kill in between loses
    neither, see ``settle``. On an error the new one is removed.

    Raises:
        InputError: The disk is full.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    replaced = path.with_name(path.name + REPLACED)
    settle(path)
    try:
        with writing(path):
            for left in (partial, replaced):
                remove(left)
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*.safetensors"):  # safetensors keeps new files to their owner; others may read
                file.chmod(0o644)
            for inside in (*partial.rglob("*"), partial):
                sync(inside)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    while not _moved(partial, path):
        path.rename(replaced)
    sync(path.parent)
    remove(replaced)


def settle(path: str | Path) -> None:
    """Puts the older folder back where a kill came after it was put aside and before the new one had its name."""
    path = Path(path)
    if not path.exists():
        with suppress(OSError):
            path.with_name(path.name + REPLACED).rename(path)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Gives a name to write to; the file replaces ``path`` when the block ends without an error, on the disk.

    Raises:
        InputError: The disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL}{secrets.token_hex(4)}")  # ids of processes repeat on other nodes
    try:
        with writing(path):
            yield partial
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns the errors of a full disk into an ``InputError`` that names what is written; others pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = FULL.get(_error_number(error))
        if why is None:
            raise
        raise InputError(f"{path}: cannot be written: {why}, then run the same command again") from error


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
