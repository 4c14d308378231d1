"""Projections that share one weight with others: gate and up, or q, k and v, as rows of it.

The rows of a fused weight are weights of their own that read the same input: they have one A, and the G of some rows is
the diagonal block of the whole G. Which rows are whose is known by the class of the module that the weight is in, as
its forward in the transformers package takes the output apart; a class that is not known here is not guessed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from lightning_kfac.models.layer import Layer

QKV = ("q", "k", "v")
GATE_UP = ("gate", "up")


@dataclass(frozen=True)
class Rows:
    """Some of the rows of a weight: d_out taken apart into ``dims``, of which ``index`` are theirs.

    Attributes:
        dims: Their product is d_out.
        index: A number or a slice for each leading one of ``dims``.

    Example:
        >>> import torch
        >>> z = torch.arange(12)  # two heads of [q q k k v v]
        >>> Rows((2, 3, 2), (slice(None), 1)).take(z, 0).flatten()
        tensor([2, 3, 8, 9])
    """

    dims: tuple[int, ...]
    index: tuple[int | slice, ...]

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """The rows along an axis, which stays taken apart: a view."""
        axis %= tensor.ndim
        return tensor.unflatten(axis, self.dims)[(slice(None),) * axis + self.index]


class FusedRows(Layer):
    """Rows of a weight of ``nn.Linear`` or ``Conv1D``, named after the weight's module and the projection.

    Args:
        name, module: Of the module that holds the weight.
        projection: What the rows are.
        rows: Which they are.
    """

    def __init__(self, name: str, module: nn.Module, projection: str, rows: Rows):
        super().__init__(f"{name}.{projection}", module)
        self.whole_name = name
        self.rows = rows

    @override
    @classmethod
    def find(cls, name: str, module: nn.Module) -> Iterator[Layer]:
        for leaf, layout in LAYOUTS.get(type(module).__name__, {}).items():
            weight = getattr(module, leaf, None)
            if isinstance(weight, (nn.Linear, Conv1D)):
                whole_name = f"{name}.{leaf}" if name else leaf
                for projection, rows in layout(module, _d_out(weight)).items():
                    yield cls(whole_name, weight, projection, rows)

    @property
    @override
    def parameter_name(self) -> str:
        return f"{self.whole_name}.weight"

    @override
    def part(self, stored: Tensor) -> Tensor:
        """[..., d_in]: the rows may be interleaved with others."""
        return self.rows.take(stored.T if isinstance(self.module, Conv1D) else stored, 0)

    @override
    def matrix(self, stored: Tensor) -> Tensor:
        return self.part(stored).flatten(0, -2)

    @override
    def write(self, stored: Tensor, W: Tensor) -> None:
        part = self.part(stored)
        part.copy_(W.view(part.shape))

    @override
    def outputs(self, seen: Tensor) -> Tensor:
        return self.rows.take(seen, -1).flatten(seen.ndim - 1)


Layout = Callable[[Any, int], Mapping[str, Rows]]


def _d_out(weight: nn.Linear | Conv1D) -> int:
    described: Any = weight
    return int(described.nf if isinstance(weight, Conv1D) else described.out_features)


def _one_after_another(names: tuple[str, ...], sizes: list[int]) -> dict[str, Rows]:
    total = sum(sizes)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return {name: Rows((total,), (slice(end - size, end),)) for name, size, end in zip(names, sizes, ends, strict=True)}


def _halves(parent: Any, d_out: int) -> dict[str, Rows]:
    """Gate, then up."""
    return _one_after_another(GATE_UP, [d_out // 2] * 2)


def _thirds(parent: Any, d_out: int) -> dict[str, Rows]:
    """q, then k, then v."""
    return _one_after_another(QKV, [d_out // 3] * 3)


def _gpt2(parent: Any, d_out: int) -> dict[str, Rows]:
    """Thirds; in cross-attention q has a weight of its own."""
    if parent.is_cross_attention:
        return _k_and_v(parent, d_out)
    return _thirds(parent, d_out)


def _k_and_v(parent: Any, d_out: int) -> dict[str, Rows]:
    return _one_after_another(QKV[1:], [d_out // 2] * 2)


def _gated_queries(parent: Any, d_out: int) -> dict[str, Rows]:
    """By head: q, then the gate of the head's output, which is no projection of its own."""
    return {"q": Rows((d_out // parent.head_dim // 2, 2, parent.head_dim), (slice(None), 0))}


def _grouped_queries(parent: Any, d_out: int) -> dict[str, Rows]:
    """q, then k, then v, of which k and v have fewer heads."""
    config = parent.config
    keys = getattr(parent, "num_key_value_heads", None) or config.num_key_value_heads
    values = keys * parent.head_dim
    return _one_after_another(QKV, [d_out - 2 * values, values, values])


def _by_head(heads: int, d_out: int) -> dict[str, Rows]:
    """q, k and v of the first head, then of the second."""
    dims = (heads, 3, d_out // heads // 3)
    return {name: Rows(dims, (slice(None), place)) for place, name in enumerate(QKV)}


def _interleaved(parent: Any, d_out: int) -> dict[str, Rows]:
    heads = getattr(parent, "num_heads", None) or getattr(parent, "num_attention_heads", None)
    return _by_head(heads or parent.config.num_attention_heads, d_out)


def _falcon(parent: Any, d_out: int) -> dict[str, Rows]:
    """By groups of heads that share k and v; by head; or all of q, then one k and v for all."""
    heads = parent.num_heads
    if not parent.new_decoder_architecture and not parent.multi_query:
        return _by_head(heads, d_out)
    groups = parent.num_kv_heads if parent.new_decoder_architecture else 1
    dims = (groups, heads // groups + 2, parent.head_dim)
    places: dict[str, int | slice] = {"q": slice(None, -2), "k": -2, "v": -1}
    return {name: Rows(dims, (slice(None), place)) for name, place in places.items()}


def _bigcode(parent: Any, d_out: int) -> dict[str, Rows]:
    if parent.is_cross_attention:
        return _k_and_v(parent, d_out)
    if not parent.multi_query:
        return _by_head(parent.num_heads, d_out)
    return _one_after_another(QKV, [parent.embed_dim, parent.kv_dim, parent.kv_dim])


def _codegen(parent: Any, d_out: int) -> dict[str, Rows]:
    """Four parts, in each q, then v, then k."""
    dims = (4, 3, d_out // 12)
    return {name: Rows(dims, (slice(None), place)) for name, place in (("q", 0), ("k", 2), ("v", 1))}


# By the class of the module that the weight is in, then by the weight's own name there.
LAYOUTS: dict[str, dict[str, Layout]] = {
    "Attention": {"c_attn": _thirds},  # of OpenAI's first GPT
    "BloomAttention": {"query_key_value": _interleaved},
    "CodeGenAttention": {"qkv_proj": _codegen},
    "DbrxAttention": {"Wqkv": _grouped_queries},
    "DiaMLP": {"gate_up_proj": _halves},
    "FalconAttention": {"query_key_value": _falcon},
    "FalconFlashAttention2": {"query_key_value": _falcon},
    "Glm4MLP": {"gate_up_proj": _halves},
    "GlmMLP": {"gate_up_proj": _halves},
    "GPT2Attention": {"c_attn": _gpt2},
    "GPTBigCodeAttention": {"c_attn": _bigcode},
    "GPTNeoXAttention": {"query_key_value": _interleaved},
    "GPTNeoXJapaneseAttention": {"query_key_value": _interleaved},
    "GraniteMoeHybridMLP": {"input_linear": _halves},
    "GraniteMoeSharedMLP": {"input_linear": _halves},
    "GraniteMoeSWAMLP": {"input_linear": _halves},
    "JetMoeAttention": {"kv_proj": _k_and_v},
    "MiniMaxLightningAttention": {"qkv_proj": _interleaved},
    "MiniMaxM3VLDenseMLP": {"gate_up_proj": _halves},
    "ModernBertDecoderMLP": {"Wi": _halves},
    "MoshiGatingMLP": {"fc1": _halves},
    "MptAttention": {"Wqkv": _thirds},
    "PersimmonAttention": {"query_key_value": _interleaved},
    "Phi3Attention": {"qkv_proj": _grouped_queries},
    "Phi3MLP": {"gate_up_proj": _halves},
    "Phi4MultimodalAttention": {"qkv_proj": _grouped_queries},
    "Phi4MultimodalMLP": {"gate_up_proj": _halves},
    "Qwen3NextAttention": {"q_proj": _gated_queries},
    "Qwen3_5Attention": {"q_proj": _gated_queries},
    "Qwen3_5MoeAttention": {"q_proj": _gated_queries},
    "Qwen4ExpTextAttention": {"q_proj": _gated_queries},
    "Zamba2MLP": {"gate_up_proj": _halves},
}
