"""Measured curvature (EK-FAC moments) in a factor folder: ``moments/`` with one safetensors file a layer.

Those of a domain lie in the domain's folder, and are measured in the basis of the general factors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import METADATA, FactorFolder, layer_shape
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.storage.files import new_folder, settle
from lightning_kfac.storage.json_files import file_name, read_json, write_json
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

FOLDER = "moments"
ADVICE = "collect the moments again"


class _Entry(NamedTuple):
    """What the metadata say of one layer; older versions recorded no checksums."""

    file: Path
    checksum: str | None
    bases: dict[str, Any]
    bases_checksums: dict[str, Any] | None


def save_moments(
    moments: Mapping[str, Tensor],
    folder: Path,
    factors: Mapping[str, KroneckerFactors],
    bases: BasisCache,
    kind: str,
) -> None:
    """Writes moments into a factor folder, with the keys of the bases that they were measured in.

    Args:
        moments: float32 [d_out, d_in] by dotted layer name.
        folder: Where the factors of the same text are.
        factors: Those in whose bases they were measured.
        bases: The cache that gave the bases.
        kind: ``token`` or ``sequence``.
    """
    with new_folder(folder / FOLDER) as partial:
        layers = {}
        for number, (name, layer) in enumerate(moments.items()):
            file = f"layer_{number:04d}.safetensors"
            layers[name] = {
                "file": file,
                "checksum": save_tensors({"moments": layer}, partial / file, {"layer": name}),
                "bases": bases.keys(factors, name),
                "bases_checksums": bases.checksums(factors, name),
            }
        write_json(partial / METADATA, {"moments": kind, "layers": layers})


def has_moments(factors: object) -> bool:
    """Whether factors are a folder with moments in it."""
    if isinstance(factors, FactorFolder):
        settle(factors.path / FOLDER)
    return isinstance(factors, FactorFolder) and (factors.path / FOLDER / METADATA).is_file()


def load_moments(folder: Path, factors: Mapping[str, KroneckerFactors], bases: BasisCache, name: str) -> Tensor | None:
    """One layer's moments, or None where there are none.

    Args:
        folder: Where the factors of the same text are.
        factors: The general ones.
        bases: Their bases.
        name: Dotted name of the layer.

    Raises:
        InputError: They are damaged, or were measured in a basis that is no longer there.
    """
    path = folder / FOLDER
    settle(path)
    if not (path / METADATA).is_file():
        return None
    entry = _entry(path, name)
    if entry is None:
        return None
    moments = load_tensors(entry.file, ADVICE, {"moments": layer_shape(factors, name)}, entry.checksum)["moments"]
    if not moments.is_floating_point():
        raise InputError(f"{entry.file}: damaged or incomplete: moments of {moments.dtype}; {ADVICE}")
    if not _is_there(entry, factors, bases, name):
        raise InputError(
            f"{path}: the moments of {name} were measured in another basis than {bases.dtype} ones in "
            f"{bases.folder}, or the one there is damaged; edit with the precision of the collection, or collect the "
            "moments again"
        )
    return moments


def _entry(path: Path, name: str) -> _Entry | None:
    """That of a layer; None where it has no moments."""
    layers = read_json(path / METADATA, ADVICE).get("layers")
    try:
        if not isinstance(layers, dict):
            raise ValueError("it has no layers")
        if name not in layers:
            return None
        fields = layers[name]
        file = path / file_name(fields["file"])
        entry = _Entry(file, fields.get("checksum"), fields["bases"], fields.get("bases_checksums"))
        if not isinstance(entry.bases, dict):
            raise ValueError(f"the bases of {name} are a {type(entry.bases).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / METADATA}: damaged or incomplete: {error!r}; {ADVICE}") from None
    return entry


def _is_there(entry: _Entry, factors: Mapping[str, KroneckerFactors], bases: BasisCache, name: str) -> bool:
    """Whether the bases are those that the moments were measured in.

    Solvers differ in the last bit, and within equal eigenvalues in everything: the very basis is needed.
    """
    if entry.bases != bases.keys(factors, name):
        return False
    if entry.bases_checksums is None:
        return all(map(bases.holds, entry.bases.values()))
    return entry.bases_checksums == bases.checksums(factors, name)
