"""Methods that train: on the forget set, and on text whose recall is to stay. ``modules/unlearning.py`` runs them."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from lightning_kfac.errors import InputError
from lightning_kfac.methods.method import Method, Needs, check_range


@dataclass(frozen=True)
class TrainedMethod(Method):
    """Minimises weight * (loss on the forget set) + (1 - weight) * (cross-entropy of text), in the chosen layers alone.

    Args:
        steps: Optimizer steps; where they are the strength, one training is measured after each number of them.
        weight: Of the loss on the forget set, in [0, 1].
        lr: Learning rate, the same in every step.
        batch_size: Sequences of each kind a step, over all ranks together.
        seed: Of the order of the sequences.
    """

    strength: ClassVar[str] = "steps"
    needs: ClassVar[Needs] = "forget set and text"

    steps: int = 20
    weight: float = 0.5
    lr: float = 1e-4
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self.name, "steps", self.steps, 0)
        check_range(self.name, "weight", self.weight, 0, 1)
        check_range(self.name, "batch_size", self.batch_size, 1)
        if not 0 < self.lr < float("inf"):
            raise InputError(
                f"methods: {self.name}: lr is {self.lr:g}; it must be greater than 0, and finite", "methods"
            )


@dataclass(frozen=True)
class GradientAscent(TrainedMethod):
    """The loss on the forget set is its negative cross-entropy; Adam."""

    name: ClassVar[str] = "gradient_ascent"


@dataclass(frozen=True)
class NPO(TrainedMethod):
    """Negative preference optimization (arXiv 2404.05868): the loss on the forget set is the mean over its sequences of
    (2 / beta) log(1 + (pi / pi_ref)^beta), with the model as it was for pi_ref; Adam.

    Args:
        beta: Greater than 0.
    """

    name: ClassVar[str] = "npo"

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < float("inf"):
            raise InputError(f"methods: npo: beta is {self.beta:g}; it must be greater than 0, and finite", "methods")

    @property
    @override
    def label(self) -> str:
        return "NPO"


@dataclass(frozen=True)
class BalancedSubnet(TrainedMethod):
    """Learns which weights to drop (arXiv 2410.02159): of each layer those with the largest |score|, by SGD with
    momentum 0.9 on the scores; the loss on the forget set is its negative cross-entropy.

    Args:
        ratio: Share of each layer's weights that is dropped.
    """

    name: ClassVar[str] = "balanced_subnet"
    strength: ClassVar[str] = "ratio"

    ratio: float = 0.01
    weight: float = 0.7
    lr: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self.name, "ratio", self.ratio, 0, 1)

    @property
    @override
    def label(self) -> str:
        return "BalancedSubnet"
