"""Documents of files in every format."""

import gzip
import itertools
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from lightning_kfac import InputError
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.readers import (
    Reading,
    count_of_file,
    documents_of_file,
    holds_little,
    in_turn,
    sources_of_file,
)
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.token_files import TokenKind
from tests.common import write_jsonl


def test_shards_with_different_columns_are_read_in_turn(mixture):
    texts = list(Corpus(source=str(mixture)).documents())
    assert sorted(texts) == sorted([f"wiki {i}" for i in range(4)] + [f"math {i}" for i in range(4)])
    assert {t.split()[0] for t in texts[:2]} == {"wiki", "math"}
    assert list(Corpus(source=str(mixture)).documents()) == texts


def test_parquet_text_and_other_fields(tmp_path):
    pq.write_table(pa.table({"content": ["a", "b"], "n": [1, 2]}), tmp_path / "x.parquet")
    (tmp_path / "y.txt").write_text("one\ndocument")
    assert list(Corpus(source=str(tmp_path / "x.parquet"), text_field="content").documents()) == ["a", "b"]
    assert list(Corpus(source=str(tmp_path / "y.txt")).documents()) == ["one\ndocument"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"record 1: no text in field 'text'; fields here: body, id"),
        ("a.jsonl", b"[1]\n", r"line 1: expected a JSON object, found list"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read"),
        ("a.csv", b"text\nx", r"a\.csv: cannot read this kind of file"),
    ],
)
def test_wrong_corpus_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(Corpus(source=str(tmp_path / name)).documents())


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_text_made_of_several_fields(tmp_path, kind):
    rows = [{"question": "1 + {x}?", "answer": "it is 2", "n": 3}]
    file = tmp_path / f"qa.{kind}"
    if kind == "jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    corpus = Corpus.parse({"source": str(file), "text_field": "Q: {question}\nA: {answer}"})
    assert list(corpus.documents()) == ["Q: 1 + {x}?\nA: it is 2"]
    with pytest.raises(InputError, match=r"no text in field 'n'|cannot be read"):
        list(Corpus.parse({"source": str(file), "text_field": "{question}{n}"}).documents())


def test_bad_records_of_a_corpus_are_skipped_and_counted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n{"text": 3}\n{"text": "two"}\n{"text": "cut off in the mid')
    bad = BadRows(skip=True)
    assert list(Corpus(source=str(path)).documents(bad)) == ["one", "two"]
    assert bad.count == 2 and "line 2" not in str(bad.first) and "record 2: no text" in str(bad.first)
    with pytest.raises(InputError, match=r"c\.jsonl, record 2"):
        list(Corpus(source=str(path)).documents())
    path.write_text('{"text": "one"}\n{"text": "cut off in the mid')
    with pytest.raises(InputError, match=r"c\.jsonl, line 2: not valid JSON"):
        list(Corpus(source=str(path)).documents())


def touched(folder, files):
    """Files with contents, by name."""
    for name, contents in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return folder


def texts(source, **options):
    return sorted(Corpus.parse({"source": str(source), **options}).documents())


ONE = '{"text": "the only document"}\n'
CARDS = {
    "README.md": "---\nlicense: odc-by\n---\n# A card\n", "LICENSE.txt": "Apache", "data/README.md": "how it was made",
    "dataset_infos.json": '{"default": {\n}}', "state.json": "{}", ".gitattributes": "*.parquet filter=lfs",
    ".cache/huggingface/download/x.jsonl": ONE, "data/.hidden.txt": "hidden", "croissant.json": "{}",
}  # fmt: skip


def test_cards_and_files_about_the_data_are_no_documents(tmp_path):
    touched(tmp_path, CARDS | {"data/train-00000-of-00001.jsonl": ONE})
    assert texts(tmp_path) == ["the only document"]
    assert texts(tmp_path / "README.md") == [CARDS["README.md"]]  # asked for by name


def test_a_folder_of_cards_alone_is_a_corpus_of_them(tmp_path):
    touched(tmp_path, {"a/README.md": "one", "b/README.md": "two"})
    assert texts(tmp_path) == ["one", "two"]


def test_every_kind_in_one_folder(tmp_path):
    touched(tmp_path, {
        "a.txt": "text", "b/c.md": "markdown", "b/.d.txt": "no", "empty.jsonl": "",
        "e.jsonl": '\ufeff{"text": "lines"}\n', "f.json": '[\n {"text": "array"}\n]', "g.csv": "text\nno",
        "bom.txt": "\ufeffmark", "empty.parquet": b"",
        "h.jsonl.gz": gzip.compress(b'{"text": "gz"}\n'), "i.txt.zst": zstandard.compress(b"zst"), "empty.txt": "",
    })  # fmt: skip
    pq.write_table(pa.table({"text": ["parquet"], "n": [1]}), tmp_path / "j.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "k.parquet")
    assert texts(tmp_path) == sorted(["text", "markdown", "lines", "array", "mark", "gz", "zst", "parquet"])


def test_what_save_to_disk_writes(tmp_path, capfd):
    data = Dataset.from_dict({"text": [f"train {i}" for i in range(5)], "n": list(range(5))})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "data-00002-of-00003.arrow").write_bytes(b"left by an earlier one")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"left by map")
    assert texts(tmp_path / "one") == [f"train {i}" for i in range(5)]
    both = DatasetDict({"train": data, "test": Dataset.from_dict({"text": ["test"]})})
    both.save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both") == [f"train {i}" for i in range(5)]
    assert texts(tmp_path / "both", split="test") == ["test"]
    with pytest.raises(InputError, match=r"there is no split 'dev'; there are test, train"):
        texts(tmp_path / "both", split="dev")


def test_splits_of_a_hub_folder_by_the_names_of_its_files(tmp_path):
    for name in ("train", "test"):
        shards = {f"data/{name}-{i:05}-of-00002.jsonl": f'{{"text": "{name} {i}"}}\n' for i in (0, 1)}
        touched(tmp_path, shards)
    assert texts(tmp_path) == ["train 0", "train 1"]
    assert texts(tmp_path, split="test") == ["test 0", "test 1"]
    touched(tmp_path / "parts", {f"part-{i:05}-of-00002.jsonl": f'{{"text": "{i}"}}\n' for i in (0, 1)})
    assert texts(tmp_path / "parts") == ["0", "1"]


def test_records_of_token_ids(tmp_path):
    rows = [{"input_ids": [5, 6, 0, 7], "attention_mask": [1, 1, 1, 0]}, {"tokens": [8, 9, 0, 4]}, {"text": "a text"}]
    how = Reading(tokens=TokenKind(eos=0, known=10, vocab_size=10))
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    for file, expected in (
        (write_jsonl(tmp_path / "a.jsonl", rows), [[5, 6, 0], [8, 9, 0], [4], "a text"]),
        (tmp_path / "a.parquet", [[5, 6, 0]]),
    ):
        found = documents_of_file(file, how)
        assert [d if isinstance(d, str) else d.ids.tolist() for d in found] == expected
    with pytest.raises(InputError, match=r"record 1: token ids in field 'input_ids', where text is needed"):
        list(documents_of_file(tmp_path / "a.jsonl", Reading()))


# -- parts of large files ------------------------------------------------------------------------------------------


def large(folder, name, count=400):
    """A file of records of very different lengths; texts are numbered."""
    rows = [{"text": f"{i} " + "x" * (i * 7919 % 900)} for i in range(count)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=37)
    elif name.endswith("arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=37)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return folder / name, [row["text"] for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("stretch", [50, 3_000, 10_000])
def test_parts_hold_every_document_once(tmp_path, name, stretch):
    file, expected = large(tmp_path, name)
    sources = sources_of_file(file, Reading(), stretch)
    assert len(sources) > 10
    assert [text for source in sources for text in source] == expected  # parts are in the order of the file
    parts = len(sources)
    sources = sources_of_file(file, Reading(), stretch)
    first = [expected.index(text) for text in itertools.islice(in_turn(sources, parts), parts)]
    assert sum(np.histogram(first, bins=10, range=(0, 400))[0] > 0) == 10  # of every tenth of the file
    assert count_of_file(file) == (None if name == "a.json" else len(expected))


def test_errors_in_a_part_name_the_line(tmp_path):
    file, expected = large(tmp_path, "a.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[500] = b"nothing\n"
    lines[600] = b'{"body": "x"}\n'
    file.write_bytes(b"".join(lines))
    for number, message in ((500, "line 501: not valid JSON"), (600, "record 601: no text in field 'text'")):
        sources = sources_of_file(file, Reading(), 3_000)
        place = sum(map(len, lines[:number]))
        with pytest.raises(InputError, match=rf"a\.jsonl, {message}"):
            list(sources[place // 3_000])
    bad = BadRows(skip=True)
    found = [text for source in sources_of_file(file, Reading(bad=bad), 3_000) for text in source]
    assert found == [text for i, text in enumerate(expected) if i not in (250, 300)] and bad.count == 2


def test_items_in_turn():
    sources = [iter("abc"), iter(""), iter("d"), iter("efgh")]
    assert "".join(in_turn(sources, 2)) == "abdcefgh"


def test_no_part_keeps_its_file_open(tmp_path):
    """A thousand stretches of lines, and as many texts, are read in turn."""
    file, _ = large(tmp_path, "a.jsonl")
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text("text")
    sources = [s for f in sorted(tmp_path.iterdir()) for s in sources_of_file(f, Reading(), 200)]
    before = len(os.listdir("/proc/self/fd"))
    items = in_turn(sources, len(sources))
    for _ in range(len(sources) // 2):
        next(items)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert holds_little(file) and not holds_little(tmp_path / "a.parquet")
