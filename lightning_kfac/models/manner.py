"""How rows of tokens are fed to a model so that each is read as if it were alone: found by trying, once a model.

Padding lies behind the tokens, where a causal model does not see it, and positions are left to the model. So it does
not matter how a family counts them (from 0, from its padding id, by the mask, by places), nor whether it heeds a mask.
What is left to find out is whether the model is causal at all, and whether rows of a batch leave each other alone.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfac.console import say
from lightning_kfac.distributed.sharding import is_sharded
from lightning_kfac.errors import InputError, first_line
from lightning_kfac.models.language import language_model, most_positions, vocabulary_size
from lightning_kfac.models.probes import once_a_model

# Tokens of the two rows on which a model is tried. The short one is the end of the long one.
SHORT, LONG = 5, 14
# Half-precision models up to so many weights are tried in float32, where small effects stand out of the rounding.
SMALL = 1 << 26
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Manner:
    """How rows of tokens are fed to a model.

    Attributes:
        masks_all: The attention mask goes along with rows without padding too: the model would take a genuine token
            for padding if it is the padding id.
        apart_from: Batches with so many positions, or more, are read one row at a time, without padding or mask.
        longest: Rows with more positions than that are refused; ``limit`` says why.
    """

    masks_all: bool = False
    apart_from: float = math.inf
    longest: float = math.inf
    limit: str = ""

    def is_apart(self, positions: int) -> bool:
        """Whether rows of so many positions are read one at a time."""
        return positions >= self.apart_from

    def check_length(self, model: nn.Module, positions: int) -> None:
        """Raises ``InputError`` for rows with more positions than the model reads reproducibly."""
        if positions > self.longest:
            raise InputError(
                f"a row of {positions} tokens, but {type(model).__name__} takes at most {self.longest}: {self.limit}"
            )


@once_a_model
def manner_of(model: nn.Module) -> Manner:
    """How a model is to be fed; tried on two short rows, which leaves its weights, mode and random numbers alone.

    Every rank of a sharded model must call it, or be in a ``Lockstep``.

    Raises:
        InputError: The model cannot read a row of tokens, reads it otherwise each time, or predicts a token from those
            behind it.
    """
    name = type(model).__name__
    with trying(model):
        trial = Trial(model)
        if not trial.alone.isfinite().any():
            return Manner()  # damaged weights: whatever is measured says so
        alone = trial.reads(padded=False)
        if alone and trial.reads(padded=True):
            return _by_length(model, trial.takes_padding_id())
        if not trial.same(trial.logits(trial.short[None])[0], trial.alone):
            raise InputError(f"{name} reads the same tokens otherwise each time: nothing can be measured on it")
        together = torch.cat([trial.short, trial.behind])
        if not trial.same(trial.logits(together[None])[0, : len(trial.short)], trial.alone):
            raise InputError(
                f"{name} is no causal language model: the tokens behind a position change what it predicts there "
                "(an encoder needs is_decoder=True in its config)"
            )
    why = "it takes no mask" if alone else "rows of a batch change each other's predictions"
    say(f"{name}: {why}, so rows are read one at a time")
    return Manner(apart_from=0)


def _by_length(model: nn.Module, takes_padding_id: bool) -> Manner:
    """The manner of a model whose rows leave each other alone, as long as they are short.

    Some kinds of RoPE have other frequencies once a batch is longer than the text of the pretraining: "longrope" of
    all its rows, "dynamic" also of those that come after it.
    """
    manner = Manner(masks_all=not takes_padding_id)
    config = language_model(model).config.get_text_config()
    most = most_positions(config) or math.inf
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        known = rope.get("original_max_position_embeddings", most)
        if rope["rope_type"] == "longrope":
            return replace(manner, apart_from=known + 1)
        if "dynamic" in rope["rope_type"]:
            why = "beyond, its dynamic RoPE depends on the rows that it has read before"
            return replace(manner, longest=most, limit=why)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and (first := getattr(module, "padding_idx", None)) is not None:
            places = module.get_parameter("weight").shape[0] - first - 1
            return replace(manner, longest=places, limit=f"its positions begin behind the padding id {first}")
    return manner


def _ropes(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kinds of RoPE in a model: one, or one for each kind of layer."""
    several = [part for part in parameters.values() if isinstance(part, Mapping)]
    return [rope for rope in (parameters, *several) if isinstance(rope.get("rope_type"), str)]


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """A model as it is tried out: in eval mode, in its own precision or a better one, and afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _in_float32(model),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """A small model's half-precision tensors widened, and then the same tensors as before."""
    tensors = [*model.parameters(), *model.buffers()]
    small = sum(tensor.numel() for tensor in tensors) <= SMALL and not is_sharded(model)
    stored = [(tensor, tensor.data) for tensor in tensors if small and tensor.dtype in HALF]
    try:
        for tensor, data in stored:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in stored:
            tensor.data = data


class Trial:
    """A short row, read alone, and the same row in batches with a longer one.

    Attributes:
        short, long: int64 [SHORT], [LONG]; fewer where the model takes fewer positions.
        behind: int64, other tokens that fill the short row up.
        alone: float64 [SHORT, V], logits of the short row by itself.
        tolerance: What rounding can make of the distance of two readings.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        parameter = next(model.parameters())
        config = language_model(model).config
        count = vocabulary_size(model)
        special = [value for key, value in config.to_dict().items() if key.endswith("token_id")]
        ids = [token for token in range(min(count, 4 * LONG)) if token not in special] or list(range(count))
        width = min(LONG, most_positions(config.get_text_config()) or LONG)
        row = torch.tensor([ids[(5 * i + 3) % len(ids)] for i in range(2 * LONG)], device=parameter.device)
        self.long = row[:width]
        self.short = self.long[-SHORT:] if width > SHORT else self.long[-1:]
        self.behind = row[LONG : LONG + width - len(self.short)]
        self.tolerance = max(1e-4, 8 * _rounding(parameter))
        try:
            self.alone = self.logits(self.short[None])[0]
        except Exception as error:  # models refuse tokens each in its own way
            raise InputError(f"{type(model).__name__} cannot read rows of tokens: {first_line(error)}") from error

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float64 [B, T, V]."""
        more = {} if mask is None else {"attention_mask": mask}
        return self.model(input_ids=ids, use_cache=False, **more).logits.double()

    def reads(self, padded: bool) -> bool:
        """Whether the short row beside the longer one is read as alone, with a mask or with other tokens behind it."""
        mask = torch.ones_like(self.long).repeat(2, 1)
        mask[0, len(self.short) :] = 0
        filling = torch.full_like(self.behind, int(self.long[0])) if padded else self.behind
        ids = torch.stack([torch.cat([self.short, filling]), self.long])
        try:
            found = self.logits(ids, mask if padded else None)
        except Exception:  # it takes no such mask, and says so in its own way
            return False
        # Padding that is not finite would reach the sums as 0 times NaN.
        return not found.isnan().any() and self.same(found[0, : len(self.short)], self.alone)

    def takes_padding_id(self) -> bool:
        """Whether the padding id is read as a token like others where no mask says otherwise."""
        pad = language_model(self.model).config.get_text_config().pad_token_id
        if pad is None or not 0 <= pad < vocabulary_size(self.model):
            return True
        row = self.short[None].clone()
        row[0, -1] = pad
        return self.same(self.logits(row)[0], self.logits(row, torch.ones_like(row))[0])

    def same(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two readings of the same tokens differ by no more than rounding."""
        return distance(found, expected) <= self.tolerance


def distance(found: Tensor, expected: Tensor) -> float:
    """RMS difference of two sets of logits [..., V], relative to the spread of the expected ones over the vocabulary.

    A number that is the same for all tokens changes no prediction and does not count.
    """
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    finite = expected.isfinite()
    a, b = (x.where(finite, 0) - x.where(finite, 0).sum(-1, True) / finite.sum(-1, True) for x in (found, expected))
    difference = (a - b).where(finite, 0).norm()
    return float(difference / b.where(finite, 0).norm().clamp(min=1e-30))


def _rounding(parameter: Tensor) -> float:
    """The relative rounding of products with a weight, under the small-model rule of ``trying``."""
    if parameter.dtype == torch.float32 and parameter.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2.0**-10
    return torch.finfo(parameter.dtype).eps
