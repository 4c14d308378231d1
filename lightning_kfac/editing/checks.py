"""What must hold before an edit: layers, shapes, formulas, domains, device. Each check raises ``InputError``."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder, layer_shape
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.language import check_no_adapter
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.targets import block_of, count_blocks, narrow, projection_of

Factors = Mapping[str, KroneckerFactors]


def edited_layers(model: nn.Module, factors: Factors, config: EditConfig) -> dict[str, Layer]:
    """The layers that an edit changes, by name.

    Raises:
        InputError: A layer is not in the model, has no factors, has factors of another shape, or shares its weight.
    """
    if not factors:
        raise InputError("there are no factors to edit with")
    check_no_adapter(model)
    layers = find_layers(model)
    if missing := [name for name in factors if name not in layers]:
        raise InputError(f"the factors are of another model: it has no layer {missing[0]}")
    chosen = narrow(list(factors), count_blocks(model), config.blocks, config.projections)
    chosen = named_in_layers(config, chosen)
    check_untied(model, [layers[name] for name in chosen])
    for name in chosen:
        expected, found = layers[name].shape, layer_shape(factors, name)
        if expected != found:
            raise InputError(
                f"{name}: the weight is {expected[0]} x {expected[1]}, its factors are for {found[0]} x {found[1]}"
            )
    return {name: layers[name] for name in chosen}


def check_untied(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Raises ``InputError`` for a layer whose weight is also another layer's, such as a tied head."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for layer in layers:
        if others := [o for o in owners[id(layer.parameter)] if o != layer.parameter_name]:
            raise InputError(
                f"{layer.name} shares its weight with {others[0]}: an edit would change both; leave it out"
            )


def named_in_layers(config: EditConfig, names: list[str]) -> list[str]:
    """Those that ``config.layers`` names, if it is set.

    Raises:
        InputError: One of them has no factors. (rho 1 leaves a layer alone, so there it needs none.)
    """
    if config.layers is None:
        return names
    idle = 1 if config.mode == "suppress" else None
    wanted = {(block, p) for block, chosen in config.layers.items() for p, rule in chosen.items() if rule != idle}
    places = {name: (str(block_of(name)), projection_of(name)) for name in names}
    if absent := sorted(wanted - set(places.values())):
        raise InputError(f"layers: there are no factors for block {absent[0][0]}, projection {absent[0][1]}")
    if not wanted:
        raise InputError("layers: every rho is 1, so there is nothing to edit")
    return [name for name, place in places.items() if place in wanted]


MENDS = {
    "moments": (
        "moments measured in the basis of the factors: collect with collect.moments token (or sequence), or from "
        "Python with collect_moments",
        "collect.moments",
    ),
    "coupled": (
        "coupled factors: collect with collect.coupled true, or from Python with collect_factors(coupled=True)",
        "collect.coupled",
    ),
}


def check_formula(config: EditConfig, mixing: bool, there: Collection[str]) -> None:
    """Raises ``InputError`` where a layer's formula cannot be used with domains, or what it needs was not collected.

    Args:
        there: What was, beside A and G.
    """
    if mixing:
        config.check_mixing()
    for need in FORMULAS[config.formula].needs:
        if need not in there:
            what, setting = MENDS[need]
            raise InputError(f"formula {config.formula} needs {what}", setting)


def check_alpha(config: EditConfig, domains: Iterable[str]) -> None:
    """Raises ``InputError`` where alpha names a domain that is not there."""
    domains = list(domains)
    if isinstance(config.alpha, Mapping) and (unknown := [name for name in config.alpha if name not in domains]):
        raise InputError(f"alpha names {unknown[0]!r}, but the domains are {', '.join(domains) or 'none'}")


def check_device(device: torch.device | str | None) -> None:
    """Raises ``InputError`` where nothing can be computed on the device that was named."""
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"device {device}: cannot be used here: {str(error).splitlines()[0]}; leave it out, or say cpu"
            ) from None


def check_tokenizers(factors: Factors, domains: Mapping[str, Factors]) -> None:
    """Raises ``InputError`` where another tokenizer has cut the text of a domain than that of the general factors.

    Factors in memory, and those of version 0.1, do not say which it was.
    """
    known = tokenizer_of(factors)
    for name, domain in domains.items():
        found = tokenizer_of(domain)
        if known and found and found != known:
            raise InputError(
                f"the domain {name} ({_place(domain)}) is of other tokens than the general factors "
                f"({_place(factors)}): the tokenizers are {found[:8]} and {known[:8]}; collect one of them again, or "
                "mix them all the same with force=True",
                "force=True",
            )


def tokenizer_of(factors: Factors) -> str | None:
    """Fingerprint of the tokenizer that factors were collected with, where it is known."""
    return factors.metadata.get("tokenizer_fingerprint") if isinstance(factors, FactorFolder) else None


def _place(factors: Factors) -> str:
    return str(factors.path) if isinstance(factors, FactorFolder) else "in memory"


def check_domain(domain: str, factors: Factors, general: Factors, layers: Iterable[str]) -> None:
    """Raises ``InputError`` where a domain's factors lack a layer, or are of another shape than the general ones."""
    for name in layers:
        if name not in factors:
            raise InputError(f"the domain {domain} has no factors of {name}; collect it for the same layers")
        expected, found = layer_shape(general, name), layer_shape(factors, name)
        if expected != found:
            raise InputError(
                f"the domain {domain}: its factors of {name} are for {found[0]} x {found[1]}, the general ones for "
                f"{expected[0]} x {expected[1]}"
            )
