"""Questions that show what an edited model can still do, made here from a corpus and a seed: nothing is downloaded.

Each task belongs to one of the groups that arXiv 2510.24256 tells apart. Answers are spread evenly, so that who always
gives the same one is right by chance only.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import NamedTuple

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.text_ids import Tokenize, continuation_ids
from lightning_kfac.errors import InputError

GROUPS = ("logic", "open-book", "closed-book", "arithmetic", "recitation", "other")
# Of a corpus so much is looked at.
MOST_DOCUMENTS = 4000
MOST_CHARACTERS = 4_000_000
CHOICES = 4
COMMON_WORDS = 200
SHORTEST_WORD = 4
WORDS_OF_A_SENTENCE = range(8, 31)
BRACKETS = {"(": ")", "[": "]", "{": "}"}
NAMES = ("a", "b", "i", "k", "n", "x", "y", "item", "key", "name", "size", "text", "value")
TERMS = 20  # of an addition: 0 to 19, as the embedded arithmetic model knows them


class TextQuestion(NamedTuple):
    """A prompt and what may follow it.

    Attributes:
        prompt: Text.
        options: Of several the model must find the right one likelier than the others, a single one it must write.
        right: Place of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    right: int = 0


class TokenQuestion(NamedTuple):
    """The same in token ids."""

    prompt: list[int]
    options: list[list[int]]
    right: int = 0


@dataclass(frozen=True)
class AbilityTask:
    """Questions of one kind.

    Attributes:
        name, group: The group is one of ``GROUPS``.
        asked: The questions.
        numbers: The answers are numbers: one with another digit behind it is another one.
    """

    name: str
    group: str
    asked: tuple[TokenQuestion, ...]
    numbers: bool = False

    @property
    def chooses(self) -> bool:
        """Whether there are options to choose from."""
        return len(self.asked[0].options) > 1

    @property
    def chance(self) -> float:
        """Share of the questions that the best constant answer gets right."""
        answers = (one.right if self.chooses else tuple(one.options[0]) for one in self.asked)
        return max(Counter(answers).values()) / len(self.asked)

    @property
    def metric(self) -> str:
        """How answers are judged."""
        return "choice" if self.chooses else "exact"


def recitation_task(sequences: Sequence[MemorizedSequence]) -> AbilityTask:
    """Passages to be continued word for word, as strict accuracy has it."""
    asked = tuple(TokenQuestion(list(s.prefix), [list(s.suffix)]) for s in sequences)
    return AbilityTask("recitation", "recitation", asked)


def local_tasks(texts: Iterable[str], tokenizer: Tokenize, count: int, seed: int = 0) -> list[AbilityTask]:
    """All built-in tasks but recitation.

    Args:
        texts: Documents of a corpus; a few thousand are read.
        count: Questions a task; of a corpus with little text there are fewer.
        seed: Decides which.

    Raises:
        InputError: The corpus has too little text to ask about.
    """
    corpus = _some(texts)
    facts = corpus_questions(corpus, count, seed)
    words = common_words(corpus)
    made: dict[str, tuple[str, list[TextQuestion]]] = {
        "brackets": ("logic", bracket_questions(count, seed)),
        "comparisons": ("logic", comparison_questions(count, seed)),
        "booleans": ("logic", boolean_questions(count, seed)),
        "copying": ("open-book", copying_questions(words, count, seed)),
        "open_book": ("open-book", [question for question, _ in facts]),
        "closed_book": ("closed-book", [question for _, question in facts]),
        "additions": ("arithmetic", addition_questions(count, seed)),
    }
    return [
        AbilityTask(name, group, tuple(_asked(q, tokenizer) for q in questions), name == "additions")
        for name, (group, questions) in made.items()
    ]


def _asked(question: TextQuestion, tokenizer: Tokenize) -> TokenQuestion:
    cut = [continuation_ids(tokenizer, question.prompt, option) for option in question.options]
    return TokenQuestion(cut[0].prefix, [continuation.suffix for continuation in cut], question.right)


def _some(texts: Iterable[str]) -> list[str]:
    found: list[str] = []
    left = MOST_CHARACTERS
    for text in islice(texts, MOST_DOCUMENTS):
        found.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return found


# -- logic and arithmetic --------------------------------------------------------------------------------


def bracket_questions(count: int, seed: int) -> list[TextQuestion]:
    """Which bracket closes what is open? The three kinds are right equally often."""
    draw = random.Random(f"brackets {seed}")
    closing = tuple(BRACKETS.values())
    questions = []
    for number in range(_even(count, len(closing))):
        right = number % len(closing)
        opened = [*draw.choices(tuple(BRACKETS), k=draw.randrange(1, 3)), tuple(BRACKETS)[right]]
        text = "".join(f"{draw.choice(NAMES)}{bracket}" for bracket in opened) + draw.choice(NAMES)
        if draw.random() < 0.5:  # one more that is closed already
            inner = draw.choice(tuple(BRACKETS))
            text += f"{inner}{draw.choice(NAMES)}{BRACKETS[inner]}"
        questions.append(TextQuestion(f"f(x)\na[i]\nf(a[i])\nd{{k}}\nf(d{{k}})\n{text}", closing, right))
    return questions


def comparison_questions(count: int, seed: int) -> list[TextQuestion]:
    """Is one number smaller than another? True and false equally often."""
    draw = random.Random(f"comparisons {seed}")
    shots = "3 < 8 is True\n9 < 2 is False\n14 < 11 is False\n6 < 17 is True\n"
    questions = []
    for number in range(_even(count, 2)):
        small, large = sorted(draw.sample(range(100), 2))
        right = number % 2
        first, second = (large, small) if right else (small, large)
        questions.append(TextQuestion(f"{shots}{first} < {second} is", (" True", " False"), right))
    return questions


def boolean_questions(count: int, seed: int) -> list[TextQuestion]:
    """The value of a short Boolean expression; True and False equally often."""
    draw = random.Random(f"booleans {seed}")
    shots = "True and False is False\nnot False is True\nFalse or True is True\nnot True or False is False\n"
    wanted = [True, False] * (_even(count, 2) // 2)
    questions = []
    for value in wanted:
        while True:
            terms = [draw.choice(("", "not ")) + draw.choice(("True", "False")) for _ in range(draw.randrange(2, 4))]
            joined = draw.choice((" and ", " or ")).join(terms)
            if _holds(joined) == value:
                break
        questions.append(TextQuestion(f"{shots}{joined} is", (" True", " False"), int(not value)))
    return questions


def _holds(expression: str) -> bool:
    """The value of terms joined by one kind of connective."""
    connective = any if " or " in expression else all
    terms = re.split(" or | and ", expression)
    return connective((term == "True") or (term == "not False") for term in terms)


def addition_questions(count: int, seed: int) -> list[TextQuestion]:
    """Sums of two numbers below 20, to be written."""
    draw = random.Random(f"additions {seed}")
    pairs = [(a, b) for a in range(TERMS) for b in range(TERMS)]
    return [TextQuestion(f"{a} + {b} =", (f" {a + b}",)) for a, b in draw.sample(pairs, min(count, len(pairs)))]


# -- the corpus ------------------------------------------------------------------------------------------


def copying_questions(words: Sequence[str], count: int, seed: int) -> list[TextQuestion]:
    """A list of words is repeated: which comes next? Each place of the list is right equally often.

    Args:
        words: To draw from, at least ``CHOICES``.
    """
    draw = random.Random(f"copying {seed}")
    questions = []
    for number in range(_even(count, CHOICES - 1)):
        items = draw.sample(words, CHOICES)
        right = 1 + number % (CHOICES - 1)  # the first word of a line is no copy of what stood before
        line = " ".join(items)
        options = tuple(f" {word}" for word in items[1:])
        questions.append(TextQuestion(f"{line}\n{line}\n{' '.join(items[:right])}", options, right - 1))
    return questions


def common_words(texts: Iterable[str]) -> list[str]:
    """The most frequent words of a corpus with at least four lower-case letters.

    Raises:
        InputError: There are fewer than ``CHOICES``.
    """
    counts = Counter(word for text in texts for word in re.findall(rf"\b[a-z]{{{SHORTEST_WORD},}}\b", text))
    words = [word for word, _ in counts.most_common(COMMON_WORDS)]
    if len(words) < CHOICES:
        raise InputError(f"the corpus has {len(words)} words of {SHORTEST_WORD} letters; questions need {CHOICES}")
    return words


def corpus_questions(texts: Sequence[str], count: int, seed: int) -> list[tuple[TextQuestion, TextQuestion]]:
    """Sentences of a corpus with a word to be chosen, each asked twice: with the sentence before it, and without.

    The word is the rarest in the second half of its sentence that does not stand in the sentence before; the others to
    choose from are such words of other sentences, as like in length as there are. As many sentences as possible are of
    different documents.

    Returns:
        Open-book and closed-book question of each sentence.

    Raises:
        InputError: There are not enough sentences.
    """
    draw = random.Random(f"corpus {seed}")
    frequency = Counter(word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text))
    documents = [_sentences(text) for text in texts]
    draw.shuffle(documents)
    for sentences in documents:
        draw.shuffle(sentences)
    in_turn = (sentence for turn in zip_longest(*documents) for sentence in turn if sentence is not None)
    cut: dict[str, tuple[str, str]] = {}
    for sentence in in_turn:
        if len(cut) == _even(count, CHOICES):
            break
        if (parts := _cut(sentence, frequency)) is not None:
            start, word = parts
            cut.setdefault(start, (sentence, word))  # two sentences that begin alike would be one question
    answers = sorted({word for _, word in cut.values()}, key=lambda word: (len(word), word))
    if len(answers) < CHOICES:
        raise InputError(f"the corpus has {len(cut)} sentences to ask about; questions need more text")
    usable = len(cut) - len(cut) % CHOICES
    questions = []
    for number, (start, (sentence, word)) in enumerate(islice(cut.items(), usable)):
        right = number % CHOICES
        options = _others(word, answers, draw)
        options.insert(right, word)
        choices = tuple(f" {option}" for option in options)
        questions.append((TextQuestion(f"{sentence}\n\n{start}", choices, right), TextQuestion(start, choices, right)))
    return questions


def _sentences(text: str) -> list[str]:
    found = (" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", text))
    return [sentence for sentence in found if sentence.count(" ") + 1 in WORDS_OF_A_SENTENCE]


def _cut(sentence: str, frequency: Counter[str]) -> tuple[str, str] | None:
    """What stands before the word that is asked for, and the word; None where none will do."""
    words = [
        found
        for found in re.finditer(rf"(?<=\s)[A-Za-z]{{{SHORTEST_WORD},}}\b", sentence)
        if found.start() > len(sentence) / 2 and found[0].lower() not in sentence[: found.start()].lower()
    ]
    if not words:
        return None
    found = min(words, key=lambda found: frequency[found[0].lower()])
    return sentence[: found.start()].rstrip(), found[0]


def _others(word: str, answers: Sequence[str], draw: random.Random) -> list[str]:
    """Words that differ, nearest in length."""
    others = [answer for answer in answers if answer.lower() != word.lower()]
    draw.shuffle(others)
    return sorted(others, key=lambda other: abs(len(other) - len(word)))[: CHOICES - 1]


def _even(count: int, options: int) -> int:
    """The next number of questions among which each option can be right equally often."""
    return -(-count // options) * options
