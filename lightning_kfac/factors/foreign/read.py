"""Reading Kronecker factors that other tools have saved.

Every tool keeps sum or mean of a a^T and g g^T by layer. What differs is names, scale and count: one module a tool
says how its files look.
"""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.foreign import bergson, kronfluence, original
from lightning_kfac.factors.foreign.checks import load_dict
from lightning_kfac.factors.kronecker import KroneckerFactors

Kind = Literal["auto", "original", "replication", "kronfluence", "bergson"]

PARTITIONS = "partitions"
# What a folder of each kind holds, the surest signs first.
FILES = {
    "kronfluence": "activation_covariance.safetensors",
    "bergson": "activation_sharded",
    PARTITIONS: "activation_covariance_data_partition*",
    "original": "kfac_factors_blk_*.pt",
    "replication": "kfac_statistics.pt",
}
LAYOUTS = (
    "original: kfac_factors_blk_*.pt or a folder of them; replication: kfac_statistics.pt; kronfluence: a folder "
    "with activation_covariance.safetensors; bergson: a folder with activation_sharded/shard_0.safetensors"
)


def read_foreign(
    path: str | Path,
    kind: Kind = "auto",
    n_tokens: int | None = None,
    layer_pattern: str = "model.layers.{block}.mlp.{projection}_proj",
) -> tuple[dict[str, KroneckerFactors], dict[str, Any]]:
    """Reads factors that another tool has saved. Nothing but tensors is ever unpickled.

    Args:
        path: File or folder, see the tool's module.
        kind: Which tool; ``auto`` recognises it by its files.
        n_tokens: Number of positions with a loss, where the files do not tell. For kronfluence: divides G
            instead of the stored count, which includes positions without a loss (the last of each row).
        layer_pattern: Dotted name of a layer, with ``{block}`` and ``{projection}`` (gate, up, down). What
            stands before the list of blocks is put before bergson's names, which lack it.

    Returns:
        Factors by dotted layer name (layers with equal A share one tensor), and metadata for
        ``save_factors``: ``imported_from``, ``source``, and ``notes`` on what the files leave open.

    Raises:
        InputError: Unknown layout, a file that is damaged or holds more than tensors, a matrix that is not
            square, symmetric and finite, a count that is missing or contradicts ``n_tokens``.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/kfac_statistics.pt"
        >>> torch.save({"layer_5.gate_proj": (torch.eye(3), torch.eye(2))}, path)
        >>> factors, metadata = read_foreign(path, n_tokens=1000)
        >>> {name: (f.shape, f.n_tokens) for name, f in factors.items()}, metadata["imported_from"]
        ({'model.layers.5.mlp.gate_proj': ((2, 3), 1000)}, 'replication')
    """
    path = Path(path)
    if kind not in ("auto", *READERS):
        raise InputError(f"kind is {kind!r}; choose auto, {', '.join(READERS)}")
    if n_tokens is not None and n_tokens <= 0:
        raise InputError(f"n_tokens is {n_tokens}; it must be positive")
    if not {"{block}", "{projection}"} <= set(re.findall(r"\{\w*\}", layer_pattern)):
        raise InputError(f"layer_pattern: {layer_pattern!r} lacks {{block}} or {{projection}}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = _recognise(path) if kind == "auto" else kind
    notes = NOTES[found](path)
    factors: dict[str, KroneckerFactors] = {}
    shared: dict[tuple[int, float, float], Tensor] = {}
    for name, layer in READERS[found](path, n_tokens, layer_pattern):
        if name in factors:
            raise InputError(f"{path}: {name} occurs twice; leave only one of the files in the folder")
        factors[name] = KroneckerFactors(_share(layer.A, shared), layer.G, layer.n_tokens)
    if not factors:
        raise InputError(f"{path}: holds no layer")
    return factors, {"imported_from": found, "source": str(path), "notes": notes}


def _recognise(path: Path) -> str:
    """The kind of a file or folder, by names alone where they suffice."""
    found = None
    if path.is_dir():
        found = next((kind for kind, files in FILES.items() if any(path.glob(files))), None)
    elif path.suffix in (".pt", ".pth"):
        keys = [str(key) for key in load_dict(path)]
        found = next((kind for kind, pattern in original.KEYS.items() if any(map(pattern.fullmatch, keys))), None)
    if found == PARTITIONS:
        raise InputError(f"{path}: kronfluence's partitions; join them first with aggregate_covariance_matrices")
    if found is None:
        raise InputError(f"{path}: none of the known layouts ({LAYOUTS})")
    return found


READERS = {
    "original": original.read_original,
    "replication": original.read_replication,
    "kronfluence": kronfluence.read,
    "bergson": bergson.read,
}
NOTES = {
    "original": original.original_notes,
    "replication": original.replication_notes,
    "kronfluence": kronfluence.notes,
    "bergson": bergson.notes,
}


def _share(A: Tensor, seen: dict[tuple[int, float, float], Tensor]) -> Tensor:
    """The first tensor equal to A, so that ``save_factors`` stores it once."""
    first = seen.setdefault((len(A), A[0].sum().item(), A.diagonal().sum().item()), A)
    return first if torch.equal(first, A) else A
