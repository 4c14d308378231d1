"""Which layers: from block numbers, projection names or regular expressions to modules of a model."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from torch import nn

from lightning_kfac.errors import InputError
from lightning_kfac.models.choices import ALL, Blocks, Projections, block_choice, projection_choice
from lightning_kfac.models.experts import layout_of
from lightning_kfac.models.fused import LAYOUTS, FusedRows
from lightning_kfac.models.language import check_no_adapter
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.running import modules_of_text

Place = TypeVar("Place", int, str)

ATTENTION = ("attn", "attention", "self_attn", "self_attention")
# What each projection is called in the model families of the transformers package: the end of a layer's dotted name.
NAMES = {
    "gate": ("gate_proj", "w1"),
    "up": (
        "up_proj",
        "c_fc",
        "w3",
        "fc1",
        "dense_h_to_4h",
        "fc_in",
        "intermediate.dense",
        "ffn.0",
        "lin1",
        "ff.layer_1",
    ),
    "down": (
        *("down_proj", "mlp.c_proj", "w2", "fc2", "dense_4h_to_h", "fc_out", "output_linear", "output.dense"),
        *("ffn.2", "lin2", "ff.layer_2", "mlp.Wo"),
    ),
    "q": ("q_proj", "self.query", "q_proj.linear", "Wq", "q_lin"),
    "k": ("k_proj", "self.key", "k_proj.linear", "Wk", "k_lin"),
    "v": ("v_proj", "self.value", "v_proj.linear", "Wv", "v_lin"),
    "o": (
        *("o_proj", "o_proj.linear", "attention.output.dense", "multi_head_attention.dense", "out_lin"),
        *(f"{a}.{o}" for a in ATTENTION for o in ("out_proj", "dense", "c_proj", "Wo")),
    ),
}
MLP = ("gate", "up", "down")
# Of a mixture: the experts that a router chooses, and those that every token goes through.
KINDS_OF_MLP = ("", "expert_", "shared_")
PROJECTIONS = (*NAMES, *(kind + p for kind in KINDS_OF_MLP[1:] for p in MLP))
# Attentions, norms and routers may hold gates and small networks of another purpose.
ELSEWHERE = re.compile(r"(?:attn|attention|layernorm|router|\bgate)\.")
FUSED = {
    "gate_up_proj": "gate and up",
    "Wi": "gate and up",
    "input_linear": "gate and up",
    "c_attn": "q, k and v",
    "qkv_proj": "q, k and v",
    "query_key_value": "q, k and v",
    "Wqkv": "q, k and v",
}
# The names of the weights whose rows are layers of their own.
TAKEN_APART = {leaf for layout in LAYOUTS.values() for leaf in layout}
AN_EXPERT = re.compile(r"(?:^|\.)experts\.(?:(?:gate_up_proj|up_proj|down_proj)\.)?(\d+)(?:\.|$)")
SHARED = re.compile(r"(?:^|\.)shared_(?:experts?|mlp)\.")
# The end of the dotted name of a block, and of what is in one.
BLOCK = r"(?:^|\.)(?:layers|layer|h|blocks|block|attentions|ffns)\.(\d+)"
A_BLOCK = re.compile(rf"{BLOCK}$")
IN_BLOCK = re.compile(rf"{BLOCK}\.")


def resolve_targets(
    model: nn.Module,
    blocks: Blocks = ALL,
    projections: Projections | None = None,
    modules: Sequence[str] | None = None,
) -> dict[str, Layer]:
    """The chosen layers by dotted name, in the model's own order.

    Args:
        blocks: Transformer blocks by index, negative from the end, or ``all``; see ``block_choice``.
        projections: Any of gate, up, down, q, k, v, o; of experts expert_gate, expert_up, expert_down, and shared_gate,
            shared_up, shared_down of one that every token goes through. By default gate, up, down, of them
            those that there are.
        modules: Instead of blocks and projections: regular expressions, each of which must match the
            whole dotted name of at least one layer. A weight that is chosen whole is not tracked in parts as well.

    Raises:
        InputError: Something named does not exist (the message lists what does) or cannot be tracked: text never runs
            through it, or its weight is quantized.
    """
    check_no_adapter(model)
    layers = find_layers(model)
    running = modules_of_text(model)
    idle = set() if running is None else {name for name, layer in layers.items() if layer.module not in running}
    if modules is not None:
        chosen = _by_pattern(layers, modules, dict(model.named_modules()))
        if never := sorted(chosen & idle):
            raise InputError(f"modules: {never[0]} is among them, which text never runs through; leave it out")
    else:
        used = {name: layer for name, layer in layers.items() if name not in idle}
        chosen = _by_projection(model, used, block_choice(blocks), projection_choice(projections))
    chosen -= {name for name in chosen if isinstance(part := layers[name], FusedRows) and part.whole_name in chosen}
    for name in chosen:
        if (what := layers[name].packed()) is not None:
            raise InputError(f"{name} is a {what}: load the model without quantization, or leave the layer out")
    return {name: layer for name, layer in layers.items() if name in chosen}


def narrow(names: Collection[str], n_blocks: int, blocks: Blocks, projections: Projections | None) -> list[str]:
    """Those of ``names`` that lie in the given blocks and are one of the given projections.

    Args:
        names: Dotted names of layers that were collected.
        n_blocks: Number of the model's blocks, for negative indices.
        blocks: Indices, or ``all`` that occur.
        projections: Names, or None for all that occur.

    Raises:
        InputError: A block or projection does not occur (the message lists those that do).
    """
    wanted = block_choice(blocks)
    chosen = projection_choice(projections)
    numbers = None if wanted == ALL else _block_numbers(wanted, n_blocks)
    if numbers is not None:
        _check_present("block", numbers, map(block_of, names))
    if chosen is not None:
        _check_present("projection", chosen, map(projection_of, names))
    return [
        name
        for name in names
        if (numbers is None or block_of(name) in numbers) and (chosen is None or projection_of(name) in chosen)
    ]


def _check_present(kind: str, wanted: Iterable[Place], found: Iterable[Place | None]) -> None:
    present = sorted({place for place in found if place is not None})
    if absent := [place for place in wanted if place not in present]:
        raise InputError(f"there are no factors for {kind} {absent[0]}, only for {', '.join(map(str, present))}")


def count_blocks(model: nn.Module) -> int:
    """Number of transformer blocks that read text: those of a vision tower do not count."""
    find = getattr(model, "get_decoder", None)
    return (_blocks_in(find()) if callable(find) else 0) or _blocks_in(model)


def _blocks_in(module: nn.Module) -> int:
    return 1 + max((b for name, _ in module.named_modules() if (b := block_of(name)) is not None), default=-1)


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
        >>> projection_of("model.layers.5.mlp.experts.gate_up_proj.3.up"), projection_of("h.0.attn.c_attn.q")
        ('expert_up', 'q')
    """
    expert = AN_EXPERT.search(name)
    plain = _plain_projection(_without_expert(name).replace("..", ".").rstrip("."))
    if plain in MLP and ELSEWHERE.search(IN_BLOCK.split(name)[-1]):
        return None
    if plain in MLP and expert:
        return f"expert_{plain}"
    if plain in MLP and SHARED.search(name):
        return f"shared_{plain}"
    return plain


def expert_of(name: str) -> int | None:
    """The number of the expert in a dotted name.

    Example:
        >>> expert_of("model.layers.5.mlp.experts.gate_up_proj.3.up")
        3
    """
    found = AN_EXPERT.search(name)
    return int(found[1]) if found else None


def same_but_the_expert(name: str, names: Iterable[str]) -> list[str]:
    """Those of some layers that are the same projection of an expert of the same block.

    Example:
        >>> same_but_the_expert("experts.up_proj.3", ["experts.up_proj.0", "experts.up_proj.3", "experts.down_proj.3"])
        ['experts.up_proj.0', 'experts.up_proj.3']
    """
    return [other for other in names if _without_expert(other) == _without_expert(name)]


def _without_expert(name: str) -> str:
    expert = AN_EXPERT.search(name)
    return name if expert is None else name[: expert.start(1)] + name[expert.end(1) :]


def _plain_projection(name: str) -> str | None:
    parent, _, last = name.rpartition(".")
    if last in NAMES and parent.rpartition(".")[2] in TAKEN_APART:
        return last
    fitting = {end: p for p, ends in NAMES.items() for end in ends if name == end or name.endswith(f".{end}")}
    return fitting[max(fitting, key=len)] if fitting else None


def layer_label(name: str) -> str:
    """A short name for tables and figures.

    Example:
        >>> layer_label("model.layers.5.mlp.gate_proj"), layer_label("lm_head")
        ('5 gate', 'lm_head')
    """
    block = block_of(name)
    projection = projection_of(name)
    if block is None or projection is None:
        return name
    expert = expert_of(name)
    return f"{block} {projection}" + (f" {expert}" if expert is not None else "")


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Short labels of layers; those that would share one keep their names.

    Example:
        >>> layer_labels(["layers.0.mlp.up_proj", "layers.1.experts.0.up_proj", "layers.1.experts.1.up_proj"]).values()
        dict_values(['0 up', '1 expert_up 0', '1 expert_up 1'])
    """
    labels = {name: layer_label(name) for name in names}
    taken = Counter(labels.values())
    return {name: label if taken[label] == 1 else name for name, label in labels.items()}


def _by_projection(
    model: nn.Module, layers: dict[str, Layer], blocks: Sequence[int] | str, projections: Sequence[str] | None
) -> set[str]:
    if projections is None:
        there_are = {projection_of(name) for name in layers}
        projections = [name for name in MLP if name in there_are] or MLP
    if unknown := [p for p in projections if p not in PROJECTIONS]:
        raise InputError(f"unknown projection {unknown[0]!r}; choose from {', '.join(PROJECTIONS)}")
    if not projections:
        raise InputError(f"no projection chosen; choose from {', '.join(PROJECTIONS)}")
    numbers = {number for name in layers if (number := block_of(name)) is not None}
    if not numbers:
        raise InputError("the model has no numbered blocks; choose layers with `modules`")
    wanted = sorted(numbers) if blocks == "all" else _block_numbers(blocks, max(numbers) + 1)
    inside: dict[int, dict[str, str | None]] = {block: {} for block in wanted}
    wholes = {layer.whole_name for layer in layers.values() if isinstance(layer, FusedRows)}
    for name in layers:
        if (block := block_of(name)) in inside and name not in wholes:
            inside[block][name] = projection_of(name)
    there = {block: set(found.values()) for block, found in inside.items()}
    for block in wanted:
        for projection in projections:
            others = there.values() if blocks == "all" else ()
            if not _is_covered(projection, there[block], set(projections), others):
                raise InputError(_missing_projection(model, block, projection, inside[block]))
    return {name for found in inside.values() for name, projection in found.items() if projection in projections}


def _is_covered(
    projection: str, there: Collection[str | None], chosen: set[str], others: Iterable[Collection[str | None]]
) -> bool:
    """Whether a choice says what it means in a block: it has the projection, or another kind of it was chosen too.

    In a mixture some blocks may have an MLP and others experts. "All" blocks of experts are those that have some;
    ``gate`` alone would silently leave the experts out.
    """
    if projection in there:
        return True
    kind, _, plain = projection.rpartition("_")
    if plain not in MLP:
        return False
    if any(f"{other}{plain}" in there and f"{other}{plain}" in chosen for other in KINDS_OF_MLP):
        return True
    return bool(kind) and any(projection in other for other in others)


def _block_numbers(blocks: Sequence[int] | str, count: int) -> list[int]:
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
        message += f". {layer} fuses {FUSED[layer]} in a way that is not known here: track it whole with "
        message += f"`modules: ['.*\\.{layer}']`"
    elif [p for p in inside.values() if p and p.startswith("expert_") and p.endswith(f"_{projection}")]:
        message += (
            f". It is a mixture: choose `expert_{projection}` (experts that a router chooses), or another of these"
        )
    elif experts := [n for n in names if n.endswith("experts") and not layout_of(model.get_submodule(n))]:
        message += f". {experts[0]} holds its experts in a way that is not known here"
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
        known = "Linear and Conv1D layers, their rows and experts"
        return f"modules: {pattern!r} matches {others[0]}, a {kind}; only {known} can be tracked"
    examples = ", ".join(list(layers)[:4])
    return f"modules: {pattern!r} matches no layer. Layers are named like {examples}"
