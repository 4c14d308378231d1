"""Texts cut into passages, against a loop; what is used and left out is counted."""

import json

import numpy as np
import pytest

from lightning_kfac.data.passages import load_passages
from lightning_kfac.errors import InputError
from lightning_kfac.models.loading import load_tokenizer
from tests.common import write_jsonl


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


WORDS = "Return the value for key if key is in the dictionary, else default. "


def test_suffixes_follow_one_another(tmp_path, tokenizer):
    texts = [WORDS * 12, WORDS * 2, "short", WORDS * 30]
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    found = load_passages(str(file), tokenizer, 2048)
    ids = [tokenizer(text)["input_ids"] for text in texts if text != "short"]
    assert found.sizes == [len(x) for x in ids] and found.too_short == 1 and found.halved == 1
    for number, text in enumerate(ids):
        own = [p for p in found.passages if p.text == number]
        asked = [token for p in own for token in p.suffix]
        if number == 1:
            (half,) = own
            assert half.prefix + half.suffix == text and len(half.suffix) == len(text) // 2
            continue
        assert all((len(p.prefix), len(p.suffix)) == (64, 48) for p in own)
        assert all(text[p.start : p.start + 112] == p.prefix + p.suffix for p in own)
        assert asked == text[64 : 64 + len(asked)] and len(text) - 64 - len(asked) < 48
    assert "3 texts" in found.told() and "1 shorter than a passage" in found.told() and "1 left out" in found.told()
    own = load_passages(str(file), tokenizer, 2048, prefix_len=5, suffix_len=9)
    assert {(len(p.prefix), len(p.suffix)) for p in own.passages} == {(5, 9)}


def test_other_forms_of_texts(tmp_path, tokenizer, few):
    rows = [json.loads(line) for line in few.read_text().splitlines()]
    as_set = load_passages(str(few), tokenizer, 2048)
    assert [(p.prefix, p.suffix) for p in as_set.passages] == [(r["prefix_ids"], r["suffix_ids"]) for r in rows]
    assert as_set.untouched and as_set.told() == "10 texts, 10 passages"
    cut = load_passages(str(few), tokenizer, 2048, prefix_len=20, suffix_len=8)
    assert [(p.prefix, p.suffix) for p in cut.passages] == [(r["prefix_ids"][-20:], r["suffix_ids"][:8]) for r in rows]
    named = write_jsonl(tmp_path / "n.jsonl", [{"a": r["prefix"], "b": r["suffix"]} for r in rows])
    by_fields = {"source": str(named), "prefix_field": "a", "suffix_field": "b"}
    assert [p.suffix for p in load_passages(by_fields, tokenizer, 2048).passages] == [r["suffix_ids"] for r in rows]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text(WORDS * 12)
    (tmp_path / "plain" / "b.txt").write_text(WORDS * 9)
    folder = load_passages(str(tmp_path / "plain"), tokenizer, 2048)
    assert len(folder.sizes) == 2 and not folder.untouched
    ids = tokenizer(WORDS * 12)["input_ids"]
    np.save(tmp_path / "ids.npy", np.array([*ids, 0, *ids, 0], dtype=np.int64))
    one = load_passages(str(tmp_path / "plain" / "a.txt"), tokenizer, 2048)
    twice = load_passages(str(tmp_path / "ids.npy"), tokenizer, 2048)
    assert twice.sizes == 2 * one.sizes and twice.passages[0] == one.passages[0]


def test_what_cannot_be_cut(tmp_path, tokenizer):
    short = write_jsonl(tmp_path / "s.jsonl", [{"text": "short"}, {"text": "Return the value."}])
    empty = write_jsonl(tmp_path / "e.jsonl", [{"prefix": "Return", "suffix": ""}])
    for source, lengths, said in (
        (short, {}, r"no text is long enough: the longest has \d+ tokens, 16 are needed"),
        (short, {"prefix_len": 0}, "prefix_len is 0"),
        (short, {"suffix_len": -1}, "suffix_len is -1"),
        (empty, {}, r"line 1: the suffix is empty"),
        (tmp_path / "none.txt", {}, "no such file or folder"),
    ):
        with pytest.raises(InputError, match=said):
            load_passages(str(source), tokenizer, 2048, **lengths)
