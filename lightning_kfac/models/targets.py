"""Which layers: from block numbers, projection names or regular expressions to modules of a model."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, TypeVar

from torch import nn

from lightning_kfac.errors import InputError
from lightning_kfac.models.language import check_no_adapter
from lightning_kfac.models.layers import KINDS, Layer, find_layers

Place = TypeVar("Place", int, str)
Blocks = Literal["all"] | Sequence[int]

# What each projection is called in the model families of the transformers package.
PROJECTION_NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "c_fc", "w3", "fc1", "dense_h_to_4h", "fc_in"),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h", "fc_out"),
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj",),
}
# `c_proj` is the name of two layers in GPT-2.
QUALIFIED_NAMES = {"mlp.c_proj": "down", "attn.c_proj": "o"}
FUSED = {
    "gate_up_proj": "gate and up",
    "c_attn": "q, k and v",
    "qkv_proj": "q, k and v",
    "query_key_value": "q, k and v",
}
# The end of the dotted name of a block, and of what is in one.
BLOCK = r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)"
A_BLOCK = re.compile(rf"{BLOCK}$")
IN_BLOCK = re.compile(rf"{BLOCK}\.")


def resolve_targets(
    model: nn.Module,
    blocks: Blocks = "all",
    projections: Sequence[str] = ("gate", "up", "down"),
    modules: Sequence[str] | None = None,
) -> dict[str, Layer]:
    """The chosen layers by dotted name, in the model's own order.

    Args:
        blocks: Transformer blocks by index, negative from the end, or ``all``.
        projections: Any of gate, up, down, q, k, v, o.
        modules: Instead of blocks and projections: regular expressions, each of which must match the
            whole dotted name of at least one layer.

    Raises:
        InputError: Something named does not exist (the message lists what does) or cannot be tracked.
    """
    check_no_adapter(model)
    layers = find_layers(model)
    if modules is not None:
        chosen = _by_pattern(layers, modules, dict(model.named_modules()))
    else:
        chosen = _by_projection(model, layers, blocks, projections)
    return {name: layer for name, layer in layers.items() if name in chosen}


def narrow(names: Collection[str], n_blocks: int, blocks: Blocks, projections: Sequence[str] | None) -> list[str]:
    """Those of ``names`` that lie in the given blocks and are one of the given projections.

    Args:
        names: Dotted names of layers that were collected.
        n_blocks: Number of the model's blocks, for negative indices.
        blocks: Indices, or ``all`` that occur.
        projections: Names, or None for all that occur.

    Raises:
        InputError: A block or projection does not occur (the message lists those that do).
    """
    if blocks != "all":
        blocks = _block_numbers(blocks, n_blocks)
        _check_present("block", blocks, map(block_of, names))
    if projections is not None:
        _check_present("projection", projections, map(projection_of, names))
    return [
        name
        for name in names
        if (blocks == "all" or block_of(name) in blocks) and (projections is None or projection_of(name) in projections)
    ]


def _check_present(kind: str, wanted: Iterable[Place], found: Iterable[Place | None]) -> None:
    present = sorted({place for place in found if place is not None})
    if absent := [place for place in wanted if place not in present]:
        raise InputError(f"there are no factors for {kind} {absent[0]}, only for {', '.join(map(str, present))}")


def count_blocks(model: nn.Module) -> int:
    """Number of transformer blocks."""
    return 1 + max((b for name, _ in model.named_modules() if (b := block_of(name)) is not None), default=-1)


def block_modules(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in the model's own order."""
    return [module for name, module in model.named_modules() if A_BLOCK.search(name)]


def block_of(name: str) -> int | None:
    """The block number in a dotted name.

    Example:
        >>> block_of("model.layers.5.mlp.gate_proj")
        5
    """
    found = IN_BLOCK.search(name)
    return int(found[1]) if found else None


def projection_of(name: str) -> str | None:
    """The projection that a dotted name stands for.

    Example:
        >>> projection_of("model.layers.5.mlp.gate_proj"), projection_of("transformer.h.0.mlp.c_proj")
        ('gate', 'down')
    """
    for ending, projection in QUALIFIED_NAMES.items():
        if name.endswith(ending):
            return projection
    last = name.rpartition(".")[2]
    return next((p for p, names in PROJECTION_NAMES.items() if last in names), None)


def layer_label(name: str) -> str:
    """A short name for tables and figures.

    Example:
        >>> layer_label("model.layers.5.mlp.gate_proj"), layer_label("lm_head")
        ('5 gate', 'lm_head')
    """
    block = block_of(name)
    projection = projection_of(name)
    return name if block is None or projection is None else f"{block} {projection}"


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Short labels of layers; those that would share one keep their names.

    Example:
        >>> layer_labels(["layers.0.mlp.up_proj", "layers.1.experts.0.up_proj", "layers.1.experts.1.up_proj"]).values()
        dict_values(['0 up', 'layers.1.experts.0.up_proj', 'layers.1.experts.1.up_proj'])
    """
    labels = {name: layer_label(name) for name in names}
    taken = Counter(labels.values())
    return {name: label if taken[label] == 1 else name for name, label in labels.items()}


def _by_projection(model: nn.Module, layers: dict[str, Layer], blocks: Blocks, projections: Sequence[str]) -> set[str]:
    if unknown := [p for p in projections if p not in PROJECTION_NAMES]:
        raise InputError(f"unknown projection {unknown[0]!r}; choose from {', '.join(PROJECTION_NAMES)}")
    if not projections:
        raise InputError(f"no projection chosen; choose from {', '.join(PROJECTION_NAMES)}")
    numbers = {number for name in layers if (number := block_of(name)) is not None}
    if not numbers:
        raise InputError("the model has no numbered blocks; choose layers with `modules`")
    wanted = sorted(numbers) if blocks == "all" else _block_numbers(blocks, max(numbers) + 1)
    chosen = set()
    for block in wanted:
        inside = {name: projection_of(name) for name in layers if block_of(name) == block}
        for projection in projections:
            found = [name for name, p in inside.items() if p == projection]
            if not found:
                raise InputError(_missing_projection(model, block, projection, inside))
            chosen.update(found)
    return chosen


def _block_numbers(blocks: Blocks, count: int) -> list[int]:
    if isinstance(blocks, str) or not all(isinstance(b, int) for b in blocks) or not blocks:
        raise InputError(f"blocks must be 'all' or a list of indices, got {blocks!r}")
    if bad := [b for b in blocks if not -count <= b < count]:
        raise InputError(f"block {bad[0]} does not exist; the model has blocks 0 to {count - 1} (or -{count} to -1)")
    return sorted({b % count for b in blocks})


def _missing_projection(model: nn.Module, block: int, projection: str, inside: dict[str, str | None]) -> str:
    names = [n for n, _ in model.named_modules() if block_of(n) == block]
    existing = sorted({p for p in inside.values() if p})
    message = (
        f"block {block} has no projection {projection!r}; it has {', '.join(existing) or 'none of the known ones'}"
    )
    fused = [n for n in names if projection in FUSED.get(n.rpartition(".")[2], "").replace(",", "").split()]
    if fused:
        layer = fused[0].rpartition(".")[2]
        message += f". {layer} fuses {FUSED[layer]}: track it whole with `modules: ['.*\\.{layer}']`"
    elif experts := [n for n in names if n.endswith("experts")]:
        message += f". {experts[0]} holds its experts in one 3-D parameter, which cannot be tracked"
    else:
        message += ". Other layers can be chosen with `modules`"
    return message


def _by_pattern(layers: dict[str, Layer], patterns: Iterable[str], named: dict[str, nn.Module]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(f"modules: {pattern!r} is not a regular expression: {error}") from None
        found = {name for name in layers if compiled.fullmatch(name)}
        if not found:
            raise InputError(_no_match(pattern, [n for n in named if n and compiled.fullmatch(n)], layers, named))
        chosen |= found
    if not chosen:
        raise InputError("modules: the list is empty")
    return chosen


def _no_match(pattern: str, others: list[str], layers: Collection[str], named: dict[str, nn.Module]) -> str:
    if others:
        kind = type(named[others[0]]).__name__
        known = " and ".join(known.of.__name__ for known in KINDS)
        return f"modules: {pattern!r} matches {others[0]}, a {kind}; only {known} layers can be tracked"
    examples = ", ".join(list(layers)[:4])
    return f"modules: {pattern!r} matches no layer. Layers are named like {examples}"
