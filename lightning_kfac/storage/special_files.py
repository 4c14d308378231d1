"""Files that are none: a pipe waits for ever, a device never ends."""

import os
import stat
from pathlib import Path

from lightning_kfac.errors import InputError

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_not_special(path: str | Path) -> None:
    """Raises ``InputError`` for a pipe, a socket or a device; what is missing or cannot be looked at passes.

    Example:
        >>> check_not_special("/dev/null")
        Traceback (most recent call last):
        lightning_kfac.errors.InputError: /dev/null: a device, not a file; give the path of a regular file
    """
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind is not None:
        raise InputError(f"{path}: {kind}, not a file; give the path of a regular file")
