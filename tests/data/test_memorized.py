"""Memorized sets: formats, bad rows, cuts, and the tokenizer that they belong to."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from tests.common import write_jsonl


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


def test_ids_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    ids = {"prefix_ids": [1, 2], "suffix_ids": [3]}
    text = {"prefix": "Return", "suffix": " the value", "tokenizer_fingerprint": "f" * 64}
    own = {**ids, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    path = write_jsonl(tmp_path / "m.jsonl", [own, text])  # what is text is tokenized anew
    assert len(load_memorized(path, tokenizer, 2048)) == 2
    path = write_jsonl(tmp_path / "m.jsonl", [own, {**ids, "tokenizer_fingerprint": "f" * 64}])
    known = own["tokenizer_fingerprint"][:8]
    with pytest.raises(
        InputError, match=rf"line 2: the ids were made by another tokenizer \(f{{8}}\) than .* \({known}\)"
    ):
        load_memorized(path, tokenizer, 2048)
    assert len(load_memorized(path, None, 2048)) == 2  # without a tokenizer there is nothing to compare
