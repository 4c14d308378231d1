"""What a run folder holds, read for a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder, load_factors
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.manifest import Manifest
from lightning_kfac.storage.results import read_results
from lightning_kfac.storage.run_folder import EDIT_FILE

# Fields of results that are in tables of their own.
ASIDE = ("rank", "attack", "method")
FORECAST = "forecast.json"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: The folder.
        status: ``run.json``: command, times, version; empty for a sweep, a scan or a search.
        config: ``config.yaml``; empty where there is none.
        results: Rows of ``results.jsonl``, of each edit the latest.
        edit: ``edit.json`` of the edited model.
        comparison: ``comparison.json``: examples, changes of token losses.
        extraction: ``extraction.json``: expected share extracted over the number of tries, by set and stage.
        findings: ``mining.json``, ``recommended.json``, ``crystallization.json``, ``bands.json``, ``abilities.json``,
            if they are there.
        forecast: ``forecast.json``, in the folder or in ``forecast/``.
        factors: The collected factors, if any.
        compared: ``compared.json`` of a comparison of methods; ``attacked`` has the results of attacks on each.
    """

    path: Path
    status: dict[str, Any]
    config: str
    results: list[dict[str, Any]]
    edit: dict[str, Any]
    comparison: dict[str, Any]
    extraction: dict[str, Any]
    findings: dict[str, dict[str, Any]]
    forecast: dict[str, Any]
    factors: FactorFolder | None
    compared: dict[str, Any]
    attacked: dict[str, list[dict[str, Any]]]

    @property
    def is_grid(self) -> bool:
        """Whether the results are those of many edits."""
        return any("point" in row for row in self.results) and not (self.attacks or self.compared)

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """The results of an attacked model, those of both models without an attack first; empty for other runs."""
        return self.results if any("attack" in row for row in self.results) else []

    @property
    def scan(self) -> Path:
        """The figure of a scan; only a scan has one."""
        return self.path / "scan.png"

    @property
    def windows(self) -> Path:
        """The figure of a search: where documents come out."""
        return self.path / "windows.png"

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """The latest result of each stage; those of a rank, in a study of attention, are in its own table."""
        return {row["stage"]: row for row in self.results if all(row.get(key) is None for key in ASIDE)}


def read_run(path: Path) -> Run:
    """Reads a run folder.

    Raises:
        InputError: There is no such folder, or no run wrote it.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder")
    if Manifest(path).kind == "audit":
        raise InputError(f"{path}: the folder of an audit, which wrote its own page, audit.html")
    names = ("mining", "recommended", "crystallization", "bands", "abilities")
    findings = {name: found for name in names if (found := _json(path / f"{name}.json"))}
    forecast = _json(path / FORECAST) or _json(path / "forecast" / FORECAST)
    results = read_results(path / "results.jsonl")
    if results and "context" in results[-1]:  # what was measured on other text, or in another dtype, is no part of it
        results = [row for row in results if row.get("context") == results[-1]["context"]]
    if not (results or findings or forecast or (path / "run.json").is_file()):
        raise InputError(f"{path}: holds no results.jsonl and no run.json; name the folder of a run")
    edits = [_json(path / place / EDIT_FILE) for place in ("edited", "patch")]
    factors = load_factors(path / "factors") if (path / "factors" / "metadata.json").is_file() else None
    config = path / "config.yaml"
    return Run(
        path,
        _json(path / "run.json"),
        config.read_text("utf-8", errors="replace") if config.is_file() else "",
        list({row.get("point", number): row for number, row in enumerate(results)}.values()),
        next(filter(None, edits), {}),
        _json(path / "comparison.json"),
        _json(path / "extraction.json"),
        findings,
        forecast,
        factors,
        compared := _json(path / "compared.json"),
        {label: read_results(path / file) for label, file in compared.get("attacked", {}).items()},
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "remove the file") if path.is_file() else {}
