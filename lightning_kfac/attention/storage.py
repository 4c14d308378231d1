"""Residual spectra on disk: a folder with ``metadata.json`` and one safetensors file a layer."""

import json
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
from lightning_kfac.errors import InputError
from lightning_kfac.files import new_folder

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
        for layer, heads in spectra.items():
            tensors = {name: getattr(heads, name).cpu().contiguous() for name in TENSORS}
            save_file(tensors, folder / _file(layer), metadata={"layer": str(layer)})
        contents = {"format": FORMAT, "version": version("lightning-kfac"), **spectra.metadata, "layers": list(spectra)}
        (folder / METADATA).write_text(json.dumps(contents, indent=2), "utf-8")


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
    if not (path / METADATA).is_file():
        raise InputError(f"{path}: not a folder of residual spectra: it has no {METADATA}")
    try:
        metadata = json.loads((path / METADATA).read_text("utf-8"))
        known, layers = metadata["format"], metadata["layers"]
        found = {layer: HeadSpectra(**load_file(path / _file(layer))) for layer in layers}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{path}: the residual spectra are damaged ({error}); collect them again") from None
    if known != FORMAT:
        raise InputError(f"{path}: format {known!r} of residual spectra; this version reads format {FORMAT}")
    return ResidualSpectra(found, metadata)


def _file(layer: int) -> str:
    return f"layer_{layer:04d}.safetensors"
