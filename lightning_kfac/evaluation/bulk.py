"""Listens to the inputs of layers while a model reads texts: which share of them lies in the flat directions?"""

from collections.abc import Iterator, Mapping
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


class BulkShare:
    """Bulk shares of texts at some layers of a model, with those of a random basis as a control.

    A direction's depth is its eigenvalue of A, or, where moments were measured, their sum over the outputs. Weights are
    those of the model as it is now.

    Args:
        model: The model; its layers are whole.
        factors: Their layers are listened to.

    Raises:
        InputError: A layer is not the model's, or an expert's.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, KroneckerFactors]):
        check_layers(model, factors)
        self.model = model
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
        if size not in self._random:
            self._random[size] = random_basis(size).to(layer.device, dtype)
        self._bases.setdefault(place, A.vectors.to(dtype))
        chosen = torch.arange(size, device=flat.device) < flat.sum()  # as many of the random ones
        self._of_layers[name] = [
            (gains(layer.W, self._bases[place]), flat),
            (gains(layer.W, self._random[size]), chosen),
        ]

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

    def _see(self, place: str, heard: "Heard") -> See:
        def see(a: Tensor, z: Tensor, positions: Tensor | None = None) -> None:
            inputs = self.layers[place].inputs(a)
            if inputs.shape[:-1].numel() != heard.shape.numel():
                raise InputError(f"{place} does not see every token of a text; leave it out of the factors")
            inputs = inputs.reshape(*heard.shape, -1)
            bases = self._bases[place], self._random[inputs.shape[-1]]
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
        """Adds energies [rows, positions, 4] of a layer: flat and all, in both bases."""
        self._parts.setdefault(name, []).append(energies)

    def energies(self, name: str, length: int) -> Tensor:
        """Of a layer, for all rows: [B, length, 4], 0 where nothing was read."""
        parts = [nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in self._parts[name]]
        return torch.cat(parts)

    def shares(self, first: Tensor, counts: Tensor, length: int) -> dict[str, Tensor]:
        """Shares of each row by layer, float64 [B, 2]: in the layer's basis and in the random one.

        Args:
            first, counts: int64 [B], from which position on, and how many.
            length: Positions of the longest row.
        """
        places = torch.arange(length, device=first.device)
        inside = (places >= first[:, None]) & (places < (first + counts)[:, None])
        found = {}
        for name in self._parts:
            sums = (self.energies(name, length).double() * inside[..., None]).sum(1)
            found[name] = torch.stack([sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]], dim=1)
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
