"""JSON files, and lines of JSON, with a checksum of their own."""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import new_file

CHECKSUM = "checksum"
LINE_CHECKSUM = "crc"


def write_json(path: str | Path, contents: Mapping[str, Any], checksum: bool = True) -> None:
    """Writes an object; the file appears under its name when it is complete and on the disk.

    Args:
        checksum: Add a field with a checksum of all others, which ``read_json`` verifies.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/state.json"
        >>> write_json(path, {"step": 7})
        >>> read_json(path, "begin anew")
        {'step': 7}
    """
    contents = {key: value for key, value in contents.items() if key != CHECKSUM}
    if checksum:
        contents[CHECKSUM] = _checksum(json.loads(json.dumps(contents)))
    with new_file(path) as partial:
        partial.write_text(json.dumps(contents, indent=2) + "\n", "utf-8")


def read_json(path: str | Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file without its checksum, which is verified where there is one.

    Args:
        advice: What to do where the file is damaged, for the message.

    Raises:
        InputError: The file is missing, no JSON object, or has another checksum than it says.
    """
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise ValueError("there is no such file")
        contents = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(contents, dict):
            raise ValueError(f"it holds no object but a {type(contents).__name__}")
        json.dumps(contents, ensure_ascii=False).encode("utf-8")  # halves of characters cannot be written again
        known = contents.pop(CHECKSUM, None)
        if known is not None and known != _checksum(contents):
            raise ValueError("its contents do not have the checksum that it says")
    except RecursionError:
        raise InputError(f"{path}: damaged or incomplete: nested too deeply; {advice}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or incomplete: {error}; {advice}") from None
    return contents


def for_json(value: Any) -> Any:
    """Numbers that JSON does not have as None.

    Example:
        >>> for_json({"a": [1.5, float("nan")], 2: float("inf")})
        {'a': [1.5, None], 2: None}
    """
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed_line(row: Mapping[str, Any]) -> str:
    """A line of JSON, without its end, with a field ``crc`` of all others.

    Example:
        >>> sealed_line({"batch": 3})
        '{"batch": 3, "crc": 1441096883}'
        >>> row_of_line(sealed_line({"batch": 3})), row_of_line('{"batch": 7, "crc": 1441096883}')
        ({'batch': 3}, None)
    """
    row = {key: value for key, value in row.items() if key != LINE_CHECKSUM}
    return json.dumps(row | {LINE_CHECKSUM: _line_checksum(json.loads(json.dumps(row)))})


def row_of_line(line: str | bytes, sealed: bool = True) -> dict[str, Any] | None:
    """The object in a line without its checksum; None where it is cut off or damaged.

    Args:
        sealed: A line without a checksum, as older versions have them, is damaged too.
    """
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or (sealed and LINE_CHECKSUM not in row):
            return None
        known = row.pop(LINE_CHECKSUM, None)
        return row if known is None or known == _line_checksum(row) else None
    except (ValueError, RecursionError):
        return None


def file_name(name: object) -> str:
    """A name in the same folder, as metadata may give it; raises ``ValueError`` for a path that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{str(name)[:80]!r} is not the name of a file in the folder")
    return name


def _checksum(contents: Mapping[str, Any]) -> str:
    """Does not depend on the order of fields or on spaces."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _line_checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True, separators=(",", ":")).encode())
