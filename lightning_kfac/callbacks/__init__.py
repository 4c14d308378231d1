"""Lightning callbacks: they carry data to the math and write what comes back."""

from typing import TYPE_CHECKING

from lightning_kfac.lazy import lazy

if TYPE_CHECKING:
    from lightning_kfac.callbacks.collection.collector import CurvatureCollector
    from lightning_kfac.callbacks.crystallize import CrystallizationStudy
    from lightning_kfac.callbacks.edit import EditCallback
    from lightning_kfac.callbacks.mining import MiningWriter
    from lightning_kfac.callbacks.progress import RunProgress
    from lightning_kfac.callbacks.report import RunReport
    from lightning_kfac.callbacks.residuals import ResidualCollector
    from lightning_kfac.callbacks.save_model import SaveTrainedModel
    from lightning_kfac.callbacks.spectrum import SpectrumLogger
    from lightning_kfac.distributed.rank_watch import RankWatch
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "lightning_kfac.callbacks.collection.collector": ["CurvatureCollector"],
            "lightning_kfac.callbacks.crystallize": ["CrystallizationStudy"],
            "lightning_kfac.callbacks.edit": ["EditCallback"],
            "lightning_kfac.callbacks.mining": ["MiningWriter"],
            "lightning_kfac.callbacks.progress": ["RunProgress"],
            "lightning_kfac.callbacks.report": ["RunReport"],
            "lightning_kfac.callbacks.residuals": ["ResidualCollector"],
            "lightning_kfac.callbacks.save_model": ["SaveTrainedModel"],
            "lightning_kfac.callbacks.spectrum": ["SpectrumLogger"],
            "lightning_kfac.distributed.rank_watch": ["RankWatch"],
        },
    )

__all__ = [
    "CrystallizationStudy",
    "CurvatureCollector",
    "EditCallback",
    "MiningWriter",
    "RankWatch",
    "ResidualCollector",
    "RunProgress",
    "RunReport",
    "SaveTrainedModel",
    "SpectrumLogger",
]
