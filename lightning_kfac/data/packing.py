"""From documents to rows of token ids."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 256


def tokenize_documents(
    documents: Iterable[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int | None,
    on_progress: Callable[[int], None] = lambda n: None,
    start: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Tokenizes documents, each followed by the end-of-sequence token, until ``max_tokens`` are there.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        max_tokens: The budget in tokens, exact; ``None`` takes every document.
        on_progress: Called with the number of tokens so far.
        start: Tokens before each document, which count like others.

    Yields:
        int32 [n_tokens] of each document; the last one may be cut.

    Raises:
        InputError: No EOS token, or no text at all.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, which separates documents")
    count = 0
    for texts in _in_groups(documents, DOCUMENTS_AT_ONCE):
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            left = None if max_tokens is None else max_tokens - count
            if left == 0:
                return
            document = np.asarray([*start, *ids, tokenizer.eos_token_id], dtype=np.int32)[:left]
            count += len(document)
            yield document
        on_progress(count)
        if count == max_tokens:
            return
    if not count:
        raise InputError("the corpus has no text")


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


def _in_groups(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for text in documents:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
