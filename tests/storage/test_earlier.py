"""Folders of version 0.1, which have no manifest, are known by their own files and by nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_kfac import save_factors
from lightning_kfac.errors import InputError
from lightning_kfac.storage.earlier import adopt_output, adopt_run, kind_of_output
from lightning_kfac.storage.manifest import MANIFEST, Manifest, files_below
from lightning_kfac.storage.run_folder import OUTPUTS, PREVIOUS, STATE, RunFolder
from tests.storage.common import made_factors

MADE = Path(__file__).parents[1] / "v0_1"


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_every_file_of_a_run_is_known_and_no_other(tmp_path, name):
    run = shutil.copytree(MADE / name, tmp_path / "run")
    (run / STATE).mkdir(exist_ok=True)
    (run / "edited").mkdir(exist_ok=True)
    for mine in ("notes.txt", "state/thesis.txt", "edited/README.md", "factors.part1"):
        (run / mine).write_text("mine")
    adopt_run(run)
    manifest = Manifest(run)
    assert manifest.kind == "collection"
    foreign = {manifest.name(path) for path in files_below(run) if not manifest.owns(path)}
    assert foreign == {"notes.txt", "state/thesis.txt", "edited/README.md", "factors.part1"}
    for entry in (*OUTPUTS, STATE, PREVIOUS, "data"):
        manifest.remove(entry)
    assert {manifest.name(path) for path in files_below(run)} == foreign | {MANIFEST}


def test_half_written_files_of_an_interrupted_run_are_removed(tmp_path):
    run = shutil.copytree(MADE / "interrupted", tmp_path / "run")
    assert list(run.rglob("*.part????????"))
    folder = RunFolder(run)
    folder.lock()
    folder.check(overwrite=False)
    folder.unlock()
    assert folder.interrupted and not list(run.rglob("*.part????????"))
    assert (run / "state" / "step-0000000005" / "checkpoint.json").is_file()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"run.json": {"status": "finished", "command": "edit.py sweep --output s", "version": "0.1.0"}}, "sweep"),
        ({"run.json": {"status": "finished", "command": "train.py validate", "version": "0.1.0"}}, "validate"),
        ({"run.json": {"status": "running", "command": "train.py fit", "version": "0.1.0"}, "model/x": 1}, "training"),
        ({"run.json": {"status": "running", "command": "train.py fit", "version": "0.1.0"}}, "collection"),
        ({"results.jsonl": {"point": "a", "context": "b"}}, "sweep"),
        ({"results.jsonl": {"point": "a"}, "halves/choose.jsonl": 1}, "scan"),
        ({"mining/rank-0.jsonl": {"search": "0f3a"}}, "predict"),
        ({"run.json": {"runs": ["mine"]}}, None),
        ({"run.json": [], "results.jsonl": {"stage": "mine"}, "mining.json": {"gold": 7}}, None),
        ({"state/thesis.txt": 1}, None),
    ],
)
def test_kinds_of_run(tmp_path, files, kind):
    for name, contents in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(contents) + "\n")
    adopt_run(tmp_path)
    assert Manifest(tmp_path).kind == kind
    assert (tmp_path / MANIFEST).exists() == (kind is not None)


def test_outputs_of_one_command(tmp_path):
    assert kind_of_output(MADE / "finished" / "edited") == kind_of_output(MADE / "patch") == "apply"
    save_factors(made_factors(), tmp_path / "collected")
    save_factors(made_factors(), tmp_path / "imported", {"imported_from": "kronfluence"})
    assert kind_of_output(tmp_path / "collected") is None and kind_of_output(tmp_path / "imported") == "import"
    edited = shutil.copytree(MADE / "finished" / "edited", tmp_path / "edited")
    adopt_output(edited)
    Manifest(edited).check(".")
    (edited / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt: no run of this program wrote it"):
        Manifest(edited).check(".")
