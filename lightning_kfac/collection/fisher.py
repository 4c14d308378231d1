"""The objective of a causal language model: its loss on a batch of tokens, and how its logits are cut."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfac.errors import InputError
from lightning_kfac.math.loss import AT_ONCE, IGNORED, sample_labels, uniforms
from lightning_kfac.models.head import HeadLoss, Labels
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.manner import manner_of
from lightning_kfac.models.probes import is_plain_head
from lightning_kfac.models.tokens import TokenBatch, trial_batch

LabelSource = Literal["sampled", "gold"]

HEAD_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# One logit of a slice that exists at once: at most float32.
BYTES_OF_LOGIT = 4
# The same while labels are drawn from it: in float32, and three times in float64.
BYTES_PER_LOGIT = 28


@dataclass(frozen=True)
class FisherLoss:
    """Summed token cross-entropy with sampled or gold labels.

    Args:
        labels: ``sampled`` draws them from the model's own predictions (true Fisher); ``gold`` takes
            the corpus (empirical Fisher).
        seed: Keys the draws.
        mc_samples: Draws of labels a forward pass; more than one needs ``sampled``.

    Raises:
        InputError: An unknown kind of labels, or several draws of gold labels.
    """

    labels: LabelSource = "sampled"
    seed: int = 0
    mc_samples: int = 1

    def __post_init__(self) -> None:
        if self.labels not in ("sampled", "gold"):
            raise InputError(f"labels is {self.labels!r}; choose sampled or gold")
        if self.mc_samples < 1 or (self.mc_samples > 1 and self.labels == "gold"):
            raise InputError(f"mc_samples is {self.mc_samples}: at least 1, and gold labels have one draw only")

    def prepare(self, batch: Mapping[str, Any], first_index: int = 0) -> TokenBatch:
        """A batch on the CPU with the numbers that draw its labels, so that no device waits for them.

        Args:
            batch: As ``TokenBatch.from_dict`` reads it.
            first_index: Number of its first row, where it does not say.
        """
        tokens = TokenBatch.from_dict(batch, first_index)
        if self.labels == "gold":
            return tokens
        index = tokens.sample_index
        positions = tokens.position_ids
        u = torch.stack([uniforms(self.seed, index, positions, draw) for draw in range(self.mc_samples)], dim=1)
        return replace(tokens, uniforms=u)

    def draws(self, model: nn.Module, batch: TokenBatch, head_chunk: int | None) -> Iterator[Tensor]:
        """One loss for each draw of labels, all on one forward pass: scalar tensors to differentiate.

        Args:
            batch: As ``prepare`` made it.
            head_chunk: Tokens whose logits exist at once; None takes the logits from the model whole.
        """
        targets = batch.targets.flatten()
        if head_chunk is None:
            logits = model(**batch.model_inputs(model)).logits.flatten(0, 1)
        else:
            hidden = language_model(model).base_model(**batch.model_inputs(model)).last_hidden_state.flatten(0, 1)
        for draw in range(self.mc_samples):
            labels = self._labels(batch, targets, draw)
            if head_chunk is None:
                wide = logits if logits.dtype == torch.float64 else logits.float()
                drawn = labels(logits.detach(), slice(None))
                yield F.cross_entropy(wide, drawn, ignore_index=IGNORED, reduction="sum")
            else:
                yield HeadLoss.apply(hidden, language_model(model).get_output_embeddings(), labels, head_chunk)

    def _labels(self, tokens: TokenBatch, targets: Tensor, draw: int) -> Labels:
        if self.labels == "gold":
            return lambda logits, part: targets[part]
        if tokens.uniforms is None:
            raise RuntimeError("the batch has no numbers that draw its labels: give it to prepare first")
        u = tokens.uniforms[:, draw].flatten()
        ignored = targets == IGNORED
        return lambda logits, part: sample_labels(logits, u[part]).masked_fill(ignored[part], IGNORED)

    def trial(self, positions: int, device: torch.device) -> TokenBatch:
        """A row of token 0."""
        return self.prepare(trial_batch(positions)).to(device)

    def head(
        self, model: nn.Module, layers: Mapping[str, Layer], device: torch.device, positions: int
    ) -> tuple[int | None, int]:
        """Tokens whose logits exist at once, and their bytes; None, all of them, where the model must make them."""
        manner_of(model)  # tried out while nothing listens to the layers
        head = language_model(model).get_output_embeddings()
        vocabulary = head.weight.shape[0]
        if any(layer.module is head for layer in layers.values()) or not is_plain_head(model):
            return None, positions * vocabulary * BYTES_PER_LOGIT
        return slice_of_logits(device.type, vocabulary, positions)


def slice_of_logits(kind: str, vocabulary: int, positions: int) -> tuple[int, int]:
    """Tokens of a batch whose logits exist at once, and the bytes that these take.

    Args:
        kind: Of the device: ``cpu`` or ``cuda``.
        vocabulary: Logits of a token.
        positions: Tokens of the batch.
    """
    most = HEAD_BYTES.get(kind, HEAD_BYTES["cuda"]) // (vocabulary * BYTES_OF_LOGIT)
    chunk = max(1, min(positions, most))
    drawn = min(chunk * vocabulary, max(vocabulary, AT_ONCE.get(kind, AT_ONCE["cuda"])))
    return chunk, chunk * vocabulary * BYTES_OF_LOGIT + drawn * BYTES_PER_LOGIT
