"""Factors that bergson has saved (github.com/EleutherAI/bergson 0.26.1 at 3c66bb5, ``hessians/kfac.py``).

A run folder with ``activation_sharded/shard_R.safetensors`` and ``gradient_sharded/``, name inside the base model ->
rows of rank R. Sums over all real positions but each row's last, counted in ``total_processed.pt``. Ones are appended
under ``include_bias``. Its other methods use the same files: ``config.yaml`` says which it was.
"""

from pathlib import Path

import torch

from lightning_kfac.errors import InputError
from lightning_kfac.factors.foreign.checks import (
    Layers,
    checked_count,
    factors_of,
    load_pickled,
    open_safetensors,
    read_tensor,
    without_bias,
)
from lightning_kfac.storage.yaml_files import read_yaml

NOTE = (
    "sums divided by the number of real positions but the last of each row; loss_reduction mean would "
    "let short rows weigh more in G, ours is sum"
)


def read(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Sums by name inside the base model, rows split over the shards, one count for all."""
    shards = {}
    for part in ("activation", "gradient"):
        found = len(list((path / f"{part}_sharded").glob("shard_*.safetensors")))
        shards[part] = [path / f"{part}_sharded" / f"shard_{rank}.safetensors" for rank in range(max(found, 1))]
    file = path / "total_processed.pt"
    if file.exists():
        count = checked_count(load_pickled(file), str(file), n_tokens)
    elif n_tokens is not None:
        count = n_tokens
    else:
        raise InputError(f"{path}: has no total_processed.pt; the factors are sums, so give n_tokens")
    root = layer_pattern.partition("{block}")[0].rstrip(".").rpartition(".")[0]
    with open_safetensors(shards["activation"][0]) as shard:
        keys = list(shard.keys())
    for key in keys:
        try:
            A, G = (torch.cat([read_tensor(file, key) for file in files]) for files in shards.values())
        except (RuntimeError, TypeError):
            raise InputError(f"{path}: the shards of {key} do not fit together; is one of another run?") from None
        name = key if not root or key.startswith(f"{root}.") else f"{root}.{key}"
        yield name, factors_of(without_bias(A, count), G, f"{path}: {key}", count, count, count)


def notes(path: Path) -> str:
    """What the run's own settings say; refuses matrices of another method, which look the same."""
    file = path / "config.yaml"
    try:
        steps = read_yaml(file)["steps"] if file.exists() else []
        commands = [c for step in steps for c in step.values() if isinstance(c, dict) and "hessian_cfg" in c]
        parts = [c.get(part) or {} for c in commands[-1:] for part in ("index_cfg", "hessian_cfg")]
        known = {key: value for part in parts for key, value in part.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file}: cannot be read; repair it or move it away") from None
    if known.get("method", "kfac") != "kfac":
        raise InputError(f"{file}: method {known['method']} gives no K-FAC factors; run bergson with method kfac")
    labels = {"True": "gold", "False": "sampled"}.get(str(known.get("use_dataset_labels")), "unknown")
    facts = {key: known.get(key, "unknown") for key in ("method", "loss_reduction")}
    return "; ".join([f"labels: {labels}", *(f"{key}: {value}" for key, value in facts.items()), NOTE])
