"""Rows of a text that a command is given by name, without a Trainer."""

from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from transformers import PreTrainedTokenizerBase

from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.loaders import TokenRows
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.packing import row_offsets
from lightning_kfac.data.set_formats import is_set
from lightning_kfac.data.text_ids import start_tokens
from lightning_kfac.data.tokenized import tokenized_text


def add_row_options(parser: ArgumentParser, max_tokens: int) -> None:
    """How a text is cut into rows.

    Args:
        max_tokens: The default budget.
    """
    parser.add_argument("--max_tokens", type=int, default=max_tokens, help="Token budget of each corpus.")
    parser.add_argument("--seq_len", type=int, default=128, help="Tokens a row of a corpus.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows at once.")
    differing = "Where transformers ignores tokenizer.json: use the file's own tokenizer (true) or the other (false)."
    parser.add_argument("--data.own_tokenizer", type=bool | None, default=None, help=differing)


def text_rows(
    source: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, options: Namespace, folder: Path
) -> TokenRows:
    """A memorized set row by row, or a corpus packed into rows.

    Args:
        options: As ``add_row_options`` has them.
        folder: For tokenized text.
    """
    if is_set(source):
        sequences = load_memorized(source, tokenizer, vocab_size)
        ids = [np.asarray([*s.prefix, *s.suffix], dtype=np.int32) for s in sequences]
        ends = np.cumsum([0, *map(len, ids)])
        return TokenRows(np.concatenate(ids), ends, ends=ends[1:])
    corpus = Corpus.parse(source, embedded_split="heldout")
    corpus.check()
    start = start_tokens(tokenizer)
    read = tokenized_text(folder, "text", corpus, tokenizer, options.max_tokens, vocab_size, start=start)
    offsets = row_offsets(len(read.tokens), options.seq_len)
    return TokenRows(np.array(read.tokens), offsets, tuple(start), read.ends)
