"""A text as one array of tokens on disk, made once and mapped into memory."""

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_kfac.console import say, track_count
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.packing import tokenize_documents
from lightning_kfac.data.rows import BadRows
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedText:
    """Documents one after the other, each with its EOS token.

    Attributes:
        tokens: int32 [n_tokens].
        ends: int64 [n_documents], behind the last token of each document.
    """

    tokens: np.ndarray
    ends: np.ndarray


def tokenized_text(
    folder: Path,
    name: str,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    vocab_size: int,
    skip_bad_rows: bool = False,
    start: Sequence[int] = (),
) -> TokenizedText:
    """Tokenizes a corpus into a folder, or finds it there.

    Documents are written as they come, so memory holds only a few. The file's name tells the corpus (its files' sizes
    and times too), the budget and the tokenizer; it appears when it is complete.

    Args:
        start: Tokens before each document.

    Raises:
        InputError: The corpus has no text, or ids outside the model's vocabulary.
    """
    identity: tuple[object, ...] = (corpus, corpus.state(), max_tokens, skip_bad_rows, tokenizer_fingerprint(tokenizer))
    if start:
        identity = (*identity, list(start))
    path = folder / f"{name}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.tokens"
    ends_path = path.with_suffix(".ends.npy")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ends = _write(path, corpus, tokenizer, max_tokens, vocab_size, skip_bad_rows, start)
        partial = ends_path.with_suffix(_partial(path).suffix)
        with open(partial, "wb") as file:
            np.save(file, ends)
        partial.replace(ends_path)
        _partial(path).replace(path)
    return TokenizedText(np.memmap(path, dtype=np.int32, mode="r"), np.load(ends_path, allow_pickle=False))


def _write(
    path: Path,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    vocab_size: int,
    skip_bad_rows: bool,
    start: Sequence[int],
) -> np.ndarray:
    ends: list[int] = []
    count = 0
    bad = BadRows(skip_bad_rows)
    with (
        track_count(f"tokenize {corpus.label}", "tokens", total=max_tokens) as advance_to,
        open(_partial(path), "wb") as file,
    ):
        for document in tokenize_documents(corpus.documents(bad), tokenizer, max_tokens, advance_to, start):
            if (largest := int(document.max())) >= vocab_size:
                raise InputError(
                    f"{corpus.label}: the tokenizer {getattr(tokenizer, 'name_or_path', '')} makes the id {largest}, "
                    f"but the model's vocabulary ends at {vocab_size - 1}; set data.tokenizer to the model's own"
                )
            file.write(document.tobytes())
            count += len(document)
            ends.append(count)
    bad.tell(corpus.label)
    if max_tokens is not None and count < max_tokens:
        say(f"{corpus.label} has {count:,} tokens, fewer than the {max_tokens:,} asked for")
    return np.asarray(ends, dtype=np.int64)


def _partial(path: Path) -> Path:
    return path.with_suffix(f".part{os.getpid()}-{socket.gethostname()}")
