"""Tables of a run on paper."""

from rich import box
from rich.table import Table

from lightning_kfac.collection.memory import readable_bytes
from lightning_kfac.console import format_seconds
from lightning_kfac.planning.run import RunPlan


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def memory_table(plan: RunPlan) -> Table:
    """What one rank holds, part by part, and whether it fits."""
    table = _table("Memory of one rank", "part", "")
    for part, n_bytes in plan.memory.items():
        table.add_row(part, readable_bytes(n_bytes))
    table.add_section()
    table.add_row("while collecting", readable_bytes(sum(plan.memory.values())))
    table.add_row("while editing", readable_bytes(plan.edit_memory))
    table.add_row("may be used", readable_bytes(plan.capacity))
    if plan.capacity != plan.edit_capacity:
        table.add_row("may be used while editing", readable_bytes(plan.edit_capacity))
    table.add_row("fits", "yes" if plan.fits else "no")
    table.add_section()
    table.add_row("host memory of one node", readable_bytes(plan.host_memory))
    return table


def time_table(plan: RunPlan) -> Table:
    """Time by part, with its share of all, and the FLOPs of one token."""
    passes = "1 pass" if len(plan.passes) == 1 else f"{len(plan.passes)} passes"
    title = f"Time: {passes}, {plan.steps:,} steps each, {plan.rows_at_once} rows at once"
    table = _table(title, "part", "time", "share", "GFLOP a token")
    for part, seconds in plan.seconds.items():
        flops = {"forward": plan.flops.forward, "backward": plan.flops.backward, "covariances": plan.flops.covariance}
        each = f"{flops[part] / 1e9:.3g}" if part in flops else ""
        table.add_row(part, readable_seconds(seconds), f"{seconds / plan.total_seconds:.1%}", each)
    table.add_section()
    table.add_row("together", readable_seconds(plan.total_seconds), "", f"{sum(plan.flops) / 1e9:.3g}")
    table.add_row("communication in the collection", "", f"{plan.communication_share:.1%}", "")
    return table


def disk_table(plan: RunPlan) -> Table:
    """What a run writes, part by part."""
    table = _table("On disk", "part", "")
    for part, n_bytes in plan.disk.items():
        table.add_row(part, readable_bytes(n_bytes))
    return table


def readable_seconds(seconds: float) -> str:
    """``0.25`` -> ``0.25 s``, ``75`` -> ``1:15``."""
    return f"{seconds:.2g} s" if seconds < 10 else format_seconds(seconds)


def readable_parameters(number: int) -> str:
    """``7298011136`` -> ``7.30 billion parameters``."""
    return f"{number / 1e9:.2f} billion parameters" if number >= 1e8 else f"{number / 1e6:.1f} million parameters"
