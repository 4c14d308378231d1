"""A text as one array of tokens on disk, made once and mapped into memory."""

import hashlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_kfac.console import say, track_count
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.documents import Document, TokenIds
from lightning_kfac.data.packing import tokenize_documents
from lightning_kfac.data.readers import Reading
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.token_files import TokenKind
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A document gives at most this part of a budget, so that so many are read where there are so many.
PARTS = 200
# Less is no text to speak of.
FEWEST_TOKENS = 128
# Below, factors are those of the very documents, and intervals promise too much (see math/statistics.py).
FEW_DOCUMENTS = 50
# Ids of an excerpt that a reader recognizes.
SHOWN = 16
# The most that one document gives is raised by what lacks; where documents are of very different lengths, doubled.
ROUNDS = 4


@dataclass(frozen=True)
class TokenizedText:
    """Documents one after the other, each with its EOS token.

    Attributes:
        tokens: int32 [n_tokens].
        ends: int64 [n_documents], behind the last token of each document.
        cuts: int64, places of the EOS tokens behind which the document went on: nothing that text predicts.
        spread: The budget was spread over documents.
    """

    tokens: np.ndarray
    ends: np.ndarray
    cuts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    spread: bool = False


def tokenized_text(
    folder: Path,
    name: str,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    vocab_size: int,
    skip_bad_rows: bool = False,
    start: Sequence[int] = (),
    sample: bool = True,
) -> TokenizedText:
    """Tokenizes a corpus into a folder, or finds it there.

    Documents are written as they come, so memory holds only a few. The file's name tells the corpus (its files' sizes
    and times too), the budget and the tokenizer; it appears when it is complete.

    Args:
        start: Tokens before each document.
        sample: Spread the budget: one document gives at most a 200th of it (128 tokens at least), more only where the
            documents do not fill it otherwise. The embedded corpus is many short documents, and is read in order.

    Raises:
        InputError: The corpus has no text, or ids outside the model's vocabulary.
    """
    spread = sample and max_tokens is not None and not corpus.embedded
    identity: tuple[object, ...] = (corpus, corpus.state(), max_tokens, skip_bad_rows, tokenizer_fingerprint(tokenizer))
    if start:
        identity = (*identity, list(start))
    earlier = _path(folder, name, identity)
    ends_path = earlier.with_suffix(".ends.npy")
    if earlier.exists() and ends_path.exists():  # by version 0.1, which read documents whole, one after the other
        return TokenizedText(_mapped(earlier), np.load(ends_path, allow_pickle=False))
    path = _path(folder, name, (*identity, PARTS)) if spread else earlier
    places_path = path.with_suffix(".ends.npz")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        writing = _Writing(path, corpus, tokenizer, max_tokens, vocab_size, skip_bad_rows, start)
        writing.write(spread)
        if sample:
            writing.tell()
        partial = places_path.with_suffix(_partial(path).suffix)
        with open(partial, "wb") as file:
            np.savez(file, ends=writing.ends, cuts=writing.cuts)
        partial.replace(places_path)
        _partial(path).replace(path)
    with np.load(places_path, allow_pickle=False) as places:
        return TokenizedText(_mapped(path), places["ends"], places["cuts"], spread)


def _path(folder: Path, name: str, identity: tuple[object, ...]) -> Path:
    return folder / f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.tokens"


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.int32, mode="r")


class _Writing:
    """A text on its way to the disk.

    Attributes:
        ends, cuts: As in ``TokenizedText``.
        first_ids: The beginning of the first document that came as ids; None where all are text.
    """

    def __init__(
        self,
        path: Path,
        corpus: Corpus,
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int | None,
        vocab_size: int,
        skip_bad_rows: bool,
        start: Sequence[int],
    ):
        self.path = path
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.skip_bad_rows = skip_bad_rows
        self.start = start
        self.kind = TokenKind(tokenizer.eos_token_id, len(tokenizer), vocab_size)
        self.ends: list[int] = []
        self.cuts: list[int] = []
        self.first_ids: np.ndarray | Sequence[int] | None = None

    @property
    def count(self) -> int:
        """Tokens so far."""
        return self.ends[-1] if self.ends else 0

    def write(self, spread: bool) -> None:
        """Reads documents until the budget is filled, more of each where all of them do not fill it."""
        budget = self.max_tokens
        most = max(budget // PARTS, FEWEST_TOKENS) if spread and budget is not None else None
        label = self.corpus.label
        with track_count(f"tokenize {label}", "tokens", total=budget) as advance_to:
            for number in itertools.count(1):
                bad = BadRows(self.skip_bad_rows)
                self._read(self.corpus.read(self._how(bad), spread), most, advance_to)
                if most is None or budget is None or self.count == budget or not self.cuts:
                    break
                most += max(-(-(budget - self.count) // len(self.cuts)), most if number > ROUNDS else 0)
                if most >= budget:
                    most = None
        bad.tell(label)

    def _how(self, bad: BadRows) -> Reading:
        return Reading(self.corpus.text_field, bad, self.kind)

    def _read(self, documents: Iterator[Document], most: int | None, advance_to: Callable[[int], None]) -> None:
        self.ends = []
        self.cuts = []
        documents = self._noted(documents)
        with open(_partial(self.path), "wb") as file:
            for ids in tokenize_documents(documents, self.tokenizer, self.max_tokens, advance_to, self.start, most):
                self._check(ids)
                file.write(ids.tobytes())
                self.ends.append(self.count + len(ids))
                if len(ids) == most and ids[-1] == self.kind.eos:
                    self.cuts.append(self.count - 1)

    def _noted(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            if isinstance(document, TokenIds) and self.first_ids is None:
                self.first_ids = document.ids[:SHOWN]
            yield document

    def _check(self, ids: np.ndarray) -> None:
        wrong = int(ids.max()) if ids.max() >= self.kind.vocab_size else int(ids.min())
        if 0 <= wrong < self.kind.vocab_size:
            return
        last = self.kind.vocab_size - 1
        if self.first_ids is not None:
            raise InputError(
                f"{self.corpus.label}: the id {wrong} is outside the model's vocabulary (0 to {last}); the token ids "
                "were made with another tokenizer"
            )
        raise InputError(
            f"{self.corpus.label}: the tokenizer {getattr(self.tokenizer, 'name_or_path', '')} makes the id {wrong}, "
            f"but the model's vocabulary ends at {last}; set data.tokenizer to the model's own"
        )

    def tell(self) -> None:
        """Says what was read, and whether that is enough."""
        label = self.corpus.label
        n_documents = len(self.ends)
        filled = self.count == self.max_tokens
        total = self.corpus.count() if filled else n_documents
        of = f" of {total:,}" if total is not None and total >= n_documents else ""
        noun = "document" if (total or n_documents) == 1 else "documents"
        say(f"{label}: {self.count:,} tokens of {n_documents:,}{of} {noun}")
        if self.first_ids is not None:
            text = self.tokenizer.decode(np.asarray(self.first_ids).tolist())
            say(f"{label}: token ids are used as they are; this tokenizer reads them as {text!r} ...")
        if self.max_tokens is not None and not filled:
            say(f"{label} has {self.count:,} tokens, fewer than the {self.max_tokens:,} asked for")
        if n_documents < FEW_DOCUMENTS:
            say(
                f"{label}: few documents ({n_documents}): factors and figures are of these texts rather than of their "
                f"kind, and intervals are rough; give {FEW_DOCUMENTS} or more"
            )


def _partial(path: Path) -> Path:
    return path.with_suffix(f".part{os.getpid()}-{socket.gethostname()}")
