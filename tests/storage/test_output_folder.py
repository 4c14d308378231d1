"""Outputs that are written as a whole: reserved before the work, one writer, nobody else's replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_kfac.errors import InputError
from lightning_kfac.storage.manifest import Manifest
from lightning_kfac.storage.output_folder import OutputFolder
from tests.storage.test_damage import in_child


def write(path, kind="inspect", overwrite=False, text="new", name="spectra.json"):
    with OutputFolder(path, kind, overwrite) as output:
        output.new.mkdir()
        (output.new / name).write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_output_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "out"
    with OutputFolder(path, "inspect", False) as output:
        output.new.mkdir()
        (output.new / "spectra.json").write_text("{}")
        assert not path.exists()
    assert names(path.parent) == {"out"} and names(path) == {"manifest.jsonl", "spectra.json"}
    assert Manifest(path).kind == "inspect" and Manifest(path).entries["spectra.json"].size == 2


def test_a_checkpoint_says_what_is_in_it_in_its_record(tmp_path):
    with OutputFolder(tmp_path / "e", "apply", False) as output:
        output.new.mkdir()
        (output.new / "edit.json").write_text('{"layers": []}')
        (output.new / "model.safetensors").write_bytes(b"weights")
    assert names(tmp_path / "e") == {"edit.json", "model.safetensors"}
    about = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert about["layers"] == [] and about["files"]["model.safetensors"]["size"] == 7
    (tmp_path / "e" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine.txt: no run of this program wrote it; move it away, or choose another"):
        write(tmp_path / "e", "apply", overwrite=True)


def test_only_an_earlier_output_of_the_same_command_is_replaced(tmp_path, capsys):
    path = tmp_path / "out"
    write(path)
    with pytest.raises(InputError, match="is already there; add --overwrite to replace it, or choose"):
        write(path)
    with pytest.raises(InputError, match="is already there; choose another --output"):
        write(path, "bands", overwrite=True)
    write(path, overwrite=True, text="newer")
    assert "overwrite replaces 2 files" in " ".join(capsys.readouterr().out.split())
    assert (path / "spectra.json").read_text() == "newer" and names(tmp_path) == {"out"}
    (path / "spectra.json").write_text("by hand")
    with pytest.raises(InputError, match="somebody has changed it"):
        write(path, overwrite=True)
    assert names(tmp_path) == {"out"} and (path / "spectra.json").read_text() == "by hand"


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    (tmp_path / "free.part").mkdir()
    (tmp_path / "free.part" / "notes").write_text("mine")
    for name in ("out", "free"):
        with pytest.raises(InputError, match=r"is already there; choose another|in the way, and this"):
            write(tmp_path / name, overwrite=True)
    assert names(tmp_path) == {"out", "free.part"} and (tmp_path / "free.part" / "notes").exists()


def test_what_somebody_puts_there_meanwhile_stays(tmp_path):
    write(tmp_path / "out")
    with OutputFolder(tmp_path / "out", "inspect", True) as output:
        output.new.mkdir()
        (tmp_path / "out" / "notes").write_text("mine")
    assert [p.read_text() for p in tmp_path.rglob("notes")] == ["mine"]


def test_the_second_writer_is_refused(tmp_path):
    with OutputFolder(tmp_path / "out", "inspect", False) as output:
        output.new.mkdir()
        said = in_child(lambda: write(tmp_path / "out"))
        assert "InputError" in said and "is writing to this folder; wait for it, or choose another --output" in said
    assert in_child(lambda: write(tmp_path / "out")).startswith("InputError")  # the first has finished


@pytest.mark.parametrize("older", [False, True])
def test_a_kill_anywhere_leaves_the_older_or_the_new_one(tmp_path, older):
    path = tmp_path / "out"
    seen = []
    for step in range(60):
        for left in list(tmp_path.iterdir()):
            shutil.rmtree(left)
        if older:
            write(path, text="older")

        def die_there(step=step):
            events = iter(range(step))

            def count(event, args):
                touched = event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
                if touched and str(tmp_path) in str(args[0]) and next(events, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            write(path, overwrite=True)

        outcome = in_child(die_there)
        write(path, overwrite=True, text="again")  # what is left is in nobody's way
        assert names(tmp_path) == {"out"} and (path / "spectra.json").read_text() == "again", step
        seen.append(outcome)
        if outcome == "done":
            break
    assert seen[-1] == "done" and set(seen[:-1]) == {"SIGKILL"} and len(seen) > 10


def test_errors_and_disks_that_take_nothing(tmp_path):
    with pytest.raises(KeyError), OutputFolder(tmp_path / "out", "inspect", False) as output:
        output.new.mkdir()
        raise KeyError
    assert not names(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(1 << 17))
        with pytest.raises(InputError, match="no space left on the device"), OutputFolder(disk / "o", "inspect", False):
            raise AssertionError("the work has begun")
        assert names(disk) == {"filler"}
        (disk / "filler").unlink()
        write(disk / "o")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
        with pytest.raises(InputError, match="the disk is read-only"), OutputFolder(disk / "p", "inspect", False):
            raise AssertionError("the work has begun")
    finally:
        subprocess.run(["umount", "-l", str(disk)], timeout=20, check=True)
