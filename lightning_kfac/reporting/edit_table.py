"""What an edit did, layer by layer, as a table."""

from rich import box
from rich.table import Table

from lightning_kfac.editing.report import EditReport
from lightning_kfac.models.targets import layer_label


def report_table(report: EditReport, verb: str) -> Table:
    """What an edit did (or would do), layer by layer, and on average."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{verb} layer by layer", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("formula", "rho", "kept", "of", "share", "mass", "norm", "after", "change"):
        table.add_column(name, justify="left" if name == "formula" else "right", no_wrap=True)
    for layer in report.layers:
        numbers = [f"{layer.n_kept:,}", f"{layer.n_total:,}", f"{layer.fraction_kept:.1%}", f"{layer.mass_kept:.1%}"]
        norms = [f"{layer.norm_before:.4g}", f"{layer.norm_after:.4g}", f"{layer.relative_change:.3f}"]
        table.add_row(layer_label(layer.name), layer.formula, f"{layer.rho:g}", *numbers, *norms)
    shares = [f"{report.fraction_kept:.1%}", f"{report.mass_kept:.1%}"]
    table.add_section()
    table.add_row("all", "", "", "", "", *shares, "", "", f"{report.relative_change:.3f}")
    if report.unedited:
        fewest, most = min(report.unedited.values()), max(report.unedited.values())
        table.caption = f"{len(report.unedited)} experts with {fewest:,} to {most:,} tokens are left as they are"
    return table
