"""Measured curvature (EK-FAC moments) in a factor folder: ``moments/`` with one safetensors file a layer.

Those of a domain lie in the domain's folder, and are measured in the basis of the general factors.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_kfac.bases import BasisCache
from lightning_kfac.errors import InputError
from lightning_kfac.factors import METADATA, FactorFolder, KroneckerFactors
from lightning_kfac.files import new_folder

FOLDER = "moments"


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
            save_file({"moments": layer.cpu().contiguous()}, partial / file, metadata={"layer": name})
            layers[name] = {"file": file, "bases": bases.keys(factors, name)}
        (partial / METADATA).write_text(json.dumps({"moments": kind, "layers": layers}, indent=2), "utf-8")


def has_moments(factors: object) -> bool:
    """Whether factors are a folder with moments in it."""
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
    if not (path / METADATA).is_file():
        return None
    try:
        entry = json.loads((path / METADATA).read_text("utf-8"))["layers"].get(name)
        if entry is None:
            return None
        file, keys = path / str(entry["file"]).rpartition("/")[2], entry["bases"]
        moments = load_file(file)["moments"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{path}: the moments are damaged ({error!r}); collect them again") from None
    # Solvers differ in the last bit, and within equal eigenvalues in everything: the very basis is needed.
    if keys != bases.keys(factors, name) or not all(map(bases.holds, keys.values())):
        raise InputError(
            f"{path}: the moments of {name} were measured in another basis than {bases.dtype} ones in "
            f"{bases.folder}; edit with the precision of the collection, or collect the moments again"
        )
    return moments
