"""A text is tokenized once, and its budget is spread over documents."""

import re
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_kfac import InputError
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.tokenized import tokenized_text
from tests.common import write_jsonl
from tests.tally import DAMAGED, tally


def test_tokenized_text_is_made_once(tmp_path, tokenizer):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "Return the value."}, {"text": "A class."}])
    corpus = Corpus(source=str(tmp_path / "c.jsonl"))
    text = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, None, 2048)
    parts = np.split(text.tokens, text.ends[:-1])
    assert [tokenizer.decode(part[:-1]) for part in parts] == ["Return the value.", "A class."]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").iterdir()}
    again = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, None, 2048)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "t").iterdir()} == before
    assert np.array_equal(again.tokens, text.tokens)
    tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, 3, 2048)
    assert len(list((tmp_path / "t").iterdir())) == 4


def folder_of_texts(folder: Path, count: int, words: int) -> Path:
    """Text files of numbered words, in lines."""
    folder.mkdir()
    for number in range(count):
        lines = (" ".join(f"d{number}w{i}" for i in range(line, line + 9)) for line in range(0, words, 9))
        (folder / f"{number:04}.txt").write_text("\n".join(lines))
    return folder


def read(tmp_path, tokenizer, corpus, budget, **options):
    """The text, and the documents that it comes from, by the numbers in their words."""
    text = tokenized_text(tmp_path / "t", "corpus", Corpus.parse(str(corpus)), tokenizer, budget, 2048, **options)
    parts = [tokenizer.decode(part) for part in np.split(text.tokens, text.ends[:-1])]
    return text, [set(re.findall(r"d(\d+)w", part)) for part in parts]


def test_a_budget_is_spread_over_documents(tmp_path, tokenizer, capsys):
    folder = folder_of_texts(tmp_path / "texts", 401, 600)
    text, documents = read(tmp_path, tokenizer, folder, 60_000)
    assert len(text.tokens) == 60_000 and all(len(found) == 1 for found in documents)
    assert len(set.union(*documents)) == len(documents) == 200 == len(text.cuts)
    assert np.array_equal(text.cuts, text.ends - 1) and np.array_equal(np.diff(text.ends), [300] * 199)
    assert (text.tokens[text.cuts] == tokenizer.eos_token_id).all()
    said = capsys.readouterr().err
    assert f"{folder}:train: 60,000 tokens of 200 of 401 documents" in said and "few documents" not in said
    again, _ = read(tmp_path / "again", tokenizer, folder, 60_000)
    assert np.array_equal(again.tokens, text.tokens)


def test_few_documents_give_more_each(tmp_path, tokenizer, capsys):
    """Thirty documents fill the budget alike; of two, one of which is short, the other gives the rest."""
    folder = folder_of_texts(tmp_path / "texts", 30, 3000)
    text, documents = read(tmp_path, tokenizer, folder, 60_000)
    assert len(text.tokens) == 60_000 and len(documents) == 30
    sizes = np.diff(text.ends, prepend=0)
    assert sizes.min() > 1900 and sizes.max() == 2000
    said = capsys.readouterr().err
    assert "60,000 tokens of 30 of 30 documents" in said and "few documents (30)" in said
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "long.txt").write_text((folder / "0000.txt").read_text() * 4)
    (tmp_path / "two" / "short.txt").write_text("d1w1 d1w2")
    text, documents = read(tmp_path, tokenizer, tmp_path / "two", 20_000)
    assert len(text.tokens) == 20_000 and sorted(map(sorted, documents)) == [["0"], ["1"]]


def test_one_document_is_read_from_its_beginning(tmp_path, tokenizer):
    folder = folder_of_texts(tmp_path / "texts", 1, 90_000)
    whole = tokenizer((folder / "0000.txt").read_text(), add_special_tokens=False)["input_ids"]
    text, _ = read(tmp_path, tokenizer, folder / "0000.txt", 20_000)
    assert text.tokens.tolist() == whole[:20_000] and not len(text.cuts)


def test_a_small_corpus_is_used_whole(tmp_path, tokenizer, capsys):
    folder = folder_of_texts(tmp_path / "texts", 60, 90)
    text, documents = read(tmp_path, tokenizer, folder, 1_000_000)
    assert len(documents) == 60 and not len(text.cuts)
    whole = [tokenizer(file.read_text(), add_special_tokens=False)["input_ids"] for file in folder.iterdir()]
    assert len(text.tokens) == sum(map(len, whole)) + 60
    said = capsys.readouterr().err
    assert f"{len(text.tokens):,} tokens of 60 of 60 documents" in said and "fewer than the 1,000,000 asked for" in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_large_file_is_read_all_over(tmp_path, tokenizer, name, capsys):
    """Its first documents are no sample: files are sorted by source or date."""
    rows = [{"text": " ".join(f"d{number}w{i}" for i in range(60))} for number in range(4000)]
    if name == "a.jsonl":
        write_jsonl(tmp_path / name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=200)
    _, documents = read(tmp_path, tokenizer, tmp_path / name, 30_000)
    numbers = [int(next(iter(found))) for found in documents if found]
    assert len(numbers) > 60 and all(np.histogram(numbers, bins=4, range=(0, 4000))[0] > 4)
    assert f"tokens of {len(documents):,} of 4,000 documents" in capsys.readouterr().err


def test_a_search_reads_whole_documents_in_order(tmp_path, tokenizer, capsys):
    folder = folder_of_texts(tmp_path / "texts", 3, 900)
    text, documents = read(tmp_path, tokenizer, folder, 6_000, sample=False)
    assert not len(text.cuts) and len(documents) == 2 and "documents" not in capsys.readouterr().err
    whole = [tokenizer(file.read_text(), add_special_tokens=False)["input_ids"] for file in sorted(folder.iterdir())]
    assert text.tokens[: text.ends[0] - 1].tolist() in whole


def test_a_corpus_of_token_ids(tmp_path, tokenizer, capsys):
    texts = [f"Return the value of {i}." for i in range(300)]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    np.concatenate(ids).astype("<u2").tofile(tmp_path / "a.npy")
    text, _ = read(tmp_path, tokenizer, tmp_path / "a.npy", None)
    assert text.tokens.tolist() == list(chain(*ids)) and np.diff(text.ends, prepend=0).tolist() == [*map(len, ids)]
    said = capsys.readouterr().err
    assert "token ids are used as they are; this tokenizer reads them as 'Return the value of 0." in said
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6, 4000]}])
    with pytest.raises(InputError, match=r"the id 4000 is outside the model's vocabulary \(0 to 2047\); the token ids"):
        read(tmp_path, tokenizer, tmp_path / "a.jsonl", None)
    write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6, -100]}])
    with pytest.raises(InputError, match="the id -100 is outside"):
        read(tmp_path, tokenizer, tmp_path / "a.jsonl", None)


def test_bad_records_are_counted_once(tmp_path, tokenizer, capsys):
    """Few documents are read several times until the budget is spread."""
    rows = [{"text": " ".join(f"d{n}w{i}" for i in range(900))} for n in range(3)]
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"body": "none"}])
    read(tmp_path, tokenizer, tmp_path / "a.jsonl", 9_000, skip_bad_rows=True)
    assert "1 bad rows skipped" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["tokens", "safetensors"])
@pytest.mark.parametrize("harm", ["half", "zeros", "bit", "part of a number", "empty", "gone", "other"])
def test_a_damaged_text_is_tokenized_again(tmp_path, tokenizer, which, harm, capsys):
    folder = folder_of_texts(tmp_path / "texts", 3, 90)
    text, _ = read(tmp_path, tokenizer, folder, 500)
    expected = text.tokens.tolist(), text.ends.tolist(), text.cuts.tolist()
    other = folder_of_texts(tmp_path / "other", 2, 900)
    read(tmp_path / "elsewhere", tokenizer, other, 500)
    file = next((tmp_path / "t").glob(f"*.{which}"))
    good = file.read_bytes()
    middle = len(good) // 2
    harmed = {
        "half": good[:middle],
        "zeros": bytes(len(good)),
        "bit": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "part of a number": good[:-3],
        "empty": b"",
        "other": next((tmp_path / "elsewhere" / "t").glob(f"*.{which}")).read_bytes(),
    }
    tally(DAMAGED)
    file.unlink()
    if harm != "gone":
        file.write_bytes(harmed[harm])
    capsys.readouterr()
    again, _ = read(tmp_path, tokenizer, folder, 500)
    assert (again.tokens.tolist(), again.ends.tolist(), again.cuts.tolist()) == expected
    said = capsys.readouterr().err
    assert ("the text is tokenized again" in said) == (harm != "gone") and "500 tokens of 3 of 3 documents" in said
    assert {path.suffix for path in (tmp_path / "t").iterdir()} == {".tokens", ".safetensors"}


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    folder = folder_of_texts(tmp_path / "texts", 3, 90)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr("lightning_kfac.data.tokenized.tokenize_documents", full)
    with pytest.raises(InputError, match=r"\.tokens: cannot be written: no space left on the device; free some"):
        read(tmp_path, tokenizer, folder, 500)
    assert not list((tmp_path / "t").iterdir())


def test_a_damaged_text_of_version_0_1_is_named(tmp_path, tokenizer):
    folder = folder_of_texts(tmp_path / "texts", 3, 90)
    corpus = Corpus.parse(str(folder))
    text = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, 500, 2048, sample=False)
    ends = text.ends
    file = next((tmp_path / "t").glob("*.tokens"))
    file.with_suffix(".places.safetensors").unlink()
    np.save(file.with_suffix(".ends.npy"), ends)
    earlier = tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, 500, 2048)
    assert earlier.tokens.tolist() == text.tokens.tolist() and earlier.ends.tolist() == ends.tolist()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"\.tokens: damaged; remove it"):
        tokenized_text(tmp_path / "t", "corpus", corpus, tokenizer, 500, 2048)
