"""Memorized sets: prefixes and the suffixes that a model may recite, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lightning_kfac.console import say
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.set_formats import OWN, MemorizedSet
from lightning_kfac.data.text_ids import Continuation, Tokenize, continuation_ids, text_ids
from lightning_kfac.errors import InputError
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint

# Of the rows that hold text beside ids, so many are compared with the tokenizer; of fewer nothing is concluded.
COMPARED_WITH_TEXT = 20
FEWEST_COMPARED = 3


@dataclass(frozen=True)
class MemorizedSequence:
    """Token ids of a prefix and of the gold suffix that follows it in the training data."""

    prefix: Sequence[int]
    suffix: Sequence[int]

    def cut(self, prefix_len: int | None, suffix_len: int | None) -> "MemorizedSequence":
        """The last ``prefix_len`` tokens of the prefix and the first ``suffix_len`` of the suffix.

        Raises:
            InputError: It has fewer.
        """
        for option, wanted, ids in (("prefix", prefix_len, self.prefix), ("suffix", suffix_len, self.suffix)):
            if wanted is not None and len(ids) < wanted:
                raise InputError(f"the {option} has {len(ids)} tokens, data.{option}_len asks for {wanted}")
        prefix = self.prefix if prefix_len is None else self.prefix[len(self.prefix) - prefix_len :]
        return MemorizedSequence(prefix, self.suffix if suffix_len is None else self.suffix[:suffix_len])


def load_memorized(
    source: str | Path | MemorizedSet,
    tokenizer: Tokenize | None,
    vocab_size: int,
    *,
    prefix_len: int | None = None,
    suffix_len: int | None = None,
    skip_bad_rows: bool = False,
) -> list[MemorizedSequence]:
    """Reads a memorized set.

    Rows hold ids, used untouched, or text, see ``MemorizedSet``. Text is tokenized prefix and suffix together, see
    ``continuation_ids``; of how many rows a token straddles the cut is said.
    Rows that repeat earlier ones count again, with a notice, unless bad rows are skipped. Ids beside a
    ``tokenizer_fingerprint`` (``predict`` writes it) are refused with another tokenizer.

    Args:
        source: A file, ``demo:FILE``, or one with the fields to read.
        tokenizer: Needed for text rows; where rows hold ids and text, it is checked against them.
        vocab_size: Ids must lie below it.
        prefix_len, suffix_len: Tokens of each prefix (its last) and of each suffix (its first); by default all.
        skip_bad_rows: Leave out rows that cannot be used, and repetitions, and say how many.

    Raises:
        InputError: Names the file and the line.
    """
    memorized = MemorizedSet.parse("memorized", source)
    path = memorized.files()[0]
    bad = BadRows(skip_bad_rows)
    sequences: list[MemorizedSequence] = []
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    repeated: list[str] = []
    with_text: list[tuple[str, list[int]]] = []
    straddling: list[str] = []
    halved = 0
    rows = _Rows(memorized, tokenizer, vocab_size, prefix_len)
    for where, row in memorized.rows(bad):
        try:
            sequence, straddles, in_the_middle = rows.parse(row, where)
            cut = _cut(sequence, where, prefix_len, suffix_len)
        except InputError as error:
            bad.meet(error)
            continue
        first = seen.setdefault((tuple(cut.prefix), tuple(cut.suffix)), where)
        if first is not where:
            repeated.append(f"{where} repeats {first.rpartition(', ')[2]}")
            if skip_bad_rows:
                bad.meet(InputError(repeated[-1]))
                continue
        sequences.append(cut)
        straddling += [where] * straddles
        halved += in_the_middle
        if "prefix_ids" in row and len(with_text) < COMPARED_WITH_TEXT:
            with_text += _text_beside_ids(row, sequence)
    bad.tell(path)
    if not sequences:
        raise InputError(f"{path}: the memorized set is empty")
    if repeated and not skip_bad_rows:
        say(f"{path}: {len(repeated):,} rows repeat earlier ones and count again; the first: {repeated[0]}")
    if halved:
        say(
            f"{path}: {halved:,} rows of tokens do not say where their prefix ends and are cut in the middle; "
            "data.prefix_len, or prefix_len in the rows, cuts elsewhere"
        )
    if straddling:
        say(
            f"{path}: in {len(straddling):,} of {len(sequences):,} rows a token straddles the end of the prefix, so "
            f"the suffix was tokenized by itself; the first: {straddling[0]}"
        )
    _check_tokenizer(with_text, tokenizer, path)
    return sequences


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
        prefix, suffix, text, halved = self.memorized.parts(row, where, self.prefix_len)
        if text:
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
