"""The one exception type that a user of the package is meant to read."""

import difflib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used: a file, an option, a layer name.

    The message names the culprit and says what to do. The command line prints it as one line
    without a traceback; from Python it is an ordinary ``ValueError``.

    Args:
        message: In the names that Python knows: ``collect.moments``, ``force=True``.
        settings: Those in the message that are options of a command line.

    Example:
        >>> str(InputError("the folder is not empty; overwrite=True replaces it", "overwrite=True"))
        'the folder is not empty; overwrite=True replaces it'
    """

    def __init__(self, message: str, *settings: str):
        super().__init__(message)
        self.settings = settings

    def with_options(self) -> str:
        """The message for someone at a command line.

        Example:
            >>> InputError("the folder is not empty; overwrite=True replaces it", "overwrite=True").with_options()
            'the folder is not empty; --overwrite replaces it'
        """
        text = str(self)
        for name in self.settings:
            option = "--" + name.removesuffix("=True")
            found = rf"(?<![\w./-]){re.escape(name)}(?![\w/-]|\.\w)"
            text = option.join(re.split(found, text))
        return text


def first_line(error: BaseException) -> str:
    """The first line of what another library's exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cause(error: BaseException) -> str:
    """What another library's exception says, in one line of at most 300 characters; a bare key with its type.

    Example:
        >>> cause(KeyError("hidden_size"))
        "KeyError: 'hidden_size'"
        >>> cause(RuntimeError("Error(s) in loading:\\n\\tsize mismatch for w"))
        'Error(s) in loading: size mismatch for w'
    """
    said = " ".join(str(error).split())
    if len(said) > 300:
        first = first_line(error)
        said = said[:300] if first.endswith(":") else first[:300]
    bare = not said or isinstance(error, KeyError | AttributeError | IndexError)
    return ": ".join(part for part in (type(error).__name__ * bare, said) if part)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known, where one that is known looks like it.

    Example:
        >>> did_you_mean("formul", ["formula", "rho"]), did_you_mean("xyz", ["formula"])
        ('; did you mean formula?', '')
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)
    return f"; did you mean {close[0]}?" if close else ""
