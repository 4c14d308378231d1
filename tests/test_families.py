"""docs/families.md says what works with every causal family of transformers, and its table is made here.

By default every family is built and its layers are compared with the table, of some the factors and the recitation
too. ``FAMILIES=all pytest tests/test_families.py`` does the latter for all, ``make families`` writes the table.
"""

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lightning_kfac import InputError, KroneckerFactors, collect_factors
from lightning_kfac.errors import first_line
from lightning_kfac.evaluation.functions import memorization_score
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.targets import (
    AN_EXPERT,
    IN_BLOCK,
    PROJECTIONS,
    SHARED,
    block_of,
    projection_of,
    resolve_targets,
)
from tests.common import batched, generated, relative_error
from tests.families import FAMILIES, build_any
from tests.oracle import greedy, product_factors

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN = "<!-- What follows is written by `make families`. -->\n"
REWRITE = "docs/families.md is not what the models are: run `make families`"
PLAIN = ("gate", "up", "down", "q", "k", "v", "o")
HEAD = ("family", "block", *PLAIN, "experts", "shared expert", "factors", "recitation", "notes")
# float32 arithmetic against float64, see test_feeding.py. Faults are 1e-2 and more.
CLOSE = 2e-5
LENGTHS = (9, 6, 4)

# Where projections have no names here, layers are chosen by `modules`.
MODULES = {
    "falcon_mamba": ("in_proj", "x_proj", "out_proj"),
    "mamba": ("in_proj", "x_proj", "out_proj"),
    "mamba2": ("in_proj", "out_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "xlstm": ("q", "k", "v", "out_proj", "proj_up_gate", "proj_up", "proj_down"),
}
LATENT = "latent attention: `q_a_proj`, `q_b_proj`, `kv_a_proj_with_mqa` and `kv_b_proj` by `modules`"
LINEAR = "the linear attention's other layers by `modules`"
SHARED_WEIGHTS = "blocks share these weights: factors of each use, an edit is refused"
RECURRENT = "the recurrence's `in_proj` and `out_proj` by `modules`"
UNKNOWN = "its experts are stored in a way that is not known here"
NOTES = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "hy_v4", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(
        ("bailing_hybrid", "kimi_linear"), "blocks with linear attention have q, k, v; the others have " + LATENT
    ),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h"), RECURRENT),
    **dict.fromkeys(
        ("olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), LINEAR
    ),
    **dict.fromkeys(("zamba", "zamba2"), SHARED_WEIGHTS),
    "dbrx": UNKNOWN,
    "deepseek_v4": "attention by `modules`: its `kv_proj` is k and v at once, its output has two weights",
    "hrm_text": "a block is two, one in each of its two stacks, and runs several times",
    "inkling_text": "its shared experts are one 3-D parameter, which is not tracked",
    "jetmoe": UNKNOWN + ", those of q and o too",
    "longcat_flash": f"a block has two attentions and two MLPs; some experts have no weights; {LATENT}",
    "lfm2": "the convolution's `in_proj` and `out_proj` by `modules`",
    "lfm2_moe": "the convolution's `in_proj` and `out_proj` by `modules`",
    "lfm3": "the convolution's `in_proj` and `out_proj` by `modules`",
    "minimax": "the second out_proj is that of blocks with lightning attention",
    "recurrent_gemma": "the recurrence's `linear_x`, `linear_y` and `linear_out` by `modules`",
    "xlnet one-way": "its attention's weights are 3-D parameters",
    "zaya": "v is made of two layers, by `modules`",
}
# In linear attention heads of v may be wider than those of q, or more.
VALUES_ARE_WIDER = ("olmo_hybrid",)
ENCODERS = "an encoder-decoder with its own audio codec, no text model"
# Families without a row, and why.
NOT_BUILT = {
    "blt": "reads bytes through three models; its smallest config is large",
    "cohere_compass_text": "does not build from its own default config",
    "dots3_note": "its smallest config is large",
    "dots3_note_text": "its smallest config is large",
    "gemma3n": "needs the timm package; its text part is `gemma3n_text`",
    "gemma4_assistant": "a draft model that reads another model's states",
    "gemma4_unified_assistant": "a draft model that reads another model's states",
    "musicgen": ENCODERS,
    "musicgen_melody": ENCODERS,
    "qwen4_exp": "does not build without settings that no config has yet",
    "qwen4_exp_text": "does not build without settings that no config has yet",
}


def families() -> list[str]:
    """Every causal family that transformers knows, and variants that are fed in another way."""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*NOT_BUILT}
    return sorted((known - {"xlnet"}) | {name for name in FAMILIES if " " in name})


def patterns(family: str) -> list[str]:
    """For ``modules``."""
    return [rf".*\.{layer}" for layer in MODULES[family]]


# -- what a model has ----------------------------------------------------------------------------------------------


@cache
def built(family: str) -> nn.Module:
    logging.set_verbosity_error()
    return build_any(family)


@cache
def tracked(family: str) -> dict[str, Layer]:
    """The layers that blocks and projections choose, one choice at a time, or else ``MODULES``."""
    model = built(family)
    if family in MODULES:
        return resolve_targets(model, modules=patterns(family))
    there = {(block_of(name), projection_of(name)) for name in find_layers(model)}
    found = {}
    for block, projection in sorted((b, PROJECTIONS.index(p)) for b, p in there if b is not None and p):
        with suppress(InputError):  # text does not run through it
            found |= resolve_targets(model, [block], [PROJECTIONS[projection]])
    return found


def layer_cells(family: str) -> list[str]:
    """Family, block and the layers' names."""
    names = list(tracked(family))
    inside = {name: IN_BLOCK.split(name)[-1] for name in names}
    blocks = dict.fromkeys(name[: -len(inside[name])].rstrip(".") for name in names)
    by_projection = {p: [inside[n] for n in names if projection_of(n) == p] for p in PROJECTIONS}
    if family in MODULES:
        return [family, _joined(re.sub(r"\.\d+$", ".N", block) for block in blocks), *[""] * 9]
    return [
        family,
        _joined(re.sub(r"\.\d+$", ".N", block) for block in blocks),
        *(_joined(by_projection[p]) for p in PLAIN),
        _of_a_kind("expert_", AN_EXPERT, by_projection),
        _of_a_kind("shared_", SHARED, by_projection),
    ]


def _joined(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _of_a_kind(kind: str, pattern: re.Pattern, by_projection: dict[str, list[str]]) -> str:
    """The module, and which projections it has."""
    there = {p: names for p, names in by_projection.items() if p.startswith(kind) and names}
    if not there:
        return ""
    modules = [
        re.sub(r"\.?(?:\w+\.)?\d+$", "", name[: pattern.search(name).end()].strip("."))
        for names in there.values()
        for name in names
    ]
    return f"{_joined(modules)}: {', '.join(p.removeprefix(kind) for p in there)}"


# -- whether it is right -------------------------------------------------------------------------------------------


def rows() -> list[list[int]]:
    """Ragged rows without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in LENGTHS]


def factors_cell(family: str) -> tuple[str, str]:
    """What the factors of all tracked layers are, against plain autograd; why there are none."""
    layers = tracked(family)
    names = [re.escape(name) for name in layers]
    try:
        manner_of(built(family))
        found = collect_factors(built(family), batched(rows(), 3, "left"), modules=names, labels="gold")
    except InputError as error:
        return "refused", first_line(error)
    oracle = _oracle(family)
    worst = max(_distance(layer, found[name], oracle) for name, layer in layers.items())
    return "equal" if worst < CLOSE else f"**differ by {worst:.0e}**", ""


def _oracle(family: str) -> dict:
    try:
        return product_factors(build_any(family), rows())
    except RuntimeError:  # float32 is written into its code
        return product_factors(build_any(family), rows(), torch.float32)


def _distance(layer: Layer, found: KroneckerFactors, oracle: dict) -> float:
    """The relative error of A or G, whichever is larger; infinite where other positions were counted."""
    A, G, n = oracle.get((layer.parameter_name, getattr(layer, "expert", None)), (None, None, 0))
    if found.n_tokens != n:
        return float("inf")
    if n == 0:
        return 0.0
    index = torch.arange(len(G))
    if (own := getattr(layer, "rows", None)) is not None:
        index = own.take(index, 0).flatten()
    return max(relative_error(found.A, A), relative_error(found.G, G[index][:, index]))


def recitation_cell(family: str) -> str:
    """Whether continuations are those of ``generate``, or else those of one forward a token."""
    model = built(family)
    try:
        manner_of(model)
    except InputError:
        return "refused"
    prefixes = [row[:n] for row, n in zip(rows(), (3, 5, 2), strict=True)]
    lengths = (6, 4, 7)
    if _recited(model, prefixes, [greedy(model, p, n) for p, n in zip(prefixes, lengths, strict=True)]) < 1:
        return "**other than its forward**"
    try:
        golds = [generated(model, p, n) for p, n in zip(prefixes, lengths, strict=True)]
    except Exception:  # it has none, or not for this
        return "as its forward; `generate` fails"
    return "as `generate`" if _recited(model, prefixes, golds) == 1 else "as its forward; `generate` differs"


def _recited(model: nn.Module, prefixes: list[list[int]], golds: list[list[int]]) -> float:
    return memorization_score(model, None, prefixes, golds).strict_accuracy


# -- the table -----------------------------------------------------------------------------------------------------


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def whole_line(family: str) -> str:
    note = NOTES.get(family, "")
    if family in MODULES:
        quoted = (f"'{pattern}'" for pattern in patterns(family))
        note = f"`modules: [{', '.join(quoted)}]`"
    factors, why = factors_cell(family)
    return line([*layer_cells(family), factors, recitation_cell(family), ". ".join(filter(None, (note, why)))])


def table() -> str:
    """All that follows ``BEGIN``."""
    lines = [line(HEAD), line("---" for _ in HEAD), *map(whole_line, families())]
    reasons = [f"- `{family}`: {why}" for family, why in NOT_BUILT.items()]
    return "\n".join([*lines, "", "Not tried:", "", *reasons, ""])


def written() -> dict[str, str]:
    """The lines of the table in the docs, by family."""
    found = DOCS.read_text().partition(BEGIN)[2].splitlines()
    return {text.split(" | ")[0].removeprefix("| "): text for text in found if text.startswith("| ")}


def test_every_causal_family_is_in_the_table():
    assert [*written()][2:] == families(), REWRITE
    assert {*NOT_BUILT} <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert DOCS.read_text().endswith("\n".join(f"- `{family}`: {why}" for family, why in NOT_BUILT.items()) + "\n")


@pytest.mark.parametrize("family", families())
def test_layers_are_those_of_the_table(family):
    assert written()[family].startswith(line(layer_cells(family)).removesuffix("|")), REWRITE


@pytest.mark.parametrize("family", families())
def test_projections_fit_each_other(family):
    """What leaves gate and up enters down, what leaves q's attention enters o: no other layer is taken for one."""
    sizes = {}
    for name, layer in tracked(family).items() if family not in MODULES else ():
        side = layer.shape[projection_of(name).rpartition("_")[2] in ("down", "o")]
        sizes.setdefault((block_of(name), projection_of(name)), set()).add(side)
    pairs = [(f"{kind}{a}", f"{kind}down") for kind in ("", "expert_", "shared_") for a in ("gate", "up")]
    if family not in VALUES_ARE_WIDER:
        pairs.append(("q", "o"))
    for (block, projection), size in sizes.items():
        for first, second in pairs:
            if projection == first and (block, second) in sizes:
                assert size == sizes[block, second], (block, projection)


@pytest.mark.parametrize("family", families() if os.environ.get("FAMILIES") else families()[::12])
def test_factors_and_recitation_are_as_the_table_says(family):
    assert whole_line(family) == written()[family], REWRITE


if __name__ == "__main__":
    sys.exit(DOCS.write_text(DOCS.read_text().partition(BEGIN)[0] + BEGIN + "\n" + table()) and 0)
