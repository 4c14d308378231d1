"""A memorized set in two halves: what is done with one is measured on the other."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import new_file

# Text with so many tokens in a row of a sequence that is measured would give it away.
GIVEN_AWAY = 16


class Halves(NamedTuple):
    """Attributes: ``shown`` may be used, ``reported`` is measured."""

    shown: list[MemorizedSequence]
    reported: list[MemorizedSequence]


def seeded_halves(sequences: Sequence[MemorizedSequence], seed: int, where: object) -> Halves:
    """Two halves in the order of the set; sequences with the same suffix come into the same one.

    Args:
        seed: Decides which go where.
        where: Names the set in messages.

    Raises:
        InputError: There are fewer than two different sequences.

    Example:
        >>> rows = [MemorizedSequence([1, n], [5, n]) for n in (7, 8, 7, 9)]
        >>> halves = seeded_halves(rows, 0, "a set")
        >>> [[sequence.suffix for sequence in half] for half in halves]
        [[[5, 9]], [[5, 7], [5, 8], [5, 7]]]
    """
    suffixes = list(dict.fromkeys(tuple(sequence.suffix) for sequence in sequences))
    if len(suffixes) < 2:
        raise InputError(
            f"{where}: {len(suffixes)} sequence with a suffix of its own; halves need at least two, better a hundred"
        )
    order = np.random.default_rng(seed).permutation(len(suffixes))
    shown = {suffixes[number] for number in order[: len(suffixes) // 2]}
    return Halves(
        [sequence for sequence in sequences if tuple(sequence.suffix) in shown],
        [sequence for sequence in sequences if tuple(sequence.suffix) not in shown],
    )


def write_sequences(sequences: Sequence[MemorizedSequence], path: Path) -> None:
    """A memorized set of token ids, as JSONL."""
    rows = [{"prefix_ids": list(map(int, s.prefix)), "suffix_ids": list(map(int, s.suffix))} for s in sequences]
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def giving_away(rows: Sequence[MemorizedSequence], reported: Sequence[MemorizedSequence]) -> list[int]:
    """The numbers of those rows that hold ``GIVEN_AWAY`` tokens in a row of a reported suffix, or a shorter one whole.

    Example:
        >>> reported = [MemorizedSequence([1], [7, 8, 9])]
        >>> giving_away([MemorizedSequence([7], [8, 9, 1]), MemorizedSequence([], [8, 9, 7])], reported)
        [0]
    """
    runs: dict[int, set[tuple[int, ...]]] = {}
    for sequence in reported:
        n = min(GIVEN_AWAY, len(sequence.suffix))
        runs.setdefault(n, set()).update(_runs(sequence.suffix, n))
    whole = [[*row.prefix, *row.suffix] for row in rows]
    return [i for i, ids in enumerate(whole) if any(run in runs[n] for n in runs for run in _runs(ids, n))]


def _runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(map(int, ids[i : i + n])) for i in range(len(ids) - n + 1)]
