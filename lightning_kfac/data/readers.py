"""Documents of local files: text, JSON, Parquet, Arrow, token ids, compressed or not. Nothing here uses the network."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.documents import Document, TextFile, TokenIds
from lightning_kfac.data.records import (
    CHUNK,
    COMPRESSION,
    JSON,
    LINES,
    RECORDS,
    batches_of_arrow,
    group_rows,
    has_lines,
    kind_of_file,
    lines_between,
    object_of_line,
    open_parquet,
    reading,
    records_of,
    rows_of_batch,
)
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.token_files import TokenKind, split_at, token_sources
from lightning_kfac.errors import InputError
from lightning_kfac.storage.special_files import check_not_special

TEXT = (".txt", ".md")
TOKENS = ".npy"
SUFFIXES = (*RECORDS, *TEXT, TOKENS)
# Fields of token ids, where a record has no text.
ID_FIELDS = ("input_ids", "token_ids", "tokens")
MASK_FIELD = "attention_mask"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Smaller text is read at once.
SMALL_TEXT = 1 << 20
# A large file of lines is read in so many places in turn; a stretch between them has at least so many bytes.
STRETCHES = 4096
SHORTEST_STRETCH = 1 << 18
# Lines are counted in files up to this size: it takes less than a tenth of a second.
COUNTED = 1 << 26
# What hub folders and save_to_disk keep beside the documents.
CARDS = {"readme", "license", "licence", "copying", "notice", "citation", "contributing", "code_of_conduct"}
INFO_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"}
SHARD = re.compile(r"(\w[\w.]*?)-\d{5}-of-\d{5}\b.*")
T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        text_field: What records hold the text in: a field, or a text with several in braces.
        bad: What to do with records that hold no text.
        tokens: What token ids must be; None where only text can be used.
    """

    text_field: str = "text"
    bad: BadRows = BadRows()  # noqa: RUF009 (raises at the first one, so it stays as it is)
    tokens: TokenKind | None = None

    def wanted(self, names: Sequence[str]) -> list[str]:
        """The columns to read of those that a file has: the text, else token ids; where it has neither, all."""
        texts = fields_of(self.text_field)
        if all(name in names for name in texts):
            return [*texts, *(name for name in names if name == MASK_FIELD)]
        return [name for name in names if name in (*ID_FIELDS, MASK_FIELD)] or list(names)


# -- which files ---------------------------------------------------------------------------------------------------


def local_files(source: str, split: str | None = None) -> list[Path]:
    """The file, or the files of documents in the folder, that a source names; empty where it may be a hub data set.

    Hidden files, cards (``README.md``) and files about the data set (``dataset_infos.json``) are no documents, unless
    the folder holds nothing else.

    Args:
        split: Where a folder keeps splits apart as the datasets package does, the one to read.

    Raises:
        InputError: No such file or folder, none of a kind that can be read, or not that split.
    """
    path = resolve_path(source).expanduser()
    check_not_special(path)
    if path.is_file():
        if kind_of_file(path.name) not in SUFFIXES:
            raise InputError(f"{path}: cannot read this kind of file; use one of {', '.join(SUFFIXES)} (or .gz, .zst)")
        return [path]
    if path.is_dir():
        return _files_of_folder(path, split)
    if kind_of_file(source) in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise InputError(f"{path}: no such file or folder")
    return []


def _files_of_folder(folder: Path, split: str | None) -> list[Path]:
    readable = sorted(
        file
        for file in folder.rglob("*")
        if kind_of_file(file.name) in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.name not in INFO_FILES
        and file.is_file()
    )
    files = [file for file in readable if not _is_card(file)] or readable
    if not files:
        raise InputError(f"{folder}: the folder holds no {', '.join(SUFFIXES)} file")
    shards: dict[Path, set[str] | None] = {}
    files = [file for file in files if file.suffix != ".arrow" or _is_shard(file, shards)]
    return _of_split(folder, files, split)


def _is_card(file: Path) -> bool:
    return file.name.partition(".")[0].lower() in CARDS and kind_of_file(file.name) in (*TEXT, ".json")


def _is_shard(file: Path, known: dict[Path, set[str] | None]) -> bool:
    """Whether an Arrow file is one of those that ``save_to_disk`` lists, or is in no such folder."""
    folder = file.parent
    if folder not in known:
        known[folder] = _listed_shards(folder)
    listed = known[folder]
    return not file.name.startswith("cache-") if listed is None else file.name in listed


def _listed_shards(folder: Path) -> set[str] | None:
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return {str(entry["filename"]) for entry in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Of a folder with splits those files that belong to one: in ``save_to_disk``'s folders, or by their names."""
    if split is None:
        return files
    if (folder / "dataset_dict.json").is_file():
        chosen = [file for file in files if file.relative_to(folder).parts[0] == split]
        if not chosen:
            there = sorted({file.relative_to(folder).parts[0] for file in files})
            raise InputError(f"{folder}: there is no split {split!r}; there are {', '.join(there)} (split)")
        return chosen
    names = {file: found[1] if (found := SHARD.match(file.name)) else None for file in files}
    return [file for file in files if names[file] == split] if split in names.values() else files


# -- documents -----------------------------------------------------------------------------------------------------


def documents_of_file(file: Path, how: Reading) -> Iterator[Document]:
    """The documents of a file, from its beginning to its end.

    Raises:
        InputError: The file cannot be read; names it and the record.
    """
    for source in sources_of_file(file, how, stretch=None):
        yield from source


def sources_of_file(file: Path, how: Reading, stretch: int | None) -> list[Iterator[Document]]:
    """The documents of a file in parts that can be read in turn: stretches of lines, groups of rows.

    Args:
        stretch: Bytes of lines in a part; None leaves them together.
    """
    kind = kind_of_file(file.name)
    with reading(file):
        if not file.stat().st_size:
            return []
        if kind in TEXT:
            return [_text(file)]
        if kind == TOKENS:
            return list(token_sources(_unpacked(file), _token_kind(file, how)))
        if kind == ".parquet":
            with open_parquet(_unpacked(file)) as parquet:
                sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            firsts = np.cumsum([1, *sizes])[:-1].tolist()
            return [_of_group(file, how, group, first) for group, first in enumerate(firsts)]
        if kind == ".arrow":
            return _of_arrow(file, how)
        if stretch and _is_cut(file, stretch):
            starts = range(0, file.stat().st_size, stretch)
            return [_of_stretch(file, how, start, start + stretch) for start in starts]
    return [_of_records(file, how)]


def holds_little(file: Path) -> bool:
    """Whether a source of this file holds next to nothing open between two documents."""
    return file.suffix not in (*COMPRESSION, ".parquet") and (file.suffix != ".json" or has_lines(file))


def count_of_file(file: Path) -> int | None:
    """How many documents a file has, where that can be told at once."""
    kind = kind_of_file(file.name)
    size = file.stat().st_size
    with reading(file):
        if not size:
            return 0
        if kind in TEXT:
            return 1
        if kind == ".parquet":
            with open_parquet(file) as parquet:
                return int(parquet.metadata.num_rows)
        if kind == ".arrow":
            return sum(map(len, batches_of_arrow(file)))
        if kind in LINES and file.suffix not in COMPRESSION and size <= COUNTED:
            with open(file, "rb") as stream:
                return sum(1 for line in stream if line.strip())
    return None


def in_turn(sources: list[Iterator[T]], at_once: int) -> Iterator[T]:
    """One item of each of the first sources, again and again; one that has ended gives its place to another."""
    active = sources[:at_once]
    waiting = sources[at_once:]
    waiting.reverse()
    while active:
        going_on = []
        for source in active:
            item = next(source, None)
            if item is not None:
                yield item
                going_on.append(source)
            elif waiting:
                going_on.append(waiting.pop())
        active = going_on


def _unpacked(file: Path) -> Path:
    if file.suffix in COMPRESSION:
        raise InputError(f"{file}: compressed as a whole; unpack it first")
    return file


def _token_kind(file: Path, how: Reading) -> TokenKind:
    if how.tokens is None:
        raise InputError(f"{file}: token ids, where text is needed")
    return how.tokens


def _text(file: Path) -> Iterator[Document]:
    document = TextFile(file)
    size = document.size
    if size is None or size > SMALL_TEXT:
        yield document
    else:
        yield document.text()


def _is_cut(file: Path, stretch: int) -> bool:
    """Whether a file has lines that can be read from any place on, and enough of them."""
    return file.suffix in JSON and file.stat().st_size > stretch and has_lines(file)


def _of_records(file: Path, how: Reading) -> Iterator[Document]:
    for number, row in records_of(file, how.wanted, how.bad):
        yield from _usable(row, how, partial(_record, file, number))


def _of_group(file: Path, how: Reading, group: int, first: int) -> Iterator[Document]:
    with reading(file), open_parquet(file) as parquet:
        for number, row in enumerate(group_rows(parquet, group, how.wanted), start=first):
            yield from _usable(row, how, partial(_record, file, number))


def _of_arrow(file: Path, how: Reading) -> list[Iterator[Document]]:
    sources = []
    first = 1
    for batch in batches_of_arrow(file):
        sources.append(_of_batch(file, how, batch, first))
        first += len(batch)
    return sources


def _of_batch(file: Path, how: Reading, batch: Any, first: int) -> Iterator[Document]:
    with reading(file):
        for number, row in enumerate(rows_of_batch(batch, how.wanted), start=first):
            yield from _usable(row, how, partial(_record, file, number))


def _of_stretch(file: Path, how: Reading, start: int, stop: int) -> Iterator[Document]:
    """Of the lines that begin in a stretch of bytes. Their numbers are only counted for a message."""
    with reading(file):
        for place, line in lines_between(file, start, stop):
            try:
                row = object_of_line(line, "")
            except InputError as error:
                _meet(how.bad, partial(_line_at, file, place), str(error))
            else:
                yield from _usable(row, how, partial(_record_at, file, place))


def _record(file: Path, number: int) -> str:
    return f"{file}, record {number}"


def _record_at(file: Path, place: int) -> str:
    return _record(file, _number(file, place))


def _line_at(file: Path, place: int) -> str:
    return f"{file}, line {_number(file, place)}"


def _number(file: Path, place: int) -> int:
    """Of the line that begins at a byte."""
    number = 1
    with open(file, "rb") as stream:
        while place > 0 and (chunk := stream.read(min(CHUNK, place))):
            number += chunk.count(b"\n")
            place -= len(chunk)
    return number


def _usable(row: Mapping[str, Any], how: Reading, where: Callable[[], str]) -> Iterator[Document]:
    """The documents of a record; one that has none is met as a bad row.

    Args:
        where: Names the record, in a message.
    """
    try:
        yield from documents_of_row(row, how)
    except InputError as error:
        _meet(how.bad, where, f": {error}")


def _meet(bad: BadRows, where: Callable[[], str], why: str) -> None:
    """Meets a bad row; to name the first one may take a look through the whole file."""
    bad.meet(InputError(where() + why) if bad.first is None else bad.first)


def documents_of_row(row: Mapping[str, Any], how: Reading) -> Iterable[Document]:
    """The text of a record, or else its token ids, by documents; ids that its ``attention_mask`` leaves out are none.

    Raises:
        InputError: It has neither.
    """
    field = how.text_field
    names = fields_of(field)
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if not missing:
        return [PLACEHOLDER.sub(lambda found: row[found[1]], field) if PLACEHOLDER.search(field) else row[field]]
    for name in (*names, *ID_FIELDS):
        if _are_ids(ids := row.get(name)):
            if how.tokens is None:
                raise InputError(f"token ids in field {name!r}, where text is needed")
            ids = np.asarray(ids, dtype=np.int64)
            mask = row.get(MASK_FIELD)
            if isinstance(mask, (list, tuple)) and len(mask) == len(ids):
                ids = ids[np.asarray(mask) == 1]
            return map(TokenIds, split_at(ids, how.tokens.eos))
    raise InputError(f"no text in field {missing[0]!r}; fields here: {', '.join(row)}")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) is int for number in value)


def fields_of(text_field: str) -> list[str]:
    """The fields that a text is made of."""
    return PLACEHOLDER.findall(text_field) or [text_field]
