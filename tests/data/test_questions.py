"""Questions: prompts, and answers found in texts."""

import pytest

from lightning_kfac import InputError
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.models.loading import load_tokenizer
from tests.common import write_jsonl


def test_answers_are_found_by_pattern_and_cut_at_stops(tmp_path):
    gsm = QuestionSet("f", answer_pattern=r"####\s*(-?[\d.,]+)", stop=("\n\n", "Question:"))
    assert gsm.extract("a = 3\nb = 4\n#### 1,234") == "1234"
    assert gsm.answer_in("so\n#### 7\n\n#### 9") == "7" and gsm.answer_in("I do not know") == ""
    assert gsm.answer_in("#### 5 Question: #### 6") == "5"
    assert QuestionSet.parse("math", {"source": "f", "stop": "Question:"}).stop == ("Question:",)
    plain = QuestionSet("f")
    assert plain.answer_in(" 19\n20") == "19" and plain.extract("Paris, France") == "Paris, France"
    rows = [{"question": "2 and 2?", "answer": "2+2\n#### 4"}]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    asked = QuestionSet.parse(
        "math",
        {"source": str(file), "prompt_field": "question", "template": "Q: {prompt} A:", "few_shot": "Q: 1? A: 1 ",
         "answer_pattern": r"####\s*(.+)"},
    )  # fmt: skip
    tokenizer = load_tokenizer("demo")
    (question,) = asked.load(tokenizer, 2048)
    assert tokenizer.decode(question.prompt) == "Q: 1? A: 1 Q: 2 and 2? A:" and question.answer == "4"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "x"}], {}, "line 1: no text in the field 'answer'"),
        ([{"prompt": "x", "answer": "y"}], {"answer_pattern": r"\d+"}, "finds no answer in 'answer'"),
        ([], {}, "there is no question"),
        ([{"prompt": "x", "answer": "y"}], {"template": "Q"}, "lacks {prompt}"),
        ([{"prompt": "x", "answer": "y"}], {"answer_pattern": "("}, "no regular expression"),
        ([{"prompt": "x", "answer": "y"}], {"patterns": "("}, "unknown field 'patterns'"),
        ([{"prompt": "x", "answer": "y"}], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([{"prompt": "x", "answer": "y"}], {"stop": [""]}, "not empty"),
        ([{"prompt": "x " * 50, "answer": "y"}], {"max_new_tokens": 80}, "at most 128 positions"),
    ],
)
def test_wrong_questions(tmp_path, rows, settings, message):
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        QuestionSet.parse("math", {"source": str(file), **settings}).load(load_tokenizer("demo"), 2048, 128)
