"""Kronecker factors, and the folder they are kept in.

A folder holds ``metadata.json`` and one safetensors file a layer. Only upper triangles are stored; an
A that several layers share is stored once, and metadata says where.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.files import content_hash, new_folder
from lightning_kfac.hub import local_folder
from lightning_kfac.math.covariance import pack_upper, unpack_upper

FORMAT = 1
METADATA = "metadata.json"


@dataclass(frozen=True)
class KroneckerFactors:
    """Curvature of one layer: its Fisher is approximated by G (x) A.

    Attributes:
        A: float32 [d_in, d_in], mean of a a^T over valid positions.
        G: float32 [d_out, d_out], mean of g g^T over valid positions.
        n_tokens: Number of valid positions.

    Example:
        >>> import torch
        >>> factors = KroneckerFactors(torch.eye(3), torch.eye(2), n_tokens=10)
        >>> factors.shape
        (2, 3)
    """

    A: Tensor
    G: Tensor
    n_tokens: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the layer's weight."""
        return len(self.G), len(self.A)


@dataclass(frozen=True)
class FactorFolder(Mapping[str, KroneckerFactors]):
    """Factors on disk, read layer by layer when asked for.

    Attributes:
        path: The folder.
        metadata: Contents of ``metadata.json``.
    """

    path: Path
    metadata: dict = field(repr=False)

    def __getitem__(self, name: str) -> KroneckerFactors:
        entry = self.metadata["layers"][name]
        A = self._triangle(entry["A"], entry["d_in"])
        return KroneckerFactors(A, self._triangle(entry["G"], entry["d_out"]), entry["n_tokens"])

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
        path = self.path / Path(file).name  # never a path outside the folder
        try:
            with safe_open(path, framework="pt") as tensors:
                packed = tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); the factors are damaged, collect them again") from None
        if packed.shape != (size * (size + 1) // 2,):
            raise InputError(f"{path}: {key} has {packed.numel()} numbers, not a triangle of size {size}")
        return unpack_upper(packed, size)


def pack_matrix(name: str, matrix: Tensor) -> Tensor:
    """What is stored of a symmetric matrix: its upper triangle, float32."""
    return pack_upper(matrix.float())


def save_factors(
    factors: Mapping[str, KroneckerFactors],
    path: str | Path,
    metadata: Mapping | None = None,
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
        yield name, {"G": layer.G} | ({} if id(layer.A) in seen else {"A": layer.A})
        seen.add(id(layer.A))


def _write(
    factors: Mapping[str, KroneckerFactors],
    partial: Path,
    metadata: Mapping | None,
    pack: Callable[[str, Tensor], Tensor],
) -> None:
    places: dict[int, str] = {}
    layers = {}
    for number, (name, matrices) in enumerate(stored_matrices(factors)):
        layer, file = factors[name], f"layer_{number:04d}.safetensors"
        places.setdefault(id(layer.A), f"{file}:A")
        tensors = {side: pack(name, matrix) for side, matrix in matrices.items()}
        save_file(tensors, partial / file, metadata={"layer": name})
        d_out, d_in = layer.shape
        layers[name] = {
            "A": places[id(layer.A)],
            "G": f"{file}:G",
            "d_in": d_in,
            "d_out": d_out,
            "n_tokens": layer.n_tokens,
        }
    contents = {"format": FORMAT, "version": version("lightning-kfac"), **(metadata or {}), "layers": layers}
    (partial / METADATA).write_text(json.dumps(contents, indent=2), "utf-8")


def load_factors(path: str | Path) -> FactorFolder:
    """Opens a factor folder; the tensors are read when a layer is asked for.

    Args:
        path: The folder, or the name of a Hugging Face hub repository.

    Returns:
        A mapping from dotted layer names to ``KroneckerFactors``, with ``.metadata``.

    Raises:
        InputError: Not a factor folder, or one of another format.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/factors"
        >>> save_factors({"fc": KroneckerFactors(torch.eye(3), torch.eye(2), 10)}, path, {"corpus": "notes"})
        >>> folder = load_factors(path)
        >>> list(folder), folder["fc"].shape, folder.metadata["corpus"]
        (['fc'], (2, 3), 'notes')
    """
    path = local_folder(path)
    try:
        metadata = json.loads((path / METADATA).read_text("utf-8"))
        known, layers = metadata["format"], metadata["layers"]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not a factor folder: it has no {METADATA}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / METADATA}: cannot be read ({error!r}); the factors are damaged") from None
    if known != FORMAT or not isinstance(layers, dict):
        raise InputError(f"{path}: factor format {known!r}; this version reads format {FORMAT}")
    return FactorFolder(path, metadata)


def layer_shape(factors: Mapping[str, KroneckerFactors], name: str) -> tuple[int, int]:
    """(d_out, d_in) of a layer, without reading a tensor from the disk."""
    return factors.layer_shape(name) if isinstance(factors, FactorFolder) else factors[name].shape
