"""Crystallized attention: what is lost when only the strongest value vector is kept, and how little brings it back."""

from typing import TYPE_CHECKING

from lightning_kfac.lazy import lazy

if TYPE_CHECKING:
    from lightning_kfac.attention.collect import collect_residuals
    from lightning_kfac.attention.crystallized import Crystallization, crystallize
    from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
    from lightning_kfac.attention.storage import load_spectra, save_spectra
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "lightning_kfac.attention.collect": ["collect_residuals"],
            "lightning_kfac.attention.crystallized": ["Crystallization", "crystallize"],
            "lightning_kfac.attention.spectra": ["HeadSpectra", "ResidualSpectra"],
            "lightning_kfac.attention.storage": ["load_spectra", "save_spectra"],
        },
    )

__all__ = [
    "Crystallization",
    "HeadSpectra",
    "ResidualSpectra",
    "collect_residuals",
    "crystallize",
    "load_spectra",
    "save_spectra",
]
