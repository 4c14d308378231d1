"""The one exception type that a user of the package is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, an option, a layer name.

    The message names the culprit and says what to do. The command line prints it as one line
    without a traceback; from Python it is an ordinary ``ValueError``.

    Example:
        >>> issubclass(InputError, ValueError)
        True
    """


def first_line(error: Exception) -> str:
    """The first line of what another library's exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
