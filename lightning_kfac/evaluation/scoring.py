"""What a model says of text: losses and rankings of next tokens, and recitation under shifted prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kfac.evaluation.recitation import gold_hits, recite
from lightning_kfac.metrics.functional import stress_length, token_losses, top_tokens
from lightning_kfac.models.logits import logits_in_slices
from lightning_kfac.models.tokens import TokenBatch


@torch.no_grad()
def next_token_scores(model: nn.Module, batch: TokenBatch, k: int = 10) -> tuple[Tensor, Tensor]:
    """Loss of each target and the k likeliest tokens at each position.

    Returns:
        float64 [B, T] (of positions that do not count: of token 0), int64 [B, T, k].
    """
    targets = batch.targets.clamp(min=0).flatten()
    losses: list[Tensor] = []
    rankings: list[Tensor] = []
    for part, logits in logits_in_slices(model, batch):
        losses.append(token_losses(logits, targets[part]))
        rankings.append(top_tokens(logits, k))
    shape = batch.targets.shape
    return torch.cat(losses).view(shape), torch.cat(rankings).view(*shape, -1)


@torch.no_grad()
def target_losses(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Loss of each target, 0 at positions that do not count. float64 [B, T]."""
    targets = batch.targets.clamp(min=0).flatten()
    losses = [token_losses(logits, targets[part]) for part, logits in logits_in_slices(model, batch)]
    return torch.cat(losses).view(batch.targets.shape).masked_fill(~batch.valid, 0)


def position_stress(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    golds: Sequence[Sequence[int]],
    t: int = 20,
    include_unperturbed: bool = False,
) -> list[tuple[int, int]]:
    """Recited lengths of each sequence: by its prefix, and by the best perturbation of its prompt.

    One forward over prefix and gold decides every prompt that is extended to the left of the suffix; a prompt that
    starts later needs a forward of its own. Nothing is generated.

    Args:
        prefixes: B lists of token ids.
        golds: B lists, cut after their end of text.
        t: Most gold tokens added to a prompt; prompts that start later keep at least the last t + 1 tokens.
        include_unperturbed: Let the prefix itself count among the perturbations.
    """
    hits = gold_hits(model, prefixes, golds).tolist()
    shifted: list[list[int]] = [[] for _ in prefixes]
    for length in range(t + 1, max(map(len, prefixes), default=0)):
        some = [i for i, prefix in enumerate(prefixes) if len(prefix) > length]
        recitals = recite(model, [prefixes[i][-length:] for i in some], [golds[i] for i in some], decode=False)
        for i, recital in zip(some, recitals, strict=True):
            shifted[i].append(recital.matched)
    lengths = []
    for own, gold, others in zip(hits, golds, shifted, strict=True):
        own = own[: len(gold)]
        original = stress_length(own, [], 0, include_unperturbed=True)
        lengths.append((original, stress_length(own, others, t, include_unperturbed)))
    return lengths
