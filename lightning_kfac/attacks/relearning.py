"""Relearning: what does fine-tuning on something else bring back? (arXiv 2406.13356, 2602.03379)

One half of the suppressed set, or unrelated text, is learned for a few steps; the other half is measured, which the
attack never sees. What rises there was hidden, not gone. The training is ``modules/relearning.py``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_kfac.attacks.attack import Attack
from lightning_kfac.errors import InputError

HALF = "half"
TEXT = "text"


@dataclass(frozen=True)
class Relearning(Attack):
    """Fine-tunes the edited model, and measures it after some numbers of steps.

    Args:
        steps: When to measure; 0 is before the first step.
        source: What is learned: ``half`` of the memorized set, ``text`` (the corpus of the data), or the file of
            another memorized set.
        weights: ``full`` trains all weights, ``lora`` adapters (peft) of every linear layer but the head.
        optimizer: ``adam`` (betas 0.9 and 0.999, no weight decay) or ``sgd`` (no momentum).
        lr: Learning rate, the same in every step.
        batch_size: Sequences a step, over all ranks together.
        rank: Of the adapters, which are scaled by 2.
        seed: Of the order of the sequences and of the adapters.
    """

    name: ClassVar[str] = "relearning"

    steps: tuple[int, ...] = (1, 5, 20, 100)
    source: str = HALF
    weights: Literal["full", "lora"] = "full"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-4
    batch_size: int = 8
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 0:
            raise InputError(f"attacks: steps is {list(self.steps)}; name numbers of steps, from 0")
        for name in ("batch_size", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"attacks: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"attacks: lr is {self.lr:g}; it must be greater than 0, and finite")

    @property
    @override
    def label(self) -> str:
        learned = {HALF: "one half", TEXT: "unrelated text"}.get(self.source, self.source)
        return f"relearning {learned}, {'LoRA, ' if self.weights == 'lora' else ''}lr {self.lr:g}"

    def after(self, step: int) -> dict[str, Any]:
        """Name and settings of the measurement after a step, for ``results.jsonl``: settings without a say left out."""
        unused = {"rank"} if self.weights == "full" else set()
        return {key: value for key, value in self.about().items() if key not in unused} | {"steps": step}
