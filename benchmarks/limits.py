"""The least arithmetic that a collection can do, and the rate at which this machine multiplies matrices."""

from collections.abc import Callable

import torch

PRODUCT_SIZE = 2048


def least_flops_per_token(config, lowest_block: int, seq_len: int, blocks: list[int], projections: tuple) -> dict:
    """FLOPs a token of each part, for a model of the OLMo-2 or Llama family with full attention heads.

    Forward through everything; backward (activation gradients only) from the head down to the lowest
    tracked outputs; one triangle of each covariance product; gate and up share one A.
    """
    d, f, n, v = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    attention = 2 * 2 * d * (seq_len / 2)  # causal: each token sees half of the others; scores and mixing
    block = 2 * (4 * d * d + 3 * d * f) + attention
    above = n - 1 - lowest_block
    # In the lowest block the gradient ends at its lowest tracked output, below which nothing is needed.
    within = 2 * d * f if {"gate", "up"} & set(projections) else 0
    sizes = {"gate": f, "up": f, "down": d}
    covariance = sum(sizes[p] ** 2 for p in projections)
    covariance += d * d * bool({"gate", "up"} & set(projections)) + f * f * ("down" in projections)
    return {
        "forward": n * block + 2 * d * v,
        "backward": above * (block + attention) + within + 2 * d * v,
        "covariance": len(blocks) * covariance,
    }


def product(dtype: torch.dtype, size: int = PRODUCT_SIZE) -> Callable[[], torch.Tensor]:
    """A square matrix product of 2 size^3 FLOPs, to be timed."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: a @ b
