"""What commands do to folders that are not theirs, to each other's, and on disks that take nothing."""

import os
import shutil
import stat
import subprocess
import time

import pytest
import torch

from lightning_kfac import load_factors
from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.cli.train import main
from lightning_kfac.storage.manifest import files_below
from tests.common import failed, small
from tests.forks import ROOT, Run

COMMANDS = {
    "crystallize": [
        "fit",
        "--config",
        "configs/crystallize.yaml",
        "--data.memorized",
        "null",
        "--crystallize.ranks",
        "[1]",
    ],
    "training": ["fit", "--config", "configs/demo_model.yaml"],
    "validate": ["validate", "--model.model_name", "demo", "--data.heldout", "embedded"],
    "predict": ["predict", "--config", "configs/mine.yaml"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished collection with an edit."""
    folder = tmp_path_factory.mktemp("collected") / "run"
    main(["fit", *small(folder, "null", **{"edit.rho": 0.8})])
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in files_below(folder)}


def refused(capfd, args) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in args])
    assert stopped.value.code == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize("status", ["finished", "running"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_of_another_kind_is_left_alone(run, tmp_path, capfd, monkeypatch, kind, status):
    monkeypatch.chdir(ROOT)
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished",', f'"{status}",'))
    before = contents(folder)
    args = [*COMMANDS[kind], "--trainer.default_root_dir", folder]
    for flag in [[], ["--overwrite"]] if kind != "validate" else [[]]:
        said = refused(capfd, [*args, *flag])
        assert f"holds a run of another kind (collection, this is {kind}); choose another folder" in said
        assert contents(folder) == before


@pytest.mark.parametrize("command", ["sweep", "scan", "apply", "import", "inspect", "restore", "bands", "attack"])
def test_no_command_writes_over_a_run(run, tmp_path, few, capsys, command):
    folder = shutil.copytree(run, tmp_path / "run")
    before = contents(folder)
    options = {"factors": run / "factors", "output": folder}
    if command in ("sweep", "scan"):
        options |= {"data.memorized": few, "data.heldout": "embedded"}
    if command == "import":
        options = {"source": run / "factors", "output": folder}
    if command in ("restore", "attack"):
        options = {"model": run / "edited", "output": folder}
    if command == "bands":
        options |= {"texts.memorized": few}
    flags = [] if command in ("sweep", "scan", "attack") else ["--overwrite"]
    said = failed(capsys, command, *flags, **options)
    assert "holds a run of another kind" in said or "is already there; choose another --output" in said
    assert contents(folder) == before


def test_foreign_files_stay_where_a_run_works(tmp_path, few, capfd):
    folder = tmp_path / "project"
    for place in ("corpus.part1.jsonl", "shots.particles/a.csv", "data/mine.csv", "manifest.json", ".lock"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("mine")
    before = contents(folder)
    main(["fit", *small(folder, few)])
    main(["fit", *small(folder, few), "--overwrite"])
    assert contents(folder).items() >= before.items()
    (folder / "factors" / "notes.txt").write_text("mine")
    assert "factors/notes.txt: no run of this program wrote it; move it" in refused(
        capfd, ["fit", *small(folder, few), "--overwrite"]
    )
    assert contents(folder).items() >= before.items() and (folder / "factors" / "notes.txt").exists()


def test_a_search_replaces_its_own_files_only(tmp_path, few, capfd):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "%s"}\n' % ("a word " * 300))
    args = ["predict", "--model.model_name", "demo", "--data.corpus", corpus, "--trainer.default_root_dir"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "memorized.jsonl").write_text("mine")
    for flag in ([], ["--overwrite"]):
        said = refused(capfd, [*args, tmp_path / "mine", *flag])
        assert "memorized.jsonl: no run of this program wrote it" in said
    assert [p.name for p in files_below(tmp_path / "mine")] == ["memorized.jsonl"]
    words = [str(word) for word in (*args, tmp_path / "run")]
    main(words)
    assert "already holds a finished run; add --overwrite" in refused(capfd, words)
    (tmp_path / "run" / "mining").mkdir()
    (tmp_path / "run" / "mining" / "gold.txt").write_text("mine")
    assert "mining/gold.txt: no run of this program" in refused(capfd, [*words, "--overwrite"])
    (tmp_path / "run" / "mining" / "gold.txt").unlink()
    main([*words, "--overwrite"])
    assert "overwrite replaces memorized.jsonl, repetitions.jsonl, mining.json" in " ".join(
        capfd.readouterr().out.split()
    )


def test_two_edits_into_one_output(run, tmp_path, forks):
    """The second is refused at once, before it has loaded a model; the first is as if it had been alone."""
    words = ["apply", "--factors", str(run / "factors"), "--rho", "0.8", "--output", str(tmp_path / "e")]
    first = forks.start(Run(words, str(tmp_path / "first"), module="lightning_kfac"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "e.part").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = forks.start(Run(words, str(tmp_path / "second"), module="lightning_kfac"))
    codes = [forks.wait(first), forks.wait(second)]
    assert codes == [0, 2], (tmp_path / "second").read_text()
    said = (tmp_path / "second").read_text()
    assert f"process {first} on " in said and "is writing to this folder; wait for it" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "first", "second"]


def test_two_sweeps_into_one_output(run, tmp_path, few, forks):
    options = {"factors": run / "factors", "output": tmp_path / "s", "data.memorized": few, "rhos": "[0.6, 0.7, 0.8]"}
    words = ["sweep", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    first = forks.start(Run(words, str(tmp_path / "first"), module="lightning_kfac"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "s" / "manifest.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = forks.start(Run(words, str(tmp_path / "second"), module="lightning_kfac"))
    assert [forks.wait(first), forks.wait(second)] == [0, 2], (tmp_path / "second").read_text()
    assert f"process {first} on " in (tmp_path / "second").read_text()
    assert len((tmp_path / "s" / "results.jsonl").read_text().splitlines()) == 4


def test_an_import_that_is_killed_is_made_again(tmp_path, forks):
    """At every third piece of its work on files: the older factors stay, nothing is in the way of the next call."""
    A, G = torch.eye(8) * 3, torch.eye(6) * 2
    torch.save({"layer_3.gate_proj": (A, G), "layer_3.up_proj": (A, G)}, tmp_path / "kfac_statistics.pt")
    words = ["import", "--source", str(tmp_path / "kfac_statistics.pt"), "--output", str(tmp_path / "out" / "f")]
    how = {"module": "lightning_kfac", "watched": str(tmp_path / "out")}
    assert forks.run([*words, "--n_tokens", "50"], tmp_path / "log", **how)[0] == 0
    for kill_at in range(1, 200, 3):
        new = [*words, "--n_tokens", str(50 + kill_at), "--overwrite"]
        code, said = forks.run(new, tmp_path / "log", **how, kill_at=kill_at)
        assert code in (0, -9), said
        n_tokens = load_factors(tmp_path / "out" / "f")["model.layers.3.mlp.up_proj"].n_tokens
        assert n_tokens in (50, 50 + kill_at)
        assert forks.run([*words, "--n_tokens", "50", "--overwrite"], tmp_path / "log", **how)[0] == 0
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["f"]
        if code == 0:
            break
    assert code == 0 and kill_at > 15


@pytest.mark.parametrize("umask, expected", [(0o077, 0o600), (0o027, 0o640)])
def test_every_file_of_a_run_has_the_permissions_of_the_umask(tmp_path, few, umask, expected):
    before = os.umask(umask)
    try:
        main(["fit", *small(tmp_path / "run", few, **{"edit.rho": 0.8})])
        edit_main(["apply", "--factors", str(tmp_path / "run" / "factors"), "--output", str(tmp_path / "e")])
        edit_main(["report", str(tmp_path / "run")])
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for name in ("run", "e") for p in files_below(tmp_path / name)}
    assert len(modes) > 15 and {p: m for p, m in modes.items() if m != expected} == {}


def test_reports_replace_reports(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    edit_main(["report", str(folder)])
    edit_main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    (folder / "report.html").write_text(page.replace("</body>", "<p>my notes</p></body>"))
    (tmp_path / "index.html").write_text("<title>my page</title>")
    for words in ([str(folder)], [str(folder), "--output", str(tmp_path / "index.html")]):
        with pytest.raises(SystemExit):
            edit_main(["report", *words])
        assert "name another --output" in capsys.readouterr().err
    assert "my notes" in (folder / "report.html").read_text() and "my page" in (tmp_path / "index.html").read_text()
    edit_main(["report", str(folder), "--output", str(tmp_path / "other.html")])
    edit_main(["report", str(folder), "--output", str(tmp_path / "other.html")])
    assert sorted(p.name for p in tmp_path.glob("*.html*")) == ["index.html", "other.html"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 30 MB, to fill or to make read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], timeout=20, check=True)


def test_a_disk_that_takes_nothing_shows_before_the_work(run, small_disk, few, capsys, monkeypatch):
    folder = shutil.copytree(run, small_disk / "run")
    words = {
        "apply": {"factors": run / "factors", "output": small_disk / "e"},
        "inspect": {"factors": run / "factors", "output": small_disk / "i"},
        "import": {"source": run / "factors", "output": small_disk / "f"},
        "restore": {"model": run / "edited", "output": small_disk / "r"},
        "bands": {"factors": run / "factors", "texts.a": "embedded", "output": small_disk / "b"},
        "sweep": {"factors": run / "factors", "data.memorized": few, "output": small_disk / "s"},
    }
    before = sorted(small_disk.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=20)
    monkeypatch.setattr("lightning_kfac.cli.options.load_model", None)  # no work is done
    try:
        for command, options in words.items():
            assert "the disk is read-only; make it writable" in failed(capsys, command, **options), command
        with pytest.raises(SystemExit) as stopped:
            edit_main(["report", str(folder)])
        assert stopped.value.code == 2 and "the disk is read-only" in capsys.readouterr().err
        edit_main(["inspect", "--factors", str(folder / "factors")])  # bases that cannot be kept are computed
        with pytest.raises(SystemExit):
            main(["fit", *small(small_disk / "other", few)])
        assert "the disk is read-only" in capsys.readouterr().err
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True, timeout=20)
    assert sorted(small_disk.rglob("*")) == before


def test_room_for_a_checkpoint_is_asked_for_before_the_model_is_read(run, small_disk, capsys, monkeypatch):
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "filler").write_bytes(bytes(free - 2_000_000))
    options = {
        "apply": {"factors": run / "factors", "output": small_disk / "e"},
        "restore": {"model": run / "edited", "output": small_disk / "r"},
    }
    with monkeypatch.context() as patched:
        patched.setattr("lightning_kfac.cli.options.load_model", None)
        for command, words in options.items():
            assert "needs 4 MB, the disk has 2 MB left; free some" in failed(capsys, command, **words)
    (small_disk / "filler").unlink()
    for command, words in options.items():
        edit_main([command, *(str(word) for name, value in words.items() for word in (f"--{name}", value))])
    assert sorted(path.name for path in small_disk.iterdir()) == ["e", "r"]


def test_a_full_disk_leaves_nothing_half_written_and_a_retry_works(run, small_disk, few, capsys):
    folder = shutil.copytree(run, small_disk / "run")
    edit_main(["report", str(folder)])
    page = (folder / "report.html").read_bytes()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "filler").write_bytes(bytes(free - 90_000))
    sweep = {"factors": run / "factors", "output": small_disk / "s", "rhos": "[0.7]", "data.heldout": "embedded"}
    sweep |= {"data.memorized": few, "data.heldout_tokens": 400, "data.seq_len": 64, "accelerator": "cpu"}
    words = [word for name, value in sweep.items() for word in (f"--{name}", str(value))]
    for command in (["report", str(folder)], ["sweep", *words]):
        with pytest.raises(SystemExit) as stopped:
            edit_main(command)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "no space left on the device; free some" in said and "Traceback" not in said
    assert not list(small_disk.rglob("*.part*")) and (folder / "report.html").read_bytes() == page
    rows = (small_disk / "s" / "results.jsonl").read_text().splitlines()
    assert len(rows) == 2  # what was measured stays
    (small_disk / "filler").unlink()
    edit_main(["report", str(folder)])
    edit_main(["sweep", *words])
    assert (small_disk / "s" / "results.jsonl").read_text().splitlines() == rows
    assert (small_disk / "s" / "pareto.png").is_file()


@pytest.mark.parametrize("output", ["", "http://example.org/x", "memory://x"])
def test_an_output_is_a_local_path(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    commands = [
        ["audit", "--model", "demo", "--texts", "demo:unseen.jsonl"],
        ["apply", "--factors", "f"],
        ["inspect", "--factors", "f"],
        ["import", "--source", "f"],
        ["report", "run"],
    ]
    for words in commands:
        with pytest.raises(SystemExit) as stopped:
            edit_main([*words, "--output", output])
        assert stopped.value.code == 2 and "error: --output " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
