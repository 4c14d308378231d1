"""Eigenbases, computed once: kept in memory, or on disk beside the factors that they belong to."""

import hashlib
from collections.abc import Callable, Collection, Hashable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_kfac.distributed.ranks import Ranks, share_out
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder, layer_shape
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.math.spectrum import Spectrum, eigenbasis
from lightning_kfac.storage.tensor_files import load_tensors, read_header, save_tensors, tensors_checksum

FOLDER = "bases"
ADVICE = "it is computed again"


class BasisCache:
    """Eigenbases under a key of their matrix's content and the precision.

    Args:
        folder: Where to keep them; None keeps them in memory. A folder that cannot be written is not used, nor is
            a damaged file.
        dtype: Precision of the decomposition.

    Example:
        >>> cache = BasisCache()
        >>> cache.spectrum("A", lambda: torch.eye(2)).values.tolist()
        [1.0, 1.0]
    """

    def __init__(self, folder: Path | None = None, dtype: torch.dtype = torch.float64):
        self.folder = folder
        self.dtype = dtype
        self._memory: dict[str, Spectrum] = {}
        self._keys: dict[Hashable, str] = {}
        self._computed: set[str] = set()
        self._checksums: dict[str, str] = {}  # of what was verified or written

    @classmethod
    def beside(cls, factors: Mapping[str, KroneckerFactors], dtype: torch.dtype = torch.float64) -> "BasisCache":
        """The cache of a factor folder; in memory for factors that are there themselves."""
        return cls(factors.path / FOLDER if isinstance(factors, FactorFolder) else None, dtype)

    def of(
        self, factors: Mapping[str, KroneckerFactors], name: str, device: torch.device | str = "cpu"
    ) -> tuple[Spectrum, Spectrum]:
        """Eigenbases of G and A of one layer, on ``device``; layers that share an A share its basis."""
        place_G, place_A = self.places(factors, name)
        G = self.spectrum(place_G, lambda: factors[name].G, f"G of {name}", device)
        return G, self.spectrum(place_A, lambda: factors[name].A, f"A of {name}", device)

    def keys(self, factors: Mapping[str, KroneckerFactors], name: str) -> dict[str, str]:
        """The keys of a layer's two bases, by side."""
        place_G, place_A = self.places(factors, name)
        key_G = self._key(place_G, lambda: factors[name].G)
        return {"G": key_G, "A": self._key(place_A, lambda: factors[name].A)}

    def spectrum(
        self,
        place: Hashable | None,
        load: Callable[[], Tensor],
        name: str = "matrix",
        device: torch.device | str = "cpu",
    ) -> Spectrum:
        """The eigenbasis of a matrix.

        Args:
            place: Stands for the matrix as long as this cache lives, so that it is read once; None where
                nothing does.
            load: Gives the matrix [d, d].
            name: For error messages.
            device: Where to compute, and where the result is wanted.
        """
        found = self._read(self._key(place, load)) if place in self._keys else None
        if found is None:
            matrix = load()
            key = self._key(place, lambda: matrix)
            found = self._read(key)
        if found is None:
            found = eigenbasis(matrix.to(device), name, self.dtype)
            self._computed.add(key)
            self._write(key, found, name)
        return found.to(device)

    def checksums(self, factors: Mapping[str, KroneckerFactors], name: str) -> dict[str, str | None]:
        """What identifies a layer's two bases to the last bit, by side; None where one is not there or damaged."""
        return {side: self._checksum(key) for side, key in self.keys(factors, name).items()}

    def _checksum(self, key: str) -> str | None:
        spectrum = self._read(key)
        if spectrum is not None and key not in self._checksums:  # in memory, where nobody has asked before
            self._checksums[key] = tensors_checksum(spectrum._asdict())
        return None if spectrum is None else self._checksums[key]

    def owners(self, factors: Mapping[str, KroneckerFactors], names: Collection[str], size: int) -> dict[str, int]:
        """Which of ``size`` ranks decomposes the factors of each layer; layers that share an A have the same."""
        shapes = {name: layer_shape(factors, name) for name in names}
        groups = {name: self.places(factors, name)[1] if size > 1 else None for name in names}
        return share_out({name: d_out**3 + d_in**3 for name, (d_out, d_in) in shapes.items()}, groups, size)

    def prepare(
        self,
        factors: Mapping[str, KroneckerFactors],
        names: Collection[str],
        ranks: Ranks,
        owners: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Computes the bases of some layers, each on its owner's rank; all ranks can then read them from the folder."""
        owners = owners or self.owners(factors, names, ranks.size)
        with ranks.together():
            for name in names:
                if owners[name] == ranks.rank:
                    self.of(factors, name, device)

    def holds(self, key: str) -> bool:
        """Whether a basis was here before this cache computed any, undamaged."""
        return key not in self._computed and self._read(key) is not None

    def places(self, factors: Mapping[str, KroneckerFactors], name: str) -> tuple[Hashable, Hashable]:
        """What stands for a layer's G and A; layers that share an A have the same for it."""
        if isinstance(factors, FactorFolder):
            return (factors.path, name), (factors.path, factors.shared_A(name))
        return factors[name].G, factors[name].A  # a tensor stands for itself, and is held by its place here

    def _key(self, place: Hashable | None, load: Callable[[], Tensor]) -> str:
        if place is not None and place in self._keys:
            return self._keys[place]
        matrix = load().to("cpu", torch.float32).contiguous()
        digest = hashlib.sha256(f"{self.dtype}{list(matrix.shape)}".encode())
        digest.update(matrix.numpy().data.cast("B"))
        key = f"{len(matrix)}-{digest.hexdigest()[:32]}"
        if place is not None:
            self._keys[place] = key
        return key

    def _read(self, key: str) -> Spectrum | None:
        if key in self._memory:
            return self._memory[key]
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        size = int(key.partition("-")[0])
        try:
            header = read_header(path, ADVICE)
            if header.metadata.get("key", key) != key:
                return None  # of another matrix
            shapes = {"values": (size,), "vectors": (size, size)}
            tensors = load_tensors(path, ADVICE, shapes, verify=key not in self._checksums)
        except InputError:
            return None  # damaged: it is computed again
        spectrum = Spectrum(tensors["values"], tensors["vectors"])
        if (spectrum.values.dtype, spectrum.vectors.dtype) != (torch.float64, self.dtype):
            return None
        if key not in self._checksums:
            if not (spectrum.values.isfinite().all() and spectrum.vectors.isfinite().all()):
                return None
            self._checksums[key] = header.checksum or tensors_checksum(tensors)
        return spectrum

    def _write(self, key: str, spectrum: Spectrum, name: str) -> None:
        tensors = {"values": spectrum.values.cpu(), "vectors": spectrum.vectors.cpu().contiguous()}
        path = self._path(key)
        if path is not None:
            with suppress(OSError, SafetensorError, InputError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._checksums[key] = save_tensors(tensors, path, {"matrix": name, "key": key})
                return
        self._memory[key] = Spectrum(**tensors)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"
