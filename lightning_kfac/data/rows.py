"""JSON lines, with errors that name the file and the line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_kfac.console import say
from lightning_kfac.errors import InputError


class BadRows:
    """What to do with rows that cannot be used.

    Args:
        skip: Leave them out and count them; otherwise the first one is an error.

    Example:
        >>> bad = BadRows(skip=True)
        >>> bad.meet(InputError("rows.jsonl, line 2: the suffix is empty"))
        >>> bad.count
        1
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.count = 0
        self.first: InputError | None = None

    def meet(self, error: InputError) -> None:
        """One bad row. Raises the error where rows are not skipped."""
        if not self.skip:
            raise error
        self.count += 1
        self.first = self.first or error

    def tell(self, source: object) -> None:
        """Says how many rows were skipped, and why the first."""
        if self.count:
            say(f"{source}: {self.count:,} bad rows skipped; the first: {self.first}")


def read_objects(path: Path, bad: BadRows | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line, object) for each line that is not empty.

    Args:
        bad: What to do with a line that is no JSON object; by default it is an error.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or a line is no JSON object.
    """
    bad = bad or BadRows()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = parse_object(_decoded(line, where), where)
            except InputError as error:
                bad.meet(error)
                continue
            yield where, row


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object in a line; raises ``InputError`` where there is none."""
    with json_errors(where):
        row = json.loads(line)
    return check_object(row, line, where)


def check_object(row: Any, source: str, where: str) -> dict[str, Any]:
    """A JSON value that must be an object of whole characters.

    Args:
        source: What it was read from.

    Raises:
        InputError: It is not.
    """
    with json_errors(where):
        if "\\ud" in source.lower():  # halves of characters, which no tokenizer and no file takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


@contextmanager
def json_errors(where: str) -> Iterator[None]:
    """Turns what ``json`` raises into an ``InputError``."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: not valid JSON: half of a character (\\ud800 to \\udfff by itself)") from None
    except (RecursionError, ValueError) as error:  # of depth, of numbers with thousands of digits
        raise InputError(f"{where}: not valid JSON: {error}") from None
