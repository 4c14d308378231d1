"""Where in a document windows come out: probabilities along its tokens, in as many cells as a figure has room for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

CELLS = 1000
DRAWN = 12
# Columns of windows, some rows at a time.
Columns = Mapping[str, np.ndarray]


class Cells(NamedTuple):
    """One measurement of a document, cell by cell.

    Attributes:
        log10_p: float64 [n], of the likeliest window whose suffix lies there; NaN where none was measured.
        asked: bool [n], whether any suffix lies there, measured or not.
    """

    log10_p: np.ndarray
    asked: np.ndarray


@dataclass
class Strip:
    """A document, and what each of some models makes of it.

    Attributes:
        name: Of the document.
        n_tokens: Its length.
        stages: Cells by stage, in order.
    """

    name: str
    n_tokens: int
    stages: dict[str, Cells] = field(default_factory=dict)


def add_windows(cells: Cells, n_tokens: int, starts: np.ndarray, log_p: np.ndarray, prefix: int, suffix: int) -> None:
    """Enters windows of a document: what is said of a window is said of the tokens of its suffix.

    Args:
        cells: Changed in place.
        n_tokens: Of the document.
        starts: int [n], places of the windows in the document.
        log_p: float64 [n], natural logarithms; NaN where nothing was measured.
        prefix, suffix: Tokens of either, of every window.
    """
    count = len(cells.asked)
    first = (starts + prefix) * count // n_tokens
    last = np.minimum((starts + prefix + suffix - 1) * count // n_tokens, count - 1)
    log10_p = log_p / np.log(10)
    for begin, end, value in zip(first.tolist(), last.tolist(), log10_p.tolist(), strict=True):
        place = slice(begin, end + 1)
        cells.asked[place] = True
        cells.log10_p[place] = np.fmax(cells.log10_p[place], value)


def empty_cells(n_tokens: int) -> Cells:
    """Cells in which nothing was entered; no more of them than tokens."""
    count = max(1, min(CELLS, n_tokens))
    return Cells(np.full(count, np.nan), np.zeros(count, dtype=bool))


def most_extracted(stages: Iterable[Iterable[Columns]], n_documents: int) -> list[int]:
    """Numbers of the documents to draw: most windows expected from one sample of each, in any stage; in their order."""
    most = np.zeros(n_documents)
    for windows in stages:
        expected = np.zeros(n_documents)
        for columns in windows:
            p = np.nan_to_num(np.exp(columns["log_p"]))
            expected += np.bincount(columns["document"], p, n_documents)
        most = np.maximum(most, expected)
    return sorted(np.argsort(-most, kind="stable")[:DRAWN].tolist())


def strips_of(
    documents: Mapping[int, tuple[str, int]],
    stages: Mapping[str, Callable[[], Iterator[Columns]]],
    prefix: int,
    suffix: int,
) -> list[Strip]:
    """Strips of some documents, from windows that are read a few at a time.

    Args:
        documents: Number to name and length in tokens.
        stages: Stage to a function that begins to read its windows.
        prefix, suffix: Tokens of either.
    """
    strips = {number: Strip(name, n_tokens) for number, (name, n_tokens) in documents.items()}
    for stage, read in stages.items():
        for strip in strips.values():
            strip.stages[stage] = empty_cells(strip.n_tokens)
        for columns in read():
            for number in np.intersect1d(columns["document"], list(strips)).tolist():
                own = columns["document"] == number
                strip = strips[number]
                there = columns["start"][own], columns["log_p"][own]
                add_windows(strip.stages[stage], strip.n_tokens, *there, prefix, suffix)
    return list(strips.values())


def covered(strips: Sequence[Strip]) -> list[Strip]:
    """Those of which any window was asked for."""
    return [strip for strip in strips if any(cells.asked.any() for cells in strip.stages.values())]
