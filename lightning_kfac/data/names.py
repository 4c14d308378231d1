"""Names of the texts and sets of a run."""

CORPUS = "corpus"
HELDOUT = "heldout"
MEMORIZED = "memorized"
CLEAN = "clean"


def domain_text(name: str) -> str:
    """The name of a domain among a run's texts."""
    return f"domain-{name}"
