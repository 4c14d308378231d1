"""What a report begins with: the numbers in words are those of the rows."""

import pytest

from lightning_kfac.reporting.headline import headline, of_pair
from lightning_kfac.reporting.run import read_run
from lightning_kfac.storage.results import append_result
from tests.reporting.pages import (
    AFTER,
    BEFORE,
    write_abilities,
    write_attacks,
    write_comparison,
    write_scan,
    write_search,
    write_sweep,
)


def test_before_and_after():
    texts, figures = of_pair(BEFORE, AFTER)
    assert texts[0] == (
        "The edit suppresses nearly all of the recitation: of 50 sequences the unedited model recites 49 word for "
        "word, the edited one 1 (0.4 % to 10.5 % of such sequences)."
    )
    assert texts[1] == (
        "The cost: perplexity of other text rises by 5 % (4.0 to 6.0); 94 % of the rankings of its next tokens stay "
        "(nDCG@10)."
    )
    assert texts[2] == "In 1,000 samples of each sequence 2.6 % are expected to come out; before, 99.5 %."
    assert [value for value, _ in figures] == ["1 of 50", "+5 %", "94 %"]
    assert figures[0][1] == "recited word for word after; 49 before" and "20.00 to 21.00" in figures[1][1]


@pytest.mark.parametrize(
    ("after", "change", "said"),
    [
        (0.5, [-0.48, -0.6, -0.3], "part of"),
        (0.4, [-0.58, -0.7, -0.4], "most of"),
        (0.9, [-0.08, -0.2, 0.02], "does not measurably suppress recitation"),
        (0.98, [0.0, 0.0, 0.0], "does not measurably suppress recitation"),
        (1.0, None, "does not measurably suppress recitation"),
    ],
)
def test_how_much_went_is_said_as_it_was_measured(after, change, said):
    row = AFTER | {"strict_acc": after, "differences": {} if change is None else {"strict_acc": change}}
    assert said in of_pair(BEFORE, row)[0][0]


def test_a_cost_that_may_be_none_is_not_claimed():
    row = AFTER | {"perplexity": 20.1, "differences": {"perplexity": [0.1, -0.2, 0.4]}}
    assert "rises by 0.5 % (or not at all)" in of_pair(BEFORE, row)[0][1]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_comparison, ["1 of 50", "49 before", "+5 %", "94 %"]),
        (write_sweep, ["Of 5 edits the cheapest that suffices, original, 3,4 gate,up, rho 0.7,", "5 of 50"]),
        (write_scan, ["The recommended edit (blocks 3, 4; gate, up; rho 0.9)", "did not choose it"]),
        (
            write_attacks,
            ["Of 3 attacks the strongest, relearning one half, lr 0.0001, 20 steps, brings back 20%", "1 of 50"],
        ),
        (write_abilities, ["Of 2 tasks above chance, sums keeps the least: 50 % (45 % to 55 %) of its score.", "90 %"]),
        (write_search, ["Of 1,234 windows that were looked at, 7 are recited", "300"]),
    ],
)
def test_every_kind_of_run_begins_with_its_answer(tmp_path, write, words):
    write(tmp_path)
    text = headline(read_run(tmp_path))
    for word in words:
        assert word in text, text
    assert text.count("<b>") <= 3 and "<p class=lead>" in text


def test_one_model_alone_and_nothing(tmp_path):
    append_result(tmp_path / "results.jsonl", {"stage": "baseline", "strict_acc": 0.5, "n_sequences": 1})
    assert "1 sequence word for word" in headline(read_run(tmp_path))
    append_result(tmp_path / "results.jsonl", {"stage": "baseline", "n_sequences": 1})
    assert headline(read_run(tmp_path)) == ""
