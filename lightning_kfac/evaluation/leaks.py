"""What a model gives away of texts: one forward over each scores it for membership tests."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_kfac.errors import InputError
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
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.tokens import TokenBatch, right_padded

# Texts of like length are read together, so many at most.
TOKENS_AT_ONCE = 1 << 14


def text_scores(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    *,
    k: float = 0.2,
    decode: Callable[[list[int]], str] | None = None,
    reference_losses: Sequence[float] | None = None,
) -> list[dict[str, float]]:
    """Scores suffixes given their prefixes, by the names of ``metrics.leaks.SCORES``.

    Args:
        prefixes: B non-empty lists of token ids; of a whole text what begins it.
        suffixes: B non-empty lists, scored to their ends.
        k: Share of the tokens that Min-K and Min-K++ look at.
        decode: Gives the text of ids, for the zlib ratio; None leaves that out.
        reference_losses: B losses by the reference model; None leaves it out.

    Raises:
        InputError: The model's logits are not finite.
    """
    scores = []
    for number, found in enumerate(token_scores(model, prefixes, suffixes)):
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
        scores.append(score)
    return scores


def text_losses(model: nn.Module, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss a token of each suffix, as ``text_scores`` has it."""
    return [mean_loss(found.log_p) for found in token_scores(model, prefixes, suffixes)]


@torch.no_grad()
def token_scores(
    model: nn.Module, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]
) -> list[TokenStatistics]:
    """What a model says of each token of suffixes, given all before it; on the CPU.

    Returns:
        Of each suffix, with tensors [its length].

    Raises:
        InputError: The model's logits are not finite.
    """
    found: dict[int, TokenStatistics] = {}
    for some in _alike([len(p) + len(s) for p, s in zip(prefixes, suffixes, strict=True)]):
        read = _read(model, [prefixes[i] for i in some], [suffixes[i] for i in some])
        for place, number in enumerate(some):
            length = len(suffixes[number])
            found[number] = TokenStatistics(*(part[place, :length] for part in read))
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


def _read(model: nn.Module, prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[int]]) -> TokenStatistics:
    """The same of a batch, tensors [B, L] with anything behind the end of a suffix."""
    device = next(model.parameters()).device
    ids, real = right_padded([[*p, *s] for p, s in zip(prefixes, suffixes, strict=True)], device)
    gold, _ = right_padded(suffixes, device)
    batch = TokenBatch.from_dict({"input_ids": ids} | ({} if real.all() else {"attention_mask": real}))
    first = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
    places = (first[:, None] + torch.arange(gold.shape[1], device=device)).clamp(max=batch.shape[1] - 1)
    wanted = gold.flatten()
    parts = [token_statistics(logits, wanted[part]) for part, logits in logits_in_slices(model, batch, places)]
    columns: list[Tensor] = [torch.cat(column).view(gold.shape).cpu() for column in zip(*parts, strict=True)]
    if columns[0].isnan().any():
        raise InputError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
    return TokenStatistics(*columns)
