"""Parsers that print what is wrong in one line, and read every file through one door."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Path, get_loader, set_loader, set_parsing_settings

from lightning_kfac.cli.wording import reworded
from lightning_kfac.console import columns, command_line, filled, say_error
from lightning_kfac.errors import InputError
from lightning_kfac.storage.yaml_files import MOST_FILES, check_text, read_config

MOST_READINGS = 10 * MOST_FILES  # a parser reads some files several times


def usage(command: str, *words: str) -> str:
    """The line of a command's help that shows how it is called; its other words are names of places and options."""
    line = " ".join([command_line(command), *words, "[--OPTION VALUE ...]"])
    return filled(line, "usage: ").removeprefix("usage: ")


class _Refused(BaseException):
    """Carries an ``InputError`` past a parser, which would try the next of several types on any ``Exception``."""


@contextmanager
def one_door() -> Iterator[None]:
    """While it is open, a parser reads local files only, and all that it takes for YAML is looked at first.

    It does not matter who names the file: an option in any spelling, another file, a variable of the environment.

    Raises:
        InputError: A file or a text is refused.
    """
    load = get_loader("yaml")
    if load.__module__ == __name__:  # a parser within a parser
        yield
        return
    door = _Door(load)
    read = Path.read_text
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    set_loader("yaml", door.load, (yaml.YAMLError,))
    Path.read_text = lambda path: door.read(path)  # type: ignore[method-assign, assignment]
    try:
        yield
    except _Refused as refused:
        raise refused.args[0] from None
    finally:
        Path.read_text = read  # type: ignore[method-assign]
        set_loader("yaml", load, (yaml.YAMLError,))


class _Door:
    """What stands in for the parser's own functions."""

    def __init__(self, load: Callable[[str], Any]):
        self._load = load
        self._count = 0

    def load(self, text: str) -> Any:
        """What the parser makes of a text."""
        with _refusing():
            check_text(text, f"{text[:40]!r}...")
        return self._load(text)

    def read(self, path: Path) -> str:
        """What the parser reads of a file."""
        self._count += 1
        with _refusing():
            if self._count > MOST_READINGS:
                raise InputError(f"{path}: one of too many files that configs name, or it names itself; join them")
            if str(path) == "-":
                raise InputError("-: a config comes from a file, not from the standard input")
            file = pathlib.Path(path)
            text = read_config(file)
            check_text(text, str(file))
            return text


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise _Refused(error) from None


class InputErrors(ArgumentParser):
    """Prints what is wrong, without fifty lines of usage before it."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Also reports what the parser itself does not expect."""
        try:
            with one_door():
                return super().parse_args(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:  # what PyYAML makes of numbers, dates and tags that are none has many types
            self.error(f"a value cannot be read: {type(error).__name__}: {error}", error)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """No wider than the terminal: argparse wraps neither titles of groups nor long lists of choices."""
        for group in self._action_groups:
            group.title = filled(f"{group.title}:").removesuffix(":")
        for action in self._actions:
            if isinstance(action.metavar, str) and len(action.metavar) > columns() // 2:
                action.metavar = action.dest.rpartition(".")[2].upper()
        return super().format_help(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with code 2 and one message: our own, where one is the cause."""
        own = input_error_behind(ex)
        say_error(f"error: {own.with_options() if own else reworded(' '.join(message.split()), self)}")
        raise SystemExit(2)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: the parser wraps what a class says into its own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def with_underscores(args: Sequence[str]) -> list[str]:
    """``--dry-run`` and ``--dry_run`` are the same option."""
    changed = []
    for word in args:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            option, dot, key = name[2:].partition(".")  # what follows is a name that the user gave
            name = "--" + option.replace("-", "_") + dot + key
        changed.append(name + equals + value)
    return changed
