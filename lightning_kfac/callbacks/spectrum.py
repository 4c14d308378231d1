"""SpectrumLogger: shows the curvature of every collected layer in TensorBoard."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_kfac.callbacks.collection.collector import find_collector
from lightning_kfac.callbacks.collection.task import task_of
from lightning_kfac.callbacks.edit import EditCallback
from lightning_kfac.callbacks.typed import find_callback
from lightning_kfac.console import track_count
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.formulas import is_product
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.factors.spectra import LayerSpectrum, layer_spectrum
from lightning_kfac.models.targets import count_blocks, narrow
from lightning_kfac.reporting.board import Board
from lightning_kfac.reporting.spectra_board import show_spectra, write_spectra


class SpectrumLogger(Callback):
    """After the collection, writes spectra, cumulative mass and kept sets to TensorBoard.

    The cut is that of the run's own edit (of formula ``original``), if it has one. Eigenbases are those that the edit
    uses too.

    Attributes:
        spectra: By layer, after the collection.

    Example:
        >>> SpectrumLogger().spectra
        {}
    """

    def __init__(self) -> None:
        self.spectra: dict[str, LayerSpectrum] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            find_collector(trainer, self)  # callbacks work in their order

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        collector = find_collector(trainer, self)
        board = Board(trainer.loggers)
        if not board.takes_pictures:
            return
        model = task_of(pl_module).model
        ranks = current_ranks()
        device = next(model.parameters()).device
        collector.bases.prepare(collector.factors, list(collector.factors), ranks, collector.owners, device)
        if ranks.rank:
            return
        edit = find_callback(trainer, EditCallback)
        folder = Path(trainer.default_root_dir) / "factors"
        factors = collector.factors if collector.owners is None else load_factors(folder)
        rhos: dict[str, float] = {}
        if edit is not None and not collector.domain_factors:
            rhos = _cuts(edit.config, list(factors), count_blocks(model))
        with track_count("spectra", "layers", total=len(factors)) as advance_to:
            for number, name in enumerate(factors, start=1):
                G, A = collector.bases.of(factors, name)
                self.spectra[name] = layer_spectrum(G.values, A.values, rhos.get(name))
                advance_to(number)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                write_spectra(logger.experiment, self.spectra)
            else:
                show_spectra(Board([logger]), self.spectra)


def _cuts(edit: EditConfig, names: list[str], n_blocks: int) -> dict[str, float]:
    """Where the edit cuts the layers that it edits by ``original``: only there the figures show what it keeps."""
    own = {name: edit.for_layer(name) for name in narrow(names, n_blocks, edit.blocks, edit.projections)}
    plain = {name: config for name, config in own.items() if is_product(config.formula) and config.mode == "suppress"}
    return {name: config.rho for name, config in plain.items() if config.budget in (None, "mass")}
