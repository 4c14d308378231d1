"""Files and rows that memorized sets are published in, and where prefix and suffix lie in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import Self, override

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.documents import TextFile
from lightning_kfac.data.readers import TEXT, local_files
from lightning_kfac.data.records import RECORDS, kind_of_file, lines_of, open_file, place, reading, records_of
from lightning_kfac.data.rows import BadRows
from lightning_kfac.errors import InputError, did_you_mean
from lightning_kfac.storage.special_files import check_not_special

ARRAY = ".npy"


class TextFields(NamedTuple):
    """Fields of prefix and suffix as text; of several the first that a row has."""

    prefix: tuple[str, ...]
    suffix: tuple[str, ...]
    separator: str = ""


OWN = TextFields(("prefix", "prefix_text", "prompt"), ("target_suffix", "suffix_text", "suffix"))
# MUSE, whose prompt and continuation open-unlearning joins with a space, and TOFU.
PUBLISHED = (TextFields(("prompt",), ("gt",), " "), TextFields(("question",), ("answer",), " "))


class Parts(NamedTuple):
    """Prefix and suffix of a row.

    Attributes:
        text: Both are text; otherwise they are to be lists of ids, which nobody has looked at yet.
        halved: Nothing says where the prefix ends: the tokens were cut in the middle.
        whole: The suffix is a whole text, without a prefix.
    """

    prefix: Any
    suffix: Any
    text: bool = False
    halved: bool = False
    whole: bool = False


@dataclass(frozen=True)
class MemorizedSet:
    """A file of sequences, and where prefix and suffix lie in its rows; or texts, which are cut into such.

    Args:
        source: JSONL, JSON, Parquet or Arrow (JSON also as .gz or .zst; ``demo:FILE`` names an embedded one), or .npy:
            an array of ids [n, length], or one of prefixes, beside which the same name has ``suffix`` for ``prefix``;
            or the folder of such a pair. Texts are rows with a field ``text``, the lines of a file of text (``.txt``,
            ``.md``), or a folder: of its files each of text is one, and each row of another file.
        prefix_field, suffix_field: Fields of text or of ids; by default ``prefix_ids`` and ``suffix_ids``, or text
            under ``prefix`` and ``suffix``, ``prompt`` and ``gt``, ``question`` and ``answer``.
        tokens_field: Field of whole sequences of ids. The prefix is the first ``prefix_len`` (a field of the row, else
            the option of the data), else the first half.
        text_field: Field of whole texts, by default ``text`` where a row has no prefix; see ``load_memorized``.
        separator: Between prefix and suffix where they are text; by default a space between prompt and gt and between
            question and answer, unless there is one, and else nothing.
    """

    source: str
    prefix_field: str | None = None
    suffix_field: str | None = None
    tokens_field: str | None = None
    text_field: str | None = None
    separator: str | None = None

    @classmethod
    def parse(cls, name: str, value: "str | Path | Mapping[str, Any] | MemorizedSet") -> Self:
        """A checked set from a file name or a mapping.

        Raises:
            InputError: A field is unknown or missing.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(str(value))
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in value if key not in known]:
            meant = did_you_mean(unknown[0], known)
            raise InputError(f"data.{name}: unknown field {unknown[0]!r}; known are {', '.join(known)}{meant}")
        if wrong := [key for key, text in value.items() if not isinstance(text, str | None)]:
            raise InputError(f"data.{name}: {wrong[0]} is {value[wrong[0]]!r}; it must be text")
        if not value.get("source"):
            raise InputError(f"data.{name}: needs a source")
        if (value.get("prefix_field") is None) != (value.get("suffix_field") is None):
            raise InputError(f"data.{name}: give both prefix_field and suffix_field, or neither")
        return cls(**value)

    def files(self) -> list[Path]:
        """What is read: the file, and of prefixes in an array its suffixes; or the files of a folder.

        Raises:
            InputError: There is nothing to read in a folder.
        """
        path = resolve_path(self.source)
        check_not_special(path)
        if path.is_dir():
            pair = _array_of_prefixes(path)
            return _with_partner(pair) if pair else local_files(self.source)
        return _with_partner(path) if path.suffix == ARRAY else [path]

    def place(self) -> Path:
        """What messages name: the file, of two the first, or a folder of texts."""
        path = resolve_path(self.source)
        return path if path.is_dir() and _array_of_prefixes(path) is None else self.files()[0]

    def rows(self, bad: BadRows | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows, each with the name of its place.

        Args:
            bad: What to do with what is no row; by default it is an error.

        Raises:
            InputError: A file cannot be read, or is of another kind.
        """
        in_a_folder = resolve_path(self.source).is_dir()
        files = self.files()
        if len(files) <= 2 and all(file.suffix == ARRAY for file in files):
            yield from _rows_of_arrays(*files)
            return
        for file in files:
            if kind_of_file(file.name) not in TEXT or not file.exists():
                yield from self._records(file, bad)
            elif in_a_folder:
                yield str(file), {"text": TextFile(file).text()}
            else:
                yield from _lines(file)

    def _records(self, path: Path, bad: BadRows | None) -> Iterator[tuple[str, dict[str, Any]]]:
        if path.exists() and kind_of_file(path.name) not in RECORDS:
            raise InputError(
                f"{path}: cannot read a set from this kind of file; use one of {', '.join((*RECORDS, *TEXT))} (but for "
                f"tables also .gz and .zst), or {ARRAY}"
            )
        for number, row in records_of(path, bad=bad):
            yield place(path, number), row

    def parts(self, row: Mapping[str, Any], where: str, prefix_len: int | None = None) -> Parts:
        """Prefix and suffix of a row.

        Args:
            where: Names the row in messages.
            prefix_len: Tokens of the prefix, for whole sequences that do not say it themselves.

        Raises:
            InputError: The row lacks them.
        """
        if self.prefix_field and self.suffix_field:
            return self._joined(row, where, TextFields((self.prefix_field,), (self.suffix_field,), self._separator()))
        if self.text_field:
            return Parts("", _field(row, self.text_field, where), text=True, whole=True)
        if self.tokens_field:
            return cut_tokens(_field(row, self.tokens_field, where), row.get("prefix_len"), prefix_len, where)
        if "prefix_ids" in row and "suffix_ids" in row:
            return Parts(row["prefix_ids"], row["suffix_ids"])
        if isinstance(row.get("tokens"), list):
            return cut_tokens(row["tokens"], row.get("prefix_len"), prefix_len, where)
        known = next((known for known in (OWN, *PUBLISHED) if _has(row, known)), None)
        if known is None and "text" in row and not self.holds(row):
            return Parts("", row["text"], text=True, whole=True)
        return self._joined(row, where, known or OWN)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row looks like one of a set, not like a document."""
        own = "prefix_ids" in row or any(name in row for name in OWN.prefix)
        return own or ("text" not in row and ("tokens" in row or any(_has(row, known) for known in PUBLISHED)))

    def _separator(self) -> str:
        named = (self.prefix_field,), (self.suffix_field,)
        return next((known.separator for known in PUBLISHED if known[:2] == named), "")

    def _joined(self, row: Mapping[str, Any], where: str, known: TextFields) -> Parts:
        prefix = _first(row, known.prefix, where)
        suffix = _first(row, known.suffix, where)
        if isinstance(prefix, str) != isinstance(suffix, str):
            raise InputError(f"{where}: prefix and suffix must both be text or both be ids")
        if not isinstance(prefix, str):
            return Parts(prefix, suffix)
        if prefix and suffix:
            apart = prefix[-1].isspace() or suffix[0].isspace()
            between = "" if apart else known.separator
            suffix = (between if self.separator is None else self.separator) + suffix
        return Parts(prefix, suffix, text=True)


class TextSet(MemorizedSet):
    """Texts that are scored whole, but for the rows that have a prefix."""

    @override
    def files(self) -> list[Path]:
        found = super().files()
        if not found[0].exists():
            raise InputError(f"{found[0]}: no such file or folder")
        return found


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a text that are not empty."""
    with reading(file), open_file(file) as stream:
        for number, line in lines_of(stream, file):
            yield f"{file}, line {number}", {"text": line.decode("utf-8").rstrip("\r\n")}


def is_set(source: str) -> bool:
    """Whether a source is a memorized set by its first row, and not a corpus."""
    found = MemorizedSet(source)
    folder = resolve_path(source)
    if folder.is_dir():
        return _array_of_prefixes(folder) is not None
    path, *partner = found.files()
    if not path.is_file() or kind_of_file(path.name) not in RECORDS:
        return bool(partner)
    _, first = next(found.rows(BadRows(skip=True)), ("", {}))
    return found.holds(first)


def _has(row: Mapping[str, Any], known: TextFields) -> bool:
    return all(any(isinstance(row.get(name), str) for name in names) for names in (known.prefix, known.suffix))


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise InputError(f"{where}: no field {name!r}; fields here: {', '.join(row) or 'none'}")
    return row[name]


def _first(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    if names not in OWN:
        return _field(row, names[0], where)
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise InputError(
        f"{where}: needs prefix_ids and suffix_ids, or text in one of {', '.join(names)}; fields here: "
        f"{', '.join(row) or 'none'} (tokens, prompt and gt, question and answer are known as well, others by "
        "prefix_field and suffix_field)"
    )


def cut_tokens(tokens: Any, own: Any, asked: int | None, where: str) -> Parts:
    """Prefix and suffix of a whole sequence of ids.

    Args:
        own: Tokens of the prefix, as the row says.
        asked: The same as the options of the data say; where neither does, the sequence is cut in the middle.
        where: Names the row in messages.

    Raises:
        InputError: One of them would be empty.
    """
    if not isinstance(tokens, list):
        raise InputError(f"{where}: the tokens must be a list of integers")
    cut = own if own is not None else asked if asked is not None else len(tokens) // 2
    if type(cut) is not int or not 0 < cut < len(tokens):
        raise InputError(f"{where}: {len(tokens)} tokens, of which a prefix of {cut!r} leaves no suffix")
    return Parts(tokens[:cut], tokens[cut:], halved=own is None and asked is None)


def _with_partner(path: Path) -> list[Path]:
    """Of prefixes in an array, or of suffixes, both; of another array that alone."""
    for name, other in (("prefix", "suffix"), ("suffix", "prefix")):
        before, found, after = path.name.rpartition(name)
        if found:
            pair = path, path.with_name(before + other + after)
            return list(pair if name == "prefix" else reversed(pair))
    return [path]


def _array_of_prefixes(folder: Path) -> Path | None:
    """The prefixes of the pair of arrays in a folder, if it has one."""
    pairs = [path for path in sorted(folder.glob(f"*prefix*{ARRAY}")) if all(p.is_file() for p in _with_partner(path))]
    if len(pairs) > 1:
        raise InputError(f"{folder}: holds {len(pairs)} sets; name one of {', '.join(path.name for path in pairs)}")
    return pairs[0] if pairs else None


def _rows_of_arrays(first: Path, second: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    whole = _array(first)
    if second is None:
        yield from ((place(first, n), {"tokens": ids.tolist()}) for n, ids in enumerate(whole, start=1))
        return
    for path, other in ((first, second), (second, first)):
        if not path.exists():
            raise InputError(f"{path}: not there, {other.name} alone is no set")
    suffixes = _array(second)
    if len(whole) != len(suffixes):
        raise InputError(f"{first}: {len(whole):,} prefixes, but {second.name} has {len(suffixes):,} suffixes")
    for number, (prefix, suffix) in enumerate(zip(whole, suffixes, strict=True), start=1):
        yield place(first, number), {"prefix_ids": prefix.tolist(), "suffix_ids": suffix.tolist()}


def _array(path: Path) -> np.ndarray:
    with reading(path):
        if not path.stat().st_size:
            raise InputError(f"{path}: the file is empty")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(f"{path}: needs whole numbers [sequences, tokens], found {array.dtype} {list(array.shape)}")
    return np.asarray(array)
