"""Parsers that print what is wrong in one line."""

import sys

from lightning_kfac.errors import InputError


class InputErrors:
    """For parsers: prints what is wrong, without fifty lines of usage before it."""

    def parse_args(self, *args, **kwargs):
        """Also reports what the parser itself does not expect."""
        try:
            return super().parse_args(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:  # what PyYAML makes of numbers, dates and tags that are none has many types
            self.error(f"a value cannot be read: {type(error).__name__}: {error}", error)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Ends the program with code 2 and one message: our own, where one is the cause."""
        own = input_error_behind(ex)
        print(f"error: {own.with_options() if own else ' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """The user's mistake behind an error: the parser wraps what a class says into its own."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
