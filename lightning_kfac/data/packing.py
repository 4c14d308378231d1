"""From documents to rows of token ids."""

from collections.abc import Callable, Iterable

import numpy as np

from lightning_kfac.errors import InputError

DOCUMENTS_AT_ONCE = 256


def tokenize_documents(
    documents: Iterable[str],
    tokenizer,
    max_tokens: int | None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Tokenizes documents, each followed by the end-of-sequence token, until ``max_tokens`` are there.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        max_tokens: The budget in tokens, exact; ``None`` takes every document.
        on_progress: Called with the number of tokens so far.

    Returns:
        int32 [n_tokens].

    Raises:
        InputError: No EOS token, or no text at all.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, which separates documents")
    pieces, count, waiting = [], 0, []

    def flush() -> None:
        nonlocal count
        for ids in tokenizer(waiting, add_special_tokens=False)["input_ids"] if waiting else []:
            pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32))
            count += len(pieces[-1])
        waiting.clear()
        on_progress(min(count, max_tokens or count))

    for text in documents:
        waiting.append(text)
        if len(waiting) == DOCUMENTS_AT_ONCE:
            flush()
            if max_tokens is not None and count >= max_tokens:
                break
    flush()
    if not count:
        raise InputError("the corpus has no text")
    return np.concatenate(pieces)[:max_tokens]


def row_offsets(n_tokens: int, seq_len: int) -> np.ndarray:
    """Boundaries of rows of ``seq_len`` tokens; the last row may be shorter. int64 [n_rows + 1]."""
    return np.append(np.arange(0, n_tokens, seq_len), n_tokens)
