"""Kronecker factors, and the folder they are kept in.

A folder holds ``metadata.json`` and one safetensors file a layer. Only upper triangles are stored; an
A that several layers share is stored once, and metadata says where. Metadata knows the checksum of every file,
and its own. Folders with coupled factors are of format 2, which version 0.1 refuses; all others are of format 1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.covariance import pack_upper, unpack_upper
from lightning_kfac.storage.files import content_hash, new_folder, settle
from lightning_kfac.storage.hub import local_folder
from lightning_kfac.storage.json_files import file_name, read_json, write_json
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

FORMAT = 1
FORMAT_COUPLED = 2
COUPLED = ("A_coupled", "G_coupled")
METADATA = "metadata.json"
ADVICE = "collect the factors again"
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class FactorFolder(Mapping[str, KroneckerFactors]):
    """Factors on disk, read layer by layer when asked for; a file is verified when it is read first.

    Attributes:
        path: The folder.
        metadata: Contents of ``metadata.json``.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def __getitem__(self, name: str) -> KroneckerFactors:
        entry = self.metadata["layers"][name]
        sizes = {"A": entry["d_in"], "G": entry["d_out"]}
        found = {side: self._triangle(entry[side], sizes[side[0]]) for side in stored_sides(entry)}
        return KroneckerFactors(n_tokens=entry["n_tokens"], **found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.metadata["layers"])

    def __len__(self) -> int:
        return len(self.metadata["layers"])

    def layer_shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of a layer, from the metadata."""
        entry = self.metadata["layers"][name]
        return entry["d_out"], entry["d_in"]

    def content(self) -> str:
        """Identifies what is in the folder: factors, moments and metadata."""
        return content_hash([self.path / METADATA, *sorted(p for p in self.path.rglob("layer_*.safetensors"))])

    def shared_A(self, name: str) -> str:
        """Identifies the A of a layer; layers that share it have the same."""
        return self.metadata["layers"][name]["A"]

    def _triangle(self, place: str, size: int) -> Tensor:
        file, _, key = place.partition(":")
        path = self.path / file
        shape = (size * (size + 1) // 2,)
        known = next((e.get("checksum") for e in self.metadata["layers"].values() if e["G"] == f"{file}:G"), None)
        packed = load_tensors(path, ADVICE, {key: shape}, known, verify=file not in self._verified)[key]
        if packed.dtype != torch.float32:
            raise InputError(f"{path}: damaged or incomplete: {key} is {packed.dtype}, not torch.float32; {ADVICE}")
        self._verified.add(file)
        return unpack_upper(packed, size)


def stored_sides(entry: Mapping[str, Any]) -> list[str]:
    """Which matrices there are of a layer, from its metadata."""
    return [side for side in ("A", "G", *COUPLED) if side in entry]


def pack_matrix(name: str, matrix: Tensor) -> Tensor:
    """What is stored of a symmetric matrix: its upper triangle, float32."""
    return pack_upper(matrix.float())


def save_factors(
    factors: Mapping[str, KroneckerFactors],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    pack: Callable[[str, Tensor], Tensor] = pack_matrix,
) -> None:
    """Writes factors to a folder, which appears under its name only when it is complete.

    Args:
        factors: By dotted layer name.
        path: The folder; an older one of this name is replaced.
        metadata: Further fields for ``metadata.json``.
        pack: Gives the triangle of a layer's matrix, which may have to be fetched from elsewhere.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> save_factors({"fc": KroneckerFactors(torch.eye(3), torch.eye(2), 10)}, f"{folder}/factors")
        >>> load_factors(f"{folder}/factors")["fc"].n_tokens
        10
    """
    with new_folder(path) as partial:
        _write(factors, partial, metadata, pack)


def stored_matrices(factors: Mapping[str, KroneckerFactors]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is stored of each layer, in this order: its G, and its A unless it is that of a layer before."""
    seen = set()
    for name, layer in factors.items():
        yield name, {side: m for side, m in layer.matrices.items() if side != "A" or id(layer.A) not in seen}
        seen.add(id(layer.A))


def _write(
    factors: Mapping[str, KroneckerFactors],
    partial: Path,
    metadata: Mapping[str, Any] | None,
    pack: Callable[[str, Tensor], Tensor],
) -> None:
    places: dict[int, str] = {}
    layers = {}
    for number, (name, matrices) in enumerate(stored_matrices(factors)):
        layer = factors[name]
        file = f"layer_{number:04d}.safetensors"
        places.setdefault(id(layer.A), f"{file}:A")
        tensors = {side: pack(name, matrix) for side, matrix in matrices.items()}
        checksum = save_tensors(tensors, partial / file, {"layer": name})
        d_out, d_in = layer.shape
        layers[name] = {
            "A": places[id(layer.A)],
            "G": f"{file}:G",
            **{side: f"{file}:{side}" for side in COUPLED if side in tensors},
            "d_in": d_in,
            "d_out": d_out,
            "n_tokens": layer.n_tokens,
            "checksum": checksum,
        }
    coupled = any(layer.G_coupled is not None for layer in factors.values())
    form = FORMAT_COUPLED if coupled else FORMAT
    contents = {"format": form, "version": version("lightning-kfac"), **(metadata or {}), "layers": layers}
    write_json(partial / METADATA, contents)


def load_factors(path: str | Path) -> FactorFolder:
    """Opens a factor folder; the tensors are read when a layer is asked for.

    Args:
        path: The folder, or the name of a Hugging Face hub repository.

    Returns:
        A mapping from dotted layer names to ``KroneckerFactors``, with ``.metadata``.

    Raises:
        InputError: Not a factor folder, one of another format, or one whose metadata are damaged. Reading a layer
            raises it where its file is.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/factors"
        >>> save_factors({"fc": KroneckerFactors(torch.eye(3), torch.eye(2), 10)}, path, {"corpus": "notes"})
        >>> folder = load_factors(path)
        >>> list(folder), folder["fc"].shape, folder.metadata["corpus"]
        (['fc'], (2, 3), 'notes')
    """
    settle(path)
    path = local_folder(path)
    if not (path / METADATA).is_file():
        raise InputError(f"{path}: not a factor folder: it has no {METADATA}")
    metadata = read_json(path / METADATA, ADVICE)
    known = metadata.get("format")
    if type(known) is not int or known not in (FORMAT, FORMAT_COUPLED):
        readable = f"{FORMAT} and {FORMAT_COUPLED}"
        raise InputError(f"{path}: factor format {_short(known)}; this version reads formats {readable}")
    try:
        _check(metadata)
    except ValueError as error:
        raise InputError(f"{path / METADATA}: damaged or incomplete: {error}; {ADVICE}") from None
    return FactorFolder(path, metadata)


def _check(metadata: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a field that is missing or is not what it should be."""
    for name in ("model", "fingerprint", "tokenizer_fingerprint", "corpus"):
        if not isinstance(metadata.get(name), str | None):
            raise ValueError(f"{name} is {_short(metadata[name])}, it must be text")
    if metadata.get("n_tokens") is not None:
        _check_count(metadata, "n_tokens", 0)
    layers = metadata.get("layers")
    if not isinstance(layers, dict):
        raise ValueError("it has no layers")
    for name, entry in layers.items():
        try:
            _check_layer(entry)
        except ValueError as error:
            raise ValueError(f"layer {name[:80]}: {error}") from None


def _check_layer(entry: object) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"it is {_short(entry)}, not a mapping")
    for side in dict.fromkeys(("A", "G", *stored_sides(entry))):
        place = entry.get(side)
        if not isinstance(place, str) or not place.partition(":")[2]:
            raise ValueError(f"{side} is {_short(place)}, it must be FILE:NAME")
        file_name(place.partition(":")[0])
    for size in ("d_in", "d_out"):
        _check_count(entry, size, 1)
    _check_count(entry, "n_tokens", 0)
    if not isinstance(entry.get("checksum"), str | None):
        raise ValueError(f"checksum is {_short(entry['checksum'])}, it must be text")


def _check_count(fields: Mapping[str, Any], name: str, least: int) -> None:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{name} is {_short(value)}, it must be a whole number of at least {least}")


def _short(value: object) -> str:
    """A value for a message, which must not be as long as a damaged file can make it."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def layer_shape(factors: Mapping[str, KroneckerFactors], name: str) -> tuple[int, int]:
    """(d_out, d_in) of a layer, without reading a tensor from the disk."""
    return factors.layer_shape(name) if isinstance(factors, FactorFolder) else factors[name].shape


def has_coupled(factors: Mapping[str, KroneckerFactors]) -> bool:
    """Whether every layer has coupled factors, without reading a tensor from the disk."""
    if isinstance(factors, FactorFolder):
        return all(side in entry for entry in factors.metadata["layers"].values() for side in COUPLED)
    return all(layer.G_coupled is not None for layer in factors.values())


def layer_tokens(factors: Mapping[str, KroneckerFactors], name: str) -> int:
    """Positions that a layer saw, without reading a tensor from the disk."""
    if isinstance(factors, FactorFolder):
        return int(factors.metadata["layers"][name]["n_tokens"])
    return factors[name].n_tokens


def input_leaders(factors: Mapping[str, KroneckerFactors]) -> dict[str, str]:
    """For each layer the first one that shares its A: the same tensor, or the same place on disk.

    Example:
        >>> import torch
        >>> A, G = torch.eye(2), torch.eye(3)
        >>> input_leaders({"gate": KroneckerFactors(A, G, 1), "up": KroneckerFactors(A, G, 1)})
        {'gate': 'gate', 'up': 'gate'}
    """
    first: dict[object, str] = {}
    place = factors.shared_A if isinstance(factors, FactorFolder) else lambda name: id(factors[name].A)
    return {name: first.setdefault(place(name), name) for name in factors}
