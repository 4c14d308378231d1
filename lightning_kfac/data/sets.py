"""The sets of a run: memorized sequences, questions, members and non-members, read and checked."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lightning_kfac.assets import resolve_path
from lightning_kfac.console import say
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.names import MEMBERS, NONMEMBERS
from lightning_kfac.data.questions import Question, QuestionSet
from lightning_kfac.data.set_formats import MemorizedSet, TextSet
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Sets:
    """Memorized sets, sets of questions, and texts that a model has seen or not.

    Attributes:
        files: Memorized sets by name.
        questions: Sets of questions by name.
        prefix_len, suffix_len: Tokens of each prefix and suffix; None takes all.
        skip_bad_rows: Leave out rows of files that cannot be used.
        classes: Texts that the model has seen, and others, by name; both or neither.
        borrowed: Those of them that are a set with sequences: class to the set's name.
        sequences: What was read of ``files``.
        asked: What was read of ``questions``.
        scored: What was read of ``classes``.
    """

    files: Mapping[str, MemorizedSet]
    questions: Mapping[str, QuestionSet]
    prefix_len: int | None
    suffix_len: int | None
    skip_bad_rows: bool
    classes: Mapping[str, TextSet] = field(default_factory=dict)
    borrowed: Mapping[str, str] = field(default_factory=dict)
    sequences: dict[str, list[MemorizedSequence]] = field(default_factory=dict)
    asked: dict[str, list[Question]] = field(default_factory=dict)
    scored: dict[str, list[MemorizedSequence]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.classes) == 1:
            (name,) = self.classes
            missing = MEMBERS if name == NONMEMBERS else NONMEMBERS
            raise InputError(f"data.{name} alone tells nothing: set data.{missing} too")

    def load_sequences(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        """Reads the memorized sets once."""
        for name, file in self.files.items():
            if name not in self.sequences:
                self.sequences[name] = self._load(file, tokenizer, vocab_size)

    def _load(
        self, file: MemorizedSet, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, longest: int | None = None
    ) -> list[MemorizedSequence]:
        return load_memorized(
            file,
            tokenizer,
            vocab_size,
            prefix_len=self.prefix_len,
            suffix_len=self.suffix_len,
            skip_bad_rows=self.skip_bad_rows,
            longest=longest,
        )

    def load_classes(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_positions: int | None) -> None:
        """Reads members and non-members once.

        Raises:
            InputError: One of them cannot be read, or they are of different kinds.
        """
        before = len(self.scored)
        for name, file in self.classes.items():
            if name in self.borrowed:
                self.scored[name] = self.sequences.get(self.borrowed[name], [])  # windows of a text are cut later
            elif name not in self.scored:
                self.scored[name] = self._load(file, tokenizer, vocab_size, longest=max_positions)
                _check_lengths(file, self.scored[name], max_positions)
        whole = {name: any(text.whole for text in texts) for name, texts in self.scored.items() if texts}
        mixed = [name for name, texts in self.scored.items() if len({text.whole for text in texts}) > 1]
        if mixed or len({*whole.values(), *(False for _ in self.borrowed)}) > 1:
            what = f"data.{mixed[0]} holds" if mixed else "data.members and data.nonmembers hold"
            raise InputError(f"{what} whole texts as well as suffixes with a prefix, whose scores do not compare")
        if len(self.scored) > before and (both := _in_all(self.scored.values())):
            noun = "text is" if both == 1 else "texts are"
            say(f"{both:,} {noun} in data.members and in data.nonmembers: nothing can tell them apart")

    def load_questions(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_positions: int | None) -> None:
        """Reads the questions."""
        limits = vocab_size, max_positions, self.skip_bad_rows
        self.asked = {name: questions.load(tokenizer, *limits) for name, questions in self.questions.items()}

    def check(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_positions: int | None) -> None:
        """Reads what is cheap to read and raises ``InputError`` for what cannot work."""
        self.load_sequences(tokenizer, vocab_size)
        for name, sequences in self.sequences.items():
            _check_lengths(self.files[name], sequences, max_positions)
        self.load_classes(tokenizer, vocab_size, max_positions)
        for questions in self.questions.values():
            questions.check()

    def contents(self) -> list[tuple[object, ...]]:
        """Every set with a hash of its files and how they are read, or with its name where it is no file."""
        own = {name: texts for name, texts in self.classes.items() if name not in self.borrowed}
        files: dict[str, MemorizedSet] = {**self.files, **own}
        sets = [(name, content_of(memorized), replace(memorized, source="")) for name, memorized in files.items()]
        asked = [(name, _hash_of(questions.source)) for name, questions in self.questions.items()]
        return [*sets, *self.borrowed.items(), *asked]


def _in_all(classes: Iterable[Sequence[MemorizedSequence]]) -> int:
    """How many texts all classes have."""
    texts = [{(tuple(text.prefix), tuple(text.suffix)) for text in some} for some in classes]
    return len(set.intersection(*texts)) if texts else 0


def _check_lengths(file: MemorizedSet, sequences: Iterable[MemorizedSequence], max_positions: int | None) -> None:
    longest = max(len(sequence.prefix) + len(sequence.suffix) for sequence in sequences)
    if max_positions is not None and longest > max_positions:
        raise InputError(
            f"{file.source}: a sequence of {longest} tokens, but the model takes at most {max_positions} positions"
        )


def content_of(memorized: MemorizedSet) -> str:
    """Hash of the files of a memorized set."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in memorized.files())).hexdigest()


def _hash_of(file: str) -> str:
    path = resolve_path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file
