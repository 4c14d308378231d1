"""A study of crystallized attention as tables."""

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich import box
from rich.table import Table

from lightning_kfac.attention.comparison import BASELINE, FULL, TOP1, lowrank
from lightning_kfac.attention.figures import curve_figure, heads_figure, sharpness_figure, spectra_figure
from lightning_kfac.attention.study import SHOWN_RANKS, Study, percent
from lightning_kfac.console import console, show
from lightning_kfac.reporting.labels import stage_label

FIGURES = {"curve": curve_figure, "spectra": spectra_figure, "heads": heads_figure, "sharpness": sharpness_figure}


def modes_table(study: Study) -> Table:
    """Every mode: perplexity, change, share of the Top-1 loss recovered, strict accuracy."""
    comparison = study.comparison
    recites = any(figure is not None for figure in study.recited.values())
    table = _table("Crystallized attention", "", "perplexity", "change", "Top-1 loss recovered")
    if recites:
        table.add_column("strict accuracy", justify="right", no_wrap=True)
    shares = {lowrank(rank): percent(share, 0) for rank, share in (comparison.recovered or {}).items()}
    for name in study.recited:
        cost = comparison.costs[name]
        unknown = "n/a" if comparison.recovered is None and name not in (BASELINE, TOP1, FULL) else ""
        change = "" if name == BASELINE else percent(cost.change, 2)
        cells = [stage_label(name), f"{cost.perplexity:.3f}", change, shares.get(name, unknown)]
        if recites:
            figure = study.recited[name]
            cells.append("n/a" if figure is None else f"{figure[0]:.3f}")
        table.add_row(*cells)
    return table


def layers_table(study: Study) -> Table:
    """Top-1 in one layer at a time."""
    table = _table("Top-1 in one layer at a time", "layer", "change of perplexity")
    for layer, cost in sorted(study.layer_costs.items()):
        table.add_row(str(layer), percent(cost, 2))
    return table


def heads_table(study: Study) -> Table:
    """Spectrum, sharpness and cost of every head."""
    heads = study.heads
    ranks = [rank for rank in SHOWN_RANKS if rank in heads[0].cumulative_variance]
    shares = [f"r = {rank}" for rank in ranks]
    title = "Each head: effective dimension, variance in r directions, sharpness, cost of Top-1 there alone"
    table = _table(title, "layer", "head", "dim.", *shares, "entropy", "top-1 mass", "cost")

    def figures(dimension: str, held: list[float], entropy: float, mass: float) -> list[str]:
        return [dimension, *(f"{100 * share:.0f} %" for share in held), f"{entropy:.2f}", f"{mass:.2f}"]

    for head in heads:
        held = [head.cumulative_variance[rank] for rank in ranks]
        cells = figures(str(head.effective_dimension), held, head.entropy, head.top1_mass)
        table.add_row(str(head.layer), str(head.head), *cells, percent(head.cost, 2))

    def mean(values: list[float]) -> float:
        return sum(values) / len(heads)

    held = [mean([head.cumulative_variance[rank] for head in heads]) for rank in ranks]
    sharpness = mean([head.entropy for head in heads]), mean([head.top1_mass for head in heads])
    table.add_section()
    table.add_row("mean", "", *figures(f"{study.mean_effective_dimension:.1f}", held, *sharpness), "")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


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
