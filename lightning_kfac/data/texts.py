"""The texts of a run: where each comes from, its tokens in the run's folder, and rows of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_kfac.console import say
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.loaders import TokenRows
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.names import CORPUS, HELDOUT, domain_text
from lightning_kfac.data.packing import document_offsets, row_offsets
from lightning_kfac.data.text_ids import start_tokens
from lightning_kfac.data.tokenized import PARTS, TokenizedText, tokenized_text
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Texts:
    """Corpus, domains and held-out text.

    Attributes:
        corpus, max_tokens: Source of the corpus and its budget in tokens; None takes all of it.
        domains, domain_tokens: The same of each domain, by its name.
        heldout, heldout_tokens: The same of the held-out text, if there is one.
        seq_len: Tokens a row.
        skip_bad_rows: Leave out rows of files that cannot be used.
        start_token: Put the tokenizer's start token before each document; None: if the tokenizer does so itself.
        begins: Tokens before each document of those that were read.
        read: The texts that were read, by their names in the run.
    """

    corpus: Corpus
    max_tokens: int | None
    domains: Mapping[str, Corpus]
    domain_tokens: int | None
    heldout: Corpus | None
    heldout_tokens: int
    seq_len: int
    skip_bad_rows: bool
    start_token: bool | None = None
    begins: tuple[int, ...] = ()
    read: dict[str, TokenizedText] = field(default_factory=dict)

    def source(self, name: str) -> tuple[Corpus, int | None]:
        """Source and token budget of ``corpus`` or of a domain, by its own name."""
        return (self.corpus, self.max_tokens) if name == CORPUS else (self.domains[name], self.domain_tokens)

    def check(self) -> None:
        """Raises ``InputError`` where a local source can already be seen to be unusable."""
        for corpus in (self.corpus, self.heldout, *self.domains.values()):
            if corpus is not None:
                corpus.check(self.skip_bad_rows)
        if self.heldout == self.corpus:
            say(
                f"{self.corpus.label} is corpus and held-out text: perplexity is then of documents that the curvature "
                "knows; give other ones as data.heldout"
            )

    def tokenize(self, folder: Path, stage: str, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        """Tokenizes what a stage reads into a folder, or finds it there, and maps it into memory.

        Args:
            folder: In the run's folder.
            stage: ``fit``, ``validate`` or ``predict``.
            tokenizer: Makes the tokens.
            vocab_size: Ids must lie below it.
        """
        start = self.start(tokenizer)
        self.begins = tuple(start)
        for name, corpus, budget in self._of(stage):
            self.read[name] = tokenized_text(
                folder, name, corpus, tokenizer, budget, vocab_size, self.skip_bad_rows, start, stage != "predict"
            )

    def start(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Tokens before each document.

        Raises:
            InputError: A start token is asked for, and the tokenizer has none.
        """
        if self.start_token is False:
            return []
        own = start_tokens(tokenizer)
        if self.start_token and not own:
            if tokenizer.bos_token_id is None:
                raise InputError("data.start_token is true, but the tokenizer has no start token (bos_token)")
            own = [tokenizer.bos_token_id]
        return own

    def _of(self, stage: str) -> Iterator[tuple[str, Corpus, int | None]]:
        if stage != "validate":
            yield CORPUS, self.corpus, self.max_tokens
        if stage == "fit":
            yield from ((domain_text(name), corpus, self.domain_tokens) for name, corpus in self.domains.items())
        if self.heldout is not None and stage != "predict":
            yield HELDOUT, self.heldout, self.heldout_tokens

    def rows(self, name: str) -> TokenRows:
        """Packed rows of a text that was read."""
        text = self.read[name]
        if name == HELDOUT:
            return heldout_rows(text, self.seq_len, self.begins)
        offsets = row_offsets(len(text.tokens), self.seq_len)
        return TokenRows(text.tokens, offsets, self.begins, text.ends, text.cuts)

    def about(self, name: str) -> dict[str, Any]:
        """What metadata of factors says of ``corpus`` or of a domain."""
        corpus, budget = self.source(name)
        text = self._text(name)
        return {
            "corpus": corpus.label,
            "text": self._source_identity(name),
            "max_tokens": budget,
            "n_documents": None if text is None else len(text.ends),
            "seq_len": self.seq_len,
        }

    def identity(self, name: str, *how: object) -> str:
        """Identifies the rows of ``corpus`` or of a domain, and their order.

        Args:
            name: The text.
            how: What else the rows depend on.
        """
        _, budget = self.source(name)
        return hashlib.sha256(repr((self._source_identity(name), budget, *how)).encode()).hexdigest()[:16]

    def _text(self, name: str) -> TokenizedText | None:
        return self.read.get(CORPUS if name == CORPUS else domain_text(name))

    def _source_identity(self, name: str) -> str:
        """Of the documents and what is read of them."""
        corpus, _ = self.source(name)
        text = self._text(name)
        return corpus.identity() + (f"-{PARTS}" if text is not None and text.spread else "")

    def heldout_is_spread(self) -> tuple[object, ...]:
        """What identifies how the held-out text is spread over documents; empty where it is not."""
        if self.heldout is None or self.heldout.embedded:
            return ()
        text = self.read.get(HELDOUT)
        return ("spread", PARTS) if text is None or text.spread else ()

    def n_heldout_documents(self) -> int | None:
        """Documents of the held-out text, once it was read."""
        return len(self.read[HELDOUT].ends) if HELDOUT in self.read else None

    def n_heldout(self) -> int | None:
        """Tokens of the held-out text, once it was read."""
        return len(self.read[HELDOUT].tokens) if HELDOUT in self.read else None


def heldout_rows(text: TokenizedText, seq_len: int, begins: Sequence[int]) -> TokenRows:
    """Rows to measure on: packed, or, where a start token begins each document, of one document each.

    Args:
        seq_len: Tokens of the longest row.
        begins: Tokens before each document.
    """
    if begins:
        return TokenRows(text.tokens, document_offsets(text.ends, seq_len), tuple(begins), text.ends, text.cuts)
    return TokenRows(text.tokens, row_offsets(len(text.tokens), seq_len), (), text.ends, text.cuts)


def with_planted(rows: TokenRows, planted: list[MemorizedSequence], exposures: int) -> TokenRows:
    """Rows with each of some sequences behind them, as often as they are exposed."""
    extra = [np.asarray([*s.prefix, *s.suffix], dtype=np.int32) for s in planted] * exposures
    lengths = np.array([len(row) for row in extra])
    offsets = np.concatenate([rows.offsets, rows.offsets[-1] + lengths.cumsum()])
    return TokenRows(np.concatenate([rows.tokens, *extra]), offsets, rows.start, cuts=rows.cuts)
