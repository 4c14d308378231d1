"""Where text comes from: the embedded corpus, local files, or a data set on the Hugging Face hub."""

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning_kfac.data.documents import Document, TextFile
from lightning_kfac.data.readers import (
    SHORTEST_STRETCH,
    STRETCHES,
    Reading,
    count_of_file,
    documents_of_file,
    documents_of_row,
    holds_little,
    in_turn,
    local_files,
    sources_of_file,
)
from lightning_kfac.data.records import JSON, kind_of_file
from lightning_kfac.data.rows import BadRows, parse_object
from lightning_kfac.data.token_files import TokenKind
from lightning_kfac.errors import InputError, did_you_mean, first_line
from lightning_kfac.storage.hub import check_reachable

# Names of the original tool.
ALIASES = {"olmo": "allenai/olmo-mix-1124", "dolmo": "allenai/dolmino-mix-1124"}
# Before a tokenizer is known.
ANY_TOKENS = TokenKind(eos=-1, known=1, vocab_size=1 << 31)
# A mixture keeps its sources in separate files; reading this many in turn samples them all.
FILES_IN_TURN = 16
# "all" leaves the documents of the planted sequences out, "whole" does not, and "planted" has nothing else.
EMBEDDED_SPLITS = ("train", "heldout", "all", "whole", "planted")
CHOICE = "corpus: give either `embedded: true` or a `source` (file, folder or hub data set)"


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Args:
        embedded: Use the text that ships with Python: language reference and docstrings.
        source: A file or folder of text, JSON, Parquet, Arrow (``save_to_disk``) or token ids (``.npy``), or a data
            set of the Hugging Face hub (``olmo`` and ``dolmo`` stand for the OLMo-2 mixes).
        subset: Configuration name of a hub data set.
        split: Split of a data set of the hub, or of a folder that keeps splits apart (by default ``train``); of the
            embedded corpus ``train``, ``heldout``, ``all`` or, with what the demo model has memorized, ``whole``
            (``planted`` for these documents alone; by default what it is used for).
        text_field: Field of records that holds the text, or a text with several in it, such as
            ``{question} {answer}``; records without it may hold token ids in ``input_ids``, ``token_ids`` or
            ``tokens``.
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
                meant = did_you_mean(unknown[0], known)
                raise InputError(f"corpus: unknown field {unknown[0]!r}; known are {', '.join(known)}{meant}")
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
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._local_files()]

    def check(self, skip_bad_rows: bool = False) -> None:
        """Raises ``InputError`` where a local source can already be seen to be unusable."""
        how = Reading(self.text_field, BadRows(skip_bad_rows), ANY_TOKENS)
        local = [] if self.embedded else self._local_files()
        if local and all(_is_empty(path, how) for path in local):
            raise InputError(f"{self.source}: has no text")

    def documents(self, bad: BadRows | None = None) -> Iterator[str]:
        """Yields the texts of ``read``, each whole.

        Args:
            bad: What to do with records that hold no text; by default the first one is an error.
        """
        for document in self.read(Reading(self.text_field, bad or BadRows())):
            if isinstance(document, TextFile):
                yield document.text()
            elif isinstance(document, str):
                yield document

    def read(self, how: Reading, sample: bool = False) -> Iterator[Document]:
        """Yields documents: those of the embedded corpus by name, or a stream over the source's files.

        Several files are read in turn, in an order that is shuffled once with a fixed seed, so that the beginning of
        the stream is a sample of the whole mixture.

        Args:
            how: With the corpus' own ``text_field``.
            sample: Read large files in many places in turn too (JSON lines every 256 KB or 4,096th part, groups of
                rows of Parquet and Arrow, stretches of token ids), also in shuffled order: what is read first is a
                sample of all documents. Compressed files and JSON arrays can only be read from their beginning.
        """
        if self.embedded:
            yield from _embedded_texts(self.split or "train")
            return
        local = self._local_files()
        if local:
            yield from _sampled(local, how) if sample else _in_order(local, how)
            return
        addresses = self._hub_files()
        if addresses:
            random.Random(0).shuffle(addresses)
            yield from in_turn([_of_hub_file(address, how) for address in addresses], FILES_IN_TURN)
        else:
            yield from self._hub_stream(how)

    def count(self) -> int | None:
        """How many documents there are, where that can be told at once."""
        if self.embedded:
            return sum(1 for _ in _embedded_texts(self.split or "train"))
        counts = [count_of_file(file) for file in self._local_files()]
        known = [count for count in counts if count is not None]
        return sum(known) if counts and len(known) == len(counts) else None

    def _local_files(self) -> list[Path]:
        return local_files(self._source, self.split)

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

        check_reachable("dataset", self._source)
        try:
            data_files = load_dataset_builder(self.source, self.subset).config.data_files or {}
        except Exception as error:
            raise InputError(f"corpus {self.source}: {first_line(error)}") from error
        files = [str(file) for file in data_files.get(self.split, [])]
        return files if all(kind_of_file(file) in (*JSON, ".parquet") for file in files) else []

    def _hub_stream(self, how: Reading) -> Iterator[Document]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.source, self.subset, split=self.split, streaming=True)
        except Exception as error:
            raise InputError(f"corpus {self.source}: {first_line(error)}") from error
        for number, row in enumerate(rows, start=1):
            yield from _usable(row, how, f"{self.source}, record {number}")


def _sampled(files: list[Path], how: Reading) -> Iterator[Document]:
    total = sum(file.stat().st_size for file in files)
    stretch = max(SHORTEST_STRETCH, total // STRETCHES)
    sources = [source for file in files for source in sources_of_file(file, how, stretch)]
    random.Random(0).shuffle(sources)
    yield from in_turn(sources, len(sources) if all(map(holds_little, files)) else FILES_IN_TURN)


def _in_order(files: list[Path], how: Reading) -> Iterator[Document]:
    files = list(files)
    random.Random(0).shuffle(files)
    yield from in_turn([documents_of_file(file, how) for file in files], FILES_IN_TURN)


def _is_empty(file: Path, how: Reading) -> bool:
    if kind_of_file(file.name) == ".npy":
        return not file.stat().st_size
    return next(documents_of_file(file, how), None) is None


def _of_hub_file(address: str, how: Reading) -> Iterator[Document]:
    """The documents of a JSONL or Parquet file on the hub, streamed by the datasets package."""
    from datasets import load_dataset

    lines = kind_of_file(address) in JSON  # records of one file may differ in their columns
    options = {"path": "text", "sample_by": "line"} if lines else {"path": "parquet"}
    try:
        rows = load_dataset(**options, data_files=[address], split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            if not lines:
                yield from _usable(row, how, f"{address}, record {number}")
            elif row["text"].strip():
                yield from _of_line(row["text"], how, address, number)
    except InputError:
        raise
    except Exception as error:  # the readers below raise a dozen types for a damaged file
        raise InputError(f"{address}: cannot be read: {first_line(error)}") from error


def _of_line(line: str, how: Reading, address: str, number: int) -> Iterator[Document]:
    try:
        row = parse_object(line, f"{address}, line {number}")
    except InputError as error:
        how.bad.meet(error)
        return
    yield from _usable(row, how, f"{address}, record {number}")


def _usable(row: Mapping[str, Any], how: Reading, where: str) -> Iterator[Document]:
    try:
        yield from documents_of_row(row, how)
    except InputError as error:
        how.bad.meet(InputError(f"{where}: {error}"))


def _embedded_texts(split: str) -> Iterator[str]:
    from lightning_kfac.data.demo.embedded import embedded_documents, split_documents
    from lightning_kfac.data.demo.planted import planted_documents

    chosen = split_documents(embedded_documents(), "all")
    if split == "planted":
        planted = planted_documents()
        chosen = [document for document in chosen if document.name in planted]
    elif split != "whole":
        chosen = split_documents(embedded_documents(), split, planted_documents())
    yield from (document.text for document in chosen)
