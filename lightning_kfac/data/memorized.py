"""Memorized sets: prefixes and the suffixes that a model may recite, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning_kfac.console import counted, say
from lightning_kfac.data.cutting import FEWEST_TOKENS, SUFFIX, Window, told, windows
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.set_formats import OWN, MemorizedSet, TextSet, cut_tokens
from lightning_kfac.data.text_ids import Continuation, Tokenize, continuation_ids, start_tokens, text_ids
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint

# Of the rows that hold text beside ids, so many are compared with the tokenizer; of fewer nothing is concluded.
COMPARED_WITH_TEXT = 20
FEWEST_COMPARED = 3


@dataclass(frozen=True)
class MemorizedSequence:
    """Token ids of a prefix and of the gold suffix that follows it in the training data.

    Attributes:
        whole: They are a whole text: the prefix is what begins it, its start token or else its first token.
    """

    prefix: Sequence[int]
    suffix: Sequence[int]
    whole: bool = False

    def cut(self, prefix_len: int | None, suffix_len: int | None) -> "MemorizedSequence":
        """The last ``prefix_len`` tokens of the prefix and the first ``suffix_len`` of the suffix.

        Raises:
            InputError: It has fewer.
        """
        for option, wanted, ids in (("prefix", prefix_len, self.prefix), ("suffix", suffix_len, self.suffix)):
            if wanted is not None and len(ids) < wanted:
                raise InputError(f"the {option} has {len(ids)} tokens, data.{option}_len asks for {wanted}")
        prefix = self.prefix if prefix_len is None else self.prefix[len(self.prefix) - prefix_len :]
        return replace(self, prefix=prefix, suffix=self.suffix if suffix_len is None else self.suffix[:suffix_len])


def load_memorized(
    source: str | Path | MemorizedSet,
    tokenizer: Tokenize | None,
    vocab_size: int,
    *,
    prefix_len: int | None = None,
    suffix_len: int | None = None,
    skip_bad_rows: bool = False,
    longest: int | None = None,
) -> list[MemorizedSequence]:
    """Reads a memorized set, or texts to be scored.

    Rows hold ids, used untouched, or text, see ``MemorizedSet``. A prefix and its suffix are tokenized together, see
    ``continuation_ids``; of how many rows a token straddles the cut is said. A text without a prefix stays whole in a
    ``TextSet``. Otherwise it is cut behind ``prefix_len`` tokens; where that is not given, into passages of 64 + 48
    tokens whose suffixes follow one another, a shorter text in the middle, and one below 8 tokens is left out. How
    many were used is said.
    Rows that repeat earlier ones count again, with a notice, unless bad rows are skipped. Ids beside a
    ``tokenizer_fingerprint`` (``predict`` writes it) are refused with another tokenizer.

    Args:
        source: A file, ``demo:FILE``, or one with the fields to read.
        tokenizer: Needed for text rows; where rows hold ids and text, it is checked against them.
        vocab_size: Ids must lie below it.
        prefix_len, suffix_len: Tokens of each prefix (its last) and of each suffix (its first); by default all.
        skip_bad_rows: Leave out rows that cannot be used, and repetitions, and say how many.
        longest: Most tokens of a whole text; of longer ones, the beginning is taken, and that is said.

    Raises:
        InputError: Names the file and the line.
    """
    memorized = MemorizedSet.parse("memorized", source)
    path = memorized.place()
    bad = BadRows(skip_bad_rows)
    sequences: list[MemorizedSequence] = []
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    with_text: list[tuple[str, list[int]]] = []
    noted = _Noted()
    rows = _Rows(memorized, tokenizer, vocab_size, prefix_len, suffix_len)
    for where, row in memorized.rows(bad):
        try:
            parsed = rows.parse(row, where)
            cuts = [rows.cut(sequence, where) for sequence in parsed.sequences]
        except InputError as error:
            bad.meet(error)
            continue
        noted.add(parsed, where)
        for cut in cuts:
            first = seen.setdefault((tuple(cut.prefix), tuple(cut.suffix)), where)
            if first is not where:
                repeats = f"{where} repeats {first.rpartition(', ')[2]}"
                if skip_bad_rows:
                    bad.meet(InputError(repeats))
                    continue
                noted.repeated.append(repeats)
            sequences.append(_shortened(cut, longest))
            noted.shortened += sequences[-1] is not cut
        if "prefix_ids" in row and len(with_text) < COMPARED_WITH_TEXT:
            with_text += _text_beside_ids(row, parsed.sequences[0])
    bad.tell(path)
    if not sequences and noted.texts:
        raise InputError(f"{path}: {noted.too_few()}")
    if not sequences:
        raise InputError(f"{path}: the {'set' if isinstance(memorized, TextSet) else 'memorized set'} is empty")
    noted.tell(path, len(sequences), longest)
    _check_tokenizer(with_text, tokenizer, path)
    return sequences


class _Parsed(NamedTuple):
    """What a row gave.

    Attributes:
        sequences: One; of a text its passages, none where it is too short.
        straddles: A token straddles the end of the prefix.
        halved: Nothing said where the prefix ends, and it was cut in the middle.
        text: Tokens of a text that was cut into passages; 0 of another row.
    """

    sequences: list[MemorizedSequence]
    straddles: bool = False
    halved: bool = False
    text: int = 0


@dataclass
class _Noted:
    """What is said of the rows of a set.

    Attributes:
        repeated: Rows that repeat earlier ones.
        straddling: Rows in which a token straddles the end of the prefix.
        halved: Number of rows of ids that do not say where their prefix ends.
        shortened: Number of texts of which the beginning is used.
        texts: Tokens of each text that was cut into passages.
        passages: Number of their passages.
        short: Number of texts that are shorter than a passage.
        too_short: Number of texts that are left out.
    """

    repeated: list[str] = field(default_factory=list)
    straddling: list[str] = field(default_factory=list)
    halved: int = 0
    shortened: int = 0
    texts: list[int] = field(default_factory=list)
    passages: int = 0
    short: int = 0
    too_short: int = 0

    def add(self, parsed: _Parsed, where: str) -> None:
        self.straddling += [where] * parsed.straddles
        if not parsed.text:
            self.halved += parsed.halved
            return
        self.texts.append(parsed.text)
        self.passages += len(parsed.sequences)
        self.short += parsed.halved
        self.too_short += not parsed.sequences

    def too_few(self) -> str:
        longest = f"the longest of {counted(len(self.texts), 'text')} has {counted(max(self.texts), 'token')}"
        return f"{longest}, {FEWEST_TOKENS} are needed; in a folder each file of text is one text"

    def tell(self, path: Path, count: int, longest: int | None) -> None:
        if self.texts:
            used = len(self.texts) - self.too_short
            say(f"{path}: {told(used, self.passages, self.short, self.too_short, FEWEST_TOKENS)}")
        if self.repeated:
            rows = f"{len(self.repeated):,} rows repeat earlier ones"
            say(f"{path}: {rows} and count again; the first: {self.repeated[0]}")
        if self.shortened:
            say(f"{path}: {self.shortened:,} texts are longer than {longest:,} tokens; their beginning is used")
        if self.halved:
            say(
                f"{path}: {self.halved:,} rows of tokens do not say where their prefix ends and are cut in the middle; "
                "data.prefix_len, or prefix_len in the rows, cuts elsewhere"
            )
        if self.straddling:
            say(
                f"{path}: in {len(self.straddling):,} of {count:,} rows a token straddles the end of the prefix, so "
                f"the suffix was tokenized by itself; the first: {self.straddling[0]}"
            )


@dataclass(frozen=True)
class _Rows:
    """What rows become token ids with."""

    memorized: MemorizedSet
    tokenizer: Tokenize | None
    vocab_size: int
    prefix_len: int | None
    suffix_len: int | None

    def parse(self, row: dict[str, Any], where: str) -> _Parsed:
        """What a row gives."""
        straddles = False
        prefix, suffix, text, halved, whole = self.memorized.parts(row, where, self.prefix_len)
        if whole and isinstance(self.memorized, TextSet):
            return _Parsed([self._whole(suffix, where)])
        if whole and self.prefix_len is None:
            return self._passages(suffix, where)
        if whole:
            prefix, suffix, _, halved, _ = cut_tokens(self._text_ids(suffix, where), None, self.prefix_len, where)
        elif text:
            prefix, suffix, straddles = self._tokenized(prefix, suffix, where)
        else:
            self._check_made_by(row.get("tokenizer_fingerprint"), where)
        for name, ids in (("prefix", prefix), ("suffix", suffix)):
            self._check_ids(ids, f"{where}: {name}")
        return _Parsed([MemorizedSequence(prefix, suffix)], straddles, halved)

    def cut(self, sequence: MemorizedSequence, where: str) -> MemorizedSequence:
        """As long as the options ask for."""
        prefix_len = None if sequence.whole else self.prefix_len
        try:
            return sequence.cut(prefix_len, self.suffix_len)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def _passages(self, text: object, where: str) -> _Parsed:
        ids = self._text_ids(text, where)
        self._check_ids(ids, f"{where}: text")
        size = len(ids)
        if size < FEWEST_TOKENS:
            return _Parsed([], text=size)
        cuts = windows(size, suffix=self.suffix_len or SUFFIX)
        halves = [Window(0, size // 2, size)]
        sequences = [MemorizedSequence(ids[start:cut], ids[cut:end]) for start, cut, end in cuts or halves]
        return _Parsed(sequences, halved=not cuts, text=size)

    def _tokenized(self, prefix: str, suffix: str, where: str) -> Continuation:
        if self.tokenizer is None:
            raise InputError(f"{where}: a text row needs a tokenizer")
        for name, text in (("prefix", prefix), ("suffix", suffix)):
            if not text:
                raise InputError(f"{where}: the {name} is empty")
        return continuation_ids(self.tokenizer, prefix, suffix)

    def _whole(self, text: object, where: str) -> MemorizedSequence:
        ids = self._text_ids(text, where)
        begin = max(1, len(start_tokens(cast(Tokenize, self.tokenizer))))
        if len(ids) <= begin:
            raise InputError(f"{where}: the text is empty, or its only token is predicted by nothing")
        self._check_ids(ids, f"{where}: text")
        return MemorizedSequence(ids[:begin], ids[begin:], whole=True)

    def _text_ids(self, text: object, where: str) -> list[int]:
        if self.tokenizer is None:
            raise InputError(f"{where}: a text row needs a tokenizer")
        if not isinstance(text, str):
            raise InputError(f"{where}: the text is {type(text).__name__}; it must be text")
        if not text:
            raise InputError(f"{where}: the text is empty")
        return text_ids(self.tokenizer, text)

    def _check_ids(self, ids: object, where: str) -> None:
        place, _, name = where.rpartition(": ")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError(f"{place}: the {name} ids must be a list of integers")
        if not ids:
            raise InputError(f"{place}: the {name} is empty")
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(
                f"{where} id {bad[0]} is outside the model's vocabulary (0 to {self.vocab_size - 1}); "
                "was the set made with another tokenizer?"
            )

    def _check_made_by(self, fingerprint: object, where: str) -> None:
        own = None if fingerprint is None else self._fingerprint
        if own is not None and fingerprint != own:
            raise InputError(
                f"{where}: the ids were made by another tokenizer ({str(fingerprint)[:8]}) than the model's "
                f"({own[:8]}); mine the set again, or leave the ids out to have the text tokenized"
            )

    @cached_property
    def _fingerprint(self) -> str | None:
        return None if self.tokenizer is None else tokenizer_fingerprint(cast(Any, self.tokenizer))


def _shortened(sequence: MemorizedSequence, longest: int | None) -> MemorizedSequence:
    """A whole text of at most ``longest`` tokens."""
    if longest is None or not sequence.whole or len(sequence.prefix) + len(sequence.suffix) <= longest:
        return sequence
    return replace(sequence, suffix=sequence.suffix[: longest - len(sequence.prefix)])


def _text(row: dict[str, Any], fields: Sequence[str]) -> str | None:
    return next((row[field] for field in fields if isinstance(row.get(field), str)), None)


def _text_beside_ids(row: dict[str, Any], sequence: MemorizedSequence) -> list[tuple[str, list[int]]]:
    """The text of a row that holds ids too, with its ids; at most one pair."""
    for fields, ids in ((OWN.prefix, sequence.prefix), (OWN.suffix, sequence.suffix)):
        if text := _text(row, fields):
            return [(text, list(ids))]
    return []


def _check_tokenizer(rows: Sequence[tuple[str, list[int]]], tokenizer: Tokenize | None, path: Path) -> None:
    """Ids of another tokenizer lie in the vocabulary often enough; the text beside them tells."""
    decode = getattr(tokenizer, "decode", None)
    if len(rows) < FEWEST_COMPARED or tokenizer is None or decode is None:
        return
    for text, ids in rows:
        if decode(ids).strip() == text.strip() or text_ids(tokenizer, text) == ids:
            return
    raise InputError(
        f"{path}: the ids do not belong to the text beside them: the set was made with another tokenizer than the "
        "model's. Leave the ids out to have the text tokenized, or set data.tokenizer"
    )
