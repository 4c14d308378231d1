"""Names of the texts and sets of a run."""

import re
from collections.abc import Collection, Iterable

from lightning_kfac.errors import InputError

CORPUS = "corpus"
HELDOUT = "heldout"
MEMORIZED = "memorized"
CLEAN = "clean"
MEMBERS = "members"
NONMEMBERS = "nonmembers"


def domain_text(name: str) -> str:
    """The name of a domain among a run's texts."""
    return f"domain-{name}"


def check_names(option: str, names: Iterable[str], taken: Collection[str] = ()) -> None:
    """Raises ``InputError`` for names of sets or texts that stand for something else, or cannot be names of files."""
    for name in names:
        if name in (CORPUS, HELDOUT, MEMBERS, NONMEMBERS) or name in taken:
            raise InputError(f"data.{option}: the name {name!r} stands for something else; choose another")
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"data.{option}: the name {name!r} may hold letters, digits, - and _ only")
