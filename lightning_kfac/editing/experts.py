"""Experts that few tokens came to: their factors say little, so they stay as they are, or borrow an A.

A covariance of n vectors has at most n directions; along the others an edit would see no curvature and delete whatever
is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import layer_tokens
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.targets import same_but_the_expert

Factors = Mapping[str, KroneckerFactors]


@dataclass(frozen=True)
class Experts:
    """What becomes of experts with too few tokens.

    Attributes:
        unedited: Those that stay as they are, with their number of tokens.
        pooled: For each that borrows its A the experts of its layer, whose A are averaged.
    """

    unedited: dict[str, int] = field(default_factory=dict)
    pooled: dict[str, tuple[str, ...]] = field(default_factory=dict)


def sort_experts(layers: Mapping[str, Layer], factors: Factors, config: EditConfig) -> Experts:
    """Finds the experts with fewer tokens than ``config.expert_min_tokens``.

    Args:
        layers: Those to be edited.
        factors: Of these, and perhaps of more experts.

    Raises:
        InputError: No layer is left to edit.
    """
    found = Experts()
    for name, layer in layers.items():
        if not layer.routed:
            continue
        tokens = layer_tokens(factors, name)
        enough = max(layer.shape) if config.expert_min_tokens is None else config.expert_min_tokens
        if tokens >= max(enough, 1):
            continue
        if config.expert_inputs == "layer" and tokens:
            found.pooled[name] = tuple(same_but_the_expert(name, factors))
        else:
            found.unedited[name] = tokens
    if layers and len(found.unedited) == len(layers):
        most = max(found.unedited, key=lambda name: found.unedited[name])
        raise InputError(
            f"no expert has enough tokens to be edited: {most} has {found.unedited[most]:,}, the most; collect on more "
            "text, or set expert_min_tokens",
            "expert_min_tokens",
        )
    return found
