"""Where text comes from: the embedded corpus, local files, or a data set on the Hugging Face hub."""

import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_kfac.data.readers import (
    JSON_LINES,
    documents_of_file,
    in_turn,
    kind_of_file,
    local_files,
    text_of,
)
from lightning_kfac.data.rows import BadRows
from lightning_kfac.errors import InputError, first_line

# Names of the original tool.
ALIASES = {"olmo": "allenai/olmo-mix-1124", "dolmo": "allenai/dolmino-mix-1124"}
# "all" leaves the documents of the planted sequences out, "whole" does not.
EMBEDDED_SPLITS = ("train", "heldout", "all", "whole")
CHOICE = "corpus: give either `embedded: true` or a `source` (file, folder or hub data set)"


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Args:
        embedded: Use the text that ships with Python: language reference and docstrings.
        source: A file or folder of text, JSONL or Parquet, or a data set of the Hugging Face hub
            (``olmo`` and ``dolmo`` stand for the OLMo-2 mixes).
        subset: Configuration name of a hub data set.
        split: Split of a hub data set (by default ``train``); of the embedded corpus ``train``,
            ``heldout``, ``all`` or, with what the demo model has memorized, ``whole`` (by default what it is used for).
        text_field: Field of JSONL and Parquet records that holds the text, or a text with several in it, such as
            ``{question} {answer}``.
    """

    embedded: bool = False
    source: str | None = None
    subset: str | None = None
    split: str | None = None
    text_field: str = "text"

    @classmethod
    def parse(cls, value: "str | dict[str, Any] | Corpus", embedded_split: str = "train") -> "Corpus":
        """A checked corpus, also from a mapping or the short forms: ``embedded``, a path, or a hub name.

        Args:
            embedded_split: Split of the embedded corpus where none is named.

        Raises:
            InputError: Neither or both of ``embedded`` and ``source``, or an unknown split.
        """
        if value == "embedded":
            return cls(embedded=True, split=embedded_split)
        if isinstance(value, dict):
            known = [field.name for field in fields(cls)]
            if unknown := [key for key in value if key not in known]:
                raise InputError(f"corpus: unknown field {unknown[0]!r}; known are {', '.join(known)}")
            value = cls(**value)
        corpus = value if isinstance(value, Corpus) else cls(source=value)
        corpus = replace(corpus, split=corpus.split or (embedded_split if corpus.embedded else "train"))
        if corpus.embedded == bool(corpus.source):
            raise InputError(CHOICE)
        if corpus.embedded and corpus.split not in EMBEDDED_SPLITS:
            raise InputError(f"corpus: the embedded corpus has the splits {EMBEDDED_SPLITS}, not {corpus.split!r}")
        return replace(corpus, source=ALIASES.get(corpus.source or "", corpus.source))

    @property
    def label(self) -> str:
        """How metadata and messages name this corpus."""
        if self.embedded:
            return f"embedded:{self.split}"
        return ":".join(part for part in (self.source, self.subset, self.split) if part)

    def identity(self) -> str:
        """A short hash of where the text comes from and what may have changed there."""
        return hashlib.sha256(repr((self, self.state())).encode()).hexdigest()[:16]

    def state(self) -> list[int] | list[tuple[str, int, int]]:
        """What may change behind an unchanged name: the Python version, or files' sizes and times."""
        if self.embedded:
            return list(sys.version_info[:3])
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(self._source)]

    def check(self, skip_bad_rows: bool = False) -> None:
        """Raises ``InputError`` where a local source can already be seen to be unusable."""
        bad = BadRows(skip_bad_rows)
        local = [] if self.embedded else local_files(self._source)
        if local and all(next(documents_of_file(str(path), self.text_field, bad), None) is None for path in local):
            raise InputError(f"{self.source}: has no text")

    def documents(self, bad: BadRows | None = None) -> Iterator[str]:
        """Yields texts: all of the embedded corpus, or a stream over the source's files.

        Several files are read in turn, in an order that is shuffled once with a fixed seed, so that
        the beginning of the stream is a sample of the whole mixture.

        Args:
            bad: What to do with records that hold no text; by default the first one is an error.
        """
        bad = bad or BadRows()
        if self.embedded:
            yield from _embedded_texts(self.split or "train")
            return
        files = [str(path) for path in local_files(self._source)] or self._hub_files()
        if not files:
            yield from self._hub_stream(bad)
            return
        random.Random(0).shuffle(files)
        yield from in_turn([documents_of_file(file, self.text_field, bad) for file in files])

    @property
    def _source(self) -> str:
        """Of a corpus that is not embedded."""
        if self.source is None:
            raise InputError(CHOICE)
        return self.source

    def _hub_files(self) -> list[str]:
        """The JSONL and Parquet files of a hub data set; empty if it is made of something else.

        Each file is streamed by itself: mixtures such as the OLMo-2 ones have files whose columns
        differ, which one stream over all of them refuses.
        """
        from datasets import load_dataset_builder

        try:
            data_files = load_dataset_builder(self.source, self.subset).config.data_files or {}
        except Exception as error:
            raise InputError(f"corpus {self.source}: {first_line(error)}") from error
        files = [str(file) for file in data_files.get(self.split, [])]
        return files if all(kind_of_file(file) in (*JSON_LINES, ".parquet") for file in files) else []

    def _hub_stream(self, bad: BadRows) -> Iterator[str]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.source, self.subset, split=self.split, streaming=True)
        except Exception as error:
            raise InputError(f"corpus {self.source}: {first_line(error)}") from error
        for number, row in enumerate(rows, start=1):
            yield from text_of(row, self.text_field, f"{self.source}, record {number}", bad)


def _embedded_texts(split: str) -> Iterator[str]:
    from lightning_kfac.data.demo.embedded import embedded_documents, split_documents
    from lightning_kfac.data.demo.planted import planted_documents

    if split == "whole":
        chosen = split_documents(embedded_documents(), "all")
    else:
        chosen = split_documents(embedded_documents(), split, planted_documents())
    yield from (document.text for document in chosen)
