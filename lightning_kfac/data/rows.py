"""JSON lines, with errors that name the file and the line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
