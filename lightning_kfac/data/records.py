"""Records of local files: JSON lines, a JSON array or object, Parquet, Arrow; a stream, without any network."""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from typing_extensions import override

from lightning_kfac.data.rows import BadRows, check_object, json_errors, parse_object
from lightning_kfac.errors import InputError, first_line
from lightning_kfac.storage.special_files import check_not_special

LINES = (".jsonl", ".ndjson")
JSON = (*LINES, ".json")
TABLES = (".parquet", ".arrow")
RECORDS = (*JSON, *TABLES)
COMPRESSION = (".gz", ".zst")
ROWS_AT_ONCE = 64
CHUNK = 1 << 16
# What expands without end from a small file is no record: this many bytes are still parsed within a gigabyte.
LONGEST_RECORD = 1 << 28
# A column of a row group may unpack to so much, or, if it is larger on the disk, to so many times as much.
LARGEST_UNPACKED = 1 << 30
MOST_EXPANSION = 200
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def kind_of_file(name: str) -> str:
    """The suffix, without that of a compression: ``a.jsonl.gz`` -> ``.jsonl``."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in COMPRESSION else path).suffix


# Of the names of a file's columns, those to read.
Wanted = Callable[[Sequence[str]], Sequence[str]]


def records_of(
    file: Path, wanted: Wanted | None = None, bad: BadRows | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a file with their numbers, from 1; of JSON lines, with the numbers of their lines.

    A file without a byte has no records. A text in a JSON array is a record with the field ``text``.

    Args:
        file: JSONL (``.ndjson``), JSON (lines, an array of objects, or objects one after the other), Parquet or
            Arrow; JSON also as ``.gz`` or ``.zst``.
        wanted: Which fields to read, of those that a file of columns has; by default all.
        bad: What to do with what is no record; by default it is an error.

    Raises:
        InputError: The file cannot be read, or holds something else; names the file and the line or record.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
        >>> list(records_of(path))
        [(1, {'text': 'one'}), (3, {'text': 'two'})]
    """
    bad = bad or BadRows()
    kind = kind_of_file(file.name)
    if kind not in RECORDS:
        raise InputError(f"{file}: cannot read records of this kind of file; use one of {', '.join(RECORDS)}")
    if kind in TABLES and file.suffix in COMPRESSION:
        raise InputError(f"{file}: compressed as a whole; unpack it first ({kind} compresses its columns itself)")
    with reading(file):
        if not file.stat().st_size:
            return
        if kind == ".parquet":
            yield from enumerate(_rows_of_parquet(file, wanted), start=1)
        elif kind == ".arrow":
            yield from enumerate(_rows_of_arrow(file, wanted), start=1)
        elif kind in LINES or has_lines(file):
            yield from _objects_in_lines(file, bad)
        else:
            yield from _objects_in_values(file, bad)


def place(file: Path, number: int) -> str:
    """How a message names a record of ``records_of``."""
    return f"{file}, {'line' if kind_of_file(file.name) in LINES else 'record'} {number}"


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what reading a file may raise into an ``InputError`` that names it; a pipe or a device is refused."""
    check_not_special(file)
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error.reason}; convert it (iconv -t UTF-8)") from None
    except EOFError:
        raise InputError(f"{file}: cut off; bring it here again") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # of zlib, zstandard and pyarrow: a dozen types for a damaged file
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error


def open_file(file: Path) -> BinaryIO:
    """A local file for reading, uncompressed."""
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file))
    if file.suffix == ".zst":
        return io.BufferedReader(_Unzstandard(file), CHUNK)
    return open(file, "rb")


class _Unzstandard(io.RawIOBase):
    """What a zstandard file holds. The package's own reader ends without a word where a file is cut off."""

    # A block of three bytes may stand for 128 KB.
    STEP = 1 << 8

    def __init__(self, file: Path):
        self._packed = open(file, "rb")  # noqa: SIM115 (closed below)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, target: Any) -> int:
        while not self._ready and self._refilled():
            pass
        taken = self._ready[: len(target)]
        target[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def _refilled(self) -> bool:
        packed = self._frame.unused_data if self._frame.eof else b""
        packed = packed or self._packed.read(self.STEP)
        if self._frame.eof and packed:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._begun = False
        if not packed:
            if self._begun and not self._frame.eof:
                raise EOFError
            return False
        self._begun = True
        self._ready = memoryview(self._frame.decompress(packed))
        return True

    @override
    def close(self) -> None:
        self._packed.close()
        super().close()


# -- JSON ------------------------------------------------------------------------------------------------------


def _too_long() -> str:
    return f"longer than {LONGEST_RECORD:,} bytes"


def has_lines(file: Path) -> bool:
    """Whether each line is an object, or an array or an object goes over all of them."""
    with open_file(file) as stream:
        beginning = stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip()  # type: ignore[attr-defined]
        if beginning.startswith(b"["):
            return False
        _, line = next(lines_of(stream, file), (1, b""))
    return not line.startswith(b"{") or line.rstrip().endswith(b"}")


def lines_of(stream: BinaryIO, file: Path, number: int = 1) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers.

    Args:
        number: Of the first line.
    """
    while line := stream.readline(LONGEST_RECORD):
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            raise InputError(f"{file}, line {number}: {_too_long()}; put one record in a line")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield number, line
        number += 1


def lines_between(file: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at a byte in [start, stop) and are not empty, with these bytes.

    The file is open only while a line is read, so that many stretches of many files can be read in turn.
    """
    place = start
    if start:
        with open(file, "rb") as stream:
            stream.seek(start - 1)
            while (skipped := stream.readline(CHUNK)) and not skipped.endswith(b"\n"):
                if stream.tell() >= stop:
                    return  # within a line longer than the stretch
            place = stream.tell()
    while place < stop:
        with open(file, "rb") as stream:
            stream.seek(place)
            line = stream.readline(LONGEST_RECORD)
        if not line:
            return
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            raise InputError(f"{file}, byte {place:,}: a line {_too_long()}; put one record in a line")
        begin = place
        place += len(line)
        line = line if begin else line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield begin, line


def object_of_line(line: bytes, where: str) -> dict[str, Any]:
    """The object in a line; raises ``InputError`` where there is none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    return parse_object(text, where)


def _objects_in_lines(file: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_file(file) as stream:
        for number, line in lines_of(stream, file):
            try:
                row = object_of_line(line, f"{file}, line {number}")
            except InputError as error:
                bad.meet(error)
            else:
                yield number, row


def _objects_in_values(file: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of an array, or that follow each other over several lines."""
    with open_file(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        values = _Values(text)
        number = 0
        while values.has_next():
            number += 1
            where = f"{file}, record {number}"
            try:
                with json_errors(where):
                    value, source = values.next()
            except InputError as error:  # where it ends nobody knows
                bad.meet(error)
                return
            try:
                row = check_object({"text": value} if isinstance(value, str) else value, source, where)
            except InputError as error:
                bad.meet(error)
            else:
                yield number, row


class _Values:
    """JSON values of an array or one after the other, with no more than one of them in memory."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream
        self._text = ""
        self._decoder = json.JSONDecoder()
        self._in_array = self._skip("[")

    def has_next(self) -> bool:
        """Whether another value follows; raises ``EOFError`` where an array does not end."""
        self._skip(",")
        if self._in_array and not self._text:
            raise EOFError
        return bool(self._text) and not self._text.startswith("]")

    def next(self) -> tuple[Any, str]:
        """The next value and its source; raises what ``json`` does."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                if len(self._text) > LONGEST_RECORD:
                    raise ValueError(f"longer than {LONGEST_RECORD:,} characters; cut it") from None
                if not self._read():
                    raise
            else:
                source = self._text[:end]
                self._text = self._text[end:]
                return value, source

    def _skip(self, sign: str) -> bool:
        """White space, and one sign in it, if it is there."""
        self._skip_space()
        found = self._text.startswith(sign)
        if found:
            self._text = self._text[1:]
            self._skip_space()
        return found

    def _skip_space(self) -> None:
        self._text = self._text.lstrip()
        while not self._text and self._read():
            self._text = self._text.lstrip()

    def _read(self) -> bool:
        """Doubles what is in memory, so that a long value is not tried too often."""
        more = self._stream.read(max(CHUNK, len(self._text)))
        self._text += more
        return bool(more)


# -- tables ----------------------------------------------------------------------------------------------------


def _rows_of_parquet(file: Path, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            yield from group_rows(parquet, group, wanted)


def open_parquet(file: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that reads a little at a time, and checks the checksums of pages with some."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def group_rows(parquet: Any, group: int, wanted: Wanted | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one row group; raises ``ValueError`` for rows that nobody can mean."""
    columns = wanted(parquet.schema_arrow.names) if wanted else None
    for batch in parquet.iter_batches(_rows_at_once(parquet, group, columns), [group], columns):
        yield from _rows_of_table(batch)


def _rows_at_once(parquet: Any, group: int, columns: Sequence[str] | None) -> int:
    """So many rows that what their columns hold, packed together, is no more than a long record."""
    about = parquet.metadata.row_group(group)
    parts = [about.column(number) for number in range(about.num_columns)]
    chosen = [part for part in parts if columns is None or part.path_in_schema.partition(".")[0] in columns]
    size = max((part.total_uncompressed_size for part in chosen), default=0)
    if about.num_rows and size > LONGEST_RECORD * about.num_rows:
        raise ValueError(f"its rows have {size // about.num_rows:,} bytes each, {_too_long()}; cut them")
    for part in chosen:
        if part.total_uncompressed_size > max(LARGEST_UNPACKED, MOST_EXPANSION * part.total_compressed_size):
            raise ValueError(
                f"{part.total_compressed_size:,} bytes of column {part.path_in_schema} expand to "
                f"{part.total_uncompressed_size:,}; cut it into smaller row groups"
            )
    return max(1, min(ROWS_AT_ONCE, LONGEST_RECORD // max(size, 1)))


def _rows_of_table(batch: Any) -> list[dict[str, Any]]:
    """The rows of a ``pyarrow.RecordBatch``, once none of their texts is found to be too long."""
    import pyarrow
    import pyarrow.compute

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            longest = pyarrow.compute.max(pyarrow.compute.binary_length(column)).as_py() or 0
            if longest > LONGEST_RECORD:
                raise ValueError(f"a row has {longest:,} bytes in field {name!r}, {_too_long()}; cut it")
    return list(batch.to_pylist())


def _rows_of_arrow(file: Path, wanted: Wanted | None) -> Iterator[dict[str, Any]]:
    for batch in batches_of_arrow(file):
        yield from rows_of_batch(batch, wanted)


def batches_of_arrow(file: Path) -> list[Any]:
    """The ``pyarrow.RecordBatch`` of a stream, as the datasets package writes it, or of a file with an index behind it.

    They stay on the disk until their rows are read, unless they are compressed.

    Raises:
        ValueError: They are compressed, and too large to keep.
    """
    import pyarrow

    source = pyarrow.memory_map(str(file))  # lives as long as the batches
    try:
        return _kept(pyarrow.ipc.open_stream(source))
    except pyarrow.ArrowInvalid:
        indexed = pyarrow.ipc.open_file(source)
        return _kept(indexed.get_batch(number) for number in range(indexed.num_record_batches))


def _kept(batches: Iterable[Any]) -> list[Any]:
    import pyarrow

    before = pyarrow.total_allocated_bytes()
    kept = []
    for batch in batches:
        kept.append(batch)
        if pyarrow.total_allocated_bytes() - before > LONGEST_RECORD:
            raise ValueError(f"compressed, it expands to more than {LONGEST_RECORD:,} bytes; write it uncompressed")
    return kept


def rows_of_batch(batch: Any, wanted: Wanted | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a batch."""
    chosen = batch.select(wanted(batch.schema.names)) if wanted else batch
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        yield from _rows_of_table(chosen.slice(start, ROWS_AT_ONCE))
