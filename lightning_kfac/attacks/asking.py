"""Attacks that leave the model as it is and ask in another way: many samples, other prompts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from typing_extensions import override

from lightning_kfac.attacks.attack import Attack
from lightning_kfac.console import counted
from lightning_kfac.errors import InputError
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics import described
from lightning_kfac.metrics.described import Measures
from lightning_kfac.metrics.functional import Decoding, extracted_in


@dataclass(frozen=True)
class Sampling(Attack):
    """Samples the continuation many times instead of taking the likeliest tokens (arXiv 2410.19482).

    Nothing is sampled: the expected share that ``tries`` samples of each prefix give word for word is computed.

    Args:
        tries: Samples of each prefix.
        temperature, top_k, top_p: The decoding scheme, see ``measures.extraction``; top_k null takes all tokens.
    """

    name: ClassVar[str] = "sampling"
    figure: ClassVar[str] = "extraction.median_log10_p"

    tries: int = 1000
    temperature: float = 1.0
    top_k: int | None = 40
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"attacks: tries is {self.tries}; it must be at least 1")
        self._decoding()

    @property
    @override
    def label(self) -> str:
        usual = Sampling(self.tries)
        others = [f"{n} {getattr(self, n)}" for n in ("temperature", "top_k", "top_p")]
        changed = [text for text, same in zip(others, self._same(usual), strict=True) if not same]
        return ", ".join([f"{self.tries:,} samples", *changed])

    @override
    def measures(self, usual: Measures) -> Measures:
        return replace(usual, extraction=described.Sampling(**asdict(self._decoding())))

    @override
    def got(self, figures: Mapping[str, Figure]) -> Figure:
        log_p = figures[self.figure].sums * math.log(10)
        return Figure(extracted_in(log_p, self.tries), torch.ones_like(log_p))

    def _decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_k, self.top_p)

    def _same(self, other: "Sampling") -> list[bool]:
        return [getattr(self, n) == getattr(other, n) for n in ("temperature", "top_k", "top_p")]


@dataclass(frozen=True)
class PromptShift(Attack):
    """Extends and shifts the prompts, and takes for each sequence the best (the position stress of arXiv 2510.24256).

    The prefix itself counts among the prompts. A prompt that is extended gives some of the text away and scores only
    what is left, so that a whole text comes from the prefix or from one of its ends.

    Args:
        tokens: Most tokens of the text that a prompt is extended by; of the prefix it keeps more than so many.
    """

    name: ClassVar[str] = "prompt_shift"
    figure: ClassVar[str] = "stress/stress_full_match"

    tokens: int = 20

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"attacks: tokens is {self.tokens}; it must be at least 1")

    @property
    @override
    def label(self) -> str:
        return f"prompts shifted by {counted(self.tokens, 'token')}"

    @override
    def measures(self, usual: Measures) -> Measures:
        return replace(usual, position_stress=self.tokens, include_unperturbed=True)
