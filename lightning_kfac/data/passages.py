"""Texts cut into passages: a prefix that is given, and the suffix that a model is asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_kfac.console import counted
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.cutting import PREFIX, SUFFIX, Window, told, windows
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.packing import tokenize_documents
from lightning_kfac.data.readers import Reading
from lightning_kfac.data.set_formats import MemorizedSet, is_set
from lightning_kfac.data.text_ids import start_tokens
from lightning_kfac.data.token_files import TokenKind
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A shorter text is halved; of one below this, half would be said by anybody, which a verdict must not rest on.
FEWEST_TOKENS = 16
# By them a mapping names a memorized set.
SET_FIELDS = {"prefix_field", "suffix_field", "tokens_field", "separator"}


class Passage(NamedTuple):
    """Part of a text.

    Attributes:
        text: Number of the text.
        start: Its first token's place in the text.
    """

    text: int
    start: int
    prefix: list[int]
    suffix: list[int]


@dataclass
class Passages:
    """The passages of some texts.

    Attributes:
        source: Where the texts come from.
        sizes: Tokens of each text that is used.
        passages: In the order of the texts.
        halved: Texts too short for a whole passage, which were halved.
        too_short: Texts too short for that, which are left out.
        untouched: The texts said themselves where their prefixes end.
    """

    source: str
    sizes: list[int] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    halved: int = 0
    too_short: int = 0
    untouched: bool = False

    def told(self) -> str:
        """How many texts and passages are used, and how many left out.

        Example:
            >>> Passages("a.txt", [40], [Passage(0, 0, [1], [2])], halved=1, too_short=2).told()
            '1 text, 1 passage; 1 shorter than a passage, cut in halves; 2 left out, below 16 tokens'
        """
        return told(len(self.sizes), len(self.passages), self.halved, self.too_short, FEWEST_TOKENS)


def check_lengths(prefix_len: int | None, suffix_len: int | None) -> None:
    """Raises ``InputError`` where a passage would have no prefix or no suffix."""
    for name, length in (("prefix_len", prefix_len), ("suffix_len", suffix_len)):
        if length is not None and length < 1:
            raise InputError(f"{name} is {length}; it must be at least 1")


def load_passages(
    source: str | Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    *,
    prefix_len: int | None = None,
    suffix_len: int | None = None,
    max_tokens: int | None = None,
) -> Passages:
    """Reads texts and cuts them.

    The rows of a memorized set are passages already. Other texts are cut from their beginning so that the suffixes
    follow one another: every token behind the first prefix is asked for once, but for an end shorter than a suffix. A
    text shorter than one passage is cut in halves.

    Args:
        source: A memorized set in any of its forms, or a corpus: a file or folder of text, records, token ids.
        tokenizer: Makes the tokens of texts.
        vocab_size: Ids must lie below it.
        prefix_len: Tokens of a prefix, by default 64; of a set the last ones of each, by default all.
        suffix_len: Tokens of a suffix, by default 48; of a set the first ones of each, by default all.
        max_tokens: Of a corpus; by default all.

    Raises:
        InputError: Names the file and the row, or says that no text is long enough.
    """
    check_lengths(prefix_len, suffix_len)
    named = isinstance(source, Mapping) and SET_FIELDS & source.keys()
    if named or (isinstance(source, str) and is_set(source)):
        memorized = MemorizedSet.parse("texts", source)
        rows = load_memorized(memorized, tokenizer, vocab_size, prefix_len=prefix_len, suffix_len=suffix_len)
        return _of_set(memorized.source, rows)
    corpus = Corpus.parse(dict(source) if isinstance(source, Mapping) else source, embedded_split="heldout")
    corpus.check()
    found = Passages(source if isinstance(source, str) else corpus.label)
    longest = 0
    for document in _documents(corpus, tokenizer, vocab_size, max_tokens):
        longest = max(longest, len(document))
        _add(found, document, prefix_len or PREFIX, suffix_len or SUFFIX)
    if not found.passages:
        raise InputError(
            f"{corpus.label}: no text is long enough: the longest has {counted(longest, 'token')}, {FEWEST_TOKENS} are "
            "needed"
        )
    return found


def _of_set(source: str, sequences: list[MemorizedSequence]) -> Passages:
    found = Passages(source, untouched=True)
    for number, sequence in enumerate(sequences):
        found.sizes.append(len(sequence.prefix) + len(sequence.suffix))
        found.passages.append(Passage(number, 0, list(sequence.prefix), list(sequence.suffix)))
    return found


def _documents(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_tokens: int | None
) -> Iterator[np.ndarray]:
    """Token ids of each document, without the end-of-text token that is put behind it."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token, which separates documents")
    how = Reading(corpus.text_field, tokens=TokenKind(eos, len(tokenizer), vocab_size))
    start = start_tokens(tokenizer)
    for ids in tokenize_documents(corpus.read(how), tokenizer, max_tokens, start=start):
        document = ids[:-1] if ids[-1] == eos else ids
        if len(document) and not 0 <= document.min() <= document.max() < vocab_size:
            raise InputError(f"{corpus.label}: has ids outside the model's vocabulary (0 to {vocab_size - 1})")
        yield document


def _add(found: Passages, document: np.ndarray, prefix: int, suffix: int) -> None:
    """Cuts a document, or leaves it out."""
    size = len(document)
    cuts = windows(size, prefix, suffix)
    if not cuts:
        if size < FEWEST_TOKENS:
            found.too_short += 1
            return
        found.halved += 1
        cuts = [Window(0, size - min(suffix, size // 2), size)]
    number = len(found.sizes)
    found.sizes.append(size)
    for start, cut, end in cuts:
        found.passages.append(Passage(number, start, document[start:cut].tolist(), document[cut:end].tolist()))
