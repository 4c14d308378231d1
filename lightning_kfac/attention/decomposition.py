"""Attention as its strongest value vector and the rest.

For a head at query position t: p = softmax(q k^T * scale + mask), Attn = sum_i p_i v_i, i* = argmax_i p_i.
The ground state is V_{i*}, the residual (excitation) is eps = Attn - V_{i*}; their sum is exact.

Shapes: B rows, H query heads, K key-value heads (H is a multiple of K), T query and S key positions, d the width of
a head. Outputs of attention are [B, T, H, d], as in the attention interface of transformers.
"""

import torch
from torch import Tensor


def ground_state(probabilities: Tensor, values: Tensor) -> Tensor:
    """V_{i*}, the value vector of the key with the largest probability; ties go to the lowest index.

    Args:
        probabilities: [B, H, T, S].
        values: [B, K, S, d]; each is shared by H / K query heads in turn (grouped-query attention).

    Returns:
        [B, T, H, d] in the dtype of ``values``.

    Example:
        >>> ground_state(torch.tensor([[[[0.2, 0.4, 0.4]]]]), torch.tensor([[[[1.0], [2.0], [3.0]]]])).item()
        2.0
    """
    heads = probabilities.shape[1]
    width = values.shape[-1]
    strongest = probabilities.argmax(-1)  # documented to give the first of equals
    values = values.repeat_interleave(heads // values.shape[1], dim=1)
    return values.gather(2, strongest[..., None].expand(-1, -1, -1, width)).transpose(1, 2)


def decompose(output: Tensor, probabilities: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ground state and residual of an attention output.

    Args:
        output: [B, T, H, d], sum_i p_i v_i.
        probabilities, values: As for ``ground_state``.

    Returns:
        V_{i*} and eps, both [B, T, H, d], in float32 or the wider dtype of ``output``.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    ground = ground_state(probabilities, values).to(wide)
    return ground, output.to(wide) - ground


def project(residual: Tensor, directions: Tensor) -> Tensor:
    """P P^T eps of every head.

    Args:
        residual: [..., H, d].
        directions: P [H, d, r], orthonormal columns; r = 0 gives zeros.

    Returns:
        [..., H, d] in the dtype of ``residual``.
    """
    directions = directions.to(residual)
    coordinates = torch.einsum("...hd,hdr->...hr", residual, directions)
    return torch.einsum("...hr,hdr->...hd", coordinates, directions)


def sharpness(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """How far attention is from a hard choice.

    Args:
        probabilities: [..., S].

    Returns:
        Entropy in nats and the largest probability, both float32 or wider [...].

    Example:
        >>> [round(x.item(), 4) for x in sharpness(torch.tensor([0.5, 0.5, 0.0]))]
        [0.6931, 0.5]
    """
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    return torch.special.entr(wide).sum(-1), wide.amax(-1)
