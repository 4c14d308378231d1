"""The package as `pip install .` leaves it: a wheel, an empty folder, and no clone in sight."""

import os
import shutil
import subprocess
import sys

import pytest

from lightning_kfac.cli.shipped import shipped
from tests.forks import ROOT

SOURCES = ("lightning_kfac", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, its metadata and its command, from a wheel that is built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:  # not in the clone: a build leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", *alone, "--wheel-dir", folder, folder / "source"],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", folder / "site", wheel],
                   check=True, timeout=120, capture_output=True)  # fmt: skip
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Runs a command in an empty folder; returns what it printed."""
    (tmp_path / "empty").mkdir()
    env = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [str(word) for word in words]
        done = subprocess.run(
            command, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def command(installed):
    return installed / "bin" / "lightning-kfac"


def test_the_clone_is_out_of_sight(run, installed):
    where = (
        "import lightning_kfac, lightning_kfac.cli.shipped as s; print(lightning_kfac.__file__, s.find_config('mine'))"
    )
    package, config = run(sys.executable, "-c", where).split()
    assert package == str(installed / "lightning_kfac" / "__init__.py")
    assert config == str(installed / "lightning_kfac" / "configs" / "mine.yaml")


def test_help_and_configs(run, command):
    out = run(command, "--help")
    assert "usage: lightning-kfac COMMAND" in out and "\n  fit  " in out and "\n  sweep  " in out
    listed = run(command, "configs")
    assert all(f"\n{name} " in f"\n{listed}" for name in shipped())
    assert run(command, "configs", "quickstart") == (ROOT / "configs" / "quickstart.yaml").read_text()


def test_quickstart_from_an_empty_folder(run, command, tmp_path, few):
    """Cut down: 600 tokens, ten sequences."""
    cut = {"data.max_tokens": 600, "data.heldout_tokens": 400, "data.memorized": few, "data.sets": "null"}
    words = [word for name, value in cut.items() for word in (f"--{name}", value)]
    out = run(command, "fit", "--config", "quickstart", *words)
    assert "Before and after" in out and "Outputs in runs/quickstart/: factors/, edited/, results.jsonl" in out
    out = run(sys.executable, "-m", "lightning_kfac", "inspect", "--factors", "runs/quickstart/factors")
    assert "4 layers; model demo" in out and "inspect took" in out
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["runs"]
