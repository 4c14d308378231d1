"""A text as one array of tokens on disk, made once and mapped into memory."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_kfac.console import counted, say, track_count
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.documents import Document, TokenIds
from lightning_kfac.data.packing import tokenize_documents
from lightning_kfac.data.readers import Reading
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.token_files import TokenKind
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.storage.files import content_hash, new_file, writing
from lightning_kfac.storage.tensor_files import load_tensors, read_header, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A document gives at most this part of a budget, so that so many are read where there are so many.
PARTS = 200
# Less is no text to speak of.
FEWEST_TOKENS = 128
# Below, factors are those of the very documents, and intervals promise too much (see math/statistics.py).
FEW_DOCUMENTS = 50
PLACES = ".places.safetensors"
AGAIN = "the text is tokenized again"
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
    and times too), the budget and the tokenizer; it appears when it is complete. A second file holds where documents
    end, and the checksum of the first: what is damaged is said and made again.

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
    if earlier.exists() and earlier.with_suffix(".ends.npy").exists():
        return _of_version_0_1(earlier, vocab_size)
    path = _path(folder, name, (*identity, PARTS)) if spread else earlier
    found = _stored(path, spread)
    if found is not None:
        return found
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        text = _Writing(partial, corpus, tokenizer, max_tokens, vocab_size, skip_bad_rows, start)
        text.write(spread)
    if sample:
        text.tell()
    places = {"ends": torch.tensor(text.ends, dtype=torch.int64), "cuts": torch.tensor(text.cuts, dtype=torch.int64)}
    save_tensors(places, path.with_suffix(PLACES), {"tokens": content_hash([path])})
    return TokenizedText(_mapped(path), places["ends"].numpy(), places["cuts"].numpy(), spread)


def _stored(path: Path, spread: bool) -> TokenizedText | None:
    """What is there of the text; None where nothing is, or where it is damaged."""
    places = path.with_suffix(PLACES)
    if not (path.exists() and places.exists()):
        return None
    try:
        ends_and_cuts = load_tensors(places, AGAIN)
        checksum = read_header(places, AGAIN).metadata["tokens"]
        if content_hash([path]) != checksum:
            raise InputError(f"{path}: damaged; {AGAIN}")
        ends = ends_and_cuts["ends"].numpy()
        return TokenizedText(_mapped(path), ends, ends_and_cuts["cuts"].numpy(), spread)
    except (InputError, KeyError) as error:
        say(str(error) if isinstance(error, InputError) else f"{places}: not of this program; {AGAIN}")
        return None


def _of_version_0_1(path: Path, vocab_size: int) -> TokenizedText:
    """What version 0.1 tokenized, documents whole and in order; an unfinished run of its goes on with the same text."""
    try:
        ends = np.load(path.with_suffix(".ends.npy"), allow_pickle=False)
        tokens = _mapped(path)
        if len(tokens) == ends[-1] and tokens.min() >= 0 and tokens.max() < vocab_size:
            return TokenizedText(tokens, ends)
    except (OSError, ValueError, IndexError, EOFError):
        pass
    raise InputError(f"{path}: damaged; remove it, and the text is tokenized anew, as this version reads it")


def _path(folder: Path, name: str, identity: tuple[object, ...]) -> Path:
    return folder / f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.tokens"


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.int32, mode="r")


class _Writing:
    """A text on its way to the disk.

    Args:
        path: What to write.

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
        with open(self.path, "wb") as file:
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
        say(f"{label}: {counted(self.count, 'token')} of {n_documents:,}{of} {noun}")
        if self.first_ids is not None:
            text = self.tokenizer.decode(np.asarray(self.first_ids).tolist())
            say(f"{label}: token ids are used as they are; this tokenizer reads them as {text!r} ...")
        if self.max_tokens is not None and not filled:
            say(f"{label} has {counted(self.count, 'token')}, fewer than the {self.max_tokens:,} asked for")
        if n_documents < FEW_DOCUMENTS:
            say(
                f"{label}: few documents ({n_documents}): factors and figures are of these texts rather than of their "
                f"kind, and intervals are rough; give {FEW_DOCUMENTS} or more"
            )
