"""Collecting curvature without a Trainer: the engine of the callback, for a notebook."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightning_kfac.batch import TokenBatch
from lightning_kfac.capture import CurvatureCapture
from lightning_kfac.errors import InputError
from lightning_kfac.factors import KroneckerFactors
from lightning_kfac.targets import Blocks, resolve_targets


def collect_factors(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    blocks: Blocks = "all",
    projections: Sequence[str] = ("gate", "up", "down"),
    modules: Sequence[str] | None = None,
    labels: str = "sampled",
    seed: int = 0,
) -> dict[str, KroneckerFactors]:
    """Collects the Kronecker factors of a causal language model.

    The model is used in eval mode and without trainable parameters, and left as it was found.

    Args:
        model: A Hugging Face causal language model, float32 or bfloat16.
        batches: Dicts with ``input_ids`` [B, T] and optionally ``attention_mask`` [B, T], ``labels``
            [B, T] (Hugging Face convention; -100 is ignored) and ``sample_index`` [B].
        blocks: Block indices (negative from the end) or ``all``.
        projections: Any of gate, up, down, q, k, v, o.
        modules: Instead of both: regular expressions on dotted names.
        labels: ``sampled`` (true Fisher) or ``gold`` (empirical Fisher).
        seed: Keys the sampled labels.

    Returns:
        Factors by dotted layer name. They do not depend on how rows are batched or padded.

    Raises:
        InputError: A target does not exist, no token is valid, or a value is not finite.

    Example:
        >>> from lightning_kfac.loading import load_model
        >>> model = load_model("demo")
        >>> rows = torch.arange(1, 65).view(2, 32)
        >>> factors = collect_factors(model, [{"input_ids": rows}], blocks=[3], projections=["up"])
        >>> {name: (f.shape, f.n_tokens) for name, f in factors.items()}
        {'model.layers.3.mlp.up_proj': ((512, 128), 62)}
    """
    if labels not in ("sampled", "gold"):
        raise InputError(f"labels is {labels!r}; choose sampled or gold")
    layers = resolve_targets(model, blocks, projections, modules)
    device = next(model.parameters()).device
    was_training = {module: module.training for module in model.modules()}
    required_grad = {p: p.requires_grad for p in model.parameters()}
    rows = 0
    try:
        model.eval().requires_grad_(False)
        with torch.enable_grad(), CurvatureCapture(layers) as capture:
            for number, batch in enumerate(batches):
                moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
                tokens = TokenBatch.from_dict(moved, first_index=rows)
                rows += len(tokens.input_ids)
                capture.valid = tokens.valid
                loss = tokens.fisher_loss(model, labels, seed)
                loss.backward()
                capture.check_finite(loss, f"batch {number}")
            return capture.factors()
    finally:
        for module, mode in was_training.items():
            module.training = mode
        for parameter, flag in required_grad.items():
            parameter.requires_grad_(flag)
