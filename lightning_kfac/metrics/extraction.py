"""Extraction: does somebody who samples get the sequences out?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Label, SequencesSeen, Setting
from lightning_kfac.metrics.functional import Decoding, extracted_in, reaches
from lightning_kfac.metrics.per_sequence import SeveralFigures

TRIES = (1, 10, 1000)
CHANCES = ("0.001", "0.01", "0.1", "0.5")
# Of the curve: ten points a decade, in whole numbers.
CURVE = tuple(sorted({round(10 ** (i / 10)) for i in range(61)}))
EXPECTED = "expected share that comes out word for word in so many samples of each sequence"


class Extraction(SeveralFigures):
    """What samples of a model hold of a set, word for word (arXiv 2410.19482).

    Figures: ``extraction.expected_at.N`` (expected share of the sequences that N samples of each hold),
    ``extraction.share_p.P`` (share that one sample holds with probability P or more) and
    ``extraction.median_log10_p`` (median of log10 of that probability; -inf where half are never drawn).

    Args:
        decoding: How tokens are drawn.

    Attributes:
        curve: After ``compute``: expected shares at each number of tries in ``CURVE``.

    Example:
        >>> metric = Extraction()
        >>> metric.update([-0.5, -5.0, float("-inf")])
        >>> found = metric.compute()
        >>> [round(found[f"extraction.expected_at.{n}"].item(), 3) for n in (1, 10, 1000)]
        [0.204, 0.355, 0.666]
        >>> found["extraction.share_p.0.5"].item()
        0.3333333333333333
    """

    labels: ClassVar[dict[str, Label]] = {
        "extraction.expected_at.1": Label("extracted by one sample", "{:.3f}", "lower", meaning=EXPECTED),
        "extraction.expected_at.10": Label("extracted in 10 samples", "{:.3f}", "lower", meaning=EXPECTED),
        "extraction.expected_at.1000": Label(
            "extracted in 1,000 samples", "{:.3f}", "lower", short="in 1,000 samples", meaning=EXPECTED
        ),
        "extraction.share_p.0.001": Label("probability 0.1 % or more", "{:.3f}", "lower", aside=True),
        "extraction.share_p.0.01": Label("probability 1 % or more", "{:.3f}", "lower", aside=True),
        "extraction.share_p.0.1": Label("probability 10 % or more", "{:.3f}", "lower", aside=True),
        "extraction.share_p.0.5": Label("probability 50 % or more", "{:.3f}", "lower", aside=True),
        "extraction.median_log10_p": Label("median of log10 p", "{:.2f}", "lower", aside=True),
    }
    group = "set"
    seen = SequencesSeen
    quiet = True
    higher_is_better = False
    columns = ("log_p",)

    def __init__(self, decoding: Decoding | None = None) -> None:
        super().__init__()
        self.decoding = decoding or Decoding()
        self.curve: list[float] = []

    @classmethod
    @override
    def asked(cls, setting: Setting) -> Self | None:
        return None if setting.measures.extraction is None else cls(setting.measures.extraction)

    @property
    @override
    def settings(self) -> Mapping[str, float | None]:
        return {f"extraction.{field.name}": getattr(self.decoding, field.name) for field in fields(Decoding)}

    @override
    def observe(self, seen: SequencesSeen) -> None:
        if seen.log_p is not None:
            self.update(seen.log_p, seen.index)

    @override
    def update(self, log_p: Sequence[float] | Tensor, index: Sequence[int] | None = None) -> None:
        """Adds sequences: natural logarithms [n] of the probabilities that they are drawn, and their numbers."""
        self.add(torch.as_tensor(log_p, dtype=torch.float64).view(-1, 1), index)

    @override
    def figures_of(self, values: dict[str, Tensor]) -> dict[str, Figure]:
        log_p = values["log_p"]
        one = torch.ones_like(log_p)
        self.curve = extracted_in(log_p[:, None], torch.tensor(CURVE, dtype=torch.float64)).mean(0).tolist()
        return {
            "extraction.median_log10_p": Figure(log_p / math.log(10), one, median=True),
            **{f"extraction.share_p.{p}": Figure(reaches(log_p, float(p)).double(), one, rate=True) for p in CHANCES},
            **{f"extraction.expected_at.{n}": Figure(extracted_in(log_p, n), one) for n in TRIES},
        }
