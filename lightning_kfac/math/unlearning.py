"""Losses and steps of other ways to suppress recitation, as pure functions.

Shapes: B rows, T positions, V vocabulary entries. The target of position t is the next token, -100 where it has none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_kfac.math.loss import IGNORED


def target_log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """Log probability of each target; 0 where a position has none. float32 or wider [B, T].

    Args:
        logits: [B, T, V].
        targets: int64 [B, T].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -loss.view(targets.shape)


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """m = logit of the target - the largest of the others, of every position that has a target. [n].

    A token is recited where it is above 0.

    Example:
        >>> margins(torch.tensor([[[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]]]), torch.tensor([[0, -100]])).tolist()
        [1.0]
    """
    valid = targets != IGNORED
    z = logits[valid]
    gold = targets[valid][:, None]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z.gather(1, gold).squeeze(1) - z.scatter(1, gold, -torch.inf).amax(1)


def npo(log_p: Tensor, reference: Tensor, beta: float) -> Tensor:
    """(2 / beta) log(1 + (pi / pi_ref)^beta) of each sequence: negative preference optimization (Zhang et al.,
    arXiv 2404.05868), whose mean over the forget set is minimised. [B].

    Args:
        log_p: log pi of each sequence, [B].
        reference: log pi_ref of the same, [B].
        beta: Greater than 0; towards 0 its gradient becomes that of gradient ascent.

    Example:
        >>> npo(torch.tensor([-3.0]), torch.tensor([-3.0]), 1.0).item() == 2 * torch.tensor(2.0).log().item()
        True
    """
    return (2 / beta) * F.softplus(beta * (log_p - reference))


class _LargestDropped(torch.autograd.Function):
    """1 where a score stays below the largest ones, 0 there; its gradient is that of -score."""

    @staticmethod
    @override
    def forward(ctx: Any, scores: Tensor, ratio: float) -> Tensor:
        mask = torch.ones_like(scores)
        largest = scores.flatten().topk(round(ratio * scores.numel())).indices
        mask.view(-1)[largest] = 0
        return mask

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -grads[0], None


def subnet_mask(scores: Tensor, ratio: float) -> Tensor:
    """The mask of BalancedSubnet (Sakarvadia et al., arXiv 2410.02159): 0 for the share ``ratio`` of the weights with
    the largest |score|, else 1; straight through, the gradient of |score| is minus that of the mask.

    Args:
        scores: [d_out, d_in].
        ratio: In [0, 1]; rounded to whole weights.

    Returns:
        [d_out, d_in], in the scores' dtype.

    Example:
        >>> subnet_mask(torch.tensor([[0.1, -3.0], [2.0, 0.5]]), 0.5).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    mask: Tensor = _LargestDropped.apply(scores.abs(), ratio)
    return mask


def trailing(n: int, share: float) -> slice:
    """The last round(share n) of n directions, which are the flattest where they are in descending order."""
    return slice(n - round(share * n), n)


def block_part(W: Tensor, vectors_G: Tensor, vectors_A: Tensor, rows: slice, columns: slice) -> Tensor:
    """G_s G_s^T W A_s A_s^T: the part of a matrix in a block of a basis. [d_out, d_in].

    Args:
        W: [d_out, d_in].
        vectors_G: [d_out, d_out], columns are eigenvectors.
        vectors_A: [d_in, d_in].
        rows, columns: Which of the columns of either.
    """
    G = vectors_G[:, rows]
    A = vectors_A[:, columns]
    if G.shape[1] == len(W) and A.shape[1] == W.shape[1]:
        return W
    return G @ (G.T @ W @ A) @ A.T
