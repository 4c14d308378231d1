"""Architectures for plans on paper, read from a model's skeleton."""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from lightning_kfac.errors import InputError
from lightning_kfac.models.experts import ExpertLayer
from lightning_kfac.models.fused import FusedRows
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.layers import find_layers
from lightning_kfac.models.targets import FUSED, SHARED, block_of, count_blocks, expert_of, projection_of
from lightning_kfac.planning.cost import DOWN, GATE_UP, OUT, QKV, Architecture, Product
from lightning_kfac.planning.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGES = {"q": QKV, "k": QKV, "v": QKV, "o": OUT, "gate": GATE_UP, "up": GATE_UP, "down": DOWN}
GATED = ("gate_proj", "gate_up_proj", "w1", "input_linear")
# What the model families call it.
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def published_config(shape: str) -> PretrainedConfig:
    """The configuration of one of ``SHAPES``; raises ``InputError`` for another name."""
    if shape not in SHAPES:
        raise InputError(f"shape {shape}: not known; choose from {', '.join(SHAPES)}, or name a model", "shape")
    settings = dict(SHAPES[shape][1])
    model_type = settings.pop("model_type")
    tied = {"tie_word_embeddings": False}
    return AutoConfig.for_model(model_type, **settings, **tied, pad_token_id=None)


def read_architecture(model: "PreTrainedModel") -> Architecture:
    """The matrix products of a model, from its modules; weights may be on the meta device.

    Raises:
        InputError: The model has no numbered blocks, attention heads or head, or weights of another kind.
    """
    config = model.config
    blocks = count_blocks(model)
    head = model.get_output_embeddings()
    if not blocks or head is None or not hasattr(config, "num_attention_heads"):
        raise InputError(f"{type(model).__name__}: not a decoder of blocks with attention, which alone can be planned")
    products: list[Product] = []
    sizes: dict[int | None, int] = {}
    norms: dict[int, int] = {}
    layers = {layer.parameter_name: layer for layer in find_layers(model).values()}
    for name, parameter in model.named_parameters():
        block = block_of(name)
        sizes[block] = sizes.get(block, 0) + parameter.numel()
        if block is None or name.endswith("bias"):
            continue
        if parameter.ndim >= 2:
            products.append(_product(name, parameter, layers.get(name), block, config))
        elif "norm" in name or ".ln_" in name:
            norms[block] = norms.get(block, 0) + _norm_width(name, parameter.numel(), products)
    vocabulary, hidden = head.weight.shape
    products.append(Product("head", vocabulary, hidden, blocks, QKV))
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    root = sizes.pop(None, 0)
    return Architecture(
        products=tuple(products),
        blocks=blocks,
        heads_width=width,
        vocabulary=vocabulary,
        gated=any(p.name.endswith(GATED) for p in products),
        norm_width=max(norms.values(), default=0),
        parameters=sum(sizes.values()) + root,
        block_parameters=max(sizes.values()),
        root_parameters=root,
        parts=tuple(_parts(find_layers(model).values(), config)),
    )


def _parts(layers: Iterable[Layer], config: PretrainedConfig) -> Iterator[Product]:
    """Fused rows, and single experts, each of which sees k of E tokens."""
    for layer in layers:
        block = block_of(layer.name)
        projection = projection_of(layer.name)
        if block is None or projection is None or not isinstance(layer, (FusedRows, ExpertLayer)):
            continue
        share = experts_a_token(config) / len(layer.parameter) if isinstance(layer, ExpertLayer) else 1.0
        stage = STAGES[projection.rpartition("_")[2]]
        d_out, d_in = layer.shape
        yield Product(layer.name, d_out, d_in, block, stage, expert=expert_of(layer.name), share=share)


def experts_a_token(config: PretrainedConfig) -> int:
    """How many experts of a block see a token; raises ``InputError`` where the configuration does not say."""
    found = next((getattr(config, name) for name in EXPERTS_A_TOKEN if hasattr(config, name)), None)
    if not isinstance(found, int):
        raise InputError(f"{config.model_type}: its configuration does not say how many experts see a token")
    return found


def _product(name: str, parameter: nn.Parameter, layer: Layer | None, block: int, config: PretrainedConfig) -> Product:
    if parameter.ndim == 2:
        module = name.rpartition(".")[0] if layer is None else layer.name
        d_out, d_in = parameter.shape if layer is None else layer.shape
        return Product(module, d_out, d_in, block, _stage(module), shared=bool(SHARED.search(module)))
    if parameter.ndim != 3 or "expert" not in name:
        raise InputError(f"{name} is {list(parameter.shape)}: neither a projection nor experts; it cannot be planned")
    experts, d_out, d_in = parameter.shape
    stage = _stage(name)
    inner, outer = (d_in, d_out) if stage == GATE_UP else (d_out, d_in)
    if inner != config.hidden_size == outer:  # some families store experts transposed
        d_out, d_in = d_in, d_out
    return Product(name, d_out, d_in, block, stage, experts, experts_a_token(config))


def _stage(name: str) -> int:
    if (projection := projection_of(name)) is not None:
        return STAGES[projection.rpartition("_")[2]]
    if (fused := FUSED.get(name.rpartition(".")[2])) is not None:
        return STAGES[fused.partition(",")[0].split()[0]]
    if not re.search(r"\battn|attention|self_attn", name):
        return GATE_UP  # a router reads what the experts read
    return OUT if name.endswith((".out_proj", ".dense")) else QKV


def _norm_width(name: str, width: int, products: list[Product]) -> int:
    """Numbers that a norm reads for one token; a norm of heads has the width of one of them."""
    of = re.search(r"\.([qk])_norm\.", name)
    if of is None:
        return width
    return next(p.d_out for p in reversed(products) if projection_of(p.name) == of[1])
