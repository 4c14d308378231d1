"""The objective of an image classifier with a class token: one loss an image, and which positions count."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfac.collection.fisher import LabelSource
from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import IGNORED, sample_labels, uniforms
from lightning_kfac.models.layer import Layer

Positions = Literal["class", "all"]


@dataclass(frozen=True)
class ImageBatch:
    """Images that a vision transformer reads: the class token, then the patches.

    Attributes:
        pixels: float32 [B, C, H, W].
        labels: int64 [B], those that the model was trained on; ``IGNORED`` for a filler, which counts nowhere.
        true: int64 [B], the true ones.
        index: int64 [B], numbers of the images.
        n_positions: Class token and patches.
        positions: Which of them count: all, or the class token's alone.
    """

    pixels: Tensor
    labels: Tensor
    true: Tensor
    index: Tensor
    n_positions: int
    positions: Positions = "all"

    @property
    def shape(self) -> tuple[int, int]:
        """(images, positions of each)."""
        return len(self.pixels), self.n_positions

    @property
    def counted(self) -> Tensor | None:
        """bool [B, positions]."""
        counted = (self.labels != IGNORED)[:, None].repeat(1, self.n_positions)
        if self.positions == "class":
            counted[:, 1:] = False
        return counted

    def split(self, rows: int) -> Iterator["ImageBatch"]:
        """Parts of at most ``rows`` images."""
        for start in range(0, len(self.pixels), rows):
            part = slice(start, start + rows)
            yield self._with(self.pixels[part], self.labels[part], self.true[part], self.index[part])

    def to(self, device: torch.device) -> "ImageBatch":
        """On another device."""
        return self._with(*(part.to(device) for part in (self.pixels, self.labels, self.true, self.index)))

    def _with(self, pixels: Tensor, labels: Tensor, true: Tensor, index: Tensor) -> "ImageBatch":
        return ImageBatch(pixels, labels, true, index, self.n_positions, self.positions)


@dataclass(frozen=True)
class ImageLoss:
    """Summed cross-entropy of images, with labels drawn from the model's predictions or given.

    Args:
        image_shape: (C, H, W).
        n_classes: Of the model.
        positions: Which count in A, G and N: the class token's alone, as for the vision transformers of arXiv
            2510.24256, or all of them (K-FAC "expand"). Gradients at positions that do not count are dropped there;
            they still reach the layers below.
        labels: ``sampled`` draws a label for each image (true Fisher), keyed by seed, image and draw; ``gold`` takes
            those that the model was trained on.
        seed: Keys the draws.
        mc_samples: Draws of labels a forward pass; more than one needs ``sampled``.

    Raises:
        InputError: Unknown positions or labels, or several draws of gold labels.
    """

    image_shape: tuple[int, int, int]
    n_classes: int
    positions: Positions = "class"
    labels: LabelSource = "sampled"
    seed: int = 0
    mc_samples: int = 1

    def __post_init__(self) -> None:
        if self.positions not in ("class", "all"):
            raise InputError(f"positions is {self.positions!r}; choose class or all")
        if self.labels not in ("sampled", "gold"):
            raise InputError(f"labels is {self.labels!r}; choose sampled or gold")
        if self.mc_samples < 1 or (self.mc_samples > 1 and self.labels == "gold"):
            raise InputError(f"mc_samples is {self.mc_samples}: at least 1, and gold labels have one draw only")

    def draws(self, model: nn.Module, batch: ImageBatch, head_chunk: int | None) -> Iterator[Tensor]:
        """One loss for each draw of labels, all on one forward pass."""
        logits = model(pixel_values=batch.pixels).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        for draw in range(self.mc_samples):
            labels = self._labels(batch, logits.detach(), draw)
            yield F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")

    def _labels(self, batch: ImageBatch, logits: Tensor, draw: int) -> Tensor:
        if self.labels == "gold":
            return batch.labels
        first = torch.zeros(len(batch.index), 1, dtype=torch.long)
        drawn = sample_labels(logits, uniforms(self.seed, batch.index.cpu().clamp(min=0), first, draw)[:, 0])
        return drawn.masked_fill(batch.labels == IGNORED, IGNORED)

    def trial(self, positions: int, device: torch.device) -> ImageBatch:
        """A black image, which has the model's own number of positions."""
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return ImageBatch(torch.zeros(1, *self.image_shape, device=device), zero, zero, zero, positions)

    def head(
        self, model: nn.Module, layers: Mapping[str, Layer], device: torch.device, positions: int
    ) -> tuple[None, int]:
        """All logits at once: there are few."""
        return None, 4 * positions * self.n_classes
