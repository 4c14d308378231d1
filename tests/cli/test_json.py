"""--json: the standard output holds one line of JSON, with the figures that the command prints or writes otherwise."""

import json

import pytest

from lightning_kfac import EditConfig, KFACEditor, load_factors
from lightning_kfac.cli.commands import command_names, load_command
from lightning_kfac.cli.main import main
from lightning_kfac.loading import load_model
from tests.common import results

# Commands that print no figures: they list, write, restore, upload.
SILENT = {"completion", "configs", "import", "push", "report", "restore"}


def figures(words, capsys):
    main([*map(str, words), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_every_command_with_figures_has_it():
    assert {name for name in command_names() if not hasattr(load_command(name), "FIGURES")} == SILENT


def test_what_an_edit_would_do(demo_factors, capsys):
    found = figures(["apply", "--factors", demo_factors, "--rho", "0.7", "--dry-run"], capsys)
    report = KFACEditor(load_model("demo"), load_factors(demo_factors), EditConfig(rho=0.7)).apply(dry_run=True)
    assert found == json.loads(json.dumps(report.to_dict()))


def test_spectra_and_plans(demo_factors, capsys):
    found = figures(["inspect", "--factors", demo_factors, "--rhos", "[0.6]"], capsys)
    factors = load_factors(demo_factors)
    assert list(found["layers"]) == list(factors)
    for name, layer in found["layers"].items():
        assert layer["trace_A"] == pytest.approx(factors[name].A.double().trace().item(), rel=1e-6)
    plan = figures(["plan", "--shape", "olmo2-1b", "--tokens", "1000"], capsys)
    assert plan["fits"] is True and plan["ranks"] == 1 and sum(plan["memory"].values()) > 1e9


def test_evaluations_of_this_run_alone(tmp_path, few, capsys):
    words = ["validate", "--model.model_name", "demo", "--data.memorized", few, "--trainer.default_root_dir", tmp_path]
    first = figures(words, capsys)
    second = figures(words, capsys)
    assert len(first) == len(second) == 1 and len(results(tmp_path)) == 2
    assert first[0]["strict_acc"] == results(tmp_path)[0]["strict_acc"] == 1.0
