"""A long text as token ids, piece by piece: the ids of the whole text, in the memory of a piece."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_PIECE = 1 << 16
OVERLAP = 1 << 10
# Beyond so many characters without an edge, memory counts for more than the last token.
LONGEST_WORD = 1 << 19
# Tokens that two overlapping pieces must have alike before one is taken to go on where the other ends.
AGREED = 16


class Stream(Protocol):
    """Text that is read from its beginning."""

    def read(self, size: int, /) -> str:
        """The next characters: as many as asked for, fewer only at the end."""


class _Encoded(NamedTuple):
    """Tokens with the characters [starts, ends) of the whole text that each stands for. int64 [n] each."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def ids_in_pieces(
    tokenizer: "PreTrainedTokenizerBase", stream: Stream, piece: int = LONGEST_PIECE
) -> Iterator[np.ndarray]:
    """The ids of a text without special tokens, as if it were tokenized whole.

    Pieces overlap. What a tokenizer makes of a place depends on the text around it, not on what is far away: one piece
    goes on where the other ends, at the edge of a word amid tokens that both have alike, at the same characters. Where
    there is none (an endless word), the piece grows until there is. A tokenizer without offsets (a slow one) gets the
    whole text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        stream: The text.
        piece: Characters of a piece.

    Yields:
        int64 [n].
    """
    if not tokenizer.is_fast:
        yield np.asarray(tokenizer("".join(_all(stream)), add_special_tokens=False)["input_ids"], dtype=np.int64)
        return
    text = stream.read(piece)
    begin = 0
    encoded = _encode(tokenizer, text, begin)
    first = 0  # of its tokens, that is not yielded yet
    overlap = OVERLAP
    while more := stream.read(max(piece, overlap)):
        restart = max(int(np.searchsorted(encoded.starts, begin + len(text) - overlap, "right")) - 1, 0)
        next_begin = int(encoded.starts[restart]) if len(encoded.starts) else begin
        next_text = text[next_begin - begin :] + more
        following = _encode(tokenizer, next_text, next_begin)
        cut = _common_place(encoded, following, first, next_text, next_begin)
        if cut is None:
            text += more
            encoded = _encode(tokenizer, text, begin)
            overlap *= 2
            continue
        yield encoded.ids[first : cut[0]]
        text, begin, encoded, first = next_text, next_begin, following, cut[1]
        overlap = OVERLAP
    yield encoded.ids[first:]


def _all(stream: Stream) -> Iterator[str]:
    while text := stream.read(LONGEST_PIECE):
        yield text


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, begin: int) -> _Encoded:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2) + begin
    return _Encoded(np.asarray(found["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1])


def _common_place(before: _Encoded, after: _Encoded, first: int, text: str, begin: int) -> tuple[int, int] | None:
    """Numbers of the same token in both, at the edge of a word, amid a run of tokens that both have alike.

    Within a word that does not end in a piece (spaces, one letter again and again), tokens depend on where it ends.

    Args:
        first: The token of ``before`` must come behind it.
        text: Of ``after``.
        begin: Where it begins.
    """
    for start, end, shift in _runs_alike(before, after, first):
        middle = (start + end) // 2
        for number in sorted(range(start + AGREED // 2, end - AGREED // 2 + 1), key=lambda n: abs(n - middle)):
            place = int(after.starts[number]) - begin
            if len(text) > LONGEST_WORD or text[place - 1 : place].isalnum() != text[place : place + 1].isalnum():
                return number + shift, number
    return None


def _runs_alike(before: _Encoded, after: _Encoded, first: int) -> list[tuple[int, int, int]]:
    """Runs of tokens that both have alike, the longest first: [start, end) in ``after``, and the way to ``before``."""
    if not len(before.ids):
        return []
    places = np.searchsorted(before.starts, after.starts[after.starts <= before.starts[-1]])
    if not len(places):
        return []
    shift = int(np.bincount(places - np.arange(len(places)) + len(after.ids)).argmax()) - len(after.ids)
    begin = max(0, first - shift)
    length = min(len(before.ids) - shift, len(after.ids)) - begin
    if length < AGREED:
        return []
    alike = np.ones(length, dtype=bool)
    for mine, theirs in zip(before, after, strict=True):
        alike &= mine[begin + shift : begin + shift + length] == theirs[begin : begin + length]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], alike, [0]])))
    runs = [(begin + int(a), begin + int(b), shift) for a, b in edges.reshape(-1, 2) if b - a >= AGREED]
    return sorted(runs, key=lambda run: run[0] - run[1])
