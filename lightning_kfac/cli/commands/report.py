"""Write a run as one HTML page that needs nothing else: what was done, measured, and not measured."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.console import console
from lightning_kfac.errors import InputError
from lightning_kfac.storage.earlier import adopt_run
from lightning_kfac.storage.files import new_file, writing
from lightning_kfac.storage.locks import FileLock
from lightning_kfac.storage.manifest import Entry, manifest_above

TITLE = "lightning_kfac report:"


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", type=str, help="Folder of a run: of fit, validate, predict, sweep, scan or attack.")
    parser.add_argument("--output", type=str, help="The HTML file. (default: report.html in the run's folder)")


def run(options: Namespace) -> None:
    """Writes."""
    # Here, so that the help does not wait for them.
    from lightning_kfac.reporting.page import page
    from lightning_kfac.reporting.run import read_run
    from lightning_kfac.reporting.sections import ORDER

    folder = read_run(Path(options.run))
    path = Path(options.output) if options.output else folder.path / "report.html"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        adopt_run(folder.path)
    _check_older(path)
    # The file is begun first: a disk that takes nothing shows before the work.
    with FileLock(path, "name another --output"), new_file(path) as partial:
        text = page(f"{TITLE} {folder.path.resolve().name}", (make(folder) for make in ORDER))
        partial.write_text(text, "utf-8")
    console.print(f"{path} ({len(text) / 1e6:.1f} MB, self-contained)")


def _check_older(path: Path) -> None:
    """Only an earlier report is replaced, and none that somebody has changed."""
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"--output {path} is no file; name the HTML file")
    manifest = manifest_above(path)
    with open(path, "rb") as file:
        ours = f"<title>{TITLE}".encode() in file.read(2000)
    if not ours or (manifest is not None and manifest.changed(path)):
        raise InputError(f"{path} is there already, and not as a report of this program was; name another --output")
    if manifest is not None and not manifest.owns(path):
        manifest.add({manifest.name(path): Entry()})
