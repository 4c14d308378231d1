"""One writer a folder."""

import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_kfac.console import say
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import timestamp

LOCK = ".lock"
# Some network file systems lock nothing.
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Keeps others out of a folder while this process writes to it, and lets them in when it ends, however it ends.

    Args:
        folder: Made where it is not there.
        advice: What else the user can do where the folder is taken or cannot be used.
        settings: Those that the advice names.

    Raises:
        InputError: Another process has it, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with FolderLock(tempfile.mkdtemp(), "choose another folder"):
        ...     pass
    """

    def __init__(self, folder: str | Path, advice: str, *settings: str):
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; {advice}", *settings)
        self._lock = FileLock(folder / LOCK)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            owner = f"process {os.getpid()} on {socket.gethostname()} since {timestamp()}"
            (folder / LOCK).write_text(owner, "utf-8")
        except Timeout:
            owner = (folder / LOCK).read_text("utf-8", errors="replace") or "another process"
            taken = f"{folder}: {owner} is writing to this folder; wait for it, or {advice}"
            raise InputError(taken, *settings) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNLOCKABLE:
                raise InputError(f"{folder}: cannot be written: {error.strerror}; {advice}", *settings) from None
            say(f"note: {folder} is on a disk that knows no locks; see to it that no other run writes there")

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets others in again."""
        self._lock.release()
