"""Memorized sets: prefixes and the suffixes that a model may recite, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lightning_kfac.console import say
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

    Rows hold ids, used untouched, or text, see ``MemorizedSet``. A text without a prefix is cut like a sequence of ids,
    or stays whole in a ``TextSet``. Text is tokenized prefix and suffix together, see
    ``continuation_ids``; of how many rows a token straddles the cut is said.
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
    path = memorized.files()[0]
    bad = BadRows(skip_bad_rows)
    sequences: list[MemorizedSequence] = []
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    with_text: list[tuple[str, list[int]]] = []
    noted = _Noted()
    rows = _Rows(memorized, tokenizer, vocab_size, prefix_len)
    for where, row in memorized.rows(bad):
        try:
            sequence, straddles, in_the_middle = rows.parse(row, where)
            cut = _cut(sequence, where, None if sequence.whole else prefix_len, suffix_len)
        except InputError as error:
            bad.meet(error)
            continue
        first = seen.setdefault((tuple(cut.prefix), tuple(cut.suffix)), where)
        if first is not where:
            repeats = f"{where} repeats {first.rpartition(', ')[2]}"
            if skip_bad_rows:
                bad.meet(InputError(repeats))
                continue
            noted.repeated.append(repeats)
        sequences.append(_shortened(cut, longest))
        noted.straddling += [where] * straddles
        noted.halved += in_the_middle
        noted.shortened += sequences[-1] is not cut
        if "prefix_ids" in row and len(with_text) < COMPARED_WITH_TEXT:
            with_text += _text_beside_ids(row, sequence)
    bad.tell(path)
    if not sequences:
        raise InputError(f"{path}: the {'set' if isinstance(memorized, TextSet) else 'memorized set'} is empty")
    noted.tell(path, len(sequences), longest)
    _check_tokenizer(with_text, tokenizer, path)
    return sequences


@dataclass
class _Noted:
    """What is said of the rows of a set.

    Attributes:
        repeated: Rows that repeat earlier ones.
        straddling: Rows in which a token straddles the end of the prefix.
        halved: Number of rows that do not say where their prefix ends.
        shortened: Number of texts of which the beginning is used.
    """

    repeated: list[str] = field(default_factory=list)
    straddling: list[str] = field(default_factory=list)
    halved: int = 0
    shortened: int = 0

    def tell(self, path: Path, count: int, longest: int | None) -> None:
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

    def parse(self, row: dict[str, Any], where: str) -> tuple[MemorizedSequence, bool, bool]:
        """The sequence, whether a token straddles the end of its prefix, and whether it was cut in the middle."""
        straddles = False
        prefix, suffix, text, halved, whole = self.memorized.parts(row, where, self.prefix_len)
        if whole and isinstance(self.memorized, TextSet):
            return self._whole(suffix, where), False, False
        if whole:
            prefix, suffix, _, halved, _ = cut_tokens(self._text_ids(suffix, where), None, self.prefix_len, where)
        elif text:
            prefix, suffix, straddles = self._tokenized(prefix, suffix, where)
        else:
            self._check_made_by(row.get("tokenizer_fingerprint"), where)
        for name, ids in (("prefix", prefix), ("suffix", suffix)):
            self._check_ids(ids, f"{where}: {name}")
        return MemorizedSequence(prefix, suffix), straddles, halved

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


def _cut(sequence: MemorizedSequence, where: str, prefix_len: int | None, suffix_len: int | None) -> MemorizedSequence:
    try:
        return sequence.cut(prefix_len, suffix_len)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
