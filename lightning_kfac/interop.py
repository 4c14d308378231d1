"""Readers for Kronecker factors that other tools have saved.

Every tool keeps sum or mean of a a^T and g g^T by layer. What differs is names, scale and count:

- ``original`` (github.com/goodfire-ai/memorization_kfac at 8d059db, ``data/collect_kfac_multilayer.py``):
  ``kfac_factors_blk_*.pt``, one file or a folder of them. ``blkN.gate|up|down`` -> {A, G, n_tokens}. Means
  over n_tokens positions (all but the last of each row, padding included), but g is the gradient of the
  loss AVERAGED over a batch: G is ours divided by the square of the positions in a batch.
- ``replication``: ``kfac_statistics.pt``, ``layer_N.gate_proj|up_proj|down_proj`` -> (A, G): means, no count.
- ``kronfluence`` (PyPI, 1.0.1, ``factor/covariance.py``, ``module/linear.py``): a factor folder with
  ``activation_covariance``, ``gradient_covariance`` and ``num_*_covariance_processed`` as safetensors, each
  module name -> tensor. Sums. Counts are positions that the task's attention mask keeps, not rows; the mask
  is laid on A, not on G. A layer with a bias has a row and a column of ones appended to its activations.
- ``bergson`` (github.com/EleutherAI/bergson 0.26.1 at 3c66bb5, ``hessians/kfac.py``): a run folder with
  ``activation_sharded/shard_R.safetensors`` and ``gradient_sharded/``, name inside the base model -> rows of
  rank R. Sums over all real positions but each row's last, counted in ``total_processed.pt``. Ones are
  appended under ``include_bias``. Its other methods use the same files: ``config.yaml`` says which it was.
"""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_kfac.config_files import check_yaml
from lightning_kfac.errors import InputError
from lightning_kfac.factors import KroneckerFactors

Kind = Literal["auto", "original", "replication", "kronfluence", "bergson"]
Layers = Iterator[tuple[str, KroneckerFactors]]

LAYOUTS = (
    "original: kfac_factors_blk_*.pt or a folder of them; replication: kfac_statistics.pt; kronfluence: a folder "
    "with activation_covariance.safetensors; bergson: a folder with activation_sharded/shard_0.safetensors"
)
KEYS = {
    "original": re.compile(r"blk(\d+)\.(gate|up|down)"),
    "replication": re.compile(r"layer_(\d+)\.(gate|up|down)_proj"),
}
# Largest |M - M^T| relative to the largest entry: sums of products in another order, by precision.
ASYMMETRY = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def read_foreign(
    path: str | Path,
    kind: Kind = "auto",
    n_tokens: int | None = None,
    layer_pattern: str = "model.layers.{block}.mlp.{projection}_proj",
) -> tuple[dict[str, KroneckerFactors], dict]:
    """Reads factors that another tool has saved. Nothing but tensors is ever unpickled.

    Args:
        path: File or folder, see the module's description.
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
    kind = _recognise(path) if kind == "auto" else kind
    describe = {"kronfluence": _kronfluence_notes, "bergson": _bergson_notes}.get(kind)
    notes = describe(path) if describe else NOTES[kind]
    factors: dict[str, KroneckerFactors] = {}
    shared: dict[tuple, Tensor] = {}
    for name, layer in READERS[kind](path, n_tokens, layer_pattern):
        if name in factors:
            raise InputError(f"{path}: {name} occurs twice; leave only one of the files in the folder")
        factors[name] = KroneckerFactors(_share(layer.A, shared), layer.G, layer.n_tokens)
    if not factors:
        raise InputError(f"{path}: holds no layer")
    return factors, {"imported_from": kind, "source": str(path), "notes": notes}


def _recognise(path: Path) -> str:
    """The kind of a file or folder, by names alone where they suffice."""
    if path.is_dir():
        if (path / "activation_covariance.safetensors").exists():
            return "kronfluence"
        if (path / "activation_sharded").is_dir():
            return "bergson"
        if any(path.glob("activation_covariance_data_partition*")):
            raise InputError(f"{path}: kronfluence's partitions; join them first with aggregate_covariance_matrices")
        for kind, pattern in (("original", "kfac_factors_blk_*.pt"), ("replication", "kfac_statistics.pt")):
            if any(path.glob(pattern)):
                return kind
    elif path.suffix in (".pt", ".pth"):
        keys = _load_dict(path)
        for kind, pattern in KEYS.items():
            if any(pattern.fullmatch(str(key)) for key in keys):
                return kind
    raise InputError(f"{path}: none of the known layouts ({LAYOUTS})")


# -- the four layouts --------------------------------------------------------------------------------------


def _read_original(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Means and counts by ``blkN.projection``; n_tokens must agree with the counts."""
    for file in sorted(path.glob("kfac_factors_blk_*.pt")) if path.is_dir() else [path]:
        for key, entry in _load_dict(file).items():
            name = _layer_name(file, key, "original", layer_pattern)
            if not isinstance(entry, dict) or not {"A", "G", "n_tokens"} <= set(entry):
                raise InputError(f"{file}: {key} is not a dict of A, G and n_tokens; collect it again")
            count = _count(entry["n_tokens"], f"{file}: {key}: n_tokens", n_tokens)
            yield name, _layer(entry["A"], entry["G"], f"{file}: {key}", 1, 1, count)


def _read_replication(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Means by ``layer_N.projection_proj``; the count is what the user says, or 0."""
    file = path / "kfac_statistics.pt" if path.is_dir() else path
    for key, entry in _load_dict(file).items():
        name = _layer_name(file, key, "replication", layer_pattern)
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise InputError(f"{file}: {key} is not a pair (A, G); collect it again")
        yield name, _layer(*entry, f"{file}: {key}", 1, 1, n_tokens or 0)


def _read_kronfluence(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Sums by module name, each with its own count; a bias coordinate is dropped."""
    files = {part: path / f"{part}_covariance.safetensors" for part in ("activation", "gradient")}
    counts = {part: path / f"num_{part}_covariance_processed.safetensors" for part in files}
    with _safetensors(files["activation"]) as file:
        names = list(file.keys())
    for name in names:
        count = {part: _count(_tensor(file, name), f"{file}: {name}") for part, file in counts.items()}
        A = _without_bias(_tensor(files["activation"], name), count["activation"])
        G = _tensor(files["gradient"], name)
        tokens = n_tokens or count["gradient"]
        yield name, _layer(A, G, f"{path}: {name}", count["activation"], tokens, tokens)


def _read_bergson(path: Path, n_tokens: int | None, layer_pattern: str) -> Layers:
    """Sums by name inside the base model, rows split over the shards, one count for all."""
    shards = {}
    for part in ("activation", "gradient"):
        found = len(list((path / f"{part}_sharded").glob("shard_*.safetensors")))
        shards[part] = [path / f"{part}_sharded" / f"shard_{rank}.safetensors" for rank in range(max(found, 1))]
    file = path / "total_processed.pt"
    if not file.exists() and n_tokens is None:
        raise InputError(f"{path}: has no total_processed.pt; the factors are sums, so give n_tokens")
    count = _count(_load(file), str(file), n_tokens) if file.exists() else n_tokens
    root = layer_pattern.partition("{block}")[0].rstrip(".").rpartition(".")[0]
    with _safetensors(shards["activation"][0]) as shard:
        keys = list(shard.keys())
    for key in keys:
        try:
            A, G = (torch.cat([_tensor(file, key) for file in files]) for files in shards.values())
        except (RuntimeError, TypeError):
            raise InputError(f"{path}: the shards of {key} do not fit together; is one of another run?") from None
        name = key if not root or key.startswith(f"{root}.") else f"{root}.{key}"
        yield name, _layer(_without_bias(A, count), G, f"{path}: {key}", count, count, count)


def _kronfluence_notes(path: Path) -> str:
    with _safetensors(path / "activation_covariance.safetensors") as file:
        empirical = (file.metadata() or {}).get("use_empirical_fisher")
    labels = {"True": "gold", "False": "sampled, if the task heeds `sample`"}.get(empirical, "unknown")
    return f"labels: {labels}; {NOTES['kronfluence']}"


def _bergson_notes(path: Path) -> str:
    """What the run's own settings say; refuses matrices of another method, which look the same."""
    file = path / "config.yaml"
    try:
        text = file.read_text("utf-8") if file.exists() else "steps: []"
        check_yaml(text, str(file))
        steps = yaml.safe_load(text)["steps"]
        commands = [c for step in steps for c in step.values() if isinstance(c, dict) and "hessian_cfg" in c]
        parts = [c.get(part) or {} for c in commands[-1:] for part in ("index_cfg", "hessian_cfg")]
        known = {key: value for part in parts for key, value in part.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise InputError(f"{file}: cannot be read; repair it or move it away") from None
    if known.get("method", "kfac") != "kfac":
        raise InputError(f"{file}: method {known['method']} gives no K-FAC factors; run bergson with method kfac")
    labels = {"True": "gold", "False": "sampled"}.get(str(known.get("use_dataset_labels")), "unknown")
    facts = {key: known.get(key, "unknown") for key in ("method", "loss_reduction")}
    return "; ".join([f"labels: {labels}", *(f"{key}: {value}" for key, value in facts.items()), NOTES["bergson"]])


READERS = dict(
    original=_read_original, replication=_read_replication, kronfluence=_read_kronfluence, bergson=_read_bergson
)
NOTES = {
    "original": "means as stored, but of gradients of a batch's mean loss: G is ours divided by the square of the "
    "positions in a batch, which the file does not tell; nor does it tell labels (gold or sampled), model or corpus",
    "replication": "taken as means; labels (gold or sampled), scale of the loss, token count, model and corpus are "
    "not in the file",
    "kronfluence": "sums divided by the positions that the task's attention mask kept (a row's last position has no "
    "loss but counts, unless that mask leaves it out); scale of the task's loss unknown, ours is the sum over tokens",
    "bergson": "sums divided by the number of real positions but the last of each row; loss_reduction mean would "
    "let short rows weigh more in G, ours is sum",
}


# -- checks ------------------------------------------------------------------------------------------------


def _layer(A: Any, G: Any, place: str, A_count: int, G_count: int, n_tokens: int) -> KroneckerFactors:
    return KroneckerFactors(_mean(A, A_count, f"{place}: A"), _mean(G, G_count, f"{place}: G"), n_tokens)


def _mean(matrix: Any, count: int, place: str) -> Tensor:
    """``matrix / count``, exactly symmetric, float32 [d, d]."""
    if not isinstance(matrix, Tensor) or matrix.layout != torch.strided or matrix.dtype not in ASYMMETRY:
        raise InputError(f"{place} is not a dense tensor of real numbers; collect it again")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{place} has shape {list(matrix.shape)}, it must be square; is a shard missing?")
    if matrix.untyped_storage().nbytes() < matrix.numel() * matrix.element_size():
        raise InputError(f"{place} claims {list(matrix.shape)} numbers and holds fewer; the file is damaged")
    tolerance = ASYMMETRY[matrix.dtype]
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    largest = matrix.abs().max()
    if not largest.isfinite():
        raise InputError(f"{place} has numbers that are not finite; collect it again")
    if (matrix - matrix.T).abs().max() > tolerance * largest or matrix.diagonal().min() < 0:
        raise InputError(f"{place} is not a second moment: not symmetric, or negative on the diagonal")
    return ((matrix + matrix.T) / (2 * count)).float()


def _without_bias(total: Tensor, count: int) -> Tensor:
    """Drops the last row and column if they belong to a column of ones: its square sums to the count.

    Below 2^24 the sum is exact. Above, or in bfloat16, it is not: then an odd size has to support it, since
    layers are of even width as a rule. A wrong guess is found out by the editor, which compares shapes.
    """
    if total.ndim != 2 or len(total) < 2 or total.shape[0] != total.shape[1]:
        return total
    tolerance = 1e-2 if len(total) % 2 else 1e-6
    return total[:-1, :-1] if abs(total[-1, -1].item() - count) <= tolerance * count else total


def _count(value: Any, place: str, expected: int | None = None) -> int:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, int) or number <= 0:
        raise InputError(f"{place}: the token count must be a positive whole number")
    if expected not in (None, number):
        raise InputError(f"{place} is {number}, not {expected}; leave n_tokens out")
    return number


def _layer_name(file: Path, key: Any, kind: str, layer_pattern: str) -> str:
    found = KEYS[kind].fullmatch(str(key))
    if not found:
        raise InputError(f"{file}: key {key!r} is not one of the {kind} layout ({KEYS[kind].pattern})")
    return layer_pattern.replace("{block}", found[1]).replace("{projection}", found[2])


def _share(A: Tensor, seen: dict[tuple, Tensor]) -> Tensor:
    """The first tensor equal to A, so that ``save_factors`` stores it once."""
    first = seen.setdefault((len(A), A[0].sum().item(), A.diagonal().sum().item()), A)
    return first if torch.equal(first, A) else A


# -- files -------------------------------------------------------------------------------------------------


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        what = type(error).__name__
        raise InputError(f"{path}: cannot be read ({what}); it is damaged or holds more than tensors") from None


def _load_dict(path: Path) -> dict:
    contents = _load(path)
    if not isinstance(contents, dict):
        raise InputError(f"{path}: holds a {type(contents).__name__}, not a dict of layers")
    return contents


def _tensor(path: Path, key: str) -> Tensor:
    with _safetensors(path) as file:
        return file.get_tensor(key)


@contextmanager
def _safetensors(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); is it complete?") from None
