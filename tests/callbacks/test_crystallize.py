"""Runs of train.py that crystallize attention."""

import contextlib
import io
import json
import warnings

import pytest
import torch
import yaml
from lightning.fabric.utilities.warnings import PossibleUserWarning

from lightning_kfac.assets import DEMO
from lightning_kfac.attention import load_spectra
from lightning_kfac.attention.spectra import model_fingerprint
from lightning_kfac.cli.edit import main as edit
from lightning_kfac.cli.train import main
from lightning_kfac.models.loading import load_model, load_tokenizer
from tests.common import build_model, results, scalars, write_jsonl
from tests.forks import ROOT, run_train

CONFIGS = ROOT / "configs"


def small(folder, few, **changes):
    """The shipped config, cut down to seconds."""
    options = {
        "config": CONFIGS / "crystallize.yaml",
        "data.max_tokens": 600,
        "data.seq_len": 64,
        "data.heldout_tokens": 500,
        "data.memorized": few,
        "crystallize.layers": "[5]",
        "crystallize.ranks": "[4, 32]",
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
    } | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished study and what it printed."""
    folder = tmp_path_factory.mktemp("crystallize")
    lines = (DEMO / "planted_report.jsonl").read_text().splitlines()[:5]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as out:
        warnings.simplefilter("error", PossibleUserWarning)  # Lightning's
        main(["fit", *small(folder / "run", write_jsonl(folder / "few.jsonl", lines))])
    return folder / "run", out.getvalue()


def test_results_of_a_run(run):
    rows = results(run[0])
    assert [row["stage"] for row in rows] == ["baseline", "full", "lowrank", "lowrank", "top1"]
    assert [row.get("rank") for row in rows] == [None, None, 32, 4, None]
    baseline, full, whole, _, top1 = rows
    assert full["perplexity"] == pytest.approx(baseline["perplexity"], rel=1e-6)
    assert whole["perplexity"] == pytest.approx(baseline["perplexity"], rel=1e-6)
    assert full["strict_acc"] == baseline["strict_acc"] == 1 and full["ndcg@10"] > 0.9999
    assert top1["perplexity"] > 1.001 * baseline["perplexity"] and top1["ndcg@10"] < 0.99


def test_the_study_agrees_with_the_evaluation(run):
    folder, out = run
    study = json.loads((folder / "crystallization.json").read_text())
    names = {"baseline": 0, "full": 1, "lowrank 32": 2, "lowrank 4": 3, "top1": 4}
    for name, number in names.items():
        row = results(folder)[number]
        assert study["costs"][name]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
        assert study["recited"][name] == [row["strict_acc"], 5]
    alone = [f"layer {layer}" for layer in range(6)] + [f"layer 5 head {head}" for head in range(4)]
    assert set(study["costs"]) == {*names, *alone}
    assert study["costs"]["layer 5"]["perplexity"] == pytest.approx(study["costs"]["top1"]["perplexity"])
    assert study["n_documents"] == 6 and study["verdict"] in out
    assert [(head["layer"], head["head"]) for head in study["heads"]] == [(5, head) for head in range(4)]
    mean = sum(head["effective_dimension"] for head in study["heads"]) / 4
    assert study["mean_effective_dimension"] == mean and f"{mean:.1f} of 32 directions" in study["verdict"]
    for text in ("Top-1 in one layer at a time", "lowrank 4", "Outputs in", "residuals/, crystallization.json"):
        assert text in out


def test_saved_config_runs_again(run, tmp_path):
    changes = {"config": run[0] / "config.yaml", "data.memorized": "null", "crystallize.ranks": "[0]"}
    main(["fit", *small(tmp_path / "again", None, **changes, **{"data.heldout_tokens": 100})])
    rows = results(tmp_path / "again")
    assert [row["stage"] for row in rows] == ["baseline", "full", "lowrank", "top1"]
    assert rows[2]["rank"] == 0 and rows[2]["perplexity"] == rows[3]["perplexity"]


def test_spectra_of_a_run(run):
    spectra = load_spectra(run[0] / "residuals")
    assert list(spectra) == [5] and spectra[5].variances.shape == (4, 32)
    assert spectra.metadata["n_tokens"] == 600 - 10 and spectra.metadata["corpus"] == "embedded:train"
    assert spectra.metadata["fingerprint"] == model_fingerprint(load_model("demo", "float32"))
    assert not (run[0] / "factors").exists()


def test_a_run_is_in_tensorboard(run):
    events, values = scalars(run[0])
    assert len(values["crystallize/recovered_by_rank"]) == 2 and len(values["crystallize/top1_cost_by_layer"]) == 6
    figures = {f"crystallize/{name}" for name in ("curve", "spectra", "heads", "sharpness")}
    assert figures <= set(events.Tags()["images"])
    assert "val/lowrank_4/perplexity" in values or "val/lowrank 4/perplexity" in values


def test_its_figures_are_files_and_in_the_report(run):
    names = ("curve", "spectra", "heads", "sharpness")
    assert all((run[0] / f"crystallize_{name}.png").stat().st_size > 5_000 for name in names)
    edit(["report", str(run[0])])
    text = (run[0] / "report.html").read_text("utf-8")
    assert text.count("data:image/png;base64,") >= 4 and "How many directions the residuals" in text
    assert ">unedited<" in text and ">baseline<" not in text


def test_two_ranks_give_the_spectra_of_one(few, tmp_path):
    """9 rows, the last ragged: five and four with a filler, in batches of two; held-out rows are uneven too."""
    changes = {"data.max_tokens": 570, "data.batch_size": 2, "data.heldout_tokens": 300, "crystallize.ranks": "[4]"}
    changes |= {"data.memorized": "null", "trainer.logger": "false"}
    main(["fit", *small(tmp_path / "one", few, **changes)])
    changes |= {"trainer.devices": 2, "trainer.strategy": "ddp"}
    run_train(["fit", *small(tmp_path / "two", few, **changes)])
    one, two = (load_spectra(tmp_path / name / "residuals") for name in ("one", "two"))
    assert two.metadata["n_tokens"] == one.metadata["n_tokens"] == 570 - 9
    for name in ("second_moment", "entropy", "top1_mass"):
        a, b = getattr(one[5], name), getattr(two[5], name)
        assert (a - b).norm() <= 1e-6 * a.norm()
    for a, b in zip(*(results(tmp_path / name) for name in ("one", "two")), strict=True):
        assert a["stage"] == b["stage"]
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
    a, b = (json.loads((tmp_path / name / "crystallization.json").read_text()) for name in ("one", "two"))
    assert a["n_documents"] == b["n_documents"]
    for name, cost in a["costs"].items():
        assert b["costs"][name]["change"] == pytest.approx(cost["change"], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    changes = {"data.max_tokens": 200, "data.heldout_tokens": 200, "data.memorized": "null"}
    changes |= {"trainer.precision": precision, "trainer.logger": "false"}
    main(["fit", *small(tmp_path, None, **changes)])
    baseline, full, whole, _, top1 = (row["perplexity"] for row in results(tmp_path))
    # Eager attention takes its softmax in float32, also in a float64 model.
    close = pytest.approx(baseline, rel=1e-7 if precision == "64-true" else 5e-3)
    assert full == close and whole == close and top1 != close
    assert load_spectra(tmp_path / "residuals")[5].second_moment.dtype == torch.float64


def test_gpt2_config_on_a_tiny_gpt2(tmp_path):
    """As shipped, with 12 layers a few columns wide and local files for the downloads."""
    folder = tmp_path / "model"
    build_model("gpt2", n_layer=12, vocab_size=2048, n_positions=256).save_pretrained(folder)
    load_tokenizer("demo").save_pretrained(folder)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"Return the value of x at {n}."} for n in range(90)])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"A class with {n} methods."} for n in range(60)])
    main([
        "fit", "--config", str(CONFIGS / "crystallize_gpt2.yaml"), "--model.model_name", str(folder),
        "--data.corpus", str(text), "--data.heldout", str(other), "--data.max_tokens", "600", "--data.seq_len", "32",
        "--data.heldout_tokens", "400", "--trainer.default_root_dir", str(tmp_path / "run"),
        "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    rows = results(tmp_path / "run")
    assert [row.get("rank") for row in rows] == [None, None, 12, 8, 4, 2, 1, None]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-6)
    assert "strict_acc" not in rows[0]
    assert list(load_spectra(tmp_path / "run" / "residuals")) == [9, 10, 11]


def test_gpt2_config_is_that_of_the_issue():
    config = yaml.safe_load((CONFIGS / "crystallize_gpt2.yaml").read_text())
    assert config["crystallize"]["layers"] == [9, 10, 11]
    assert config["data"]["seq_len"] == 256 and config["data"]["max_tokens"] == 30 * 256
    assert config["data"]["corpus"]["split"] != config["data"]["heldout"]["split"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crystallize.layers": "[9]"}, "layer 9 does not exist; the model has attention in layers 0 to 5"),
        ({"crystallize.ranks": "[64]"}, "rank 64 is above 32, the width of a head in layer 5"),
        ({"data.heldout": "null"}, "set data.heldout"),
        ({"edit.rho": "0.5"}, "an edit needs a collection: leave model.training and crystallize out"),
        ({"trainer.max_epochs": "2"}, "max_epochs must be 1"),
        ({"model.training.lr": "0.1"}, "crystallize needs a frozen model: leave model.training out"),
        ({"crystallize.layers": "[]"}, "no layer is chosen"),
        ({"crystallize.layers": "deep"}, "layers"),
    ],
)
def test_wrong_options_end_before_any_work(tmp_path, few, capfd, changes, message):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *small(tmp_path / "run", few, **changes)])
    assert exit_.value.code == 2 and message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
