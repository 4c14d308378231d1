"""Lightning callbacks: they carry data to the math and write what comes back."""

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
