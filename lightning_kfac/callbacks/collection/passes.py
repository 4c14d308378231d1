"""The passes of a collection, and what its factors say of where they come from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_kfac.data.names import CORPUS, domain_text


@dataclass(frozen=True)
class Pass:
    """One reading of one text.

    Attributes:
        text: ``corpus`` or the name of a domain.
        layers: Those whose sums fit into memory at once.
        moments: Measure in the bases of the factors instead of summing factors.
    """

    text: str
    layers: tuple[str, ...]
    moments: bool

    @property
    def data_name(self) -> str:
        """What ``TextData`` calls the text."""
        return data_name(self.text)


def data_name(text: str) -> str:
    """What ``TextData`` calls the corpus, or a domain of this name."""
    return CORPUS if text == CORPUS else domain_text(text)


def all_passes(
    layers: Sequence[Sequence[str]], texts: Sequence[str], domains: Collection[str], moments: bool
) -> list[Pass]:
    """Factors of every text, then moments in their bases.

    Args:
        layers: What fits into memory at once, each a pass over each text.
        texts: Whose factors are to be collected.
        domains: Whose moments are measured beside those of the corpus.
        moments: Whether any are.
    """
    factors = [Pass(text, tuple(names), False) for text in texts for names in layers]
    return factors + [Pass(t, tuple(names), True) for t in [CORPUS, *domains] * moments for names in layers]
