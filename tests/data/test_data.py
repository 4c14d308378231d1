"""Corpora, packing, memorized sets, and how rows are shared out."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.demo import embedded
from lightning_kfac.data.demo.embedded import Document, embedded_documents, is_heldout, split_documents
from lightning_kfac.data.demo.planted import planted_documents
from lightning_kfac.data.loaders import FILLER, ShardedBatches, TokenRows, collate_rows
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.data.packing import row_offsets, tokenize_documents
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.tokenized import tokenized_text
from lightning_kfac.mining.windows import spread_windows
from lightning_kfac.models.loading import load_tokenizer
from lightning_kfac.models.tokens import TokenBatch
from lightning_kfac.modules.optimizers import Muon, orthogonalized
from lightning_kfac.modules.text_data import TextData
from tests.common import build_model, write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


# -- embedded corpus ---------------------------------------------------------------------------------------


def test_embedded_splits_are_disjoint_and_leave_out_the_planted():
    documents = embedded_documents()
    train = {d.name for d in split_documents(documents, "train", planted_documents())}
    heldout = {d.name for d in split_documents(documents, "heldout")}
    assert len(documents) > 2000 and 0.05 < len(heldout) / len(documents) < 0.11
    assert not train & heldout and not train & planted_documents() and not heldout & planted_documents()
    assert len(planted_documents()) == 200
    texts = [" ".join(d.text.split()) for d in documents]
    assert len(set(texts)) == len(texts)


def test_unseen_passages_come_from_heldout_documents(tokenizer):
    from lightning_kfac.assets import resolve_path

    rows = [json.loads(line) for line in resolve_path("demo:unseen.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and all(is_heldout(row["document"]) for row in rows)
    assert all(len(row["prefix_ids"]) == 64 and len(row["suffix_ids"]) == 48 for row in rows)


def test_a_drifted_corpus_keeps_every_document_on_its_side(monkeypatch):
    """Another Python version: documents come, go, and change; names decide, so none changes sides."""
    documents = list(embedded_documents())
    drifted = [Document(d.name, d.text + " Changed in version 3.99.") for d in documents[::2]]
    drifted += documents[1::4] + [
        Document(f"doc:new.module.f{i}", f"A new function, number {i}. " * 9) for i in range(300)
    ]
    drifted.reverse()
    planted = planted_documents()
    for split in ("train", "heldout"):
        before = {d.name for d in split_documents(documents, split, planted)}
        after = {d.name for d in split_documents(drifted, split, planted)}
        surviving = {d.name for d in documents} & {d.name for d in drifted}
        assert after & surviving == before & surviving
    new = {d.name for d in split_documents(drifted, "heldout")} - {d.name for d in documents}
    assert 5 < len(new) < 50  # new documents are split by name too
    # The corpus that a run reads is the drifted one, and still holds no planted document.
    monkeypatch.setattr(embedded, "embedded_documents", lambda: tuple(drifted))
    texts = set(Corpus(embedded=True).documents())
    assert not texts & {d.text for d in drifted if d.name in planted or is_heldout(d.name)}
    assert any("Changed in version 3.99" in text for text in texts)


# -- files and streams ---------------------------------------------------------------------------------------


def test_shards_with_different_columns_are_read_in_turn(mixture):
    texts = list(Corpus(source=str(mixture)).documents())
    assert sorted(texts) == sorted([f"wiki {i}" for i in range(4)] + [f"math {i}" for i in range(4)])
    assert {t.split()[0] for t in texts[:2]} == {"wiki", "math"}
    assert list(Corpus(source=str(mixture)).documents()) == texts


def test_hub_files_are_listed_by_the_data_set_builder(mixture):
    """The same call that lists a hub data set, on a folder: each file becomes a stream of its own."""
    files = Corpus.parse(str(mixture))._hub_files()
    assert sorted(f.rpartition("/")[2] for f in files) == ["shard-0.json.gz", "shard-0.jsonl.zst"]


def test_parquet_text_and_other_fields(tmp_path):
    pq.write_table(pa.table({"content": ["a", "b"], "n": [1, 2]}), tmp_path / "x.parquet")
    (tmp_path / "y.txt").write_text("one\ndocument")
    assert list(Corpus(source=str(tmp_path / "x.parquet"), text_field="content").documents()) == ["a", "b"]
    assert list(Corpus(source=str(tmp_path / "y.txt")).documents()) == ["one\ndocument"]


def test_aliases_of_the_original_tool():
    assert Corpus.parse("dolmo").source == "allenai/dolmino-mix-1124"
    assert Corpus.parse("olmo").source == "allenai/olmo-mix-1124"
    assert Corpus.parse("embedded", "heldout") == Corpus(embedded=True, split="heldout")


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


def test_wrong_corpora(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        Corpus.parse(str(tmp_path / "nothing")).check()
    with pytest.raises(InputError, match="the folder holds no"):
        Corpus.parse(str(tmp_path)).check()
    for wrong in (Corpus(), Corpus(embedded=True, source="x")):
        with pytest.raises(InputError, match="either `embedded: true` or a `source`"):
            Corpus.parse(wrong)
    with pytest.raises(InputError, match="splits"):
        Corpus.parse(Corpus(embedded=True, split="test"))


# -- packing -----------------------------------------------------------------------------------------------


def test_documents_are_joined_with_eos_to_an_exact_budget(tokenizer):
    texts = ["Return the value.", "A class.", "Another piece of text."]
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    for budget in (None, 7, 10_000, len(ids), len(ids) - 1):
        documents = list(tokenize_documents(texts, tokenizer, budget))
        assert np.concatenate(documents).tolist() == ids[:budget]
        assert all(document[-1] == tokenizer.eos_token_id for document in documents[:-1])
    assert row_offsets(10, 4).tolist() == [0, 4, 8, 10]
    assert row_offsets(8, 4).tolist() == [0, 4, 8]


def test_no_document_is_read_beyond_the_budget(tokenizer):
    read = []

    def stream():
        for i in range(10_000):
            read.append(i)
            yield "some text that takes a few tokens"

    list(tokenize_documents(stream(), tokenizer, 100))
    assert len(read) <= 256


def test_wrong_empty_corpus(tokenizer):
    with pytest.raises(InputError, match="no text"):
        list(tokenize_documents([], tokenizer, None))


@pytest.mark.parametrize("n_rows", [1, 9, 17, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_row_is_on_exactly_one_rank(n_rows, world_size, seed):
    ranks = [list(ShardedBatches(n_rows, 4, rank, world_size, seed)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # ranks wait for each other
    assert [len(batches) for batches in ranks] == [len(ShardedBatches(n_rows, 4, 0, world_size))] * world_size
    rows = [row for batches in ranks for batch in batches for row in batch if row != FILLER]
    assert sorted(rows) == list(range(n_rows))


def test_collate_pads_on_the_right_and_gives_filler_no_weight():
    rows = TokenRows(np.arange(10, dtype=np.int32), np.array([0, 4, 8, 10]))
    batch = collate_rows([rows[2], rows[0], rows[FILLER]])
    assert batch["input_ids"].tolist() == [[8, 9, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4, [1] * 4]
    assert batch["labels"].tolist() == [[8, 9, -100, -100], [0, 1, 2, 3], [-100] * 4]
    assert batch["sample_index"].tolist() == [2, 0, 0]
    dense = collate_rows([rows[0], rows[1]])
    assert dense["dense"] and dense["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert set(dense) == {"input_ids", "sample_index", "dense"}


# -- memorized sets ------------------------------------------------------------------------------------------


def test_memorized_formats(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "m.jsonl",
        [
            {"prefix_ids": [1, 2], "suffix_ids": [3], "prefix": "ignored", "suffix": "ignored"},
            {"prefix": "Return", "target_suffix": " the value"},
            {"prefix_text": "Return", "suffix_text": " the value"},
            "",
            {"prompt": "Return", "suffix": " the value"},
        ],
    )
    rows = load_memorized(path, tokenizer, 2048)
    assert (rows[0].prefix, rows[0].suffix) == ([1, 2], [3])
    assert rows[1] == rows[2] == rows[3]
    assert rows[1].prefix == tokenizer("Return")["input_ids"]
    assert rows[1].suffix == tokenizer(" the value")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the memorized set is empty"),
        (['{"prefix_ids": [1'], "line 1: not valid JSON"),
        ([{"prefix_ids": [1], "suffix_ids": [2]}, "[]"], "line 2: expected a JSON object, found list"),
        ([{"prefix_ids": [1], "suffix_ids": []}], "line 1: the suffix is empty"),
        ([{"prefix_ids": [1, 50], "suffix_ids": [2]}], r"line 1: prefix id 50 is outside .* \(0 to 49\)"),
        ([{"prefix_ids": [-1], "suffix_ids": [2]}], "prefix id -1 is outside"),
        ([{"prefix_ids": "12", "suffix_ids": [2]}], "the prefix ids must be a list of integers"),
        ([{"prefix": "x", "text": "y"}], "line 1: needs prefix_ids and suffix_ids, or text in one of target_suffix"),
    ],
)
def test_wrong_memorized_sets(tmp_path, rows, message):
    with pytest.raises(InputError, match=message) as error:
        load_memorized(write_jsonl(tmp_path / "m.jsonl", rows), lambda t, add_special_tokens: {"input_ids": [1]}, 50)
    assert "m.jsonl" in str(error.value)


def test_wrong_memorized_paths(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        load_memorized(tmp_path / "none.jsonl", None, 50)
    with pytest.raises(InputError, match=r"no file 'x\.jsonl'; it has .*planted_report\.jsonl"):
        load_memorized("demo:x.jsonl", None, 50)
    (tmp_path / "bin.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_memorized(tmp_path / "bin.jsonl", None, 50)


@pytest.mark.parametrize(
    "wrong", [{"seq_len": 1}, {"batch_size": 0}, {"max_tokens": 0}, {"sets": {"heldout": "x"}}, {"sets": {"a.b": "x"}}]
)
def test_wrong_data_options(wrong):
    with pytest.raises(InputError, match=r"data\."):
        TextData(**wrong)


def test_rows_of_a_batch_by_length_have_the_same_loss_without_the_padding():
    model = build_model("llama")
    lengths = [12, 3, 9, 12, 5, 2]
    ids = torch.zeros(6, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(row))
        mask[row, :n] = 1
    batch = TokenBatch.from_dict({"input_ids": ids, "attention_mask": mask})
    parts = list(batch.by_length())
    assert [p.input_ids.shape for p in parts] == [(3, 5), (3, 12)]
    with torch.no_grad():
        whole, split = batch.gold_loss(model), sum(p.gold_loss(model) for p in parts)
    assert split.item() == pytest.approx(whole.item(), rel=1e-6)
    assert sum(int(p.valid.sum()) for p in parts) == sum(n - 1 for n in lengths)


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


def test_muon_takes_the_steps_of_torchs_own():
    """Torch's own runs in bfloat16, so they agree to about 1 %; what ours orthogonalizes is checked by its spectrum."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1))) for _ in "12")
    start = ours.detach().clone()
    optimizers = [
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(5):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    values = torch.linalg.svdvals(orthogonalized(torch.randn(40, 24, generator=torch.Generator().manual_seed(3))))
    assert values.min() > 0.6 and values.max() < 1.3


# -- bad rows ------------------------------------------------------------------------------------------------------


def test_bad_rows_of_a_set_are_skipped_and_counted(tmp_path, capsys):
    good = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    other = {"prefix_ids": [1, 4], "suffix_ids": [3, 5, 6]}
    rows = [good, '{"prefix_ids": [1', other, {"prefix_ids": [1], "suffix_ids": []}, good, {"prefix_ids": [77]}]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    found = load_memorized(path, None, 50, skip_bad_rows=True)
    assert [(s.prefix, s.suffix) for s in found] == [([1, 2], [3]), ([1, 4], [3, 5, 6])]
    said = " ".join(capsys.readouterr().err.split())
    assert "4 bad rows skipped; the first:" in said and "line 2: not valid JSON" in said
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        load_memorized(path, None, 50)


def test_repeated_rows_count_again_and_are_told(tmp_path, capsys):
    row = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    path = write_jsonl(tmp_path / "m.jsonl", [row, {"prefix_ids": [9], "suffix_ids": [3]}, row])
    assert len(load_memorized(path, None, 50)) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "1 rows repeat earlier ones" in said and "line 3 repeats line 1" in said


def test_sets_are_cut_at_the_seam(tmp_path):
    rows = [{"prefix_ids": [1, 2, 3], "suffix_ids": [4, 5, 6]}, {"prefix_ids": [7], "suffix_ids": [8, 9]}]
    path = write_jsonl(tmp_path / "m.jsonl", rows[:1])
    (cut,) = load_memorized(path, None, 50, prefix_len=2, suffix_len=1)
    assert (cut.prefix, cut.suffix) == ([2, 3], [4])
    write_jsonl(path, rows)
    with pytest.raises(InputError, match=r"line 2: the prefix has 1 tokens, data\.prefix_len asks for 2"):
        load_memorized(path, None, 50, prefix_len=2)
    assert len(load_memorized(path, None, 50, prefix_len=2, skip_bad_rows=True)) == 1


def test_wrong_tokenizer_shows_in_the_text_beside_the_ids(tmp_path, tokenizer):
    texts = ["Return the value", "A list of strings", "The name of the file"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [{"prefix": t, "prefix_ids": i, "suffix": "x", "suffix_ids": [5]} for t, i in zip(texts, ids, strict=True)]
    assert len(load_memorized(write_jsonl(tmp_path / "m.jsonl", rows), tokenizer, 2048)) == 3
    shifted = [{**row, "prefix_ids": [i + 1 for i in row["prefix_ids"]]} for row in rows]
    path = write_jsonl(tmp_path / "m.jsonl", shifted)
    with pytest.raises(InputError, match=r"m\.jsonl: the ids do not belong to the text beside them"):
        load_memorized(path, tokenizer, 2048)


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


def test_clean_windows_are_spread_over_the_heldout_text(tmp_path):
    data = TextData(
        heldout="embedded", heldout_tokens=20_000, clean_windows=9, prefix_len=20, suffix_len=8, tokenizer="demo"
    )
    text = tokenized_text(tmp_path, "heldout", data.heldout, data.tokenizer, 20_000, 2048)
    windows = spread_windows(text, 9, *data.window)
    assert len({tuple(w.prefix) for w in windows}) == 9
    stream = text.tokens.tolist()
    for window in windows:
        ids = [*window.prefix, *window.suffix]
        assert (len(window.prefix), len(window.suffix)) == (20, 8) and 0 not in ids
        assert any(stream[i : i + 28] == ids for i in range(len(stream)))
    with pytest.raises(InputError, match=r"clean_windows is 100000, but the held-out text holds"):
        spread_windows(text, 100_000, *data.window)
    for wrong in ({"clean_windows": 5}, {"clean_windows": 5, "heldout": "embedded", "sets": {"clean": "x"}}):
        with pytest.raises(InputError, match=r"data\.clean_windows needs"):
            TextData(**wrong)


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
