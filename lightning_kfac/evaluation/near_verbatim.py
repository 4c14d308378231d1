"""How likely a model's samples come close to suffixes: the beams of ``metrics/functional/near_verbatim.py``, run."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lightning_kfac.metrics.functional import Decoding, cut_after_end
from lightning_kfac.metrics.functional.extraction import likeliest
from lightning_kfac.metrics.functional.near_verbatim import Draws, log_near_verbatim
from lightning_kfac.models.cached_rows import RereadRows, bears_gaps, read_rows
from lightning_kfac.models.tokens import left_padded

# Beams of all sequences that are read at once.
ROWS_AT_ONCE = 512


@torch.no_grad()
def near_verbatim(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    golds: Sequence[Sequence[int]],
    log_p: Sequence[float],
    decoding: Decoding,
    distance: int,
    width: int,
    end_of_text: Collection[int] = frozenset(),
) -> list[float]:
    """Lower bounds of the probabilities that samples lie within some token edits of their golds (arXiv 2603.24917).

    Args:
        prefixes, golds: B non-empty lists of token ids; each gold is cut after its first end of text.
        log_p: Of the golds themselves, as ``recite`` tells it.
        decoding: How tokens are drawn.
        distance: Most edits.
        width: Beams of each sequence.
        end_of_text: Ids at which a continuation ends.

    Returns:
        B natural logarithms: at least ``log_p``, at most 0.
    """
    found: list[float] = []
    step = max(1, ROWS_AT_ONCE // width)
    for start in range(0, len(prefixes), step):
        part = slice(start, start + step)
        cut = [list(cut_after_end(gold, end_of_text)) for gold in golds[part]]
        longest = max(len(prefix) + len(gold) for prefix, gold in zip(prefixes[part], cut, strict=True))
        beams = _Read(model, prefixes[part], longest, decoding, width)
        own = torch.tensor(log_p[part], dtype=torch.float64, device=beams.device)
        found += log_near_verbatim(beams.first, beams.step, cut, own, distance, width, end_of_text).tolist()
    return found


class _Read:
    """Beams as the model reads them.

    Attributes:
        first: What is drawn behind the prefixes.
    """

    def __init__(
        self, model: nn.Module, prefixes: Sequence[Sequence[int]], longest: int, decoding: Decoding, width: int
    ):
        self.decoding = decoding
        self.count = max(width, decoding.top_k or width)
        rows = read_rows(model, len(prefixes), longest)
        # Beams come and go, for which rows must be taken by themselves.
        self.rows = rows if bears_gaps(rows) else RereadRows(model, len(prefixes))
        self.device = self.rows.attend.device
        ids, real = left_padded(prefixes, self.device)
        self.first = self._drawn(self.rows.read(ids, real))

    def step(self, parents: Tensor, tokens: Tensor, running: Tensor) -> Draws:
        """What is drawn behind beams that go on with these tokens; others read nothing."""
        self.rows = self.rows.take(parents)
        return self._drawn(self.rows.read(tokens[:, None], running[:, None]))

    def _drawn(self, logits: Tensor) -> Draws:
        last = logits[:, -1]
        return likeliest(last if last.dtype == torch.float64 else last.float(), self.count, self.decoding)
