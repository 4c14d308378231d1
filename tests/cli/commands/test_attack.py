"""The command attack as a user runs it: what it measures, that it never sees it, and that it goes on."""

import json

import pytest
import torch

from lightning_kfac.assets import DEMO
from lightning_kfac.attacks.registry import KINDS, attack_of
from lightning_kfac.cli.commands import attack as command
from lightning_kfac.cli.edit import main, make_parser
from lightning_kfac.cli.shipped import find_config
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.models.loading import load_model
from lightning_kfac.modules.sequence_training import SequenceTraining
from lightning_kfac.storage.results import read_results
from tests.common import edit, failed, scalars, write_jsonl

RELEARNING = {"name": "relearning", "lr": 1e-3, "batch_size": 2}
ATTACKS = [
    {"name": "pruning", "share": 0.9},
    {"name": "sampling", "tries": 100000},
    {**RELEARNING, "steps": [0, 2]},
    {**RELEARNING, "steps": [1], "source": "text"},
]


@pytest.fixture(scope="module")
def edited(demo_factors, tmp_path_factory):
    """The demo model after an edit of two of its layers."""
    path = tmp_path_factory.mktemp("edited") / "edited"
    edit("apply", factors=demo_factors, rho=0.6, output=path)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Eight planted sequences, and beside them two small texts."""
    folder = tmp_path_factory.mktemp("few")
    for name, begin in (("text", "Row"), ("heldout", "Place")):
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{begin} {i} says {i * i}, not {i % 11}."} for i in range(30)])
    lines = (DEMO / "planted_report.jsonl").read_text("utf-8").splitlines()[:8]
    return write_jsonl(folder / "few.jsonl", lines)


def attack(model, few, folder, attacks, **changes):
    options = {
        "model": model,
        "output": folder,
        "attacks": json.dumps(attacks),
        "dtype": "float32",
        "accelerator": "cpu",
        "data.memorized": few,
        "data.corpus": few.parent / "text.jsonl",
        "data.heldout": few.parent / "heldout.jsonl",
        "data.seq_len": 64,
    }
    edit("attack", **options | changes)
    return read_results(folder / "results.jsonl")


@pytest.fixture(scope="module")
def ran(edited, few, tmp_path_factory):
    """A run, what it printed, and the token ids of all that was trained on."""
    seen = []
    step = SequenceTraining.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SequenceTraining,
            "training_step",
            lambda module, batch, i: (seen.append(batch["tokens"].input_ids.tolist()), step(module, batch, i))[1],
        )
        folder = tmp_path_factory.mktemp("attacks") / "out"
        return folder, attack(edited, few, folder, ATTACKS), seen


def test_rows_say_what_was_done_and_what_it_brings_back(ran):
    _, rows, _ = ran
    assert [row["stage"] for row in rows] == ["baseline", "edited"] + ["attacked"] * 5
    assert [row["attack"]["name"] for row in rows[2:]] == ["pruning", "sampling"] + ["relearning"] * 3
    assert rows[2]["attack"] == ATTACKS[0] and rows[3]["attack"]["tries"] == 100000
    assert [row["attack"]["steps"] for row in rows[4:]] == [0, 2, 1] and rows[6]["attack"]["source"] == "text"
    before, after = rows[:2]
    assert before["strict_acc"] == 1.0 and after["strict_acc"] == 0.0 and before["n_sequences"] == 4
    for row in rows[2:]:
        assert row["recovered"]["strict_acc"][0] == pytest.approx(row["got"][0])  # of all that there was
        assert row["perplexity"] > 1 and row["intervals"]["perplexity"] and row["context"] == before["point"]
    loose, distance = (row["recovered"] for row in rows[2:4])
    assert set(loose) == {"strict_acc", "loose_acc", "avg_levenshtein_norm", "extraction.expected_at.1000"}
    assert set(distance) == {"strict_acc"}  # samples have no distance
    broken = rows[2]
    assert broken["perplexity"] > 3 * after["perplexity"]
    expected = broken["avg_levenshtein_norm"] - after["avg_levenshtein_norm"]
    expected /= before["avg_levenshtein_norm"] - after["avg_levenshtein_norm"]
    assert broken["recovered"]["avg_levenshtein_norm"][0] == pytest.approx(expected)


def test_zero_steps_recover_exactly_nothing(ran):
    _, rows, _ = ran
    nothing = rows[4]
    assert nothing["attack"]["steps"] == 0 and set(map(tuple, nothing["recovered"].values())) == {(0.0, 0.0, 0.0)}
    assert all(nothing[key] == rows[1][key] for key in ("perplexity", "avg_levenshtein_norm", "loose_acc", "ndcg@10"))


def test_attacks_never_see_what_is_reported(ran, few):
    folder, _, seen = ran
    halves = [folder / "halves" / f"{name}.jsonl" for name in ("shown", "reported")]
    shown, reported = (load_memorized(half, None, 2048) for half in halves)
    whole = load_memorized(few, None, 2048)
    assert len(shown) == len(reported) == 4
    assert sorted([*s.prefix, *s.suffix] for s in shown + reported) == sorted([*s.prefix, *s.suffix] for s in whole)
    rows = [row for batch in seen for row in batch]
    assert len(rows) == 3 * 2  # three steps of two
    for row in rows:
        for sequence in reported:
            runs = {tuple(sequence.suffix[i : i + 8]) for i in range(len(sequence.suffix) - 7)}
            assert not any(tuple(row[i : i + 8]) in runs for i in range(len(row) - 7))
    learned = {tuple([*s.prefix, *s.suffix]) for s in shown}
    assert sum(any(tuple(row) == ids[: len(row)] for ids in learned) for row in rows) == 4


def test_figure_tensorboard_and_report(ran):
    folder, rows, _ = ran
    assert (folder / "recovery.png").stat().st_size > 10_000
    _, found = scalars(folder)
    assert found["relearning_one_half_lr_0_001/strict_acc"] == [0.0, pytest.approx(rows[5]["got"][0])]
    main(["report", str(folder)])
    text = (folder / "report.html").read_text("utf-8")
    assert "What survives attacks" in text and "pruning, 90% of the weights" in text and "Before and after" in text
    assert "recovery over the steps" in text and "attacks that are not in the table" in text


def test_a_second_call_measures_only_what_is_new_in_any_order(ran, edited, few, capsys):
    folder, rows, _ = ran
    again = attack(edited, few, folder, [{"name": "noise"}, *reversed(ATTACKS)])
    assert again[: len(rows)] == rows and len(again) == len(rows) + 1 and again[-1]["attack"]["name"] == "noise"
    out = capsys.readouterr().out
    assert "6 attacks on" in out and "5 of them measured before" in out
    lines = out[out.index("What survives") :].splitlines()
    assert max(map(len, lines[:-3])) <= 80
    assert out.index("noise, 0.1") < out.index("relearning") < out.index("pruning, 90%")  # as they were asked for


def test_attacks_do_not_depend_on_their_order(ran, edited, few, tmp_path):
    """The model has its weights again after each: in another folder, in the other order, the same figures."""
    _, rows, _ = ran
    other = attack(edited, few, tmp_path / "other", [ATTACKS[1], ATTACKS[0]])
    by_name = {row["attack"]["name"]: row for row in other[2:]}
    for row in rows[2:4]:
        assert by_name[row["attack"]["name"]] | {"timestamp": 0} == row | {"timestamp": 0}


def test_an_edit_that_changed_nothing_has_nothing_to_recover(demo_factors, few, tmp_path, capsys):
    edit("apply", factors=demo_factors, rho=1.0, output=tmp_path / "same")
    rows = attack(tmp_path / "same", few, tmp_path / "out", ["pruning", {**RELEARNING, "steps": [0, 1]}])
    assert all(share is None for row in rows[2:] for share in row["recovered"].values())
    assert "null" in (tmp_path / "out" / "results.jsonl").read_text()
    words = " ".join(capsys.readouterr().out.split())
    assert words.count("nothing was") == 3


def test_a_model_without_its_unedited_one_is_refused_before_it_is_read(few, tmp_path, capsys, monkeypatch):
    load_model("demo").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(command, "open_model", None)
    monkeypatch.setattr(command, "_data", None)
    told = failed(capsys, "attack", model=tmp_path / "model", output=tmp_path / "out", **{"data.memorized": few})
    assert "has no edit.json" in told and "--unedited" in told
    (tmp_path / "model" / "edit.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    told = failed(capsys, "attack", model=tmp_path / "model", output=tmp_path / "out", **{"data.memorized": few})
    assert "the model that was edited cannot be found" in told and "name the unedited model with --unedited" in told
    assert not (tmp_path / "out").exists()


def test_the_unedited_model_can_be_named(few, tmp_path):
    load_model("demo").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "model" / "tokenizer_config.json").write_bytes((DEMO / "tokenizer_config.json").read_bytes())
    rows = attack(tmp_path / "model", few, tmp_path / "out", ["pruning"], unedited="demo", **{"data.heldout": "null"})
    assert rows[-1]["recovered"]["strict_acc"] is None and "perplexity" not in rows[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": "[nose]"}, "'nose' is no attack"),
        ({"attacks": "[]"}, "--attacks is empty"),
        ({"attacks": "[{name: relearning, source: no/such.jsonl}]"}, "no/such.jsonl"),
        ({"data.memorized": "null"}, "set --data.memorized"),
    ],
)
def test_what_cannot_be_attacked_is_one_line(edited, few, tmp_path, capsys, changes, message):
    options = {"model": edited, "output": tmp_path / "out", "data.memorized": few} | changes
    assert message in failed(capsys, "attack", **options)


def test_adapters_without_peft_are_refused_before_anything_is_measured(edited, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_kfac.models.adapters.find_spec", lambda name: None)
    attacks = json.dumps(["pruning", {"name": "relearning", "weights": "lora"}])
    told = failed(capsys, "attack", model=edited, output=tmp_path / "out", attacks=attacks, **{"data.memorized": few})
    assert "needs peft" in told and not (tmp_path / "out" / "results.jsonl").exists()


def test_a_file_that_gives_the_reported_half_away_is_cut(ran, edited, few, tmp_path, capsys):
    """The whole set as something to learn: the measured half is left out of it."""
    folder, _, _ = ran
    rows = attack(edited, few, tmp_path / "out", [{**RELEARNING, "steps": [1], "source": str(few)}])
    told = " ".join(capsys.readouterr().err.split())
    assert "4 of 8 sequences of" in told and "left out" in told and rows[-1]["attack"]["n_learned"] == 4
    only = folder / "halves" / "reported.jsonl"
    told = failed(
        capsys,
        "attack",
        model=edited,
        output=tmp_path / "other",
        attacks=json.dumps([{**RELEARNING, "source": str(only)}]),
        **{"data.memorized": few},
    )
    assert "holds nothing to learn that is not measured" in told


def test_a_killed_relearning_goes_on_with_the_same_result(ran, edited, few, tmp_path, monkeypatch):
    _, rows, _ = ran
    append = command.AttackedModel.measure

    def stop(measured, attack, model, about=None):
        if about and about["steps"] == 2:
            raise KeyboardInterrupt
        append(measured, attack, model, about)

    longer = [{**RELEARNING, "steps": [0, 1, 2]}]
    monkeypatch.setattr(command.AttackedModel, "measure", stop)
    with pytest.raises(SystemExit):
        attack(edited, few, tmp_path / "out", longer)
    kept = list((tmp_path / "out" / "state").glob("relearning-*-00000001.ckpt"))
    assert len(kept) == 1 and len(read_results(tmp_path / "out" / "results.jsonl")) == 4
    monkeypatch.undo()
    found = attack(edited, few, tmp_path / "out", longer)
    assert len(found) == 5 and not (tmp_path / "out" / "state").exists()
    assert found[-1] | {"timestamp": 0} == rows[5] | {"timestamp": 0}


def test_the_shipped_config_names_attacks_that_exist(edited, tmp_path):
    options = make_parser(["attack"]).parse_args(["attack", "--config", find_config("attack")]).attack
    attacks = [attack_of(one) for one in options.attacks]
    assert {attack.name for attack in attacks} == set(KINDS) and len(set(attacks)) == len(attacks)
    assert options.model == "runs/quickstart/edited" and options.data.memorized == "demo:planted_report.jsonl"
    words = ["--model", str(edited), "--output", str(tmp_path), "--attacks", "[pruning]", "--data.heldout", "null"]
    main(["attack", "--config", "configs/attack.yaml", *words])
    assert [row["n_sequences"] for row in read_results(tmp_path / "results.jsonl")] == [50] * 3


def test_weights_are_read_in_the_dtype_that_is_asked_for(edited, few, tmp_path):
    rows = attack(edited, few, tmp_path / "out", [{**RELEARNING, "steps": [0]}], dtype="bfloat16")
    assert rows[-1]["recovered"]["strict_acc"][0] == 0.0 and torch.isfinite(torch.tensor(rows[-1]["perplexity"]))
