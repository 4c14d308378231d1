"""Writing factors that are spread over ranks."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.factors.folder import save_factors, stored_matrices
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.covariance import pack_upper


def save_sharded(
    factors: Mapping[str, KroneckerFactors],
    path: Path,
    metadata: Mapping,
    ranks: Ranks,
    owners: Mapping[str, int],
) -> None:
    """``save_factors`` of factors that are spread over ranks: rank 0 writes, and gets one matrix at a time.

    All ranks must call it.

    Args:
        factors: On every rank, with values where it owns the layer.
        owners: The rank of each layer.
    """

    def packed(name: str, matrix: Tensor) -> Tensor | None:
        owner, size = owners[name], len(matrix)
        if owner == 0:
            return pack_upper(matrix.float()) if ranks.rank == 0 else None
        if ranks.rank == owner:
            ranks.send(pack_upper(matrix.float()), 0)
        elif ranks.rank == 0:
            return ranks.receive(size * (size + 1) // 2, owner)
        return None

    if ranks.rank == 0:
        save_factors(factors, path, metadata, packed)
        return
    for name, matrices in stored_matrices(factors):
        for matrix in matrices.values():
            packed(name, matrix)
