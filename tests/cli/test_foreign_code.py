"""What a config from elsewhere would run is told before it runs."""

import contextlib
import itertools
import sys

import pytest
import yaml

from lightning_kfac.cli.edit import main as edit
from lightning_kfac.cli.foreign_code import announce_code, foreign_code
from lightning_kfac.cli.shipped import shipped
from lightning_kfac.errors import InputError
from tests.cli.test_parsers import parser_of_fit
from tests.common import failed

CALLBACK = {"class_path": "evil_module.E", "init_args": {"on_fit_start": "builtins.print", "mode": "min"}}
WAYS = [
    ({"trainer": {"callbacks": [CALLBACK]}}, ["trainer.callbacks.0: the class evil_module.E",
     "trainer.callbacks.0.init_args.on_fit_start: builtins.print, which"]),
    ({"trainer.callbacks": CALLBACK}, ["trainer.callbacks: the class evil_module.E"]),
    ({"fit": {"trainer": {"callbacks": "evil_module.E"}}}, ["fit.trainer.callbacks: the class evil_module.E"]),
    ({"trainer": {"callbacks": ["EarlyStopping"]}}, ["trainer.callbacks.0: the class EarlyStopping"]),
    ({"trainer": {"callbacks": yaml.safe_dump([CALLBACK])}}, ["trainer.callbacks.0: the class evil_module.E"]),
    ({"trainer": "{callbacks: [{class_path: evil_module.E}]}"}, ["trainer.callbacks.0: the class evil_module.E"]),
    ({"trainer": {"logger": {"class_path": "a.B"}, "strategy": "a.S"}}, ["trainer.logger: the class a.B",
     "trainer.strategy: the class a.S"]),
    ({"model": {"architecture": {"x": {"class_path": "os.system"}}}}, ["model.architecture.x: the class os.system"]),
    ({"edit": "evil_module.E"}, ["edit: the class evil_module.E"]),
    ({"model": {"training": "evil_module.E"}}, ["model.training: the class evil_module.E"]),
    ({"model": {"trust_remote_code": True}}, ["model.trust_remote_code true: the model's repository runs"]),
    ({"model": "{trust_remote_code: 'True'}"}, ["model.trust_remote_code true: the model's repository runs"]),
    ({"weights_only": False}, ["weights_only false: a checkpoint may run code"]),
    ({"overwrite": True}, ["overwrite true: a finished run"]),
    ({"trainer": "inner/t.yaml"}, ["trainer.callbacks: the class evil_module.E"]),
    ({"trainer": "inner/named"}, ["trainer.callbacks: the class evil_module.E"]),
    ({"trainer": {"callbacks": ["inner/c.yml"]}}, ["trainer.callbacks.0: the class evil_module.E"]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a module would say that it was imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('imported', 'w')\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "t.yaml").write_text("callbacks: c.yml")
    (tmp_path / "inner" / "named").write_text("callbacks: c.yml")
    (tmp_path / "inner" / "c.yml").write_text("class_path: evil_module.E")
    return tmp_path


@pytest.mark.parametrize(("config", "expected"), WAYS)
def test_every_way_to_name_code(folder, config, expected):
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    found = foreign_code(folder / "c.yaml")
    assert [line for line in expected if not any(one.startswith(line) for one in found)] == []
    assert len(found) == len(expected) + (str(config).count("init_args") and len(expected) == 1)
    assert not (folder / "imported").exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("name", [name for name, path in shipped().items() if path.suffix == ".yaml"])
def test_what_comes_along_runs_no_other_code(name):
    assert foreign_code(shipped()[name]) == []


def test_no_option_imports_what_is_not_told(folder):
    """Every option of fit is given a name that can be imported; the parser decides what it makes of it."""
    parser = parser_of_fit()
    actions = parser._subcommands_action._name_parser_map["fit"]._actions
    names = [a.dest for a in actions if getattr(a, "_typehint", None) and not a.dest.endswith(".help")]
    imported = []
    for name, value in itertools.product(names, ("evil_module.E", "[evil_module.E]")):
        with contextlib.suppress(SystemExit, InputError):
            parser.parse_args(["fit", f"--{name}={value}"])
        if sys.modules.pop("evil_module", None):
            imported.append(name)
            (folder / "c.yaml").write_text(f"{name}: {value}")
            assert len(foreign_code(folder / "c.yaml")) == 1, name
    assert {"trainer.callbacks", "edit"} <= set(imported)


def test_ordinary_settings_are_no_code(tmp_path):
    settings = {
        "trainer": {"strategy": "ddp", "accelerator": "auto", "profiler": "simple", "logger": False, "callbacks": None,
                    "precision": "bf16-mixed", "default_root_dir": "runs/x.y"},
        "model": {"model_name": "org.name/x", "trust_remote_code": False, "dtype": "auto"},
        "data": {"corpus": "corpus.jsonl", "memorized": "set.parquet", "few_shot": "Q: [1] is {a: b}\n"},
        "weights_only": True, "overwrite": False,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert foreign_code(tmp_path / "c.yaml") == []


def test_the_command_lists_it(folder, capsys):
    (folder / "c.yaml").write_text(yaml.safe_dump(WAYS[0][0] | {"model": {"trust_remote_code": True}}))
    edit(["configs", "--explain", "c.yaml"])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "c.yaml would run or change, beside lightning_kfac's own code:"
    assert "  trainer.callbacks.0: the class evil_module.E\n" in out and "model.trust_remote_code true" in out
    edit(["configs", "--explain", "quickstart"])
    assert "names no class, no function and no switch" in capsys.readouterr().out
    assert not (folder / "imported").exists()
    assert "cannot be read" in failed(capsys, "configs", explain="nowhere/x.yaml")


def test_a_run_says_it_first(folder, capsys):
    (folder / "c.yaml").write_text("trainer: inner/t.yaml")
    for words in (["--config", "c.yaml"], ["--config=c.yaml"], ["-c", "c.yaml"], ["-cc.yaml"]):
        announce_code(["fit", *words])
        assert capsys.readouterr().err.startswith(
            "note: c.yaml asks for other code or for changes: trainer.callbacks: "
        )
    for words in (["--trainer", "inner/t.yaml"], ["--trainer=inner/t.yaml"]):
        announce_code(["fit", *words])
        assert capsys.readouterr().err.startswith("note: inner/t.yaml asks for other code or for changes: trainer.call")
    announce_code(["fit", "--config", str(shipped()["quickstart"]), "--data.corpus", "evil_module.py"])
    assert capsys.readouterr().err == ""


def test_files_that_name_each_other_end(folder):
    (folder / "a.yaml").write_text("trainer: b.yaml")
    (folder / "b.yaml").write_text("trainer: a.yaml")
    with pytest.raises(InputError, match=r"a.yaml: names more than 100 files, or one that names itself"):
        foreign_code(folder / "a.yaml")
    (folder / "list").write_text("[list, list, list]")
    (folder / "c.yaml").write_text("trainer: {callbacks: [list]}")
    with pytest.raises(InputError, match=r"c.yaml: names more than 100 files, or one that names itself"):
        foreign_code(folder / "c.yaml")
