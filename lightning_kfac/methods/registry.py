"""All methods, and how a config names one with the strengths to try."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.methods.blocks import BlockDeletion, BlockNoise, CoherentStep
from lightning_kfac.methods.curvature import CurvatureEdit
from lightning_kfac.methods.method import Method
from lightning_kfac.methods.training import NPO, BalancedSubnet, GradientAscent
from lightning_kfac.storage.settings import record_of

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (CurvatureEdit, BlockDeletion, BlockNoise, CoherentStep, GradientAscent, NPO, BalancedSubnet)
}


def methods_of(value: str | Mapping[str, Any]) -> list[Method]:
    """The methods that an entry of a config stands for: one for each strength that it lists.

    Raises:
        InputError: No such method or setting, or a value that it cannot be.

    Example:
        >>> [method.share for method in methods_of({"name": "block_deletion", "share": [0.5, 0.7]})]
        [0.5, 0.7]
    """
    settings = {"name": value} if isinstance(value, str) else dict(value)
    kind = METHODS.get(settings.get("name", ""))
    strengths = settings.get(kind.strength) if kind else None
    if not isinstance(strengths, Sequence) or isinstance(strengths, str):
        return [record_of(METHODS, settings, "methods", "method")]
    if not strengths:
        raise InputError(
            f"methods: {settings['name']}: {kind and kind.strength} is empty; name at least one", "methods"
        )
    return [record_of(METHODS, settings | {kind.strength: one}, "methods", "method") for one in strengths if kind]
