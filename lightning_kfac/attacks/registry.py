"""All kinds of attacks, and how a config names one."""

from collections.abc import Mapping
from typing import Any

from lightning_kfac.attacks.asking import PromptShift, Sampling
from lightning_kfac.attacks.attack import Attack
from lightning_kfac.attacks.noise import Noise
from lightning_kfac.attacks.pruning import Pruning
from lightning_kfac.attacks.quantization import Quantization
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.storage.settings import record_of

KINDS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (Quantization, Noise, Pruning, Sampling, PromptShift, Relearning)
}


def attack_of(value: str | Mapping[str, Any]) -> Attack:
    """The attack that a config names: its kind, or a mapping of ``name`` and settings.

    Raises:
        InputError: No such kind or setting, or a value that it cannot be.

    Example:
        >>> attack_of({"name": "noise", "norm": 0.2})
        Noise(norm=0.2, seed=0)
        >>> attack_of("quantization").label
        'int4, groups of 128'
    """
    return record_of(KINDS, value, "attacks", "attack")
