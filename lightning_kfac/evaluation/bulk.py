"""Listens to the inputs of layers while a model reads texts: which share of them lies in the flat directions?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import FactorFolder, input_leaders, layer_shape
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.factors.moments import has_moments, load_moments
from lightning_kfac.math.bulk import bulk_energies, flattest, gains, random_basis
from lightning_kfac.models.experts import ExpertLayer
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import See
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.probes import banded_mask, takes_own_mask
from lightning_kfac.models.tokens import TokenBatch, parts_of

# Row, first position, number of positions.
Stretch = tuple[int, int, int]


class BulkShare:
    """Bulk shares of texts at some layers of a model, with those of a random basis as a control.

    A direction's depth is its eigenvalue of A, or, where moments were measured, their sum over the outputs. Weights are
    those of the model as it is now.

    Args:
        model: The model; its layers are whole.
        factors: Their layers are listened to.
        control: Measure a random basis too.

    Raises:
        InputError: A layer is not the model's, or an expert's.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, KroneckerFactors], control: bool = True):
        check_layers(model, factors)
        self.model = model
        self.control = control
        self.layers = {name: layer for name, layer in find_layers(model).items() if name in factors}
        leaders = input_leaders(factors)
        self.followers = {
            place: [n for n in factors if leaders[n] == place] for place in dict.fromkeys(leaders.values())
        }
        self._bases: dict[str, Tensor] = {}
        self._random: dict[int, Tensor] = {}
        self._of_layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
        cache = BasisCache.beside(factors)
        for place, names in self.followers.items():
            for name in names:
                self._prepare(place, name, factors, cache)

    def _prepare(self, place: str, name: str, factors: Mapping[str, KroneckerFactors], cache: BasisCache) -> None:
        """Gains and flat directions of a layer, in its own basis and in a random one."""
        layer = self.layers[name]
        dtype = torch.promote_types(layer.dtype, torch.float32)
        _, A = cache.of(factors, name, layer.device)
        moments = None
        if isinstance(factors, FactorFolder) and has_moments(factors):
            moments = load_moments(factors.path, factors, cache, name)
        depth = A.values if moments is None else moments.double().sum(0).to(layer.device)
        flat = flattest(depth)
        size = len(flat)
        self._bases.setdefault(place, A.vectors.to(dtype))
        self._of_layers[name] = [(gains(layer.W, self._bases[place]), flat)]
        if self.control:
            if size not in self._random:
                self._random[size] = random_basis(size).to(layer.device, dtype)
            chosen = torch.arange(size, device=flat.device) < flat.sum()  # as many of the random ones
            self._of_layers[name].append((gains(layer.W, self._random[size]), chosen))

    @contextmanager
    def listening(self) -> Iterator["Heard"]:
        """Hears what the model reads until it ends."""
        heard = Heard()
        with ExitStack() as hooks:
            decoder = language_model(self.model).base_model
            hooks.callback(decoder.register_forward_pre_hook(heard.begin, with_kwargs=True).remove)
            for place in self.followers:
                hooks.callback(self.layers[place].watch(self._see(place, heard)).remove)
            yield heard

    @torch.no_grad()
    def of_stretches(self, batch: TokenBatch, stretches: Sequence[Stretch], context: int | None = None) -> list[float]:
        """Shares of stretches of rows, means over layers; one forward.

        Args:
            stretches: Row, first position and number of positions of each.
            context: Each token attends to itself and the tokens before it, so many in all, where the model takes a
                mask of its own.
        """
        manner_of(self.model)  # tried out while nothing listens to the layers
        mask = {}
        if context is not None and takes_own_mask(self.model) and not manner_of(self.model).is_apart(batch.shape[1]):
            mask = {"attention_mask": banded_mask(self.model, batch.shape[1], context)}
        with self.listening() as heard:
            for part in parts_of(self.model, batch, batch.shape[0]):
                language_model(self.model).base_model(**(part.model_inputs(self.model) | mask))
        rows, first, count = torch.tensor(stretches, device=batch.input_ids.device).view(-1, 3).unbind(1)
        shares = []
        for name in self.layers:
            sums = nn.functional.pad(heard.energies(name, batch.shape[1])[..., :2].double().cumsum(1), (0, 0, 1, 0))
            own = sums[rows, first + count] - sums[rows, first]
            shares.append(own[:, 0] / own[:, 1])
        return torch.stack(shares).mean(0).tolist()

    def _see(self, place: str, heard: "Heard") -> See:
        def see(a: Tensor, z: Tensor, positions: Tensor | None = None) -> None:
            inputs = self.layers[place].inputs(a)
            if inputs.shape[:-1].numel() != heard.shape.numel():
                raise InputError(f"{place} does not see every token of a text; leave it out of the factors")
            inputs = inputs.reshape(*heard.shape, -1)
            bases = [self._bases[place], *([self._random[inputs.shape[-1]]] if self.control else [])]
            for name in self.followers[place]:
                energies = [
                    bulk_energies(inputs, basis, *own) for basis, own in zip(bases, self._of_layers[name], strict=True)
                ]
                heard.add(name, torch.cat(energies, dim=-1))

        return see


class Heard:
    """What was heard of one batch, which the model may have read in several parts."""

    def __init__(self) -> None:
        self.shape = torch.Size()
        self._parts: dict[str, list[Tensor]] = {}

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the shape of the rows that are read next."""
        ids = kwargs.get("input_ids")
        self.shape = (args[0] if ids is None else ids).shape

    def add(self, name: str, energies: Tensor) -> None:
        """Adds energies [rows, positions, 2 or 4] of a layer: flat and all, in its basis and in a random one."""
        self._parts.setdefault(name, []).append(energies)

    def energies(self, name: str, length: int) -> Tensor:
        """Of a layer, for all rows: [B, length, 2 or 4], 0 where nothing was read."""
        parts = [nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in self._parts[name]]
        return torch.cat(parts)

    def shares(self, first: Tensor, counts: Tensor, length: int) -> dict[str, Tensor]:
        """Shares of each row by layer, float64 [B, 1 or 2]: in the layer's basis and in the random one.

        Args:
            first, counts: int64 [B], from which position on, and how many.
            length: Positions of the longest row.
        """
        places = torch.arange(length, device=first.device)
        inside = (places >= first[:, None]) & (places < (first + counts)[:, None])
        found = {}
        for name in self._parts:
            sums = (self.energies(name, length).double() * inside[..., None]).sum(1)
            found[name] = sums[:, 0::2] / sums[:, 1::2]
        return found


def check_layers(model: nn.Module, factors: Mapping[str, KroneckerFactors]) -> None:
    """Raises ``InputError`` where factors are not of layers that can be listened to; the model may be on paper."""
    layers = find_layers(model)
    for name in factors:
        if name not in layers:
            raise InputError(f"the factors are of {name}, which the model does not have")
        if isinstance(layers[name], ExpertLayer):
            raise InputError(f"{name} sees the tokens of one expert only; collect factors of other layers")
        if layers[name].shape != layer_shape(factors, name):
            raise InputError(
                f"the factors of {name} are of {layer_shape(factors, name)}, its weight is {layers[name].shape}"
            )
