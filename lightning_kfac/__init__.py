"""Collect the K-FAC curvature of a language model, edit its weights in the curvature basis, measure both."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from lightning_kfac.lazy import lazy

__version__ = version("lightning-kfac")

if TYPE_CHECKING:
    from lightning_kfac.collection.collect import collect_factors, collect_moments
    from lightning_kfac.editing.config import EditConfig
    from lightning_kfac.editing.editor import KFACEditor
    from lightning_kfac.editing.report import EditReport
    from lightning_kfac.editing.sweep import compare_formulas
    from lightning_kfac.errors import InputError
    from lightning_kfac.evaluation.functions import (
        ExtractionScore,
        MembershipScore,
        MemorizationScore,
        exact_accuracy,
        extraction,
        membership,
        memorization_score,
        ndcg,
        perplexity,
    )
    from lightning_kfac.factors.folder import load_factors, save_factors
    from lightning_kfac.factors.kronecker import KroneckerFactors
    from lightning_kfac.math.selection import select_components, select_products
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "lightning_kfac.collection.collect": ["collect_factors", "collect_moments"],
            "lightning_kfac.editing.config": ["EditConfig"],
            "lightning_kfac.editing.editor": ["KFACEditor"],
            "lightning_kfac.editing.report": ["EditReport"],
            "lightning_kfac.editing.sweep": ["compare_formulas"],
            "lightning_kfac.errors": ["InputError"],
            "lightning_kfac.evaluation.functions": [
                "ExtractionScore",
                "MemorizationScore",
                "MembershipScore",
                "exact_accuracy",
                "extraction",
                "membership",
                "memorization_score",
                "ndcg",
                "perplexity",
            ],
            "lightning_kfac.factors.folder": ["load_factors", "save_factors"],
            "lightning_kfac.factors.kronecker": ["KroneckerFactors"],
            "lightning_kfac.math.selection": ["select_components", "select_products"],
        },
        rooms=["assets", "attention", "callbacks", "data", "loading", "metrics"],
    )

__all__ = [
    "EditConfig",
    "EditReport",
    "ExtractionScore",
    "InputError",
    "KFACEditor",
    "KroneckerFactors",
    "MembershipScore",
    "MemorizationScore",
    "collect_factors",
    "collect_moments",
    "compare_formulas",
    "exact_accuracy",
    "extraction",
    "load_factors",
    "membership",
    "memorization_score",
    "ndcg",
    "perplexity",
    "save_factors",
    "select_components",
    "select_products",
]
