"""What an attack is: something done to an edited model, or to how it is asked, that may bring suppressed text back.

Most attacks are applied to the weights for as long as a block runs (``on``); some change nothing and only ask in
another way (``measures``), and say which figure tells what they get out word for word (``got``).
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_kfac.errors import InputError
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics.described import Measures
from lightning_kfac.models.fused import FusedRows
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers


@dataclass(frozen=True)
class Attack:
    """One attack with its settings; this one does nothing.

    Attributes:
        name: Of its kind, as configs and ``results.jsonl`` have it.
        figure: The figure that tells which share of the sequences it gets out word for word.
    """

    name: ClassVar[str] = "none"
    figure: ClassVar[str] = "strict_acc"

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """The model under attack while the block runs; afterwards its weights are the same again, bit for bit."""
        return nullcontext()

    def measures(self, usual: Measures) -> Measures:
        """What to measure instead of the usual."""
        return usual

    def got(self, figures: Mapping[str, Figure]) -> Figure:
        """What it gets out word for word of each sequence, from the figures that were measured under it."""
        return figures[self.figure]

    def about(self) -> dict[str, Any]:
        """Name and settings, for ``results.jsonl``."""
        return {"name": self.name, **asdict(self)}

    @property
    def label(self) -> str:
        """For tables."""
        return self.name


@dataclass(frozen=True)
class WeightAttack(Attack):
    """Changes the weight of every linear layer but the head: a function of one weight after the other."""

    def changed(self, W: Tensor, layer: str) -> Tensor:
        """The weight under attack.

        Args:
            W: [d_out, d_in], in float32 or wider.
            layer: Its dotted name.

        Returns:
            [d_out, d_in].
        """
        raise NotImplementedError

    @override
    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module) -> Iterator[None]:
        layers = attacked_layers(model)
        kept = {layer.parameter_name: layer.parameter.detach().to("cpu", copy=True) for layer in layers.values()}
        try:
            with torch.no_grad():
                for name, layer in layers.items():
                    W = layer.W.to(torch.promote_types(layer.dtype, torch.float32))
                    layer.write(layer.parameter.data, self.changed(W, name).to(layer.dtype))
            yield
        finally:
            for layer in layers.values():
                layer.parameter.data.copy_(kept[layer.parameter_name])


def attacked_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer but the head, by name: ``nn.Linear``, ``Conv1D`` and each expert; a fused weight as a whole.

    Raises:
        InputError: A weight is quantized already, or there is no such layer.
    """
    ends = (language_model(model).get_output_embeddings(), language_model(model).get_input_embeddings())
    spared = {id(end.get_parameter("weight")) for end in ends if end is not None}
    layers = {
        name: layer
        for name, layer in find_layers(model).items()
        if not isinstance(layer, FusedRows) and id(layer.parameter) not in spared
    }
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer but its head: there is nothing to attack")
    for name, layer in layers.items():
        if (what := layer.packed()) is not None:
            raise InputError(f"{name} is a {what}: load the model without quantization to attack it")
    return layers


def check_share(name: str, value: float, least: float = 0.0, most: float = 1.0) -> None:
    """Raises ``InputError`` for a setting outside [least, most]."""
    if not least <= value <= most:
        raise InputError(f"attacks: {name} is {value:g}; it must lie between {least:g} and {most:g}")
