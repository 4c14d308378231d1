"""The one exception type that a user of the package is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, an option, a layer name.

    The message names the culprit and says what to do. The command line prints it as one line
    without a traceback; from Python it is an ordinary ``ValueError``.

    Example:
        >>> issubclass(InputError, ValueError)
        True
    """
