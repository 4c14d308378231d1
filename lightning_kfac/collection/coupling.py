"""How strongly each layer is coupled to what a text recites, all layers in one backward pass.

The margin of a token is its logit less the largest other one. With z_t = W a_t at a layer, the coupling is the mean
over positions of ||a_t||^2 ||d m / d z_t||^2, m the sum of the margins: the squared length of the margins' gradient
in W if positions did not go together, so how far a change of W of given size, in no particular direction, moves
them. (Public journal of the repository smarter/memorization_kfac.)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_kfac.collection.collect import Batches, frozen, planned
from lightning_kfac.collection.fisher import BYTES_PER_LOGIT, FisherLoss, LabelSource
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.collection.sums import NoSums
from lightning_kfac.math.loss import margins
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.tokens import TokenBatch


@dataclass(frozen=True)
class MarginSum(FisherLoss):
    """Sum of the margins of the text's own tokens; the logits exist whole."""

    labels: LabelSource = "gold"

    @override
    def draws(self, model: nn.Module, batch: TokenBatch, head_chunk: int | None) -> Iterator[Tensor]:
        logits = model(**batch.model_inputs(model)).logits.flatten(0, 1)
        yield margins(logits if logits.dtype == torch.float64 else logits.float(), batch.targets.flatten()).sum()

    @override
    def head(
        self, model: nn.Module, layers: Mapping[str, Layer], device: torch.device, positions: int
    ) -> tuple[int | None, int]:
        manner_of(model)  # tried out while nothing listens to the layers
        vocabulary = language_model(model).get_output_embeddings().weight.shape[0]
        return None, positions * vocabulary * BYTES_PER_LOGIT


class CouplingSums(NoSums):
    """Sum over positions of ||a||^2 ||g||^2."""

    def __init__(self, layer: Layer):
        self.total = torch.zeros((), dtype=torch.float64, device=layer.device)

    @override
    def add(self, a: Tensor, g: Tensor, first_draw: bool, rows: Tensor | None = None) -> None:
        self.total += ((a.float() ** 2).sum(-1) * (g.float() ** 2).sum(-1)).double().sum()

    @override
    def trace(self) -> dict[str, Tensor]:
        return {"gradient": self.total}

    @override
    def result(self, n_tokens: int, draws: int, leader: None) -> Any:
        """The mean, a float."""
        return self.total.item() / max(n_tokens, 1)


def layer_coupling(model: nn.Module, batches: Batches, layers: Mapping[str, Layer]) -> dict[str, float]:
    """The coupling of each layer to the margins of a text's tokens.

    Args:
        model: A Hugging Face causal language model.
        batches: As for ``collect_factors``; ``labels`` say which tokens count.
        layers: Those of ``resolve_targets``.

    Returns:
        By dotted name.

    Raises:
        InputError: No token is valid, or a value is not finite.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> from lightning_kfac.models.targets import resolve_targets
        >>> model = load_model("demo")
        >>> layers = resolve_targets(model, [3], ["up", "down"])
        >>> found = layer_coupling(model, [{"input_ids": torch.arange(1, 65).view(2, 32)}], layers)
        >>> list(found) == list(layers) and min(found.values()) > 0
        True
    """
    objective = MarginSum()
    with frozen(model):
        session = CollectionSession(model, layers, objective)
        batches = planned(session, batches)
        device = next(model.parameters()).device
        try:
            session.open(layers, CouplingSums)
            for number, batch in enumerate(batches):
                session.run(objective.prepare(batch).to(device)).backward()
                session.check_finite(f"batch {number}")
            return session.close()
        finally:
            session.abandon()


def ratios(memorized: Mapping[str, float], ordinary: Mapping[str, float]) -> dict[str, float]:
    """How much stronger layers are coupled to one text than to another, without those that the other never reaches."""
    return {name: memorized[name] / ordinary[name] for name in memorized if ordinary[name]}


def best_window(values: Mapping[int, float], width: int) -> list[int]:
    """Neighbouring blocks with the largest sum; of equal ones the first.

    Example:
        >>> best_window({0: 1.0, 1: 3.0, 2: 2.0, 3: 0.5}, 2)
        [1, 2]
    """
    blocks = sorted(values)
    windows: Iterable[list[int]] = (blocks[i : i + width] for i in range(max(1, len(blocks) - width + 1)))
    return max(windows, key=lambda window: sum(values[block] for block in window))
