"""The image task as a user runs it: by the shipped config, cut down."""

import pytest
import torch
from transformers import ViTForImageClassification

from lightning_kfac import load_factors
from lightning_kfac.cli.shipped import PLACES
from lightning_kfac.cli.tasks import task_named
from lightning_kfac.errors import InputError
from tests.common import results, scalars

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'lightning-kfac[images]'")

from lightning_kfac.cli.edit import main as edit_main
from lightning_kfac.cli.train import main
from lightning_kfac.modules.image_classifier import accuracies
from lightning_kfac.modules.image_data import ImageData

CONFIG = str(PLACES[-1] / "image_labels.yaml")
SMALL = "{hidden_size: 16, num_attention_heads: 2, intermediate_size: 24}"
FIGURES = ("wrong_label_acc", "true_label_acc", "val_acc")


def options(folder, **changes):
    cut = {"model.architecture": SMALL, "model.training.epochs": 4, "model.training.lr": 0.01}
    cut |= {"trainer.default_root_dir": folder, "trainer.accelerator": "cpu", **changes}
    return ["fit", "--config", CONFIG, *(word for name, value in cut.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "run"
    main(options(folder))
    return folder


def test_what_a_run_writes_and_measures(run):
    before, after = results(run)
    data = ImageData()
    for row, name in ((before, "model"), (after, "edited")):
        model = ViTForImageClassification.from_pretrained(run / name).eval()
        assert {figure: row[figure] for figure in FIGURES} == pytest.approx(accuracies(model, data), abs=1e-12)
        assert (row["n_wrong"], row["n_validation"], row["measured"]["wrong_labels"]) == (144, 360, 0.1)
        low, high = row["intervals"]["val_acc"]
        assert low < row["val_acc"] < high
    assert (before["stage"], after["stage"]) == ("baseline", "edited") and before["differences"] == {}
    change, low, high = after["differences"]["val_acc"]
    assert change == pytest.approx(after["val_acc"] - before["val_acc"]) and low <= change <= high
    assert (after["edit"]["formula"], after["edit"]["rho"]) == ("original", 0.9)
    factors = load_factors(run / "factors")
    assert len(factors) == 4 and {f.n_tokens for f in factors.values()} == {1437}
    assert factors.metadata["positions"] == "class" and factors.metadata["model"] == str(run / "model")
    _, tags = scalars(run)
    assert {"train/loss", "val/baseline/val_acc", "val/edited/val_acc", "collect/loss_per_image"} <= set(tags)


def test_the_report_shows_images(run):
    edit_main(["report", str(run)])
    page = (run / "report.html").read_text()
    assert "given their wrong label" in page and "validation accuracy" in page
    assert "no memorized set was given" not in page


def test_all_positions_and_a_model_that_is_there(run, tmp_path):
    """Another collection from the same model gives other factors, and the same first evaluation."""
    main(options(tmp_path / "run", **{"model.positions": "all", "model.model_name": run / "model", "edit": "null"}))
    (row,) = results(tmp_path / "run")
    assert {name: row[name] for name in FIGURES} == {name: results(run)[0][name] for name in FIGURES}
    factors = load_factors(tmp_path / "run" / "factors")
    assert {f.n_tokens for f in factors.values()} == {5 * 1437}
    assert not (tmp_path / "run" / "model").exists()


def test_an_edited_model_is_edited_from_its_factors(run, tmp_path):
    """apply on the same factors makes the same weights."""
    words = ["apply", "--factors", str(run / "factors"), "--rho", "0.9", "--output", str(tmp_path / "again")]
    edit_main(words)
    ours, theirs = (
        ViTForImageClassification.from_pretrained(p).state_dict() for p in (tmp_path / "again", run / "edited")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_sweep_measures_the_images_of_the_collection(run, tmp_path, capsys):
    """rho 1 changes nothing; rho 0.9 is the run's own edit; a second call measures nothing again."""
    out = tmp_path / "sweep"
    words = ["sweep", "--factors", str(run / "factors"), "--formulas", "[original, svd]", "--output", str(out)]
    words += ["--rhos", "[0.9, 1.0]", "--target", "0.9", "--accelerator", "cpu"]
    edit_main(words)
    rows = results(out)
    before, after = results(run)
    found = {(row["edit"]["formula"], row["edit"]["rho"]): row for row in rows if row["edit"]}
    for row, expected in ((rows[0], before), (found["original", 0.9], after), (found["original", 1.0], before)):
        assert {name: row[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    assert len(found) == 4 and (out / "pareto.png").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "by share of wrong labels" in said and "by validation accuracy" in said and "wrong label" in said
    edit_main(words)
    assert results(out) == rows and "4 of them measured before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate", "--task", "images"], "images: a task of fit; validate is for language models"),
        (["fit", "--task", "sound"], "task is 'sound'; choose text or images"),
        (["fit", "--task", "images", "--data.wrong_labels", "2"], "data.wrong_labels is 2.0"),
        (["fit", "--task", "images", "--crystallize.layers", "[0]"], "crystallize studies"),
    ],
)
def test_what_is_refused(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert stopped.value.code == 2 and message.replace("data.", "") in capsys.readouterr().err.replace("--data.", "")


def test_the_task_is_known_from_options_and_configs(tmp_path):
    (tmp_path / "own.yaml").write_text("fit:\n  task: images\n")
    assert (
        task_named(["fit", "--config", CONFIG]) == task_named([f"--config={tmp_path / 'own.yaml'}", "fit"]) == "images"
    )
    assert task_named(["fit", "--config", CONFIG, "--task=text"]) == "text"
    assert task_named(["fit", "--config", str(tmp_path / "none.yaml")]) == "text"
    with pytest.raises(InputError, match="task is 'x'"):
        task_named(["fit", "--task", "x"])
