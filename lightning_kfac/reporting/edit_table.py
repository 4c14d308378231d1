"""What an edit did, layer by layer, as a table."""

from rich import box
from rich.table import Table

from lightning_kfac.console import counted
from lightning_kfac.editing.report import EditReport
from lightning_kfac.models.targets import layer_label

LEGEND = (
    "kept, of: components of the curvature basis that stay, of how many; share: their quotient",
    "mass: share of the importance that they hold; change: ||W' - W|| / ||W||",
)


def report_table(report: EditReport, verb: str) -> Table:
    """What an edit did (or would do), layer by layer, and on average."""
    rules = {(layer.formula, layer.rho) for layer in report.layers}
    title = f"{verb} layer by layer"
    if len(rules) == 1:  # said once instead of in every line
        title += f" (formula {report.layers[0].formula}, rho {report.layers[0].rho:g})"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    table.add_column("layer", overflow="fold")
    apart = ("formula", "rho") if len(rules) > 1 else ()
    for name in (*apart, "kept", "of", "share", "mass", "norm", "after", "change"):
        table.add_column(name, justify="left" if name == "formula" else "right", no_wrap=True)
    for layer in report.layers:
        rule = [layer.formula, f"{layer.rho:g}"] if apart else []
        numbers = [f"{layer.n_kept:,}", f"{layer.n_total:,}", f"{layer.fraction_kept:.1%}", f"{layer.mass_kept:.1%}"]
        norms = [f"{layer.norm_before:.4g}", f"{layer.norm_after:.4g}", f"{layer.relative_change:.3f}"]
        table.add_row(layer_label(layer.name), *rule, *numbers, *norms)
    shares = [f"{report.fraction_kept:.1%}", f"{report.mass_kept:.1%}"]
    table.add_section()
    table.add_row("all", *("" for _ in apart), "", "", *shares, "", "", f"{report.relative_change:.3f}")
    if report.unedited:
        fewest, most = min(report.unedited.values()), max(report.unedited.values())
        many = counted(len(report.unedited), "expert")
        table.caption = f"{many} with {fewest:,} to {counted(most, 'token')} left as before"
    return table
