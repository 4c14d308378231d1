"""Records of local files: every format, whole, damaged or empty, and how much memory they take."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_kfac import InputError
from lightning_kfac.data import records
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.data.records import place, records_of
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.set_formats import MemorizedSet, TextSet, is_set

ROWS = [{"text": f"number {i} \u00e9", "n": i, "ids": [i, i + 1]} for i in range(200)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def written(folder: Path, name: str) -> Path:
    """The rows in a file whose name says how."""
    path = folder / name
    table = pa.Table.from_pylist(ROWS)
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=70)
    elif name == "stream.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    elif name == "file.arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    else:
        contents = LINES
        if name.startswith("array"):
            contents = json.dumps(ROWS, indent=2 if "pretty" in name else None).encode()
        elif name.startswith("objects"):
            contents = "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()
        if "bom" in name:
            contents = b"\xef\xbb\xbf" + contents
        if name.endswith(".gz"):
            contents = gzip.compress(contents)
        if name.endswith(".zst"):  # several frames, as tools that write in parallel make them
            half = len(contents) // 2
            contents = zstandard.compress(contents[:half]) + zstandard.compress(contents[half:])
        path.write_bytes(contents)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl", "bom.jsonl", "a.ndjson", "a.json", "bom.json", "a.jsonl.gz", "a.json.zst", "array.json",
        "array-pretty.json", "array-bom.json.gz", "objects.json", "a.parquet", "stream.arrow", "file.arrow",
    ],
)  # fmt: skip
def test_every_format_gives_the_same_records(tmp_path, name):
    file = written(tmp_path, name)
    found = list(records_of(file))
    assert [row for _, row in found] == ROWS
    assert [number for number, _ in found] == list(range(1, len(ROWS) + 1))


def test_numbers_of_lines_and_names_of_places(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"n": 1}\r\n\r\n  \n{"n": 2}')
    assert list(records_of(tmp_path / "a.jsonl")) == [(2, {"n": 1}), (5, {"n": 2})]
    assert place(tmp_path / "a.jsonl.gz", 5) == f"{tmp_path}/a.jsonl.gz, line 5"
    assert place(tmp_path / "a.parquet", 5) == f"{tmp_path}/a.parquet, record 5"


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_only_the_columns_that_are_asked_for(tmp_path, name):
    file = written(tmp_path, name)
    assert next(records_of(file, lambda names: [name for name in names if name == "text"]))[1] == {"text": "number 0 é"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow"])
def test_a_file_without_a_byte_has_no_records(tmp_path, name):
    (tmp_path / name).touch()
    assert list(records_of(tmp_path / name)) == []


def test_empty_shards(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(b""))
    (tmp_path / "a.json").write_text("[]")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert list(records_of(file)) == [], file


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8 text: .* at byte 7 of the line"),
        ("a.json", b'[{"a": 1}, {"a"', r"a\.json, record 2: not valid JSON"),
        ("a.json", b'[{"a": 1}, ', r"a\.json: cut off"),
        ("a.json", b'[{"a": 1}, 3]', r"a\.json, record 2: expected a JSON object, found int"),
        ("a.json", b'[{"a": "\\ud800"}]', r"a\.json, record 1: not valid JSON: half of a character"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: cannot be read"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz: compressed as a whole; unpack it first"),
        ("a.arrow", b"no arrow", r"a\.arrow: cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz: cut off; bring it here again"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst: cannot be read: zstd"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-20], r"a\.jsonl\.zst: cut off; bring it here again"),
        ("a.csv", b"a\n1", r"a\.csv: cannot read records of this kind of file; use one of \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(InputError, match=message):
        list(records_of(tmp_path / name))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read: No such file"):
        list(records_of(tmp_path / "a.jsonl"))


def test_bad_records_are_counted_where_that_is_wanted(tmp_path):
    bad = BadRows(skip=True)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\nnothing\n{"a": 2}\n[3]\n')
    assert [row["a"] for _, row in records_of(tmp_path / "a.jsonl", bad=bad)] == [1, 2]
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, 3, {"a": 2}]')
    assert [row["a"] for _, row in records_of(tmp_path / "a.json", bad=bad)] == [1, 2]
    assert bad.count == 3 and "line 2" in str(bad.first)


def test_a_line_that_does_not_end(tmp_path, monkeypatch):
    """A few compressed bytes may stand for gigabytes."""
    monkeypatch.setattr(records, "LONGEST_RECORD", 1 << 20)
    line = b'{"text": "' + b"a " * (1 << 20) + b'"}'
    for name, contents in (("a.jsonl.gz", gzip.compress(line)), ("a.jsonl.zst", zstandard.compress(line))):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=r"line 1: longer than 1,048,576 bytes; put one record in a line"):
            list(records_of(tmp_path / name))
    (tmp_path / "a.json").write_bytes(b"[" + line + b"]")
    with pytest.raises(InputError, match=r"record 1: not valid JSON: longer than"):
        list(records_of(tmp_path / "a.json"))


def test_tables_that_expand_without_end(tmp_path, monkeypatch):
    """A few bytes of a column may stand for gigabytes: of one row, of equal rows, of a whole group."""
    monkeypatch.setattr(records, "LONGEST_RECORD", 1 << 20)
    text = "a " * (1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [text]}), path, compression="zstd")
    assert path.stat().st_size < 1 << 14
    with pytest.raises(InputError, match=r"a.parquet: cannot be read: its rows have 2,097,\d+ bytes each, longer than"):
        list(records_of(path))
    pq.write_table(pa.table({"text": [text, "b", "c", "d"]}), path, compression="zstd")
    with pytest.raises(InputError, match=r"a.parquet: cannot be read: a row has 2,097,152 bytes in field 'text'"):
        list(records_of(path))
    found = list(records_of(path, lambda names: []))
    assert len(found) == 4  # a column that nobody reads harms nobody
    equal = pa.DictionaryArray.from_arrays(pa.array([0] * 640, pa.int32()), pa.array([text[: 1 << 19]]))
    pq.write_table(pa.table({"text": equal}), path, compression="zstd")
    rows = records_of(path)
    tracemalloc.start()
    for _ in range(64):
        assert len(next(rows)[1]["text"]) == 1 << 19
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()
    monkeypatch.setattr(records, "LARGEST_UNPACKED", 1 << 20)
    pq.write_table(pa.table({"text": [text[: 1 << 15]] * 64}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(InputError, match=r"bytes of column text expand to [\d,]+; cut it into smaller row groups"):
        list(records_of(path))


@pytest.mark.parametrize("write", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_arrow_is_bounded(tmp_path, monkeypatch, write):
    monkeypatch.setattr(records, "LONGEST_RECORD", 1 << 20)
    batch = pa.record_batch([pa.array(["a " * (1 << 15)] * 4)], names=["text"])
    for compression in ("zstd", None):
        with write(
            str(tmp_path / "a.arrow"), batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
        ) as f:
            for _ in range(16):
                f.write_batch(batch)
        if compression is None:
            assert len(list(records_of(tmp_path / "a.arrow"))) == 64
            continue
        with pytest.raises(InputError, match=r"it expands to more than 1,048,576 bytes; write it uncompressed"):
            list(records_of(tmp_path / "a.arrow"))


@pytest.mark.parametrize("name", ["array.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = json.dumps({"text": "some text of a document " * 40})
    count = 20_000  # 20 MB
    if name == "a.parquet":
        pq.write_table(pa.table({"text": [json.loads(row)["text"]] * count}), tmp_path / name, row_group_size=2000)
    else:
        rows = [row.replace("some", str(i)) for i in range(count)]
        contents = f"[{', '.join(rows)}]" if "array" in name else "\n".join(rows)
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (tmp_path / name).write_bytes(pack(contents.encode()))
        del contents, rows
    tracemalloc.start()
    assert sum(1 for _ in records_of(tmp_path / name)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.npy"])
def test_a_pipe_is_named_and_not_waited_for(tmp_path, name):
    """As a corpus, a memorized set, a set of texts, and one of questions."""
    pipe = tmp_path / name
    os.mkfifo(pipe)
    readers = [
        Corpus.parse(str(pipe)).check,
        lambda: list(MemorizedSet(str(pipe)).rows()),
        lambda: list(TextSet(str(pipe)).rows()),
        lambda: is_set(str(pipe)),
    ]
    if name in ("a.jsonl", "a.parquet"):
        readers.append(QuestionSet(str(pipe)).check)
    for read in readers:
        with pytest.raises(InputError, match=f"{pipe}: a pipe, not a file"):
            read()


def test_an_empty_array_is_named(tmp_path):
    (tmp_path / "a.npy").touch()
    with pytest.raises(InputError, match=r"a\.npy: has no text"):
        Corpus.parse(str(tmp_path / "a.npy")).check()
