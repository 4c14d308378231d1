"""Documents of files in every format."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_kfac import InputError
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.rows import BadRows
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
