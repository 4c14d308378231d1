"""What a model gives away of texts: one forward over each scores it for membership tests."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.bulk import BulkShare
from lightning_kfac.metrics.functional import (
    TokenStatistics,
    exact_match,
    extraction_strength,
    mean_loss,
    min_k,
    min_k_plus_plus,
    reference_ratio,
    token_statistics,
    zlib_ratio,
)
from lightning_kfac.metrics.leaks import RANDOM
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.probes import is_plain_head
from lightning_kfac.models.tokens import TokenBatch, right_padded

# Texts of like length are read together, so many at most.
TOKENS_AT_ONCE = 1 << 14


class TextRead(NamedTuple):
    """What a model says of the tokens of one suffix, tensors [its length], and what it makes of them.

    Attributes:
        tokens: Of each token, given all before it.
        bulk: By layer: bulk share of the positions that predict these tokens, in the layer's basis and in a random one.
    """

    tokens: TokenStatistics
    bulk: dict[str, tuple[float, float]]


def text_scores(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    *,
    k: float = 0.2,
    decode: Callable[[list[int]], str] | None = None,
    reference_losses: Sequence[float] | None = None,
    bulk: BulkShare | None = None,
) -> list[dict[str, float]]:
    """Scores suffixes given their prefixes, by the names of ``metrics.leaks.SCORES``, and bulk shares by layer too.

    Args:
        prefixes: B non-empty lists of token ids; of a whole text what begins it.
        suffixes: B non-empty lists, scored to their ends.
        k: Share of the tokens that Min-K and Min-K++ look at.
        decode: Gives the text of ids, for the zlib ratio; None leaves that out.
        reference_losses: B losses by the reference model; None leaves it out.
        bulk: Listens to layers of the model; None leaves bulk shares out.

    Raises:
        InputError: The model's logits are not finite.
    """
    scores = []
    for number, (found, shares) in enumerate(read_texts(model, prefixes, suffixes, bulk)):
        loss = mean_loss(found.log_p)
        score = {"loss": loss}
        if decode is not None:
            score["zlib"] = zlib_ratio(loss, decode(list(suffixes[number])))
        if reference_losses is not None:
            score["reference"] = reference_ratio(loss, reference_losses[number])
        score["min_k"] = min_k(found.log_p, k)
        score["min_k_plus_plus"] = min_k_plus_plus(found.log_p, found.mean, found.deviation, k)
        score["exact_match"] = exact_match(found.hit)
        score["extraction_strength"] = extraction_strength(found.hit)
        if shares:
            score["bulk_share"] = mean(own for own, _ in shares.values())
            score["bulk_share_random"] = mean(random for _, random in shares.values())
            for name, (own, random) in shares.items():
                score |= {name: own, f"{RANDOM}{name}": random}
        scores.append(score)
    return scores


def text_losses(model: nn.Module, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss a token of each suffix, as ``text_scores`` has it."""
    return [mean_loss(found.tokens.log_p) for found in read_texts(model, prefixes, suffixes)]


@torch.no_grad()
def read_texts(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    bulk: BulkShare | None = None,
) -> list[TextRead]:
    """Has a model read prefixes and suffixes, once; results are on the CPU.

    Args:
        bulk: Listens to layers of the model.

    Raises:
        InputError: The model's logits are not finite.
    """
    found: dict[int, TextRead] = {}
    for some in _alike([len(p) + len(s) for p, s in zip(prefixes, suffixes, strict=True)]):
        tokens, shares = _read(model, [prefixes[i] for i in some], [suffixes[i] for i in some], bulk)
        for place, number in enumerate(some):
            length = len(suffixes[number])
            own = {name: (own[place, 0].item(), own[place, 1].item()) for name, own in shares.items()}
            found[number] = TextRead(TokenStatistics(*(part[place, :length] for part in tokens)), own)
    return [found[number] for number in range(len(suffixes))]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of texts in groups of like length, each of at most ``TOKENS_AT_ONCE`` tokens, or of one text."""
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= TOKENS_AT_ONCE:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _read(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    bulk: BulkShare | None,
) -> tuple[TokenStatistics, dict[str, Tensor]]:
    """The same of a batch: tensors [B, L] with anything behind the end of a suffix, and shares [B, 2] by layer."""
    device = next(model.parameters()).device
    ids, real = right_padded([[*p, *s] for p, s in zip(prefixes, suffixes, strict=True)], device)
    gold, wanted = right_padded(suffixes, device)
    batch = TokenBatch.from_dict({"input_ids": ids} | ({} if real.all() else {"attention_mask": real}))
    first = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
    places = (first[:, None] + torch.arange(gold.shape[1], device=device)).clamp(max=batch.shape[1] - 1)
    manner_of(model), is_plain_head(model)  # tried out while nothing listens to the layers
    with nullcontext() if bulk is None else bulk.listening() as heard:
        slices = logits_in_slices(model, batch, places)
        parts = [token_statistics(logits, gold.flatten()[part]) for part, logits in slices]
    columns: list[Tensor] = [torch.cat(column).view(gold.shape).cpu() for column in zip(*parts, strict=True)]
    if columns[0].isnan().any():
        raise InputError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
    shares = {} if heard is None else heard.shares(first, wanted.sum(1), batch.shape[1])
    return TokenStatistics(*columns), {name: share.cpu() for name, share in shares.items()}
