"""Where a study is shown: on the screen and in TensorBoard."""

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_kfac.attention.figures import curve_figure, heads_figure, sharpness_figure, spectra_figure
from lightning_kfac.attention.study import Study
from lightning_kfac.attention.tables import heads_table, layers_table, modes_table
from lightning_kfac.progress import console, show

FIGURES = {"curve": curve_figure, "spectra": spectra_figure, "heads": heads_figure, "sharpness": sharpness_figure}


def publish(study: Study, logger: Logger | None) -> None:
    """Prints tables and verdict; writes scalars by rank and layer, the figures and the verdict to the logger."""
    for table in (layers_table, heads_table, modes_table):
        show(table(study))
    console.print(study.verdict())
    if logger is None:
        return
    for rank, share in (study.comparison.recovered or {}).items():
        perplexity = study.comparison.costs[f"lowrank {rank}"].perplexity
        figures = {"crystallize/perplexity_by_rank": perplexity, "crystallize/recovered_by_rank": share.value}
        logger.log_metrics(figures, step=rank)
    for layer, cost in study.layer_costs.items():
        logger.log_metrics({"crystallize/top1_cost_by_layer": cost.value}, step=layer)
    if isinstance(logger, TensorBoardLogger):
        for name, draw in FIGURES.items():
            logger.experiment.add_figure(f"crystallize/{name}", draw(study))
        logger.experiment.add_text("crystallize/verdict", study.verdict())
