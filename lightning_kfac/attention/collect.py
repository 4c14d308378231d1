"""Second moments of attention residuals, batch by batch, in constant memory."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_kfac.attention.decomposition import decompose, sharpness
from lightning_kfac.attention.interface import Transform, attention_shapes, resolve_layers, transformed_attention
from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra, model_fingerprint
from lightning_kfac.errors import InputError
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.tokens import TokenBatch, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ResidualSums:
    """Running float64 sums of one layer with H heads of width d.

    Attributes:
        moments: [H, d, d], sum of eps eps^T.
        entropy, top1_mass: [H].
        n_tokens: Number of positions so far.
    """

    def __init__(self, heads: int, width: int, device: torch.device):
        self.moments = torch.zeros(heads, width, width, dtype=torch.float64, device=device)
        self.entropy = torch.zeros(heads, dtype=torch.float64, device=device)
        self.top1_mass = torch.zeros(heads, dtype=torch.float64, device=device)
        self.n_tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, output: Tensor, probabilities: Tensor, values: Tensor, valid: Tensor) -> None:
        """Adds one batch.

        Args:
            output, probabilities, values: As in ``decompose``.
            valid: bool [B, T]; other positions count nothing.
        """
        _, residual = decompose(output, probabilities, values)
        counted = residual[valid].double()
        self.moments += torch.einsum("nhi,nhj->hij", counted, counted)
        for total, figure in zip((self.entropy, self.top1_mass), sharpness(probabilities), strict=True):
            total += figure.transpose(1, 2)[valid].double().sum(0)
        self.n_tokens += valid.sum()

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Sums over the ranks, so that each holds the whole."""
        for name, value in list(vars(self).items()):
            setattr(self, name, sum_over_ranks(value))

    def spectra(self, layer: int) -> HeadSpectra:
        """The means; raises ``InputError`` where there are none."""
        means = [(total / self.n_tokens).cpu() for total in (self.moments, self.entropy, self.top1_mass)]
        if not all(mean.isfinite().all() for mean in means):
            why = "have NaN or infinite entries"
            if not self.n_tokens:
                why = "were not collected: the text has no valid position"
            raise InputError(f"layer {layer}: the attention residuals {why}; check the model and the text")
        return HeadSpectra(*means)


class ResidualCapture:
    """Listens to the attention of some layers between ``__enter__`` and ``__exit__``.

    Args:
        model: A causal language model in eval mode.
        layers: Numbers, negative from the end.

    Raises:
        InputError: A layer does not exist, or the architecture does not support the attention interface.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[int]):
        shapes = attention_shapes(model)
        self.model = model
        self.sums = {layer: ResidualSums(*shapes[layer], model.device) for layer in resolve_layers(layers, shapes)}
        self._valid: Tensor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "ResidualCapture":
        manner_of(self.model)  # tried out while nothing listens to the attention
        listeners = {layer: self._listener(sums) for layer, sums in self.sums.items()}
        self._stack.enter_context(transformed_attention(self.model, listeners))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @torch.no_grad()
    def run(self, tokens: TokenBatch) -> Tensor:
        """Runs one batch through the model; returns its summed next-token loss."""
        total = torch.zeros((), device=tokens.input_ids.device)
        for part in parts_of(self.model, tokens, tokens.shape[0]):
            self._valid = part.valid
            total = total + part.gold_loss(self.model)
        return total

    def spectra(
        self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda total: total, **metadata: object
    ) -> ResidualSpectra:
        """Everything so far, on every rank. ``metadata`` goes along."""
        for sums in self.sums.values():
            sums.reduce(sum_over_ranks)
        found = {layer: sums.spectra(layer) for layer, sums in self.sums.items()}
        n_tokens = int(next(iter(self.sums.values())).n_tokens)
        identity = {"fingerprint": model_fingerprint(self.model), "n_tokens": n_tokens}
        return ResidualSpectra(found, identity | metadata)

    def _listener(self, sums: ResidualSums) -> Transform:
        def listen(output: Tensor, probabilities: Tensor, values: Tensor) -> Tensor:
            if self._valid is None:
                raise RuntimeError("a ResidualCapture's model runs its batches through `run`")
            sums.add(output, probabilities, values, self._valid)
            return output

        return listen


def collect_residuals(
    model: "PreTrainedModel", batches: Iterable[dict[str, Any]], layers: Sequence[int]
) -> ResidualSpectra:
    """Spectra of the attention residuals of some layers on some text.

    Args:
        model: A causal language model in eval mode.
        batches: Dicts with ``input_ids`` [B, T] and optionally ``attention_mask`` and ``labels``, as for
            ``collect_factors``: positions count that have a next token.
        layers: Numbers, negative from the end.

    Raises:
        InputError: A layer does not exist, or the architecture does not support the attention interface.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> spectra = collect_residuals(load_model("demo"), [{"input_ids": torch.arange(200).view(4, 50)}], layers=[5])
        >>> spectra[5].effective_dimension().shape
        torch.Size([4])
    """
    with ResidualCapture(model, layers) as capture:
        for batch in batches:
            capture.run(TokenBatch.from_dict(batch).to(model.device))
        return capture.spectra()
