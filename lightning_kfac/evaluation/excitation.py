"""Runs text through a model and measures how its activations excite each band of curvature."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import input_leaders
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.bands import band_forms, band_masks, energies, singular_forms
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.math.importance import original
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import See
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.tokens import TokenBatch, parts_of


class Excitation(NamedTuple):
    """What one text does to one layer.

    Attributes:
        energies: float64 [n_shards, n_bands + 1], sum over inputs of ||W_b x||^2, last of the whole weight.
        counts: int64 [n_shards], number of inputs.
        inputs, outputs: float64 [n_shards, d_in] and [n_shards, d_out], sums of (v_j^T x)^2 and of (u_i^T W x)^2.
    """

    energies: np.ndarray
    counts: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray


class LayerForms(NamedTuple):
    """What energies of one layer are computed with, float32 on its device.

    Attributes:
        bands: [n_bands + 1, d_in, d_in], quadratic forms of the bands, and last of the whole weight.
        inputs: [d_in, d_in], rows are eigenvectors of A.
        outputs: [d_out, d_in], U_G^T W.
    """

    bands: Tensor
    inputs: Tensor
    outputs: Tensor

    def along(self, A_sum: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Summed squares of inputs and outputs along each direction, from the sum of x x^T."""
        inputs, outputs = (
            ((rows @ A_sum.float()) * rows).sum(1).double().clamp(min=0) for rows in (self.inputs, self.outputs)
        )
        return inputs.cpu().numpy(), outputs.cpu().numpy()


def layer_forms(
    model: nn.Module,
    factors: Mapping[str, KroneckerFactors],
    bases: BasisCache,
    bands: int | Sequence[float],
    singular: bool = False,
) -> dict[str, LayerForms]:
    """The forms of every layer.

    Args:
        bands: As for ``band_masks``.
        singular: Bands of the weight's singular directions instead of curvature's components.
    """
    forms = {}
    layers = find_layers(model)
    for name in factors:
        weight = layers[name].W
        G, A = bases.of(factors, name, weight.device)
        outputs = G.vectors.T @ weight.detach().to(G.vectors.dtype)
        if singular:
            of_bands = singular_forms(weight.detach().to(G.vectors.dtype), bands)
        else:
            masks = band_masks(original(G.values, A.values), bands)
            of_bands = band_forms(outputs @ A.vectors, A.vectors, masks)
        forms[name] = LayerForms(of_bands, A.vectors.T.float().contiguous(), outputs.float())
    return forms


class InputSums:
    """Sums x x^T of the inputs of some layers while a model runs; layers that share their input share the sum.

    Args:
        model: The model.
        factors: Their layers are listened to.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, KroneckerFactors]):
        self.layers = find_layers(model)
        self.place = input_leaders(factors)
        self.valid: Tensor | None = None
        self.sums: dict[str, SecondMoment] = {}

    def __enter__(self) -> "InputSums":
        self._hooks = ExitStack()
        for name in set(self.place.values()):
            self._hooks.callback(self.layers[name].watch(self._see(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call, float32 [d_in, d_in] by layer."""
        if unseen := [name for name, place in self.place.items() if place not in self.sums]:
            raise InputError(f"{unseen[0]}: the text never reached this layer; leave it out of the factors")
        sums = {place: moment.sum() for place, moment in self.sums.items()}
        self.sums = {}
        return {name: sums[place] for name, place in self.place.items()}

    def _see(self, name: str) -> See:
        def see(a: Tensor, z: Tensor, positions: Tensor | None = None) -> None:
            x = self.layers[name].inputs(a).flatten(0, -2)
            if self.valid is not None:
                valid = self.valid.flatten()
                x = x * (valid if positions is None else valid[positions])[:, None].to(x)
            if name not in self.sums:
                self.sums[name] = SecondMoment(x.shape[1], x.device)
            self.sums[name].add(x)

        return see


@torch.no_grad()
def excitation(
    model: nn.Module,
    factors: Mapping[str, KroneckerFactors],
    forms: Mapping[str, LayerForms],
    shards: Iterable[Iterable[Mapping[str, Any]]],
) -> dict[str, Excitation]:
    """One forward pass over a text, in shards.

    Args:
        forms: As ``layer_forms`` gives them.
        shards: Batches (as ``TokenBatch.from_dict`` reads them) of each part of the text.

    Returns:
        By layer.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in factors}
    counts: list[int] = []
    device = next(model.parameters()).device
    decoder = language_model(model).base_model
    parts_of_decoder = {id(module) for module in decoder.modules()}
    layers = find_layers(model)
    inside = all(id(layers[name].module) in parts_of_decoder for name in factors)
    run = decoder if inside else model
    manner_of(model)  # tried out while nothing listens to the layers
    with InputSums(model, factors) as listening:
        for shard in shards:
            counts.append(0)
            for batch in shard:
                tokens = TokenBatch.from_dict(batch).to(device)
                counts[-1] += int(tokens.valid.sum())
                for part in parts_of(model, tokens, tokens.shape[0]):
                    listening.valid = part.counted
                    run(**part.model_inputs(model))
            for name, A_sum in listening.take().items():
                form = forms[name]
                found[name].append((energies(form.bands, A_sum).cpu().numpy(), *form.along(A_sum)))
    return {name: _stacked(parts, np.array(counts)) for name, parts in found.items()}


def _stacked(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], counts: np.ndarray) -> Excitation:
    of_bands, inputs, outputs = (np.stack(values) for values in zip(*parts, strict=True))
    return Excitation(of_bands, counts, inputs, outputs)
