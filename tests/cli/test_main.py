"""The one command: its help, its names, what it loads, and that messages name what the user typed."""

import shutil
import subprocess
import sys

import pytest

from lightning_kfac import attention, callbacks, metrics, modules
from lightning_kfac.cli.commands import command_names
from lightning_kfac.cli.edit import make_parser
from lightning_kfac.cli.main import main
from lightning_kfac.console import OF_TRAIN, command_line
from lightning_kfac.errors import InputError
from tests.forks import ROOT

# What neither an import nor a help text of all commands needs.
HEAVY = {"torch", "lightning", "transformers", "matplotlib", "datasets", "tensorboard", "torchmetrics", "torchvision",
         "PIL", "pandas", "sklearn", "scipy"}  # fmt: skip
# What a command that only computes on factors needs none of.
IMAGES_AND_TRAINING = {"lightning", "datasets", "torchmetrics", "torchvision", "pandas", "sklearn"}


def loaded(code, *words):
    """Packages that a fresh interpreter has loaded after some code with a command line."""
    code = f"import sys\nsys.argv = {['lightning-kfac', *words]}\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    code += "print('\\nloaded', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.rpartition("\nloaded ")[2].split())


# -- light ---------------------------------------------------------------------------------------------------------


def test_an_import_loads_nothing_heavy():
    assert not loaded("import lightning_kfac") & HEAVY
    assert not loaded("import lightning_kfac.callbacks, lightning_kfac.metrics, lightning_kfac.attention") & HEAVY


@pytest.mark.parametrize("words", [[], ["--help"], ["configs"], ["push", "--help"], ["plan", "--help"], ["nonsense"]])
def test_help_and_light_commands_load_nothing_heavy(words):
    assert not loaded("from lightning_kfac.cli.main import main; main()", *words) & HEAVY


def test_what_python_users_import_first_needs_no_lightning():
    code = "from lightning_kfac import KFACEditor, collect_factors, load_factors"
    assert not loaded(code) & (IMAGES_AND_TRAINING | {"matplotlib", "tensorboard"})


@pytest.mark.parametrize("command", ["apply", "inspect", "import"])
def test_help_of_a_command_loads_what_it_needs(command):
    assert not loaded("from lightning_kfac.cli.main import main; main()", command, "--help") & IMAGES_AND_TRAINING


@pytest.mark.parametrize("face", [attention, callbacks, metrics, modules, sys.modules["lightning_kfac"]])
def test_every_public_name_is_found(face):
    for name in face.__all__:
        assert getattr(face, name).__name__ == name and name in dir(face)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        face.nothing  # noqa: B018 (the access is the test)


# -- help ----------------------------------------------------------------------------------------------------------


def test_all_commands_are_listed_at_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for program in ("train.py", "edit.py", "/bin/lightning-kfac", "/x/lightning_kfac/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program])
        main()
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        for name in (*OF_TRAIN, *command_names()):
            assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name


@pytest.mark.parametrize("command", [*OF_TRAIN, *command_names()])
def test_help_of_every_command_fits_80_columns(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["/x/lightning_kfac/__main__.py"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0 and lines[0].startswith(f"usage: python -m lightning_kfac {command} ")
    assert max(map(len, lines)) <= 80


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["collect", "--output", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: collect: no such command; choose from fit, validate, predict, ")


def test_a_command_is_one_file(tmp_path):
    """What CONTRIBUTING says: a module beside the others is a command, with its help."""
    shutil.copytree(ROOT / "lightning_kfac", tmp_path / "lightning_kfac", ignore=shutil.ignore_patterns("assets"))
    (tmp_path / "lightning_kfac" / "cli" / "commands" / "greet.py").write_text(
        '"""Say hello."""\n\n\n'
        'def add_options(parser):\n    parser.add_argument("--name", type=str, default="you")\n\n\n'
        'def run(options):\n    print(f"hello {options.name}")\n'
    )
    (tmp_path / "lightning_kfac" / "assets").mkdir()
    shutil.copy(ROOT / "lightning_kfac" / "assets" / "__init__.py", tmp_path / "lightning_kfac" / "assets")

    def run(*words):
        command = [sys.executable, "-m", "lightning_kfac", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout

    assert "  greet      Say hello.\n" in run()
    assert "usage: python -m lightning_kfac greet [--config CONFIG]" in run("greet", "--help")
    assert run("greet", "--name", "all").startswith("hello all\ngreet took 0:0")


# -- the command that was typed ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "fit", "apply", "alone"),
    [
        ("train.py", "python train.py fit", "python edit.py apply", "python train.py"),
        ("there/edit.py", "python there/train.py fit", "python there/edit.py apply", "python there/edit.py"),
        ("/bin/lightning-kfac", "lightning-kfac fit", "lightning-kfac apply", "lightning-kfac"),
        ("C:/Scripts/lightning-kfac.exe", "lightning-kfac fit", "lightning-kfac apply", "lightning-kfac"),
        ("/x/lightning_kfac/__main__.py", *(f"python -m lightning_kfac{word}" for word in (" fit", " apply", ""))),
    ],
)
def test_commands_are_named_as_they_were_typed(monkeypatch, called, fit, apply, alone):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", [called])
    assert (command_line("fit"), command_line("apply"), command_line()) == (fit, apply, alone)
    assert command_line("apply", "--blocks", "[3, 4]") == f"{apply} --blocks '[3, 4]'"


def test_torchrun_is_named_too(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_line("fit", "--edit.rho", 0.8) == "torchrun train.py fit --edit.rho 0.8"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(sys, "argv", ["/bin/lightning-kfac"])
    assert command_line("fit", launcher=["torchrun", "--nnodes", 2]) == "torchrun --nnodes 2 -m lightning_kfac fit"


def test_usage_and_hints_name_it(monkeypatch, tmp_path, demo_factors, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/lightning-kfac"])
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert capsys.readouterr().out.startswith("usage: lightning-kfac sweep [--config CONFIG] [--OPTION VALUE ...]\n\n")
    with pytest.raises(SystemExit):
        main(["validate", "--help"])
    assert capsys.readouterr().out.startswith("usage: lightning-kfac validate --config CONFIG [--OPTION VALUE ...]\n")
    main(["apply", "--factors", str(demo_factors), "--output", str(tmp_path / "edited")])
    out = capsys.readouterr().out
    assert "\n  lightning-kfac validate --data.memorized MEMORIZED_SET_OR_TEXTS --data.heldout GENERAL_TEXT " in out
    assert f"--model.model_name {tmp_path}/edited --trainer.default_root_dir {tmp_path}/edited-measured\n" in out
    with pytest.raises(SystemExit):
        main(["apply", "--output", str(tmp_path / "x")])
    assert "the folder of factors that `lightning-kfac fit` wrote" in capsys.readouterr().err


def test_errors_of_the_library_name_settings_and_those_of_the_command_options():
    error = InputError("formula corrected needs collect.moments; force=True goes on", "collect.moments", "force=True")
    assert str(error) == "formula corrected needs collect.moments; force=True goes on"
    assert error.with_options() == "formula corrected needs --collect.moments; --force goes on"
    paths = InputError("runs/overwrite and overwrite.txt are there; add overwrite", "overwrite")
    assert paths.with_options() == "runs/overwrite and overwrite.txt are there; add --overwrite"


def test_parsers_of_all_commands_can_be_made():
    """Names of options do not clash, in any of them."""
    assert set(make_parser()._subcommands_action.choices) == set(command_names())
