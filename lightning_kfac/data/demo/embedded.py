"""The embedded corpus: real English that every CPython carries.

The language reference topics (``pydoc_data.topics``) and the docstrings of the standard library,
read with ``ast`` and never imported. The text differs a little between Python versions, so
everything that must stay the same across versions (which documents are held out) depends on the
document's NAME alone.
"""

import ast
import functools
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_kfac.garbage import uncollected

MIN_CHARACTERS = 100
HELDOUT_PERCENT = 8
# Not prose about Python: test suites, vendored packages, an editor's menus, generated grammars.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "idle_test"}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """One piece of text. ``name`` identifies it across Python versions."""

    name: str
    text: str


def is_heldout(name: str) -> bool:
    """Whether the document of this name is kept out of training: a hash of the name decides."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


@functools.cache
def embedded_documents() -> tuple[Document, ...]:
    """All documents of the embedded corpus, sorted by name, texts deduplicated.

    Takes about two seconds the first time. Where two documents share a text, the first by name stays.
    """
    with uncollected():
        documents = sorted([*_reference_topics(), *_standard_library_docstrings()])
    seen_names = set()
    seen_texts = set()
    unique = []
    for document in documents:
        key = " ".join(document.text.split())
        if document.name not in seen_names and key not in seen_texts:
            seen_names.add(document.name)
            seen_texts.add(key)
            unique.append(document)
    return tuple(unique)


def split_documents(
    documents: Iterable[Document], split: str, excluded: frozenset[str] = frozenset()
) -> list[Document]:
    """The documents of one split, chosen by name.

    Args:
        split: ``train`` (neither held out nor excluded), ``heldout``, or ``all``.
        excluded: Names that ``train`` leaves out: the sources of planted sequences.
    """
    if split == "all":
        return list(documents)
    if split == "heldout":
        return [d for d in documents if is_heldout(d.name)]
    return [d for d in documents if not is_heldout(d.name) and d.name not in excluded]


def _reference_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if len(text) >= MIN_CHARACTERS:
            yield Document(f"topic:{name}", text.strip())


def _standard_library_docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        yield from _docstrings(tree, module)


def _sources(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - SKIPPED_FOLDERS  # not entered: site-packages has thousands of files
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _docstrings(node: Documented, name: str) -> Iterator[Document]:
    text = ast.get_docstring(node, clean=False)
    if text and len(text := inspect.cleandoc(text)) >= MIN_CHARACTERS:
        yield Document(f"doc:{name}", text)
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")
