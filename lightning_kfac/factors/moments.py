"""Measured curvature (EK-FAC moments) in a factor folder: ``moments/`` with one safetensors file a layer.

Those of a domain lie in the domain's folder, and are measured in the basis of the general factors.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.folder import METADATA, FactorFolder
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.storage.files import new_folder, settle
from lightning_kfac.storage.json_files import file_name, read_json, write_json
from lightning_kfac.storage.tensor_files import load_tensors, save_tensors

FOLDER = "moments"
ADVICE = "collect the moments again"


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
    layers = read_json(path / METADATA, ADVICE).get("layers")
    try:
        if not isinstance(layers, dict):
            raise ValueError("it has no layers")
        if name not in layers:
            return None
        entry = layers[name]
        file = path / file_name(entry["file"])
        keys = entry["bases"]
        known = entry.get("checksum")
        known_bases = entry.get("bases_checksums")
        if not isinstance(keys, dict):
            raise ValueError(f"the bases of {name} are a {type(keys).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path / METADATA}: damaged or incomplete: {error!r}; {ADVICE}") from None
    shape = factors.layer_shape(name) if isinstance(factors, FactorFolder) else factors[name].shape
    moments = load_tensors(file, ADVICE, {"moments": shape}, known)["moments"]
    if not moments.is_floating_point():
        raise InputError(f"{file}: damaged or incomplete: moments of {moments.dtype}; {ADVICE}")
    # Solvers differ in the last bit, and within equal eigenvalues in everything: the very basis is needed.
    same = keys == bases.keys(factors, name)
    if same and known_bases is not None:
        same = known_bases == bases.checksums(factors, name)
    if not same or (known_bases is None and not all(map(bases.holds, keys.values()))):
        raise InputError(
            f"{path}: the moments of {name} were measured in another basis than {bases.dtype} ones in "
            f"{bases.folder}, or the one there is damaged; edit with the precision of the collection, or collect the "
            "moments again"
        )
    return moments
