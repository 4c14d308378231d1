"""Questions with known answers: files or data sets on the hub, such as GSM8K."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from lightning_kfac.assets import resolve_path
from lightning_kfac.data.records import RECORDS, kind_of_file, place, records_of
from lightning_kfac.data.rows import BadRows
from lightning_kfac.data.text_ids import Tokenize, text_ids
from lightning_kfac.errors import InputError, first_line


class Question(NamedTuple):
    """A prompt, its answer, and how to find the answer in what a model writes.

    Attributes:
        prompt: Token ids.
        answer: The right answer, already extracted.
        asked: The set that the question belongs to.
    """

    prompt: list[int]
    answer: str
    asked: "QuestionSet"


@dataclass(frozen=True)
class QuestionSet:
    """Where questions come from and what counts as an answer.

    Args:
        source: A file (JSONL, JSON, Parquet or Arrow, JSON also as .gz or .zst; ``demo-arithmetic:FILE`` names an
            embedded one) or a data set of the Hugging Face hub.
        subset, split: Of a hub data set.
        prompt_field, answer_field: Fields of the rows.
        template: Text of the prompt; ``{prompt}`` stands for the field.
        few_shot: Text before every prompt, such as solved examples.
        answer_pattern: Regular expression for the answer in the model's text and in the answer field; the last
            match counts, of it the first group if it has one. By default the text as it is.
        stop: The model's text ends before the first of these.
        max_new_tokens: Longest text that the model may write.
        limit: Use the first so many rows.
    """

    source: str
    subset: str | None = None
    split: str = "test"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    template: str = "{prompt}"
    few_shot: str = ""
    answer_pattern: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 16
    limit: int | None = None

    @classmethod
    def parse(cls, name: str, value: "str | Mapping[str, Any] | QuestionSet") -> "QuestionSet":
        """A checked set from a file name or a mapping.

        Raises:
            InputError: A field is unknown, missing, or not what it should be.
        """
        if isinstance(value, Mapping):
            questions = cls._from_fields(name, value)
        else:
            questions = value if isinstance(value, QuestionSet) else cls(source=str(value))
        questions._check_fields(f"data.questions.{name}")
        return questions

    @classmethod
    def _from_fields(cls, name: str, values: Mapping[str, Any]) -> "QuestionSet":
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise InputError(f"data.questions.{name}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
        if "source" not in values:
            raise InputError(f"data.questions.{name}: needs a source")
        stop = values.get("stop", ("\n",))
        return cls(**{**values, "stop": (stop,) if isinstance(stop, str) else tuple(stop or ())})

    def _check_fields(self, where: str) -> None:
        if "{prompt}" not in str(self.template):
            raise InputError(f"{where}: the template {self.template!r} lacks {{prompt}}")
        for field in ("max_new_tokens", "limit"):
            number = getattr(self, field)
            if not (isinstance(number, int) and number >= 1) and not (number is None and field == "limit"):
                raise InputError(f"{where}: {field} is {number!r}; it must be a number of at least 1")
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise InputError(f"{where}: stop must be texts that are not empty, got {self.stop}")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise InputError(f"{where}: answer_pattern is no regular expression: {error}") from None

    def check(self) -> None:
        """Raises ``InputError`` where a local file cannot be used."""
        if self._is_file():
            next(self._rows(BadRows(skip=True)), None)

    def load(
        self, tokenizer: Tokenize, vocab_size: int, max_positions: int | None = None, skip_bad_rows: bool = False
    ) -> list[Question]:
        """All questions, tokenized as ``text_ids`` does it.

        Raises:
            InputError: A row lacks a field, has no answer, an id outside the vocabulary, or is too long.
        """
        questions: list[Question] = []
        bad = BadRows(skip_bad_rows)
        for where, row in self._rows(bad):
            if self.limit is not None and len(questions) >= self.limit:
                break
            try:
                questions.append(self._question(row, where, tokenizer, vocab_size, max_positions))
            except InputError as error:
                bad.meet(error)
        bad.tell(self.source)
        if not questions:
            raise InputError(f"{self.source}: there is no question")
        return questions

    def _question(
        self, row: dict[str, Any], where: str, tokenizer: Tokenize, vocab_size: int, max_positions: int | None
    ) -> Question:
        for field in (self.prompt_field, self.answer_field):
            if not isinstance(row.get(field), (str, int, float)):
                raise InputError(
                    f"{where}: no text in the field {field!r}; fields here: {', '.join(row) or 'none'} (prompt_field "
                    "and answer_field name others)"
                )
        answer = self.extract(str(row[self.answer_field]))
        if not answer:
            raise InputError(f"{where}: the pattern {self.answer_pattern!r} finds no answer in {self.answer_field!r}")
        text = self.few_shot + self.template.replace("{prompt}", str(row[self.prompt_field]))
        ids = text_ids(tokenizer, text)
        if not ids or max(ids) >= vocab_size:
            raise InputError(f"{where}: the prompt is empty, or the tokenizer is not the model's")
        if max_positions is not None and len(ids) + self.max_new_tokens > max_positions:
            raise InputError(
                f"{where}: a prompt of {len(ids)} tokens and {self.max_new_tokens} new ones, but the model takes "
                f"at most {max_positions} positions"
            )
        return Question(ids, answer, self)

    def extract(self, text: str) -> str:
        """The answer in a text, without spaces around it and commas in numbers; empty where there is none.

        Example:
            >>> QuestionSet("f", answer_pattern=r"####\\s*(.+)").extract("6 * 7 = 42\\n#### 1,042")
            '1042'
        """
        if self.answer_pattern is not None:
            found = list(re.finditer(self.answer_pattern, text))
            text = "" if not found else found[-1][1 if found[-1].re.groups else 0] or ""
        return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.strip())

    def answer_in(self, text: str) -> str:
        """The answer in what a model wrote."""
        for stop in self.stop:
            text = text.split(stop)[0]
        return self.extract(text)

    def _is_file(self) -> bool:
        path = resolve_path(self.source)
        return path.exists() or kind_of_file(path.name) in RECORDS or self.source.startswith(("/", "./", "../"))

    def _rows(self, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._is_file():
            yield from self._hub_rows()
            return
        path = resolve_path(self.source)
        yield from ((place(path, number), row) for number, row in records_of(path, bad=bad))

    def _hub_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.source, self.subset, split=self.split, streaming=True)
        except Exception as error:
            raise InputError(f"questions {self.source}: {first_line(error)}") from error
        yield from ((f"{self.source}, row {number}", row) for number, row in enumerate(rows, start=1))
