"""Which positions carry loss, and with which labels: gold or sampled.

Shapes: B rows, T positions, V vocabulary entries. Position t predicts token t + 1.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
# Numbers of a [tokens, vocabulary] matrix that element-wise steps work on at once: such as stay in a CPU's caches, and
# enough to fill a GPU.
AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}


def valid_positions(attend: Tensor, labels: Tensor | None = None) -> Tensor:
    """Positions that carry loss: t and t + 1 are real tokens and label t + 1 is not -100.

    Args:
        attend: bool [B, T], True where the token is real.
        labels: int64 [B, T] in the Hugging Face convention (unshifted), or None.

    Returns:
        bool [B, T]; the last position is never valid.
    """
    valid = torch.zeros_like(attend)
    valid[:, :-1] = attend[:, :-1] & attend[:, 1:]
    if labels is not None:
        valid[:, :-1] &= labels[:, 1:] != IGNORED
    return valid


def next_tokens(tokens: Tensor) -> Tensor:
    """Targets of every position: ``tokens`` shifted by one; the last column is -100. int64 [B, T]."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def uniforms(seed: int, sample_index: Tensor, position: Tensor, draw: int = 0) -> Tensor:
    """One uniform number in [0, 1) for every token, fixed by (seed, sample, position, draw) alone.

    The counter-based generator Philox (Salmon et al., SC 2011) is keyed by (seed, sample index),
    with the draw number in its counter; position p takes the p-th number. So the numbers depend
    neither on the batch size, nor on padding, nor on the number of ranks.

    Args:
        sample_index: int64 [B], global row numbers.
        position: int64 [B, T], index among the row's real tokens; negative entries are clamped to 0.

    Returns:
        float64 [B, T] on the CPU.
    """
    position = position.cpu().clamp(min=0)
    rows = []
    for index, row in zip(sample_index.tolist(), position, strict=True):
        bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=[0, 0, 0, draw])
        stream = np.random.Generator(bits).random(int(row.max()) + 1)
        rows.append(torch.from_numpy(stream)[row])
    return torch.stack(rows)


@torch.no_grad()
def sample_labels(logits: Tensor, u: Tensor) -> Tensor:
    """Draws y ~ softmax(logits) by inverting the cumulative distribution in float64.

    Args:
        logits: [..., V].
        u: float64 [...], uniform in [0, 1).

    Returns:
        int64 [...]: the smallest k with cdf_k > u * cdf_last.
    """
    flat = logits.flatten(0, -2)
    u = u.to(logits.device).flatten()
    drawn = []
    for part in slices(flat):
        cdf = flat[part].double().softmax(-1).cumsum(-1)
        threshold = u[part, None] * cdf[:, -1:]
        drawn.append(torch.searchsorted(cdf, threshold, right=True).squeeze(-1))
    # Rounding can put u * cdf_last on cdf_last itself; the last class is then the right one.
    return torch.cat(drawn).clamp(max=logits.shape[-1] - 1).view(logits.shape[:-1])


def slices(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix [n, V], of about ``AT_ONCE`` numbers each.

    Example:
        >>> [(part.start, part.stop) for part in slices(torch.zeros(10, 1 << 17))]
        [(0, 4), (4, 8), (8, 12)]
    """
    step = max(1, AT_ONCE.get(rows.device.type, AT_ONCE["cuda"]) // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Each target's logit less the largest other one: above 0 where greedy decoding takes the target.

    Args:
        logits: [N, V].
        targets: int64 [N]; ignored ones have a margin of 0.

    Returns:
        [N].

    Example:
        >>> margins(torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]]), torch.tensor([1, 2]))
        tensor([ 2., -2.])
    """
    wanted = targets.clamp(min=0)[:, None]
    gold = logits.gather(1, wanted).squeeze(1)
    others = logits.scatter(1, wanted, -torch.inf).amax(1)
    return (gold - others).masked_fill(targets == IGNORED, 0)
