"""Memorized sets and questions in the formats that people have them in."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_kfac import InputError
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.data.set_formats import MemorizedSet, TextSet, is_set
from lightning_kfac.data.text_ids import continuation_ids
from tests.common import write_jsonl

IDS = np.arange(3 * 64).reshape(3, 64) % 50
ROWS = [{"prefix_ids": ids[:32].tolist(), "suffix_ids": ids[32:].tolist()} for ids in IDS]
CUT = [MemorizedSequence(ids[:32].tolist(), ids[32:].tolist()) for ids in IDS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("named", ["train_prefix.npy", "train_suffix.npy"])
def test_pairs_of_arrays(tmp_path, named, dtype):
    """As lm-extraction-benchmark has them; either file names both."""
    np.save(tmp_path / "train_prefix.npy", IDS[:, :32].astype(dtype))
    np.save(tmp_path / "train_suffix.npy", IDS[:, 32:].astype(dtype))
    assert load_memorized(tmp_path / named, None, 50) == CUT
    files = [tmp_path / "train_prefix.npy", tmp_path / "train_suffix.npy"]
    assert MemorizedSet(str(tmp_path / named)).files() == files and is_set(str(tmp_path / named))


def test_an_array_of_whole_sequences(tmp_path, capsys):
    np.save(tmp_path / "train_dataset.npy", IDS)
    assert load_memorized(tmp_path / "train_dataset.npy", None, 50) == CUT
    assert "3 rows of tokens do not say where their prefix ends and are cut in the middle" in said(capsys)
    found = load_memorized(tmp_path / "train_dataset.npy", None, 50, prefix_len=10, suffix_len=4)
    assert found == [MemorizedSequence(ids[:10].tolist(), ids[10:14].tolist()) for ids in IDS]
    assert "middle" not in said(capsys)


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_tables_of_tokens(tmp_path):
    """As the evaluation of Pythia has them."""
    pq.write_table(pa.table({"index": [5, 6, 7], "tokens": IDS.tolist()}), tmp_path / "set.parquet")
    assert load_memorized(tmp_path / "set.parquet", None, 50) == CUT
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "ids.parquet")
    assert load_memorized(tmp_path / "ids.parquet", None, 50) == CUT


def test_rows_that_say_where_their_prefix_ends(tmp_path):
    rows = [{"tokens": ids.tolist(), "prefix_len": n} for ids, n in zip(IDS, (10, 20, 63), strict=True)]
    found = load_memorized(write_jsonl(tmp_path / "set.jsonl", rows), None, 50)
    assert [(len(s.prefix), len(s.suffix)) for s in found] == [(10, 54), (20, 44), (63, 1)]
    assert all([*s.prefix, *s.suffix] == ids.tolist() for s, ids in zip(found, IDS, strict=True))
    # The option then takes of each prefix its last tokens, as of any other.
    found = load_memorized(tmp_path / "set.jsonl", None, 50, prefix_len=4, suffix_len=1)
    assert [s.prefix for s in found] == [ids[n - 4 : n].tolist() for ids, n in zip(IDS, (10, 20, 63), strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.jsonl", lines(ROWS).encode()),
        ("set.json", lines(ROWS).encode()),
        ("set.json", json.dumps(ROWS, indent=1).encode()),
        ("set.ndjson", b"\xef\xbb\xbf" + lines(ROWS).encode().replace(b"\n", b"\r\n\r\n")),
        ("set.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("set.jsonl.gz", gzip.compress(lines(ROWS).encode())),
        ("set.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("set.jsonl.zst", zstandard.compress(lines(ROWS).encode())),
    ],
)
def test_the_same_rows_in_other_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_memorized(tmp_path / name, None, 50) == CUT


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("val_prefix.npy", IDS, r"val_suffix\.npy: not there, val_prefix\.npy alone is no set"),
        ("set.npy", IDS[0], r"needs whole numbers \[sequences, tokens\], found int64 \[64\]"),
        ("set.npy", IDS / 2, r"needs whole numbers \[sequences, tokens\], found float64 \[3, 64\]"),
        ("set.npy", np.array([[{}]], dtype=object), "set.npy: cannot be read: .*Python objects"),
        ("set.npy", IDS[:0], "the memorized set is empty"),
        ("set.npy", IDS - 1, "record 1: prefix id -1 is outside the model's vocabulary"),
    ],
)
def test_wrong_arrays(tmp_path, name, array, message):
    np.save(tmp_path / name, array)
    with pytest.raises(InputError, match=message):
        load_memorized(tmp_path / name, None, 50)


def test_the_folder_of_a_pair_of_arrays(tmp_path):
    np.save(tmp_path / "train_prefix.npy", IDS[:, :32])
    np.save(tmp_path / "train_suffix.npy", IDS[:, 32:])
    np.save(tmp_path / "train_preprefix.npy", IDS[:, :32])  # the benchmark's own, which has no partner
    np.save(tmp_path / "train_dataset.npy", IDS)
    assert load_memorized(tmp_path, None, 50) == load_memorized(TextSet(str(tmp_path)), None, 50) == CUT
    np.save(tmp_path / "val_prefix.npy", IDS[:, :32])
    np.save(tmp_path / "val_suffix.npy", IDS[:, 32:])
    with pytest.raises(InputError, match=r"holds 2 sets; name one of train_prefix\.npy, val_prefix\.npy"):
        load_memorized(tmp_path, None, 50)
    assert load_memorized(tmp_path / "val_suffix.npy", None, 50) == CUT


def test_arrays_that_do_not_belong_together(tmp_path):
    np.save(tmp_path / "a_prefix.npy", IDS)
    np.save(tmp_path / "a_suffix.npy", IDS[:2])
    with pytest.raises(InputError, match=r"a_prefix\.npy: 3 prefixes, but a_suffix\.npy has 2 suffixes"):
        load_memorized(tmp_path / "a_suffix.npy", None, 50)
    (tmp_path / "a_suffix.npy").write_bytes((tmp_path / "a_suffix.npy").read_bytes()[:200])
    with pytest.raises(InputError, match=r"a_suffix\.npy: cannot be read"):
        load_memorized(tmp_path / "a_prefix.npy", None, 50)


@pytest.mark.parametrize("name", ["set.jsonl", "set.json", "set.parquet", "set.npy"])
def test_empty_files_are_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"{name}: the (memorized set|file) is empty"):
        load_memorized(tmp_path / name, None, 50)


def test_other_kinds_of_file(tmp_path):
    (tmp_path / "set.csv").write_text("prefix,suffix\n")
    with pytest.raises(InputError, match=r"set\.csv: cannot read a set .*\.jsonl, .*\.parquet, .* or \.npy"):
        load_memorized(tmp_path / "set.csv", None, 50)
    with pytest.raises(InputError, match=r"the folder holds no \.jsonl, .* file"):
        load_memorized(tmp_path, None, 50)


# -- rows of text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "suffix"),
    [
        ({"prompt": "Return the", "gt": "value."}, " value."),  # MUSE
        ({"prompt": "Return the ", "gt": "value."}, "value."),
        ({"prompt": "Return the", "gt": "\nvalue."}, "\nvalue."),
        ({"question": "Return the", "answer": "value."}, " value."),  # TOFU
        ({"prefix": "Return the", "suffix": " value."}, " value."),
        ({"prefix": "Return the v", "suffix": "alue."}, "alue."),  # of our own nothing is joined
        ({"prompt": "Return the", "suffix": " value.", "gt": "no"}, " value."),
    ],
)
def test_text_of_other_benchmarks(tmp_path, tokenizer, row, suffix):
    (found,) = load_memorized(write_jsonl(tmp_path / "set.jsonl", [row]), tokenizer, 2048)
    expected = continuation_ids(tokenizer, next(iter(row.values())), suffix)
    assert (found.prefix, found.suffix) == expected[:2]
    assert tokenizer.decode(found.suffix) == suffix


@pytest.mark.parametrize(
    ("fields", "suffix"),
    [
        ({"prefix_field": "head", "suffix_field": "tail"}, "value."),
        ({"prefix_field": "head", "suffix_field": "tail", "separator": " "}, " value."),
        ({"prefix_field": "question", "suffix_field": "answer"}, " value"),
        ({"prefix_field": "question", "suffix_field": "answer", "separator": "\n"}, "\nvalue"),
    ],
)
def test_fields_by_name(tmp_path, tokenizer, fields, suffix):
    rows = [{"head": "Return the", "tail": "value.", "question": "Return the", "answer": "value", "prefix": "x"}]
    memorized = MemorizedSet.parse("memorized", {"source": str(write_jsonl(tmp_path / "set.jsonl", rows)), **fields})
    (found,) = load_memorized(memorized, tokenizer, 2048)
    assert tokenizer.decode(found.prefix) == "Return the" and tokenizer.decode(found.suffix) == suffix


def test_fields_of_ids_by_name(tmp_path):
    rows = [{"start": [1, 2], "end": [3], "sequence": [4, 5, 6, 7]}]
    path = str(write_jsonl(tmp_path / "set.jsonl", rows))
    named = MemorizedSet(path, prefix_field="start", suffix_field="end")
    assert load_memorized(named, None, 50) == [MemorizedSequence([1, 2], [3])]
    assert load_memorized(MemorizedSet(path, tokens_field="sequence"), None, 50, prefix_len=3) == [
        MemorizedSequence([4, 5, 6], [7])
    ]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"a": "x"}, {}, "text in one of prefix, .*; fields here: a .*prompt and gt, question and answer"),
        ({"a": "x"}, {"prefix_field": "a", "suffix_field": "b"}, "no field 'b'; fields here: a"),
        ({"a": "x", "b": [1]}, {"prefix_field": "a", "suffix_field": "b"}, "both be text or both be ids"),
        ({"a": "x", "b": ""}, {"prefix_field": "a", "suffix_field": "b"}, "the suffix is empty"),
        ({"tokens": [1, 2, 3], "prefix_len": 3}, {}, "3 tokens, of which a prefix of 3 leaves no suffix"),
        ({"tokens": [1, 2], "prefix_len": "1"}, {}, "a prefix of '1' leaves"),
        ({"tokens": [1]}, {}, "1 tokens, of which a prefix of 0"),
        ({"tokens": ["a", "b"]}, {}, "the prefix ids must be a list of integers"),
        ({"words": "a b"}, {"tokens_field": "words"}, "the tokens must be a list of integers"),
        ({"tokens": [1, 99]}, {}, "suffix id 99 is outside"),
    ],
)
def test_wrong_rows(tmp_path, tokenizer, row, fields, message):
    path = write_jsonl(tmp_path / "set.jsonl", [row])
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        load_memorized(MemorizedSet.parse("memorized", {"source": str(path), **fields}), tokenizer, 50)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"source": "f.jsonl", "prompt_field": "a"},
            "sets.quotes: unknown field 'prompt_field'; known are source",
        ),
        ({"prefix_field": "a", "suffix_field": "b"}, "sets.quotes: needs a source"),
        ({"source": "f.jsonl", "prefix_field": "a"}, "give both prefix_field and suffix_field"),
        ({"source": "f.jsonl", "separator": 3}, "separator is 3; it must be text"),
    ],
)
def test_wrong_fields(value, message):
    with pytest.raises(InputError, match=message):
        MemorizedSet.parse("sets.quotes", value)


def test_sets_are_told_from_documents(tmp_path):
    for row, expected in (
        ({"text": "a document"}, False),
        ({"text": "a document", "question": "a", "answer": "b"}, False),
        ({"text": "a", "prefix": "a", "suffix": "b"}, True),
        ({"question": "a", "answer": "b"}, True),
        ({"tokens": [1, 2]}, True),
        ({"prefix_ids": [1], "suffix_ids": [2]}, True),
    ):
        assert is_set(str(write_jsonl(tmp_path / "f.jsonl", [row]))) == expected
    assert not is_set("embedded") and not is_set(str(write_jsonl(tmp_path / "e.jsonl", [])))


# -- questions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.jsonl.gz", "q.jsonl.zst", "q.parquet"])
def test_questions_of_other_files(tmp_path, tokenizer, name):
    rows = [{"question": "1 + 1 =", "answer": "2"}, {"question": "2 + 2 =", "answer": "4"}]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows).encode() if name == "q.json" else b"\xef\xbb\xbf" + lines(rows).encode()
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content))
    asked = QuestionSet.parse("sums", {"source": str(path), "prompt_field": "question"})
    asked.check()
    found = asked.load(tokenizer, 2048)
    assert [(tokenizer.decode(q.prompt), q.answer) for q in found] == [("1 + 1 =", "2"), ("2 + 2 =", "4")]
    with pytest.raises(InputError, match="no text in the field 'prompt'; fields here: question, answer"):
        QuestionSet.parse("sums", str(path)).load(tokenizer, 2048)


# -- whole texts -------------------------------------------------------------------------------------------------

TEXTS = ["Return the value of the key, if it is there.", "A list of names and, é, of places."]


def whole(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    return MemorizedSequence(ids[:1], ids[1:], whole=True)


def in_a_folder(path, texts):
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_text(text)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("texts.jsonl", lambda path, texts: write_jsonl(path, [{"text": text, "label": 1} for text in texts])),
        ("texts.json", lambda path, texts: path.write_text(json.dumps(texts))),  # MUSE
        ("texts.txt", lambda path, texts: path.write_text("\n\n".join(texts) + "\r\n")),
        ("texts.txt.gz", lambda path, texts: path.write_bytes(gzip.compress("\n".join(texts).encode()))),
        ("texts.parquet", lambda path, texts: pq.write_table(pa.table({"text": texts}), path)),
        ("texts", in_a_folder),
    ],
)
def test_whole_texts_in_any_file(tmp_path, tokenizer, name, write):
    write(tmp_path / name, TEXTS)
    found = load_memorized(TextSet(str(tmp_path / name)), tokenizer, 2048)
    assert found == [whole(tokenizer, text) for text in TEXTS]
    assert found[0].suffix and TextSet(str(tmp_path / name)).files()


def test_a_file_in_a_folder_is_one_text(tmp_path, tokenizer):
    in_a_folder(tmp_path / "texts", ["\n".join(TEXTS)])
    write_jsonl(tmp_path / "texts" / "more.jsonl", [{"text": text} for text in TEXTS])
    found = load_memorized(TextSet(str(tmp_path / "texts")), tokenizer, 2048)
    assert found == [whole(tokenizer, text) for text in ("\n".join(TEXTS), *TEXTS)]


def test_texts_by_the_name_of_their_field(tmp_path, tokenizer):
    """WikiMIA has them under `input`."""
    path = write_jsonl(tmp_path / "set.jsonl", [{"input": text, "text": "no"} for text in TEXTS])
    chosen = TextSet.parse("members", {"source": str(path), "text_field": "input"})
    assert load_memorized(chosen, tokenizer, 2048) == [whole(tokenizer, text) for text in TEXTS]
    with pytest.raises(InputError, match="line 1: no field 'body'; fields here: input, text"):
        load_memorized(TextSet(str(path), text_field="body"), tokenizer, 2048)


def test_members_may_be_any_memorized_set(tmp_path, tokenizer):
    rows = [{"question": "Who?", "answer": "Nobody at all."}, *({"tokens": ids.tolist()} for ids in IDS), *ROWS]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    assert load_memorized(TextSet(str(path)), tokenizer, 2048) == load_memorized(path, tokenizer, 2048)


def test_passages_as_a_memorized_set(tmp_path, tokenizer, capsys):
    """MUSE's passages, shorter than a window: cut in the middle, or where the options say."""
    (tmp_path / "forget.json").write_text(json.dumps(TEXTS))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    halves = [MemorizedSequence(row[: len(row) // 2], row[len(row) // 2 :]) for row in ids]
    assert load_memorized(tmp_path / "forget.json", tokenizer, 2048) == halves
    assert "forget.json: 2 texts, 2 passages; 2 shorter than a passage, cut in halves" in said(capsys)
    cut = load_memorized(tmp_path / "forget.json", tokenizer, 2048, prefix_len=3, suffix_len=2)
    assert cut == [MemorizedSequence(row[:3], row[3:5]) for row in ids]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("texts.jsonl", lambda path, texts: write_jsonl(path, [{"text": text} for text in texts])),
        ("texts.txt", lambda path, texts: path.write_text("\n\n".join(texts) + "\n")),
        ("texts", in_a_folder),
    ],
)
def test_texts_become_passages(tmp_path, tokenizer, capsys, name, write):
    """Every token behind the first 64 is asked for once, but for an end shorter than a suffix."""
    long = " ".join(f"Row {number} holds {number * number}." for number in range(40))
    texts = [TEXTS[0], "Too short.", long]
    write(tmp_path / name, texts)
    first, *found = load_memorized(tmp_path / name, tokenizer, 2048)
    ids = tokenizer(long)["input_ids"]
    assert len(found) == (len(ids) - 64) // 48 >= 2
    assert [token for sequence in found for token in sequence.suffix] == ids[64 : 64 + 48 * len(found)]
    for number, sequence in enumerate(found):
        assert sequence.prefix == ids[48 * number : 48 * number + 64]
    short = tokenizer(TEXTS[0])["input_ids"]
    assert first == MemorizedSequence(short[: len(short) // 2], short[len(short) // 2 :])
    told = f"{name}: 2 texts, {1 + len(found)} passages; 1 shorter than a passage, cut in halves; 1 left out, below 8"
    assert told in said(capsys)
    first, *others = load_memorized(tmp_path / name, tokenizer, 2048, suffix_len=5)
    assert len(first.suffix) == 5 and len(others) == (len(ids) - 64) // 5


def test_texts_that_are_all_too_short(tmp_path, tokenizer):
    (tmp_path / "wrapped.txt").write_text("Return the value\nfor key.\n")
    with pytest.raises(
        InputError, match=r"wrapped\.txt: the longest of 2 texts has \d tokens, 8 are needed; in a folder"
    ):
        load_memorized(tmp_path / "wrapped.txt", tokenizer, 2048)


def test_long_texts_are_cut_and_short_ones_compared(tmp_path, tokenizer, capsys):
    path = write_jsonl(tmp_path / "set.jsonl", [{"text": text} for text in TEXTS])
    found = load_memorized(TextSet(str(path)), tokenizer, 2048, longest=8)
    assert [len(text.prefix) + len(text.suffix) for text in found] == [8, 8]
    assert "2 texts are longer than 8 tokens; their beginning is used" in said(capsys)
    cut = load_memorized(TextSet(str(path)), tokenizer, 2048, prefix_len=30, suffix_len=4)  # they have no prefix
    assert [(len(text.prefix), len(text.suffix)) for text in cut] == [(1, 4), (1, 4)]
    with pytest.raises(InputError, match=r"line 1: the suffix has \d+ tokens, data.suffix_len asks for 99"):
        load_memorized(TextSet(str(path)), tokenizer, 2048, suffix_len=99)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ""}], "line 1: the text is empty"),
        ([{"text": "x"}], "line 1: the text is empty, or its only token is predicted by nothing"),
        ([{"text": 3}], "line 1: the text is int; it must be text"),
        ([{"body": "x"}], "line 1: needs prefix_ids and suffix_ids, or text in one of"),
        ([{"prefix": "x", "suffix": ""}], "line 1: the suffix is empty"),
        ([], "the set is empty"),
    ],
)
def test_texts_that_cannot_be_scored(tmp_path, tokenizer, rows, message):
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_memorized(TextSet(str(path)), tokenizer, 2048)


def test_texts_of_no_tokenizer_or_another(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "set.jsonl", [{"text": "Return"}])
    with pytest.raises(InputError, match="line 1: a text row needs a tokenizer"):
        load_memorized(TextSet(str(path)), None, 2048)
    with pytest.raises(InputError, match=r"text id .* is outside the model's vocabulary"):
        load_memorized(TextSet(str(write_jsonl(path, [{"text": TEXTS[0]}]))), tokenizer, 5)
    write_jsonl(path, [ROWS[0] | {"tokenizer_fingerprint": "f" * 64}])
    with pytest.raises(InputError, match="the ids were made by another tokenizer"):
        load_memorized(TextSet(str(path)), tokenizer, 2048)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8"):
        load_memorized(TextSet(str(tmp_path / "latin.txt")), tokenizer, 2048)
