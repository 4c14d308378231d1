"""From documents to rows of token ids."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_kfac.data.documents import Document, TextFile, TokenIds, opened
from lightning_kfac.data.pieces import LONGEST_PIECE, OVERLAP, ids_in_pieces
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 1 << 20
# A token has 3 to 5 characters in most languages. In a text of so many characters a token the wanted ones are found.
USUAL_CHARACTERS = 4
CHARACTERS = 8
UNLIMITED = 1 << 62


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    on_progress: Callable[[int], None] = lambda n: None,
    start: Sequence[int] = (),
    most: int | None = None,
) -> Iterator[np.ndarray]:
    """Tokenizes documents, each followed by the end-of-sequence token, until ``max_tokens`` are there.

    Not much more is read and tokenized than is used. Documents without a token are left out.

    Args:
        documents: Token ids among them are used as they are; ``start`` and the end-of-sequence token are not repeated.
        tokenizer: A Hugging Face tokenizer with an EOS token.
        max_tokens: The budget in tokens, exact; ``None`` takes every document.
        on_progress: Called with the number of tokens so far.
        start: Tokens before each document, which count like others.
        most: Most tokens of a document, those around it counted. Of a longer one a stretch is taken that begins at a
            line (or word) anywhere in it, always the same: beginnings are of a kind of their own (titles, licences).

    Yields:
        int32 [n_tokens] of each document; the last one may be cut.

    Raises:
        InputError: No EOS token, or no text at all.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, which separates documents")
    reading = _Reading(tokenizer, max_tokens, on_progress, list(start), most)
    yield from reading.documents(documents)
    if not reading.count:
        raise InputError("the corpus has no text")


class _Reading:
    """Documents on their way to tokens, as far as the budget goes."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int | None,
        on_progress: Callable[[int], None],
        start: list[int],
        most: int | None,
    ):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.on_progress = on_progress
        self.start = start
        self.most = None if most is None else max(1, most - len(start) - 1)
        self.count = 0
        self._characters = 0
        self._chance = random.Random(0)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return UNLIMITED if self.max_tokens is None else self.max_tokens - self.count

    @property
    def wanted(self) -> int:
        """Most tokens of the next document."""
        return min(self.left, UNLIMITED if self.most is None else self.most)

    def documents(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Short texts are tokenized together, as many as may be needed, others by themselves."""
        together: list[str] = []
        size = 0
        for document in documents:
            place = self._chance.random()
            is_short = isinstance(document, str) and len(document) <= self._longest_whole()
            if isinstance(document, str) and is_short:
                together.append(document)
                size += len(document)
            if together and (not is_short or len(together) == DOCUMENTS_AT_ONCE or self._fills_budget(size)):
                yield from self._short(together)
                together = []
                size = 0
            if not is_short and self.left:
                yield from self._whole([self._long(document, place)])
            if not self.left:
                return
        if together:
            yield from self._short(together)

    def _longest_whole(self) -> int:
        return LONGEST_PIECE if self.most is None else min(LONGEST_PIECE, CHARACTERS * self.most)

    def _fills_budget(self, characters: int) -> bool:
        rate = self._characters / self.count if self.count else USUAL_CHARACTERS
        return characters >= min(rate * self.left, CHARACTERS_AT_ONCE)

    def _short(self, texts: list[str]) -> Iterator[np.ndarray]:
        self._characters += sum(map(len, texts))
        yield from self._whole(self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _whole(self, documents: Iterable[Sequence[int] | np.ndarray]) -> Iterator[np.ndarray]:
        """Documents with what stands around them, up to the budget."""
        eos = [self.tokenizer.eos_token_id]
        for ids in documents:
            if not len(ids) or not self.left:
                continue
            document = np.concatenate([self.start, ids[: self.most], eos]).astype(np.int32)[: self.left]
            self.count += len(document)
            yield document
        self.on_progress(self.count)

    def _long(self, document: Document, place: float) -> np.ndarray:
        """The ids of a document, as far as they are wanted.

        Args:
            place: In [0, 1): where a stretch of it begins.
        """
        if isinstance(document, TokenIds):
            ids = self._bare(np.asarray(document.ids))
            return ids[int(place * max(0, len(ids) - self.wanted)) if self.most else 0 :][: self.wanted]
        size = document.size if isinstance(document, TextFile) else len(document)
        beyond = 0 if self.most is None or size is None else max(0, size - CHARACTERS * self.most)
        piece = min(USUAL_CHARACTERS * self.wanted + 2 * OVERLAP, LONGEST_PIECE)
        found: list[np.ndarray] = []
        count = 0
        with opened(document, int(place * beyond)) as stream:
            for ids in ids_in_pieces(self.tokenizer, stream, piece):
                found.append(ids.astype(np.int32))
                count += len(ids)
                self.on_progress(self.count + min(count, self.wanted))
                if count >= self.wanted:
                    break
        return np.concatenate(found)

    def _bare(self, ids: np.ndarray) -> np.ndarray:
        """Ids without what stands around a document."""
        begins = len(self.start)
        if begins and ids[:begins].tolist() == self.start:
            ids = ids[begins:]
        return ids[:-1] if len(ids) and ids[-1] == self.tokenizer.eos_token_id else ids


def row_offsets(n_tokens: int, seq_len: int) -> np.ndarray:
    """Boundaries of rows of ``seq_len`` tokens; the last row may be shorter. int64 [n_rows + 1]."""
    return np.append(np.arange(0, n_tokens, seq_len), n_tokens)


def document_offsets(ends: np.ndarray, seq_len: int) -> np.ndarray:
    """Boundaries of rows of one document each; longer ones are cut every ``seq_len`` tokens. int64 [n_rows + 1].

    Args:
        ends: int64 [n_documents], behind the last token of each.

    Example:
        >>> document_offsets(np.array([3, 10]), 5).tolist()
        [0, 3, 8, 10]
    """
    starts = np.concatenate([[0], ends[:-1]])
    cuts = [np.arange(start, end, seq_len) for start, end in zip(starts, ends, strict=True)]
    return np.append(np.concatenate(cuts), ends[-1]).astype(np.int64)
