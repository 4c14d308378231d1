"""Residual spectra on disk: a folder with ``metadata.json`` and one safetensors file a layer."""

from importlib.metadata import version
from pathlib import Path

from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import new_folder, settle
from lightning_kfac.storage.json_files import read_json, write_json
from lightning_kfac.storage.tensor_files import load_tensors, read_header, save_tensors

ADVICE = "collect the residuals again"
FORMAT = 1
METADATA = "metadata.json"
TENSORS = ("second_moment", "entropy", "top1_mass")


def save_spectra(spectra: ResidualSpectra, path: str | Path) -> None:
    """Writes a folder with one safetensors file a layer and ``metadata.json``; it appears when it is complete.

    Example:
        >>> import tempfile, torch
        >>> moments = HeadSpectra(torch.eye(2).double()[None], torch.zeros(1), torch.ones(1))
        >>> save_spectra(ResidualSpectra({3: moments}, {"model": "demo"}), tempfile.mkdtemp() + "/residuals")
    """
    with new_folder(path) as folder:
        checksums = {}
        for layer, heads in spectra.items():
            tensors = {name: getattr(heads, name) for name in TENSORS}
            checksums[str(layer)] = save_tensors(tensors, folder / _file(layer), {"layer": str(layer)})
        contents = {"format": FORMAT, "version": version("lightning-kfac"), **spectra.metadata, "layers": list(spectra)}
        write_json(folder / METADATA, contents | {"checksums": checksums})


def load_spectra(path: str | Path) -> ResidualSpectra:
    """Reads what ``save_spectra`` wrote.

    Raises:
        InputError: Not such a folder, or a damaged one.

    Example:
        >>> import tempfile, torch
        >>> path, moments = tempfile.mkdtemp() + "/residuals", torch.eye(2).double()[None]
        >>> save_spectra(ResidualSpectra({3: HeadSpectra(moments, torch.zeros(1), torch.ones(1))}), path)
        >>> load_spectra(path)[3].variances.tolist()
        [[1.0, 1.0]]
    """
    path = Path(path)
    settle(path)
    if not (path / METADATA).is_file():
        raise InputError(f"{path}: not a folder of residual spectra: it has no {METADATA}")
    metadata = read_json(path / METADATA, ADVICE)
    known = metadata.get("format")
    layers = metadata.get("layers")
    checksums = metadata.pop("checksums", {})
    if type(known) is not int or known != FORMAT:
        raise InputError(f"{path}: format {known!r} of residual spectra; this version reads format {FORMAT}")
    if not (isinstance(layers, list) and all(map(_is_number, layers)) and isinstance(checksums, dict)):
        raise InputError(f"{path / METADATA}: damaged or incomplete: layers must be a list of numbers; {ADVICE}")
    found = {layer: _read(path / _file(layer), checksums.get(str(layer))) for layer in layers}
    return ResidualSpectra(found, metadata)


def _read(path: Path, checksum: str | None) -> HeadSpectra:
    shapes = read_header(path, ADVICE).shapes
    (heads, size, *_) = (*shapes.get("second_moment", ()), 0, 0)
    expected = {"second_moment": (heads, size, size), "entropy": (heads,), "top1_mass": (heads,)}
    tensors = load_tensors(path, ADVICE, expected, checksum)
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError(f"{path}: damaged or incomplete: it holds no real numbers; {ADVICE}")
    return HeadSpectra(**tensors)


def _is_number(layer: object) -> bool:
    return type(layer) is int and layer >= 0


def _file(layer: int) -> str:
    return f"layer_{layer:04d}.safetensors"
