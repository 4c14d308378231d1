"""``--json``: a command's figures on the standard output, and all that it says beside them on the standard error."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_kfac.storage.json_files import for_json
from lightning_kfac.storage.results import read_results

OPTION = "json"
# The constant FIGURES of a command's module names the file of its output folder that holds its figures, or says that
# its function `run` returns them.
RETURNED = "returned"


def add_json_option(parser: ArgumentParser) -> None:
    """For a command that prints figures."""
    parser.add_argument("--json", action="store_true", help="Print the figures as JSON, and nothing else.")


@contextmanager
def said_elsewhere(asked: bool) -> Iterator[None]:
    """What is printed meanwhile goes to the standard error, where JSON was asked for."""
    if not asked:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_figures(figures: Any) -> None:
    """One line of JSON; what is no number in JSON is null."""
    print(json.dumps(for_json(figures)).replace("\x7f", r"\u007f"))  # the one control that JSON leaves as it is


def figures_in(file: Path) -> Any:
    """What a command wrote: a JSON object, or the rows of results."""
    if file.suffix == ".json":
        return json.loads(file.read_text("utf-8")) if file.exists() else None
    return read_results(file)
