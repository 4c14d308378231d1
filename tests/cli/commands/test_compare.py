"""The command compare as a user runs it: what methods see, what is chosen, saved, attacked, and that it goes on."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_kfac.assets import DEMO
from lightning_kfac.cli.commands import compare as command
from lightning_kfac.cli.compared import ComparedMethods
from lightning_kfac.cli.edit import main, make_parser
from lightning_kfac.cli.shipped import find_config
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.methods.registry import METHODS, methods_of
from lightning_kfac.models.loading import load_model
from lightning_kfac.modules.unlearning import UnlearningLM
from lightning_kfac.reporting.competitors import chosen
from lightning_kfac.storage.results import read_results
from tests.common import edit, failed, write_jsonl

ASCENT = {"name": "gradient_ascent", "lr": 1e-5, "batch_size": 2, "steps": [1, 2]}
ENTRIES = [
    {"name": "formula", "rho": 0.95},
    {"name": "coherent_step", "nu": [0.1, 30.0]},
    ASCENT,
    {"name": "balanced_subnet", "steps": 2, "batch_size": 2, "ratio": [0.9]},
]
ATTACKS = [{"name": "relearning", "steps": [1], "batch_size": 2}]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Eight planted sequences, and beside them small texts."""
    folder = tmp_path_factory.mktemp("few")
    for name, begin in (("text", "Row"), ("heldout", "Place")):
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{begin} {i} says {i * i}, not {i % 11}."} for i in range(30)])
    lines = (DEMO / "planted_report.jsonl").read_text("utf-8").splitlines()
    write_jsonl(folder / "other.jsonl", lines[8:10])
    return write_jsonl(folder / "few.jsonl", lines[:8])


def compare(factors, few, folder, entries, **changes):
    options = {
        "factors": factors,
        "output": folder,
        "methods": json.dumps(entries),
        "attacks": json.dumps(ATTACKS),
        "target": 0.3,
        "dtype": "float32",
        "accelerator": "cpu",
        "data.memorized": few,
        "data.sets.elsewhere": few.parent / "other.jsonl",
        "data.corpus": few.parent / "text.jsonl",
        "data.heldout": few.parent / "heldout.jsonl",
        "data.seq_len": 64,
    }
    edit("compare", **options | changes)
    return read_results(folder / "results.jsonl")


@pytest.fixture(scope="module")
def ran(demo_factors, few, tmp_path_factory):
    """A comparison that was stopped within a training, its rows, and the token ids of all that was trained on."""
    seen = []
    log_p = UnlearningLM.log_p

    def noted(training, tokens, weights):
        seen.extend(row[mask].tolist() for row, mask in zip(tokens.input_ids, tokens.attend, strict=True))
        return log_p(training, tokens, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnlearningLM, "log_p", noted)
        folder = tmp_path_factory.mktemp("compare") / "out"
        measure = ComparedMethods.measure

        def stopped(measured, done, label):
            if done.method.amount == 2:
                raise KeyboardInterrupt
            measure(measured, done, label)

        patch.setattr(ComparedMethods, "measure", stopped)
        with pytest.raises(SystemExit):
            compare(demo_factors, few, folder, ENTRIES)
        patch.setattr(ComparedMethods, "measure", measure)
        assert len(read_results(folder / "results.jsonl")) == 5 and any((folder / "state").iterdir())
        return folder, compare(demo_factors, few, folder, ENTRIES), seen


def test_every_strength_is_a_row_that_says_what_it_is(ran):
    _, rows, _ = ran
    assert [row["stage"] for row in rows] == ["baseline"] + ["edited"] * 6
    assert rows[0]["edit"] is None and rows[0]["strict_acc"] == rows[0]["choosing/strict_acc"] == 1.0
    labels = [(row["method"]["label"], row["method"]["amount"]) for row in rows[1:]]
    assert labels[:3] == [("K-FAC, original", 0.95), ("coherent step", 0.1), ("coherent step", 30.0)]
    assert [row["edit"].get("method") for row in rows[1:]] == [
        None, "coherent_step", "coherent_step", "gradient_ascent", "gradient_ascent", "balanced_subnet",
    ]  # fmt: skip
    assert rows[1]["edit"]["formula"] == "original"
    for row in rows[1:]:
        assert row["edit"]["blocks"] == [3] and row["edit"]["projections"] == ["gate", "up"]
        assert {"perplexity", "ndcg@10", "elsewhere/strict_acc", "extraction.expected_at.1000"} <= set(row)
        assert row["edit"]["relative_change"] > 0
        whole = row["method"]["amount"] != 2  # of what another process began the time is not known
        assert row["method"]["seconds"] > 0 if whole else row["method"]["seconds"] is None
    assert rows[2]["edit"]["relative_change"] < rows[3]["edit"]["relative_change"]
    assert rows[3]["edit"]["nu"] == 30.0 and rows[4]["edit"]["steps"] == 1 and rows[6]["edit"]["ratio"] == 0.9


def test_methods_see_their_half_and_text_and_never_the_reported_half(ran, few):
    folder, _, seen = ran
    halves = {name: load_memorized(folder / "halves" / f"{name}.jsonl", None, 2048) for name in ("shown", "reported")}
    shown, reported = ([[*s.prefix, *s.suffix] for s in halves[name]] for name in ("shown", "reported"))
    assert len(shown) == len(reported) == 4
    assert not any(ids == whole[: len(ids)] for ids in seen for whole in reported)
    of_half = [ids for ids in seen if any(ids == whole[: len(ids)] for whole in shown)]
    assert len(of_half) == 2 * (2 + 1 + 2) and len(seen) == 2 * len(of_half)


def test_the_chosen_models_are_ordinary_checkpoints(ran, tmp_path, capsys):
    folder, rows, _ = ran
    found = {one.label: one for one in chosen(rows, 0.3)}
    reached = {label for label, one in found.items() if one.reached}
    assert reached == {"coherent step", "BalancedSubnet"}
    saved = {path.name: json.loads((path / "edit.json").read_text()) for path in (folder / "edited").iterdir()}
    assert len(saved) == len(reached)
    assert saved["coherent_step"]["summary"] == found["coherent step"].row["edit"]
    assert saved["balancedsubnet"]["point"] == found["BalancedSubnet"].row["point"]
    model = load_model(str(folder / "edited" / "balancedsubnet"), "float32")
    weight = model.get_parameter("model.layers.3.mlp.up_proj.weight")
    assert int((weight == 0).sum()) == round(0.9 * weight.numel())
    edit("restore", model=folder / "edited" / "coherent_step", output=tmp_path / "restored")
    restored = load_model(str(tmp_path / "restored"), "float32")
    for name, parameter in load_model("demo").named_parameters():
        assert torch.equal(parameter, restored.get_parameter(name)), name
    assert "edit" not in capsys.readouterr().err


def test_attacks_see_what_methods_may_see(ran):
    folder, _, _ = ran
    rows = read_results(folder / "attacked" / "coherent_step" / "results.jsonl")
    assert [row["stage"] for row in rows] == ["baseline", "edited", "attacked"]
    assert rows[0]["strict_acc"] == 1.0 and rows[0]["n_sequences"] == 4 and rows[2]["attack"]["n_learned"] == 4


def test_it_goes_on_and_shows_one_command_to_copy(ran, demo_factors, few, capsys, monkeypatch):
    folder, rows, _ = ran
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr("lightning_kfac.modules.evaluator.ModelEvaluator.__call__", None)  # nothing is measured
    monkeypatch.setattr(UnlearningLM, "log_p", None)
    capsys.readouterr()
    compare(demo_factors, few, folder, ENTRIES)
    out = capsys.readouterr().out
    assert (folder / "results.jsonl").read_bytes() == before and "6 of them measured before" in out
    advised = out.partition("Recommended:\n")[2].splitlines()
    written = json.loads((folder / "compared.json").read_text())
    assert advised[0].strip() == written["command"] and advised[1] == f"Expect: {written['expected']}."
    best = chosen(rows, 0.3)[0].row  # none that reaches it does without the half that chooses
    assert "It was shown the half that chose it, and needs the text that is to be forgotten." in advised
    assert "Of the attacks brings most back: relearning one half, lr 0.0001, 1 step (" in "".join(advised)
    assert f"(unedited: 100); perplexity {rows[0]['perplexity']:.4g} -> {best['perplexity']:.4g}" in advised[1]
    events = EventAccumulator(str(folder / "tensorboard" / "coherent step"))
    events.Reload()
    drawn = [event.value for event in events.Scalars("perplexity by strength")]
    assert drawn == pytest.approx([row["perplexity"] for row in rows[2:4]])
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert "Methods at matched forgetting" in page and "coherent step, nu 30" in page and "elsewhere" in page


def test_tables_fit_80_columns(ran, demo_factors, few, capsys, monkeypatch):
    folder, _, _ = ran
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("lightning_kfac.console.WIDTH_OF_LOGS", 80)
    compare(demo_factors, few, folder, ENTRIES)
    out = capsys.readouterr().out
    tables = out.partition("At the weakest")[2].partition("results, edited/")[0]
    assert max(map(len, tables.splitlines())) <= 80 and "(not" in tables and "reached)" in tables


def test_a_model_that_is_gone_is_made_again(ran, demo_factors, few):
    folder, rows, _ = ran
    path = folder / "edited" / "coherent_step"
    weights = (path / "model.safetensors").read_bytes()
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    again = compare(demo_factors, few, folder, ENTRIES, attacks="[]")
    assert len(again) == len(rows) and (path / "model.safetensors").read_bytes() == weights


def test_what_cannot_be_compared_is_one_line(demo_factors, few, tmp_path, capsys):
    options = {"factors": demo_factors, "output": tmp_path / "out", "data.heldout": few.parent / "heldout.jsonl"}
    options |= {"data.memorized": few, "data.corpus": few.parent / "text.jsonl"}
    without = {key: value for key, value in options.items() if key != "data.memorized"}
    assert "set --data.memorized" in failed(capsys, "compare", **without)
    assert "--methods is empty" in failed(capsys, "compare", **options, methods="[]")
    assert "methods: 'x' is no method" in failed(capsys, "compare", **options, methods="[x]")
    clash = {"data.sets.choosing": few}
    assert "choosing is the half that chooses" in failed(capsys, "compare", **options, **clash)
    write_jsonl(tmp_path / "two.jsonl", few.read_text().splitlines()[:2])
    two = options | {"data.memorized": tmp_path / "two.jsonl"}
    assert "each half needs at least two sequences" in failed(capsys, "compare", **two)


@pytest.mark.parametrize("name", ["competitors", "competitors_1b"])
def test_the_shipped_configs_name_every_method(name):
    entries = yaml.safe_load(Path(find_config(name)).read_text("utf-8"))["methods"]
    methods = [method for entry in entries for method in methods_of(entry)]
    assert {method.name for method in methods} == set(METHODS)
    parsed = make_parser(["compare"]).parse_args(["compare", "--config", find_config(name)])
    assert parsed.compare.target == 0.1 and command.OUTPUTS
