"""Where whole texts are cut: prefixes that are given, and the suffixes that a model is asked for."""

from typing import NamedTuple

from lightning_kfac.console import counted

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


def told(texts: int, passages: int, halved: int, too_short: int, fewest: int) -> str:
    """How many texts and passages are used, and how many left out.

    Args:
        texts: Used.
        halved: Of them, those shorter than a passage.
        too_short: Left out, because they have fewer than ``fewest`` tokens.

    Example:
        >>> told(1, 1, 1, 2, 16)
        '1 text, 1 passage; 1 shorter than a passage, cut in halves; 2 left out, below 16 tokens'
    """
    parts = [f"{counted(texts, 'text')}, {counted(passages, 'passage')}"]
    if halved:
        parts.append(f"{halved:,} shorter than a passage, cut in halves")
    if too_short:
        parts.append(f"{too_short:,} left out, below {fewest} tokens")
    return "; ".join(parts)
