"""What recites: the gradient of the margins of a forget set."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.math.loss import IGNORED
from lightning_kfac.math.unlearning import margins
from lightning_kfac.models.language import language_model
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.tokens import TokenBatch, parts_of, right_padded


def margin_gradients(
    model: nn.Module, layers: Mapping[str, Layer], sequences: Sequence[MemorizedSequence], batch_size: int = 16
) -> dict[str, Tensor]:
    """M = sum over the suffix tokens of d m_t / d W of each layer, m_t the logit of the token less the largest other.

    The model is left as it is, also which of its parameters require a gradient.

    Args:
        model: The model.
        layers: Of this model, by name.
        sequences: The forget set; of one without a prefix the first token does not count.
        batch_size: Sequences at once.

    Returns:
        [d_out, d_in] each, in float32 or wider.
    """
    inner = language_model(model)
    parameters = list(dict.fromkeys(layer.parameter for layer in layers.values()))
    required = {parameter: parameter.requires_grad for parameter in inner.parameters()}
    wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
    sums = [torch.zeros(p.shape, dtype=d, device=p.device) for p, d in zip(parameters, wide, strict=True)]
    try:
        inner.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for start in range(0, len(sequences), batch_size):
            for part in parts_of(inner, _batch(sequences[start : start + batch_size]), batch_size):
                part = part.to(parameters[0].device)
                found = torch.autograd.grad(margins(part.logits(inner), part.targets).sum(), parameters)
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
    finally:
        for parameter, needed in required.items():
            parameter.requires_grad_(needed)
    by_parameter = dict(zip(parameters, sums, strict=True))
    return {name: layer.matrix(by_parameter[layer.parameter]) for name, layer in layers.items()}


def _batch(sequences: Sequence[MemorizedSequence]) -> TokenBatch:
    ids, real = right_padded([[*s.prefix, *s.suffix] for s in sequences], torch.device("cpu"))
    labels = ids.masked_fill(~real, IGNORED)
    for row, sequence in zip(labels, sequences, strict=True):
        row[: len(sequence.prefix)] = IGNORED
    return TokenBatch.from_dict({"input_ids": ids, "attention_mask": real.long(), "labels": labels})
