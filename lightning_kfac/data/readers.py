"""Documents of local files: text, JSON lines, Parquet, compressed or not."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.rows import BadRows, parse_object
from lightning_kfac.errors import InputError, first_line

JSON_LINES = (".jsonl", ".json", ".ndjson")
SUFFIXES = (*JSON_LINES, ".parquet", ".txt", ".md")
COMPRESSION = (".gz", ".zst")
# A mixture keeps its sources in separate files; reading this many in turn samples them all.
FILES_IN_TURN = 16
PLACEHOLDER = re.compile(r"\{(\w+)\}")


def local_files(source: str) -> list[Path]:
    """The file, or all files of the folder, that a source names; empty where it may be a data set of the hub.

    Raises:
        InputError: No such file or folder, or none of a kind that can be read.
    """
    path = resolve_path(source).expanduser()
    if path.is_file():
        if kind_of_file(path.name) not in SUFFIXES:
            raise InputError(f"{path}: cannot read this kind of file; use one of {', '.join(SUFFIXES)} (or .gz, .zst)")
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and kind_of_file(p.name) in SUFFIXES)
        if not files:
            raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
        return files
    if kind_of_file(source) in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise InputError(f"{path}: no such file or folder")
    return []


def kind_of_file(name: str) -> str:
    """The suffix, without that of a compression: ``a.jsonl.gz`` -> ``.jsonl``."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix


def documents_of_file(file: str, text_field: str, bad: BadRows) -> Iterator[str]:
    """The texts of a file, as a stream.

    Args:
        file: Its name or address.
        text_field: What records of JSONL and Parquet files hold the text in, see ``text_of``.
        bad: What to do with records that hold no text.

    Raises:
        InputError: The file cannot be read.
    """
    from datasets import load_dataset

    kind = kind_of_file(file)
    if kind == ".parquet":
        options = {"path": "parquet", "columns": fields_of(text_field)}
    elif kind in JSON_LINES:  # records of one file may differ in their columns
        options = {"path": "text", "sample_by": "line"}
    else:
        options = {"path": "text", "sample_by": "document"}
        text_field = "text"
    try:
        rows = load_dataset(**options, data_files=[file], split="train", streaming=True)
        records = _parsed(rows, file, bad) if kind in JSON_LINES else enumerate(rows, start=1)
        for number, row in records:
            yield from text_of(row, text_field, f"{file}, record {number}", bad)
    except InputError:
        raise
    except Exception as error:  # the readers below raise a dozen types for a damaged file
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error


def _parsed(lines: Iterable[dict[str, str]], file: str, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of lines that are not empty, with their numbers."""
    for number, line in enumerate(lines, start=1):
        if not line["text"].strip():
            continue
        try:
            row = parse_object(line["text"], f"{file}, line {number}")
        except InputError as error:
            bad.meet(error)
        else:
            yield number, row


def text_of(row: dict[str, Any], field: str, where: str, bad: BadRows) -> Iterator[str]:
    """The text of a record, if it has one."""
    for name in fields_of(field):
        if not isinstance(row.get(name), str):
            bad.meet(InputError(f"{where}: no text in field {name!r}; fields here: {', '.join(row)}"))
            return
    yield PLACEHOLDER.sub(lambda found: row[found[1]], field) if PLACEHOLDER.search(field) else row[field]


def fields_of(text_field: str) -> list[str]:
    """The fields that a text is made of."""
    return PLACEHOLDER.findall(text_field) or [text_field]


def in_turn(sources: list[Iterator[str]]) -> Iterator[str]:
    """One text of each of the first 16 sources, again and again; a source that has ended gives its place to another."""
    active = sources[:FILES_IN_TURN]
    waiting = sources[FILES_IN_TURN:]
    while active:
        for source in list(active):
            text = next(source, None)
            if text is not None:
                yield text
            elif waiting:
                active[active.index(source)] = waiting.pop(0)
            else:
                active.remove(source)
