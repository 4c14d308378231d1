"""Configs that come along, by name."""

import json

import pytest
import yaml

from lightning_kfac.cli.edit import main as edit
from lightning_kfac.cli.main import main
from lightning_kfac.cli.shipped import find_config, shipped, with_config_paths
from lightning_kfac.errors import InputError
from tests.common import results, small
from tests.forks import ROOT


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "configs" / "quickstart.yaml")
    assert {find_config(name) for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml")} == {expected}
    assert find_config("mine/quickstart.yaml") == "mine/quickstart.yaml"  # its own error says that it is not there
    (tmp_path / "quickstart").mkdir()
    assert find_config("quickstart") == expected
    (tmp_path / "quickstart.yaml").write_text("")
    assert find_config("quickstart.yaml") == "quickstart.yaml" and find_config("quickstart") == expected
    with pytest.raises(InputError, match=r"nothing.yaml: cannot be read: .* `python edit.py configs` lists"):
        find_config("nothing.yaml")


def test_every_way_to_name_one_on_a_command_line():
    path = str(ROOT / "configs" / "sweep.yaml")
    assert with_config_paths(["fit", "--config", "sweep", "-c", "sweep", "--config=sweep", "--output", "sweep"]) == [
        "fit", "--config", path, "-c", path, f"--config={path}", "--output", "sweep",
    ]  # fmt: skip
    assert with_config_paths(["fit", "--config"]) == ["fit", "--config"]


def test_configs_are_listed_with_a_line_each(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    edit(["configs"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "took" not in out
    for name, path in shipped().items():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        comment = next(line for line in path.read_text().splitlines() if line.startswith("# "))
        assert line.split()[1:4] == comment.split()[1:4]
    assert "cluster/collect.sbatch" in shipped()


def test_one_is_printed_as_it_is(capsys):
    edit(["configs", "quickstart"])
    assert capsys.readouterr().out == (ROOT / "configs" / "quickstart.yaml").read_text()
    with pytest.raises(SystemExit):
        edit(["configs", "nothing"])
    assert "error: nothing: no such config; `python edit.py configs` lists them" in capsys.readouterr().err


def test_a_run_by_the_name_of_its_config(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = small(tmp_path / "run", few)
    place = words.index("--trainer.default_root_dir")
    main(["fit", "--config", "quickstart", *words[:place], *words[place + 2 :], "--data.sets", "null"])
    assert [row["stage"] for row in results("runs/quickstart")] == ["baseline", "edited"]
    status = json.loads((tmp_path / "runs" / "quickstart" / "run.json").read_text())
    assert status["command"].startswith("python train.py fit --config quickstart --model.model_name demo")
    saved = yaml.safe_load((tmp_path / "runs" / "quickstart" / "config.yaml").read_text())
    assert saved["edit"]["rho"] == 0.8
    edit(["report", "runs/quickstart"])
    page = (tmp_path / "runs" / "quickstart" / "report.html").read_text()
    assert "python train.py fit --config runs/quickstart/config.yaml" in page
    assert "python edit.py report runs/quickstart" in page and "python python" not in page


def test_a_plan_by_name(capsys):
    edit(["plan", "--train_config", "quickstart"])
    assert "python train.py fit --config quickstart --trainer.devices 1" in capsys.readouterr().out
