"""One writer a folder, or a file."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import filelock

from lightning_kfac.console import say
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import TROUBLES, timestamp

LOCK = ".lightning_kfac.lock"
# Some network file systems lock nothing.
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """Keeps others from writing what this process writes, and lets them in when it ends, however it ends.

    The system holds the lock for the process, so that a kill leaves none; the file only says who that is.

    Args:
        file: The lock's own file; there only as long as it is held, or after a kill.
        what: What is written, for messages.
        advice: What else the user can do where it is taken or cannot be used.
        settings: Those that the advice names.

    Raises:
        InputError: Another process has it, or its folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Lock(folder / ".lock", folder, "choose another folder"):
        ...     pass
    """

    def __init__(self, file: Path, what: Path, advice: str, *settings: str):
        self.file = file
        self._lock = filelock.FileLock(file)
        try:
            self._lock.acquire(timeout=0)
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {timestamp()}", "utf-8")
        except filelock.Timeout:
            owner = "another process"
            with suppress(OSError):
                owner = file.read_text("utf-8", errors="replace") or owner
            taken = f"{what}: {owner} is writing to this {_kind(what)}; wait for it, or {advice}"
            raise InputError(taken, *settings) from None
        except (OSError, NotImplementedError) as error:
            self.release()
            if isinstance(error, OSError) and error.errno not in UNLOCKABLE:
                why = TROUBLES.get(error.errno or 0, error.strerror)
                raise InputError(f"{what}: cannot be written: {why}, or {advice}", *settings) from None
            say(f"note: {what} is on a disk that knows no locks; see to it that no other run writes there")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets others in again."""
        if self._lock.is_locked:
            with suppress(OSError):  # whoever has opened it meanwhile finds it gone, and opens another
                self.file.unlink(missing_ok=True)
        self._lock.release()


class FolderLock(Lock):
    """The lock of a folder, which is made where it is not there.

    Raises:
        InputError: It is a file, another process has it, or it cannot be written.
    """

    def __init__(self, folder: str | Path, advice: str, *settings: str):
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; {advice}", *settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = TROUBLES.get(error.errno or 0, error.strerror)
            raise InputError(f"{folder}: cannot be written: {why}, or {advice}", *settings) from None
        super().__init__(folder / LOCK, folder, advice, *settings)


class FileLock(Lock):
    """The lock of a single file that is replaced as a whole: another file beside it, hidden."""

    def __init__(self, file: Path, advice: str, *settings: str):
        super().__init__(file.with_name(f".{file.name}.lock"), file, advice, *settings)


def _kind(what: Path) -> str:
    return "folder" if what.is_dir() else "file"
