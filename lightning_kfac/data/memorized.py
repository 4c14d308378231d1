"""Memorized sets: JSONL files of prefixes and the suffixes that a model may recite."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.json_lines import read_objects
from lightning_kfac.errors import InputError

PREFIX_FIELDS = ("prefix", "prefix_text", "prompt")
SUFFIX_FIELDS = ("target_suffix", "suffix_text", "suffix")


@dataclass(frozen=True)
class MemorizedSequence:
    """Token ids of a prefix and of the gold suffix that follows it in the training data."""

    prefix: Sequence[int]
    suffix: Sequence[int]


def load_memorized(path: str | Path, tokenizer: Callable | None, vocab_size: int) -> list[MemorizedSequence]:
    """Reads a memorized set.

    Rows hold ``prefix_ids`` and ``suffix_ids``, used untouched, or text under ``prefix`` /
    ``prefix_text`` / ``prompt`` and ``target_suffix`` / ``suffix_text`` / ``suffix``. Text is tokenized
    prefix and suffix apart, the prefix with the tokenizer's special tokens (BOS), the suffix without.

    Args:
        path: A JSONL file, or ``demo:FILE``.
        tokenizer: Needed for text rows only.
        vocab_size: Ids must lie below it.

    Raises:
        InputError: Names the file and the line.
    """
    path = resolve_path(path)
    sequences = [_parse_row(row, where, tokenizer, vocab_size) for where, row in read_objects(path)]
    if not sequences:
        raise InputError(f"{path}: the memorized set is empty")
    return sequences


def _parse_row(row: dict, where: str, tokenizer: Callable | None, vocab_size: int) -> MemorizedSequence:
    if "prefix_ids" in row and "suffix_ids" in row:
        prefix, suffix = row["prefix_ids"], row["suffix_ids"]
    else:
        prefix = _tokenize(row, PREFIX_FIELDS, tokenizer, True, where)
        suffix = _tokenize(row, SUFFIX_FIELDS, tokenizer, False, where)
    for name, ids in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError(f"{where}: the {name} ids must be a list of integers")
        if not ids:
            raise InputError(f"{where}: the {name} is empty")
        if bad := [i for i in ids if not 0 <= i < vocab_size]:
            raise InputError(
                f"{where}: {name} id {bad[0]} is outside the model's vocabulary (0 to {vocab_size - 1}); "
                "was the set made with another tokenizer?"
            )
    return MemorizedSequence(prefix, suffix)


def _tokenize(row: dict, fields: Sequence[str], tokenizer: Callable | None, special: bool, where: str) -> list[int]:
    text = next((row[f] for f in fields if isinstance(row.get(f), str)), None)
    if text is None:
        raise InputError(
            f"{where}: needs prefix_ids and suffix_ids, or text in one of {', '.join(fields)}; "
            f"fields here: {', '.join(row) or 'none'}"
        )
    if tokenizer is None:
        raise InputError(f"{where}: a text row needs a tokenizer")
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
