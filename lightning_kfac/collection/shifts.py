"""What a change of weights does to the loss, to first and second order, from one pass over a text.

With z_t = W a_t at an edited layer and g_t the gradient of the summed loss at z_t, changing W by dW shifts the loss by
s_t = g_t^T dW a_t at position t, summed over the layers. The mean of s_t under the text's own labels is the first-order
change of the loss; half the mean of s_t^2 under labels that the model draws is the second-order one, as far as
positions do not go together (the expand assumption of K-FAC). Half the mean of the square of a whole row's shift is the
Fisher's quadratic form itself, which needs many rows. (Public journal of the repository smarter/memorization_kfac.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_kfac.collection.capture import CurvatureCapture, Uses
from lightning_kfac.collection.collect import Batches, frozen, planned
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.leftovers import without_leftover_gradients
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.collection.sums import NoSums
from lightning_kfac.errors import InputError
from lightning_kfac.models.head import Labels
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.tokens import TokenBatch

Change = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shift:
    """What a change of weights does to the mean loss of a token.

    Attributes:
        first: E[s_t], the text's own labels.
        second: E[s_t^2] / 2, labels drawn by the model.
        second_by_rows: The same of whole rows: E over rows of (sum of s_t)^2 / 2, divided by the tokens of a row.
    """

    first: float
    second: float
    second_by_rows: float

    @property
    def total(self) -> float:
        """First and second order."""
        return self.first + self.second


@dataclass(frozen=True)
class Forecast:
    """What an edit will cost on a text.

    Attributes:
        total: Of all layers together.
        layers: Of each layer by itself.
        n_tokens: Positions that counted.
    """

    total: Shift
    layers: dict[str, Shift]
    n_tokens: int


@dataclass(frozen=True)
class GoldAndSampled(FisherLoss):
    """Two losses on one forward pass: of the text's own labels, then of labels that the model draws."""

    mc_samples: int = 2

    @override
    def _labels(self, tokens: TokenBatch, targets: Tensor, draw: int) -> Labels:
        if draw:
            return super()._labels(tokens, targets, draw - 1)
        return lambda logits, part: targets[part]


def forecast(model: nn.Module, batches: Batches, changes: Sequence[Change], *, seed: int = 0) -> list[Forecast]:
    """What changes of weights will do to the loss on a text, all of them in one pass; no weight is touched.

    Args:
        model: A Hugging Face causal language model.
        batches: As for ``collect_factors``.
        changes: For each edit W' - W [d_out, d_in] by dotted layer name.
        seed: Keys the sampled labels.

    Returns:
        One forecast a change.

    Raises:
        InputError: A layer does not exist, has another shape, no token is valid, or a value is not finite.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> model, rows = load_model("demo"), [{"input_ids": torch.arange(1, 257).view(2, 128)}]
        >>> name = "model.layers.3.mlp.up_proj"
        >>> smaller = -0.01 * model.get_submodule(name).weight
        >>> (found,) = forecast(model, rows, [{name: smaller}])
        >>> found.n_tokens, found.total == found.layers[name], found.total.second > 0
        (254, True, True)
    """
    layers = _changed_layers(model, changes)
    objective = GoldAndSampled(seed=seed)
    with frozen(model):
        session = CollectionSession(model, layers, objective)
        batches = planned(session, batches)
        plan = session.plan
        capture = ShiftCapture(layers, changes, plan.uses)
        engine = CurvatureEngine(model, capture, objective, plan.rows_at_once, plan.head_chunk)
        device = next(model.parameters()).device
        rows = 0
        with without_leftover_gradients(model), capture:
            for batch in batches:
                tokens = objective.prepare(batch, first_index=rows).to(device)
                rows += tokens.shape[0]
                last, _ = engine.run(tokens)
                last.backward()
    return capture.forecasts()


class _Sums:
    """Sums over positions, for each of K changes. float64 [K] each."""

    def __init__(self, count: int, device: torch.device):
        self.first, self.second, self.by_rows = torch.zeros(3, count, dtype=torch.float64, device=device)

    def add(self, shifts: Tensor, gold: bool) -> None:
        """Adds the shifts [K, B, T] of one part under one kind of labels."""
        if gold:
            self.first += shifts.sum((1, 2))
        else:
            self.second += (shifts**2).sum((1, 2)) / 2
            self.by_rows += (shifts.sum(2) ** 2).sum(1) / 2

    def of(self, change: int, n_tokens: int) -> Shift:
        """The means."""
        return Shift(*(values[change].item() / n_tokens for values in (self.first, self.second, self.by_rows)))


class ShiftCapture(CurvatureCapture):
    """Hooks that sum shifts of the loss instead of curvature.

    Args:
        changes: Those that each layer has, by the number of the edit.
    """

    def __init__(self, layers: Mapping[str, Layer], changes: Sequence[Change], uses: Uses):
        super().__init__(layers, lambda layer: NoSums(), uses)
        self.changes = {
            name: {
                k: change[name].to(layer.device, torch.float32) for k, change in enumerate(changes) if name in change
            }
            for name, layer in layers.items()
        }
        device = self.root.device
        self.by_layer = {name: _Sums(len(changes), device) for name in layers}
        self.all_layers = _Sums(len(changes), device)
        self._n_changes = len(changes)
        self._running: dict[tuple[str | None, bool], Tensor] = {}

    @override
    def begin(self, valid: Tensor | None, shape: tuple[int, int] | None = None) -> None:
        self._settle()
        super().begin(valid, shape)

    @override
    def add(self, name: str, a: Tensor, g: Tensor, first_draw: bool, where: Tensor | None = None) -> None:
        """Adds what one layer saw; the first draw's labels are the text's own."""
        a, g, _ = self._counted(name, a, g, where)
        a = a.flatten(0, -2).float()
        g = g.flatten(0, -2).float()
        for change, dW in self.changes[name].items():
            shift = ((a @ dW.T) * g).sum(1).double()
            for layer in (name, None):
                running = self._shifts(layer, first_draw)[change]
                running += shift if where is None else torch.zeros_like(running).index_add(0, where, shift)

    def _shifts(self, layer: str | None, gold: bool) -> Tensor:
        """Those of the part that is running, of one layer or of all: float64 [K, positions]."""
        if self._shape is None:
            raise RuntimeError("the shape of the batch is not known: begin was called without it")
        key = layer, gold
        if key not in self._running:
            n = self._shape[0] * self._shape[1]
            self._running[key] = torch.zeros(self._n_changes, n, dtype=torch.float64, device=self.root.device)
        return self._running[key]

    def _settle(self) -> None:
        """Ends a part."""
        for (layer, gold), shifts in self._running.items():
            sums = self.all_layers if layer is None else self.by_layer[layer]
            sums.add(shifts.unflatten(1, self._shape or ()), gold)
        self._running.clear()

    def forecasts(self) -> list[Forecast]:
        """One for each change; raises ``InputError`` where no position counted."""
        self._settle()
        n_tokens = int(self.positions)
        if not n_tokens:
            raise InputError("no valid token: every position is padding, ignored, or without a next token")
        for name, sums in self.by_layer.items():
            if not torch.stack([sums.first, sums.second]).isfinite().all():
                raise InputError(f"the shift at {name} has NaN or infinite values; look at the model's weights")
        return [
            Forecast(
                self.all_layers.of(k, n_tokens),
                {name: self.by_layer[name].of(k, n_tokens) for name, own in self.changes.items() if k in own},
                n_tokens,
            )
            for k in range(self._n_changes)
        ]


def _changed_layers(model: nn.Module, changes: Sequence[Change]) -> dict[str, Layer]:
    """The layers of all changes, in the model's order."""
    known = find_layers(model)
    wanted = {name for change in changes for name in change}
    if missing := sorted(wanted - known.keys()):
        raise InputError(f"the changes are of another model: it has no layer {missing[0]}")
    for change in changes:
        for name, dW in change.items():
            if tuple(dW.shape) != known[name].shape:
                raise InputError(f"{name}: the change is {list(dW.shape)}, the weight {list(known[name].shape)}")
    if not wanted:
        raise InputError("nothing changes: there is no layer to forecast")
    return {name: layer for name, layer in known.items() if name in wanted}
