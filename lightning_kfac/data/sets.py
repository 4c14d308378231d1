"""The sets of a run: memorized sequences and questions, read and checked."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.memorized import MemorizedSequence, load_memorized
from lightning_kfac.data.questions import Question, QuestionSet
from lightning_kfac.data.set_formats import MemorizedSet
from lightning_kfac.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Sets:
    """Memorized sets and sets of questions.

    Attributes:
        files: Memorized sets by name.
        questions: Sets of questions by name.
        prefix_len, suffix_len: Tokens of each prefix and suffix; None takes all.
        skip_bad_rows: Leave out rows of files that cannot be used.
        sequences: What was read of ``files``.
        asked: What was read of ``questions``.
    """

    files: Mapping[str, MemorizedSet]
    questions: Mapping[str, QuestionSet]
    prefix_len: int | None
    suffix_len: int | None
    skip_bad_rows: bool
    sequences: dict[str, list[MemorizedSequence]] = field(default_factory=dict)
    asked: dict[str, list[Question]] = field(default_factory=dict)

    def load_sequences(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        """Reads the memorized sets once."""
        for name, file in self.files.items():
            if name not in self.sequences:
                self.sequences[name] = load_memorized(
                    file,
                    tokenizer,
                    vocab_size,
                    prefix_len=self.prefix_len,
                    suffix_len=self.suffix_len,
                    skip_bad_rows=self.skip_bad_rows,
                )

    def load_questions(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_positions: int | None) -> None:
        """Reads the questions."""
        limits = vocab_size, max_positions, self.skip_bad_rows
        self.asked = {name: questions.load(tokenizer, *limits) for name, questions in self.questions.items()}

    def check(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, max_positions: int | None) -> None:
        """Reads what is cheap to read and raises ``InputError`` for what cannot work."""
        self.load_sequences(tokenizer, vocab_size)
        for name, sequences in self.sequences.items():
            longest = max(len(sequence.prefix) + len(sequence.suffix) for sequence in sequences)
            if max_positions is not None and longest > max_positions:
                raise InputError(
                    f"{self.files[name].source}: a sequence of {longest} tokens, but the model takes at most "
                    f"{max_positions} positions"
                )
        for questions in self.questions.values():
            questions.check()

    def contents(self) -> list[tuple[object, ...]]:
        """Every set with a hash of its files and how they are read, or with its name where it is no file."""
        sets = [(name, content_of(memorized), replace(memorized, source="")) for name, memorized in self.files.items()]
        return [*sets, *((name, _hash_of(questions.source)) for name, questions in self.questions.items())]


def content_of(memorized: MemorizedSet) -> str:
    """Hash of the files of a memorized set."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in memorized.files())).hexdigest()


def _hash_of(file: str) -> str:
    path = resolve_path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file
