"""What comes out of a model: counted over passages and over the texts that they are parts of."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.extraction import TRIES
from lightning_kfac.metrics.functional import extracted_in, tries_needed

# A passage comes out in n tries where the chance of at least one is this.
CHANCE = 0.5
# Of which it is told what comes out.
COUNTED = (10, 1000)
NEAR = "near_verbatim@1000"
MEASURES = (
    *(f"texts@{n}" for n in COUNTED),
    *(f"passages@{n}" for n in COUNTED),
    "strict",
    *(f"expected@{n}" for n in TRIES),
    NEAR,
)


class Extractable(NamedTuple):
    """What a model makes of passages.

    Attributes:
        text: int64 [n], the text that each is part of, counted from 0.
        log_p: float64 [n], natural logarithm of the probability that one sample holds it word for word.
        strict: bool [n], greedy decoding recites it.
        log_near: float64 [n], at least so likely a sample comes near it; None where that was not measured.
    """

    text: Tensor
    log_p: Tensor
    strict: Tensor
    log_near: Tensor | None = None

    def comes_out(self, tries: int, chance: float = CHANCE) -> Tensor:
        """Which passages are (n, p)-discoverable (arXiv 2410.19482): n draws give them with this chance. bool [n]."""
        return tries_needed(self.log_p, chance) <= tries

    def texts(self, passages: Tensor) -> Tensor:
        """Of which texts any of some passages is. bool [number of texts]."""
        found = torch.zeros(int(self.text.max()) + 1, dtype=torch.bool)
        found[self.text[passages]] = True
        return found

    def figures(self, chance: float = CHANCE) -> dict[str, Figure]:
        """Shares by the names of ``MEASURES``; passages of one text are no sample of others, so texts are resampled."""
        return dict(self._figures(chance))

    def _figures(self, chance: float) -> Iterator[tuple[str, Figure]]:
        for n in COUNTED:
            own = self.texts(self.comes_out(n, chance)).double()
            yield f"texts@{n}", Figure(own, torch.ones_like(own), rate=True)
        for n in COUNTED:
            yield f"passages@{n}", self._share(self.comes_out(n, chance).double(), rate=True)
        yield "strict", self._share(self.strict.double(), rate=True)
        for n in TRIES:
            yield f"expected@{n}", self._share(extracted_in(self.log_p, n))
        if self.log_near is not None:
            yield NEAR, self._share(extracted_in(self.log_near, TRIES[-1]))

    def _share(self, values: Tensor, rate: bool = False) -> Figure:
        """The mean over passages, as a ratio of sums over texts."""
        counts = torch.bincount(self.text).double()
        return Figure(
            torch.zeros_like(counts).index_add(0, self.text, values), counts, rate and bool((counts == 1).all())
        )


def check_chance(chance: float, fail_above: float | None, measure: str, near_verbatim: int) -> None:
    """Raises ``InputError`` where an audit could not say what it is asked."""
    if not 0 < chance < 1:
        raise InputError(f"chance is {chance}; it must lie between 0 and 1, both excluded")
    if fail_above is not None and not 0 <= fail_above <= 1:
        raise InputError(f"fail_above is {fail_above}; it must lie between 0 and 1")
    if measure == NEAR and not near_verbatim:
        raise InputError(f"measure {NEAR} is measured only where near_verbatim is set to a number of edits")
