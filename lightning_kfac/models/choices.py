"""Blocks and projections as people write them: ``all``, ``3``, ``3,4``, ``3-5``, ``[-1]``; ``gate,up``."""

import re
from collections.abc import Sequence

from lightning_kfac.errors import InputError

# Wide, so that a command line takes each of these forms; ``block_choice`` says what a text means.
Blocks = Sequence[int] | int | str
Projections = Sequence[str] | str
ALL = "all"
NUMBERS = re.compile(r"(-?\d+)(?:\s*-\s*(-?\d+))?")


def block_choice(blocks: Blocks) -> Sequence[int] | str:
    """``all``, or block numbers.

    Raises:
        InputError: A text is neither.

    Example:
        >>> block_choice("0, 3-5"), block_choice("all"), block_choice(-1), block_choice([3, 4])
        ([0, 3, 4, 5], 'all', [-1], [3, 4])
    """
    if isinstance(blocks, int):
        return [blocks]
    if blocks == ALL or not isinstance(blocks, str):
        return blocks
    numbers: list[int] = []
    for part in _parts(blocks):
        found = NUMBERS.fullmatch(part)
        first, last = map(int, (found[1], found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise InputError(f"blocks: {blocks!r} cannot be read; write all, 3, 3,4 or 3-5")
        numbers += range(first, last + 1)
    return numbers


def projection_choice(projections: Projections | None) -> Sequence[str] | None:
    """Names of projections; None for all.

    Example:
        >>> projection_choice("gate,up"), projection_choice("down"), projection_choice(["q"])
        (['gate', 'up'], ['down'], ['q'])
    """
    if projections is None or not isinstance(projections, str):
        return projections
    return list(_parts(projections))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[] ").split(",")]
