"""Crystallized attention: what is lost when only the strongest value vector is kept, and how little brings it back."""

from lightning_kfac.attention.collect import collect_residuals
from lightning_kfac.attention.crystallized import Crystallization, crystallize
from lightning_kfac.attention.spectra import HeadSpectra, ResidualSpectra
from lightning_kfac.attention.storage import load_spectra, save_spectra

__all__ = [
    "Crystallization",
    "HeadSpectra",
    "ResidualSpectra",
    "collect_residuals",
    "crystallize",
    "load_spectra",
    "save_spectra",
]
