"""Factors that kronfluence has saved (PyPI, 1.0.1, ``factor/covariance.py``, ``module/linear.py``).

A folder with ``activation_covariance``, ``gradient_covariance`` and ``num_*_covariance_processed`` as safetensors,
each module name -> tensor. Sums. Counts are positions that the task's attention mask keeps, not rows; the mask is
laid on A, not on G. A layer with a bias has a row and a column of ones appended to its activations.
"""

from pathlib import Path

from lightning_kfac.factors.foreign.checks import (
    Layers,
    checked_count,
    factors_of,
    open_safetensors,
    read_tensor,
    without_bias,
)

NOTE = (
    "sums divided by the positions that the task's attention mask kept (a row's last position has no "
    "loss but counts, unless that mask leaves it out); scale of the task's loss unknown, ours is the sum over tokens"
)


def read(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Sums by module name, each with its own count; a bias coordinate is dropped."""
    files = {part: path / f"{part}_covariance.safetensors" for part in ("activation", "gradient")}
    counts = {part: path / f"num_{part}_covariance_processed.safetensors" for part in files}
    with open_safetensors(files["activation"]) as file:
        names = list(file.keys())
    for name in names:
        count = {part: checked_count(read_tensor(file, name), f"{file}: {name}") for part, file in counts.items()}
        A = without_bias(read_tensor(files["activation"], name), count["activation"])
        G = read_tensor(files["gradient"], name)
        tokens = n_tokens or count["gradient"]
        yield name, factors_of(A, G, f"{path}: {name}", count["activation"], tokens, tokens)


def notes(path: Path) -> str:
    """What the files leave open."""
    with open_safetensors(path / "activation_covariance.safetensors") as file:
        empirical = (file.metadata() or {}).get("use_empirical_fisher")
    labels = {"True": "gold", "False": "sampled, if the task heeds `sample`"}.get(str(empirical), "unknown")
    return f"labels: {labels}; {NOTE}"
