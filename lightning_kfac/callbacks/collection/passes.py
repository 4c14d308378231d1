"""The passes of a collection over its texts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_kfac.data.names import CORPUS


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
    measured = [CORPUS, *domains] if moments else []
    return factors + [Pass(text, tuple(names), True) for text in measured for names in layers]
