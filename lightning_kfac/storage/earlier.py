"""What version 0.1 wrote, which had no manifest: known by its own files, and by nothing else."""

import json
import re
from pathlib import Path
from typing import Any

from lightning_kfac.storage.files import PARTIAL
from lightning_kfac.storage.manifest import Entry, Manifest, files_below

PART = rf"(\{PARTIAL}[0-9a-f]{{8}})?"
FACTORS = rf"(layer_\d{{4}}\.safetensors|metadata\.json|bases/\d+-[0-9a-f]{{32}}\.safetensors{PART}"
FACTORS += r"|moments/(layer_\d{4}\.safetensors|metadata\.json))"
CHECKPOINT = (
    r"(config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
CHECKPOINT += r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
CHECKPOINT += r"|vocab\.json|merges\.txt|chat_template\.jinja|edit\.json|restored\.json)"
PATCH = r"(edit\.json|patch\.safetensors)"
BOARD = r"tensorboard/(.*/)?(events\.out\.tfevents\.\d+\..+|hparams\.yaml)"
STATE = rf"state/(step-\d{{10}}(\{PARTIAL})?/(checkpoint\.json|rank-\d{{5}}\.safetensors){PART}"
STATE += rf"|pass-\d{{4}}/({FACTORS}|moments\.safetensors)|evaluation-[\w-]+/rank-\d+\.(jsonl|bin))"
OF_RUNS = rf"(run\.json|config\.yaml|results\.jsonl|comparison\.json|crystallization\.json|report\.html){PART}"
OF_RUNS += rf"|\.lock|data/[\w.-]+-[0-9a-f]{{16}}\.(tokens|ends\.npy)|(factors|domains/[^/]+|snapshots/\d+)/{FACTORS}"
OF_RUNS += rf"|(edited|model)/{CHECKPOINT}|patch/{PATCH}|residuals/(metadata\.json|[\w.]+\.safetensors)|{BOARD}|{STATE}"
SEARCH = r"(memorized|repetitions)\.jsonl|mining\.json|mining/rank-\d+\.jsonl"
GRID = r"(pareto|scan)\.png|reported\.jsonl|recommended\.json|halves/(choose|report)\.jsonl"
RUN = re.compile(rf"(previous/)?({OF_RUNS})|{SEARCH}|{GRID}")
# Outputs of one command: the file that tells it, and all that it wrote.
OUTPUTS = {
    "restore": ("restored.json", re.compile(CHECKPOINT)),
    "apply": ("edit.json", re.compile(rf"{CHECKPOINT}|{PATCH}")),
    "inspect": ("spectra.json", re.compile(rf"spectra\.json|(spectra|kept)_[\w.-]+\.png|{BOARD}")),
    "bands": ("bands.json", re.compile(rf"(bands|run)\.json|config\.yaml|(bands|ratios)_[\w.-]+\.png|data/.*|{BOARD}")),
    "import": ("metadata.json", re.compile(FACTORS)),
}
GROWING = ("state", "mining", "tensorboard")


def adopt_run(folder: Path) -> None:
    """Gives a run's folder of version 0.1 its manifest; leaves any other folder alone."""
    if Manifest(folder).kind is None and (kind := _kind_of_run(folder)) is not None:
        _list(folder, kind, RUN)


def adopt_output(folder: Path) -> None:
    """The same of the output of a single command."""
    kind = kind_of_output(folder)
    if Manifest(folder).kind is None and kind is not None:
        _list(folder, kind, OUTPUTS[kind][1])


def kind_of_output(folder: Path) -> str | None:
    """Which command wrote a folder; None where none of version 0.1 did."""
    for kind, (telling, _) in OUTPUTS.items():
        about = _json(folder / telling)
        if about and (kind != "import" or "imported_from" in about):
            return kind
    return None


def _kind_of_run(folder: Path) -> str | None:
    """From ``run.json``, or the files that only a search wrote."""
    status = _json(folder / "run.json")
    words = str(status.get("command", "")).split()
    if {"status", "command", "version"} <= status.keys():
        command = next((word for word in words if word in ("fit", "validate", "sweep", "scan")), None)
        return _kind_of_fit(folder) if command == "fit" else command
    if "point" in _first_row(folder / "results.jsonl"):
        return "scan" if (folder / "halves").is_dir() else "sweep"
    if "near_ties" in _json(folder / "mining.json") or "search" in _first_row(folder / "mining" / "rank-0.jsonl"):
        return "predict"
    return None


def _kind_of_fit(folder: Path) -> str:
    if (folder / "residuals").is_dir() or (folder / "crystallization.json").is_file():
        return "crystallize"
    return "training" if (folder / "model").is_dir() else "collection"


def _first_row(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        return _object(file.readline(1 << 20))


def _list(folder: Path, kind: str, layout: re.Pattern[str]) -> None:
    manifest = Manifest(folder)
    names = [manifest.name(path) for path in files_below(folder)]
    manifest.create(kind)
    manifest.add({name: Entry("folder") for name in GROWING if (folder / name).is_dir()})
    manifest.add({name: Entry("part" if PARTIAL in name else "file") for name in names if layout.fullmatch(name)})


def _json(path: Path) -> dict[str, Any]:
    return _object(path.read_bytes()) if path.is_file() else {}


def _object(text: bytes) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return contents if isinstance(contents, dict) else {}
