"""The built-in tasks: right answers by another way, spread evenly, the same for the same seed."""

from collections import Counter

import pytest

from lightning_kfac import InputError
from lightning_kfac.data import ability_tasks as tasks
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.loading import load_tokenizer

MADE = {
    "brackets": tasks.bracket_questions,
    "comparisons": tasks.comparison_questions,
    "booleans": tasks.boolean_questions,
    "additions": tasks.addition_questions,
}


def sentences(count: int) -> list[str]:
    """Documents of one sentence, with a rare word in the second half of each."""
    return [
        f"Letter {n} that came with the morning post was signed by {chr(97 + n % 26) * 3}{chr(97 + n // 26)}son alone."
        for n in range(count)
    ]


def answer_to(question):
    return question.options[question.right]


@pytest.mark.parametrize("name", MADE)
def test_the_same_seed_asks_the_same(name):
    assert MADE[name](24, 3) == MADE[name](24, 3) != MADE[name](24, 4)


@pytest.mark.parametrize("name", ["brackets", "comparisons", "booleans"])
def test_right_places_are_spread_evenly(name):
    questions = MADE[name](25, 0)
    counts = Counter(question.right for question in questions)
    assert len(questions) >= 25 and len(counts) == len(questions[0].options) and len(set(counts.values())) == 1


def test_brackets_match_a_stack():
    for question in tasks.bracket_questions(60, 1):
        open_now = []
        for character in question.prompt.splitlines()[-1]:
            if character in tasks.BRACKETS:
                open_now.append(tasks.BRACKETS[character])
            elif character in tasks.BRACKETS.values():
                assert open_now.pop() == character
        assert open_now[-1] == answer_to(question)


@pytest.mark.parametrize("name", ["comparisons", "booleans"])
def test_python_agrees(name):
    """With every line of the prompt: the ones that show how it is done, and the question."""
    for question in MADE[name](60, 1):
        for line in (question.prompt + answer_to(question)).splitlines():
            expression, _, value = line.rpartition(" is ")
            assert str(eval(expression)) == value


def test_sums_are_right_and_differ():
    questions = tasks.addition_questions(100, 0)
    assert len({question.prompt for question in questions}) == 100
    for question in questions:
        a, b = question.prompt.removesuffix(" =").split(" + ")
        assert question.options == (f" {int(a) + int(b)}",)


def test_what_is_copied_stands_in_the_prompt():
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    for question in tasks.copying_questions(words, 12, 0):
        line, again, begun = question.prompt.splitlines()
        assert line == again and line.startswith(begun + answer_to(question)) and len(set(question.options)) == 3


def test_open_and_closed_book_ask_the_same():
    pairs = tasks.corpus_questions(sentences(40), 20, 0)
    assert len(pairs) == 20 and Counter(closed.right for _, closed in pairs) == dict.fromkeys(range(4), 5)
    for opened, closed in pairs:
        whole = closed.prompt + answer_to(closed)
        assert opened == (f"{opened.prompt}", closed.options, closed.right)
        assert opened.prompt.endswith(f"\n\n{closed.prompt}") and opened.prompt.startswith(whole)
        assert answer_to(closed).endswith("son") and len(set(closed.options)) == 4  # the rarest word, not "alone"
        assert answer_to(closed).strip() not in closed.prompt


def test_documents_are_asked_in_turn():
    """A long document gives no second question while another has given none."""
    corpus = [" ".join(sentences(30)[:20]), *sentences(30)[20:]]
    asked = [closed.prompt + answer_to(closed) for _, closed in tasks.corpus_questions(corpus, 12, 0)]
    assert sum(any(text in corpus[0] for text in [prompt]) for prompt in asked) == 2


def test_a_corpus_with_too_little_text():
    with pytest.raises(InputError, match="questions need more text"):
        tasks.corpus_questions(sentences(2), 8, 0)
    with pytest.raises(InputError, match="the corpus has 1 words of 4 letters"):
        tasks.common_words(["only a b c"])


def test_all_tasks_in_token_ids():
    tokenizer = load_tokenizer("demo")
    made = tasks.local_tasks(sentences(40), tokenizer, 12)
    assert [task.name for task in made] == [
        "brackets", "comparisons", "booleans", "copying", "open_book", "closed_book", "additions"
    ]  # fmt: skip
    assert {task.group for task in made} == {"logic", "open-book", "closed-book", "arithmetic"}
    assert [task.chance for task in made[:6]] == [1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 4, 1 / 4]
    asked = made[1].asked[0]
    text = tokenizer.decode(asked.prompt + asked.options[asked.right])
    assert text.splitlines()[-1].endswith((" is True", " is False"))
    recited = tasks.recitation_task([MemorizedSequence([1, 2], [3]), MemorizedSequence([1], [4])])
    assert recited.metric == "exact" and recited.chance == 0.5 and not recited.chooses
