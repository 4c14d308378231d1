"""Write a run as one HTML page that needs nothing else: what was done, measured, and not measured."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.console import console
from lightning_kfac.errors import InputError


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=str, help="Folder of a run: of fit, validate, predict, sweep or scan.")
    parser.add_argument("--output", type=str, help="The HTML file. (default: report.html in the run's folder)")


def run(options: Namespace) -> None:
    """Writes."""
    # Here, so that the help does not wait for them.
    from lightning_kfac.reporting.page import page
    from lightning_kfac.reporting.run import read_run
    from lightning_kfac.reporting.sections import ORDER

    folder = read_run(Path(options.run))
    path = Path(options.output) if options.output else folder.path / "report.html"
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; name the HTML file")
    text = page(f"lightning_kfac report: {folder.path.resolve().name}", (make(folder) for make in ORDER))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, "utf-8")
    partial.replace(path)
    console.print(f"{path} ({len(text) / 1e6:.1f} MB, self-contained)")
