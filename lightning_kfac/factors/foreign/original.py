"""Factors that the paper's own scripts or a replication have saved.

- ``original`` (github.com/goodfire-ai/memorization_kfac at 8d059db, ``data/collect_kfac_multilayer.py``):
  ``kfac_factors_blk_*.pt``, one file or a folder of them. ``blkN.gate|up|down`` -> {A, G, n_tokens}. Means
  over n_tokens positions (all but the last of each row, padding included), but g is the gradient of the
  loss AVERAGED over a batch: G is ours divided by the square of the positions in a batch.
- ``replication``: ``kfac_statistics.pt``, ``layer_N.gate_proj|up_proj|down_proj`` -> (A, G): means, no count.
"""

import re
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.factors.foreign.checks import Layers, checked_count, factors_of, load_dict

KEYS = {
    "original": re.compile(r"blk(\d+)\.(gate|up|down)"),
    "replication": re.compile(r"layer_(\d+)\.(gate|up|down)_proj"),
}
ORIGINAL_NOTE = (
    "means as stored, but of gradients of a batch's mean loss: G is ours divided by the square of the "
    "positions in a batch, which the file does not tell; nor does it tell labels (gold or sampled), model or corpus"
)
REPLICATION_NOTE = (
    "taken as means; labels (gold or sampled), scale of the loss, token count, model and corpus are not in the file"
)


def read_original(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Means and counts by ``blkN.projection``; n_tokens must agree with the counts."""
    for file in sorted(path.glob("kfac_factors_blk_*.pt")) if path.is_dir() else [path]:
        for key, entry in load_dict(file).items():
            name = _layer_name(file, key, "original", layer_pattern)
            if not isinstance(entry, dict) or not {"A", "G", "n_tokens"} <= set(entry):
                raise InputError(f"{file}: {key} is not a dict of A, G and n_tokens; collect it again")
            count = checked_count(entry["n_tokens"], f"{file}: {key}: n_tokens", n_tokens)
            yield name, factors_of(entry["A"], entry["G"], f"{file}: {key}", 1, 1, count)


def read_replication(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Means by ``layer_N.projection_proj``; the count is what the user says, or 0."""
    file = path / "kfac_statistics.pt" if path.is_dir() else path
    for key, entry in load_dict(file).items():
        name = _layer_name(file, key, "replication", layer_pattern)
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise InputError(f"{file}: {key} is not a pair (A, G); collect it again")
        A, G = entry
        yield name, factors_of(A, G, f"{file}: {key}", 1, 1, n_tokens or 0)


def _layer_name(file: Path, key: Any, kind: str, layer_pattern: str) -> str:
    found = KEYS[kind].fullmatch(str(key))
    if not found:
        raise InputError(f"{file}: key {key!r} is not one of the {kind} layout ({KEYS[kind].pattern})")
    return layer_pattern.replace("{block}", found[1]).replace("{projection}", found[2])


def original_notes(path: Path) -> str:
    """What the files leave open."""
    return ORIGINAL_NOTE


def replication_notes(path: Path) -> str:
    """What the file leaves open."""
    return REPLICATION_NOTE
