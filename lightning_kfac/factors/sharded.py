"""Writing factors that are spread over ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.factors.folder import pack_matrix, save_factors, stored_matrices
from lightning_kfac.factors.kronecker import KroneckerFactors


def save_sharded(
    factors: Mapping[str, KroneckerFactors],
    path: Path,
    metadata: Mapping[str, Any],
    ranks: Ranks,
    owners: Mapping[str, int],
) -> None:
    """``save_factors`` of factors that are spread over ranks: rank 0 writes, and gets one matrix at a time.

    All ranks must call it.

    Args:
        factors: On every rank, with values where it owns the layer.
        owners: The rank of each layer.
    """

    def packed(name: str, matrix: Tensor) -> Tensor:
        if owners[name] == 0:
            return pack_matrix(name, matrix)
        return ranks.receive(len(matrix) * (len(matrix) + 1) // 2, owners[name])

    if ranks.rank == 0:
        save_factors(factors, path, metadata, packed)
        return
    for name, matrices in stored_matrices(factors):
        if owners[name] == ranks.rank:
            for matrix in matrices.values():
                ranks.send(pack_matrix(name, matrix), 0)
