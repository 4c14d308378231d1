"""Parsers that print what is wrong in one line."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lightning_kfac.console import columns, command_line, filled, say_error
from lightning_kfac.errors import InputError


def usage(command: str, *words: str) -> str:
    """The line of a command's help that shows how it is called; its other words are names of places and options."""
    line = " ".join([command_line(command), *words, "[--OPTION VALUE ...]"])
    return filled(line, "usage: ").removeprefix("usage: ")


class InputErrors(ArgumentParser):
    """Prints what is wrong, without fifty lines of usage before it."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Also reports what the parser itself does not expect."""
        try:
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
        say_error(f"error: {own.with_options() if own else ' '.join(message.split())}")
        raise SystemExit(2)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: the parser wraps what a class says into its own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
