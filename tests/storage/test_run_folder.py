"""Whose a run's folder is."""

import json
import os
import signal

import pytest

from lightning_kfac.errors import InputError
from lightning_kfac.storage.files import new_file
from lightning_kfac.storage.locks import LOCK
from lightning_kfac.storage.run_folder import RunFolder
from tests.storage.test_damage import in_child


def finished(path, kind="collection"):
    folder = RunFolder(path, kind)
    folder.lock()
    folder.check(overwrite=False)
    folder.claim("fit")
    folder.begin("fit", "seed: 0\n")
    folder.add_result({"stage": "baseline"})
    folder.finish()
    folder.unlock()
    return folder


def test_a_run_from_its_begin_to_its_end(tmp_path):
    finished(tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "manifest.jsonl", "results.jsonl", "run.json"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_overwrite_names_what_it_replaces_and_replaces_nothing_else(tmp_path, capsys):
    run = tmp_path / "run"
    finished(run)
    (run / "notes.txt").write_text("mine")
    folder = RunFolder(run)
    folder.lock()
    with pytest.raises(InputError, match="already holds a finished run; add overwrite"):
        folder.check(overwrite=False)
    folder.check(overwrite=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{run}: overwrite replaces results.jsonl, config.yaml, run.json of an earlier run" in said
    folder.begin("fit", "seed: 1\n")
    assert (run / "previous" / "config.yaml").read_text() == "seed: 0\n"
    folder.finish()
    folder.unlock()
    assert not (run / "previous").exists() and (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["crystallize", "training", "validate", "predict", "sweep", "scan"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_kinds_of_run_are_refused(tmp_path, kind, overwrite):
    finished(tmp_path / "run")
    with pytest.raises(
        InputError, match=rf"holds a run of another kind \(collection, this is {kind}\); choose another"
    ):
        RunFolder(tmp_path / "run", kind).check(overwrite)


@pytest.mark.parametrize(
    "place", ["state/thesis.txt", "previous/old", "tensorboard/keep.txt", "factors/notes", "model"]
)
def test_foreign_files_where_a_run_writes_are_named(tmp_path, place):
    (tmp_path / "run" / place).parent.mkdir(parents=True)
    (tmp_path / "run" / place).write_text("mine")
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    with pytest.raises(InputError, match=f"{place}: no run of this program wrote it; move it away, or choose another"):
        folder.check(overwrite=True)
    folder.unlock()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert files == [tmp_path / "run" / place]


def test_foreign_files_that_came_after_a_run_are_named(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.claim("fit")
    (tmp_path / "run" / "tensorboard").mkdir()
    (tmp_path / "run" / "tensorboard" / "events.out.tfevents.1.host.2.3").write_text("ours")
    folder.finish()
    folder.check(overwrite=True)
    (tmp_path / "run" / "tensorboard" / "keep.txt").write_text("mine")
    with pytest.raises(InputError, match=r"keep.txt: no run of this program wrote it"):
        folder.check(overwrite=True)


def test_one_writer(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.lock()
    said = in_child(lambda: RunFolder(tmp_path / "run").lock())
    assert said.startswith("InputError") and "is writing to this folder; wait for it, or choose another" in said
    first.unlock()
    assert not (tmp_path / "run").exists()  # nothing was written, nothing stays


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    def die():
        RunFolder(tmp_path / "run").lock()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == "SIGKILL" and (tmp_path / "run" / LOCK).exists()
    finished(tmp_path / "run")
    assert not (tmp_path / "run" / LOCK).exists()  # it names a host


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path):
    def die():
        folder = RunFolder(tmp_path / "run")
        folder.lock()
        folder.check(overwrite=False)
        folder.claim("fit")
        with new_file(tmp_path / "run" / "results.jsonl") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == "SIGKILL" and list((tmp_path / "run").glob("results.jsonl.part*"))
    (tmp_path / "run" / "results.jsonl.part1.csv").write_text("mine")
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    folder.check(overwrite=False)
    assert folder.interrupted
    assert [p.name for p in (tmp_path / "run").glob("results.jsonl*")] == ["results.jsonl.part1.csv"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_folder_of_another_user_is_named(tmp_path_factory):
    base = tmp_path_factory.mktemp("shared")
    place = base
    while place.stat().st_uid == 0 and place != place.parent and not place.stat().st_mode & 0o001:
        place.chmod(place.stat().st_mode | 0o011)
        place = place.parent
    finished(base / "run")
    before = {path: path.read_bytes() for path in (base / "run").iterdir()}

    def as_nobody():
        os.setgid(65534)
        os.setuid(65534)
        RunFolder(base / "run").lock()

    said = in_child(as_nobody)
    assert "run: cannot be written: permission denied; get it, or choose another folder with trainer" in said
    assert {path: path.read_bytes() for path in (base / "run").iterdir()} == before
