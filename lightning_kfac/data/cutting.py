"""Where whole texts are cut: prefixes that are given, and the suffixes that a model is asked for."""

from typing import NamedTuple

# The windows of the paper.
PREFIX = 64
SUFFIX = 48
# A shorter text is halved, unless it has fewer tokens than this.
FEWEST_TOKENS = 8


class Window(NamedTuple):
    """Places of a text's tokens: the prefix ends where the suffix begins."""

    start: int
    cut: int
    end: int


def windows(size: int, prefix: int = PREFIX, suffix: int = SUFFIX) -> list[Window]:
    """Windows of ``prefix + suffix`` tokens of a text whose suffixes follow one another.

    Every token behind the first prefix is asked for once, but for an end shorter than a suffix. A text shorter than one
    window gives none.

    Args:
        size: Tokens of the text.

    Example:
        >>> windows(9, prefix=2, suffix=3)
        [Window(start=0, cut=2, end=5), Window(start=3, cut=5, end=8)]
    """
    length = prefix + suffix
    return [Window(start, start + prefix, start + length) for start in range(0, size - length + 1, suffix)]
