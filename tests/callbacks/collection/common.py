"""A run of seconds that writes its state after every batch, and what is left of it after a kill."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lightning_kfac import load_factors


def options(texts, folder, **changes):
    """A run of seconds that writes its state after every batch."""
    settings = {
        "model.model_name": "demo",
        "model.dtype": "float32",
        "data.corpus": texts / "corpus.jsonl",
        "data.max_tokens": 700,
        "data.seq_len": 32,
        "data.batch_size": 2,
        "data.heldout": texts / "heldout.jsonl",
        "data.heldout_tokens": 300,
        "data.memorized": texts / "few.jsonl",
        "collect.blocks": "[2]",
        "collect.projections": "[gate,up]",
        "collect.save_minutes": 0,
        "edit.rho": 0.8,
        "trainer.logger": "false",
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder,
    } | changes
    return ["fit", *[word for name, value in settings.items() for word in (f"--{name}", str(value))]]


def outcome(folder) -> dict:
    """Every bit that a run gives: files by content, results without their times."""
    files = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        if not {"bases", "data"} & set(path.relative_to(folder).parts):
            tensors = load_file(path)
            digest = hashlib.sha256(b"".join(tensors[k].view(torch.uint8).numpy().tobytes() for k in sorted(tensors)))
            files[str(path.relative_to(folder))] = digest.hexdigest()
    results = Path(folder) / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in rows:
        row.pop("timestamp")
    return {"files": files, "results": rows, "edit": json.loads((Path(folder) / "edited" / "edit.json").read_text())}


def look_at_ruins(folder, reference):
    """What stands under its name after a kill is whole and right."""
    if (folder / "factors").exists():
        factors = load_factors(folder / "factors")
        assert all(factors[name].A.isfinite().all() for name in factors)
    for name, digest in reference["files"].items():
        path = folder / name
        if path.exists():
            tensors = load_file(path)
            found = hashlib.sha256(b"".join(tensors[k].view(torch.uint8).numpy().tobytes() for k in sorted(tensors)))
            assert found.hexdigest() == digest, name


def kill_and_go_on(forks, args, folder, logs, kills, reference=None):
    """Runs a command that dies again and again until it ends; returns the number of deaths and the last output."""
    for deaths, kill_at in enumerate([*kills, 0]):
        code, said = forks.run(args, logs / f"log{deaths}", watched=str(folder), kill_at=kill_at)
        if code == 0:
            return deaths, said
        assert code == -9, said
        if reference:
            look_at_ruins(folder, reference)
    raise AssertionError("it never ended")
