"""Files of token ids: ``.npy`` arrays, and the bare uint16 or uint32 numbers that OLMo's corpora are made of."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_kfac.data.documents import TokenIds
from lightning_kfac.errors import InputError

TOKENS_AT_ONCE = 1 << 18
SAMPLED = 1 << 12
MAGIC = b"\x93NUMPY"
BARE = (np.dtype("<u4"), np.dtype("<u2"))


class TokenKind(NamedTuple):
    """What token ids must be.

    Attributes:
        eos: The id that ends a document.
        known: Ids of the tokenizer.
        vocab_size: Ids of the model: they lie below it.
    """

    eos: int
    known: int
    vocab_size: int


def split_at(ids: np.ndarray, eos: int) -> Iterator[np.ndarray]:
    """The documents in some ids, each with the end-of-text token behind it, if it has one.

    Example:
        >>> [part.tolist() for part in split_at(np.array([5, 0, 6, 7]), 0)]
        [[5, 0], [6, 7]]
    """
    for part in np.split(ids, np.flatnonzero(ids == eos) + 1):
        if len(part):
            yield part


def token_sources(file: Path, kind: TokenKind) -> list[Iterator[TokenIds]]:
    """Documents of a file of ids: a source for each stretch of 262,144 ids, with the documents that begin in it.

    A document goes to its end-of-text token; one that is longer than a stretch is cut there.

    Raises:
        InputError: The file holds something else, or ids that the model does not have.
    """
    ids = _array(file, kind)
    if ids.ndim == 2:
        return [_of_rows(ids, start, kind.eos) for start in range(0, len(ids), max(1, TOKENS_AT_ONCE // ids.shape[1]))]
    return [_of_stretch(ids, start, kind.eos) for start in range(0, len(ids), TOKENS_AT_ONCE)]


def _of_rows(ids: np.ndarray, start: int, eos: int) -> Iterator[TokenIds]:
    for row in ids[start : start + max(1, TOKENS_AT_ONCE // ids.shape[1])]:
        yield from map(TokenIds, split_at(row, eos))


def _of_stretch(ids: np.ndarray, start: int, eos: int) -> Iterator[TokenIds]:
    stop = min(start + TOKENS_AT_ONCE, len(ids))
    ends = np.flatnonzero(ids[start:stop] == eos) + start + 1
    begun_before = start > 0 and ids[start - 1] != eos
    if begun_before and _reaches(ids, start, eos):
        start = int(ends[0]) if len(ends) else stop  # the stretch before has it
    if start < stop and ids[stop - 1] != eos and _reaches(ids, stop, eos):
        beyond = ids[stop : stop + TOKENS_AT_ONCE]
        stop += int(np.flatnonzero(beyond == eos)[0]) + 1
    yield from map(TokenIds, split_at(ids[start:stop], eos))


def _reaches(ids: np.ndarray, place: int, eos: int) -> bool:
    """Whether a document that crosses this place ends within a stretch behind it."""
    return bool((ids[place : place + TOKENS_AT_ONCE] == eos).any())


def _array(file: Path, kind: TokenKind) -> np.ndarray:
    with open(file, "rb") as source:
        bare = source.read(len(MAGIC)) != MAGIC
    if bare:
        return _bare(file, kind)
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise InputError(f"{file}: no array of numbers: {error}") from None
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise InputError(
            f"{file}: token ids must be integers in one or two dimensions, found {ids.dtype} in {ids.ndim}"
        )
    if not ids.size:
        return np.empty(0, dtype=np.int64)
    if not _fits(_sample(ids.reshape(-1)), kind.vocab_size):
        raise InputError(f"{file}: ids beyond the model's vocabulary (0 to {kind.vocab_size - 1}); {_OTHER}")
    return ids


_OTHER = "they were made with another tokenizer"


def _bare(file: Path, kind: TokenKind) -> np.ndarray:
    """Four bytes an id where this gives ids of the model, else two: two ids of two bytes give one out of range."""
    size = file.stat().st_size
    for dtype in BARE:
        if size % dtype.itemsize or kind.known > np.iinfo(dtype).max + 1:
            continue
        ids = np.memmap(file, dtype, mode="r")
        if _fits(_sample(ids), kind.vocab_size):
            return ids
    raise InputError(
        f"{file}: neither uint32 nor uint16 ids of a tokenizer of {kind.known:,} tokens for a model of "
        f"{kind.vocab_size:,}; {_OTHER}, or this is no file of token ids"
    )


def _fits(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(len(ids) and ids.min() >= 0 and ids.max() < vocab_size)


def _sample(ids: np.ndarray) -> np.ndarray:
    """Some ids of the beginning, the middle and the end."""
    places = (0, max(0, len(ids) // 2 - SAMPLED // 2), max(0, len(ids) - SAMPLED))
    return np.concatenate([ids[place : place + SAMPLED] for place in places])
