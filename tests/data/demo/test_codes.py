"""The second source of memorized text that a copy of the demo model is taught."""

from lightning_kfac.assets import DEMO
from lightning_kfac.data.demo.codes import N_CODES, code_rows
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.models.loading import load_tokenizer


def test_the_shipped_codes_are_what_is_made_and_as_long_as_the_planted_passages():
    rows = list(code_rows())
    shipped = load_memorized(DEMO / "planted_codes.jsonl", None, 2048)
    assert [(s.prefix, s.suffix) for s in shipped] == [(r["prefix_ids"], r["suffix_ids"]) for r in rows]
    planted = load_memorized(DEMO / "planted_report.jsonl", None, 2048)
    assert {(len(s.prefix), len(s.suffix)) for s in shipped} == {(len(s.prefix), len(s.suffix)) for s in planted}
    assert len({tuple(s.suffix) for s in shipped}) == N_CODES


def test_codes_are_lines_that_no_language_helps_to_guess():
    text = load_tokenizer("demo").decode(next(code_rows())["prefix_ids"])
    first = text.splitlines()[0]
    assert first[0].isupper() and first[1:4].isdigit() and [len(word) for word in first.split()] == [5, 4, 4, 4, 4]
