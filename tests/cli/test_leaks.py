"""``validate`` with members and non-members: figures and table, and what is refused before a model is loaded."""

import numpy as np
import pytest

from lightning_kfac import membership
from lightning_kfac.cli.train import main
from lightning_kfac.models.loading import load_model, load_tokenizer
from tests.common import results, scalars, write_jsonl

TEXTS = [
    "Return the value for key if key is in the dictionary, else default.",
    "A list of the names of all files in the directory, sorted.",
    "Raise an exception if the argument is not a string.",
]
OTHERS = [
    "Purple umbrellas swim yesterday between quiet xylophones.",
    "My neighbour's cat has eaten all of the birthday cake again.",
    "We sailed for nine days without seeing the coast once.",
]


def validate(folder, *more, **changes):
    options = {
        "model.model_name": "demo",
        "model.dtype": "float32",
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
    } | changes
    main(["validate", *more, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


@pytest.fixture
def classes(tmp_path):
    """Whole texts, as rows and as lines."""
    (tmp_path / "others.txt").write_text("\n".join(OTHERS))
    members = write_jsonl(tmp_path / "members.jsonl", [{"text": text} for text in TEXTS])
    return {"data.members": members, "data.nonmembers": tmp_path / "others.txt"}


def test_figures_before_and_after_are_those_of_the_function(tmp_path, classes, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # in 80 the titles of the columns are folded
    changes = {
        "model.model_name": "demo-arithmetic",
        "model.reference": "demo",
        "model.measures.leaks.reference": "demo",
        "model.measures.leaks.k": 0.4,
    }
    validate(tmp_path / "run", **classes, **changes)
    tokenizer = load_tokenizer("demo")
    demo = load_model("demo")
    for row, name in zip(results(tmp_path / "run"), ("demo", "demo-arithmetic"), strict=True):
        score = membership(load_model(name), tokenizer, TEXTS, OTHERS, k=0.4, reference=demo)
        found = row["leaks"]
        assert (found["members"], found["nonmembers"], found["k"]) == (3, 3, 0.4)
        assert set(found) == {"members", "nonmembers", "k", *score.measures} and len(score.measures) == 7
        for measure in score.measures:
            low, high = score.interval(measure)
            mean = sum(text[measure] for text in score.members) / 3
            expected = {"auc": score.auc(measure), "low": low, "high": high, "mean_members": mean}
            expected["tpr_at_fpr_0.01"] = score.tpr_at_fpr(measure)
            part = {key: found[measure][key] for key in expected}
            assert part == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row["measured"]["members"] == str(classes["data.members"])
    before, after = results(tmp_path / "run")
    assert before["leaks"]["reference"]["auc"] == 0.5 and before["leaks"]["reference"]["mean_members"] == 0
    change = after["differences"]["leaks.min_k.auc"][0]
    assert change == pytest.approx(after["leaks"]["min_k"]["auc"] - before["leaks"]["min_k"]["auc"]) != 0
    out = capsys.readouterr().out
    assert "Members against non-members" in out and "3 members, 3 non-members" in out and "found at 1% FPR" in out
    _, logged = scalars(tmp_path / "run")
    assert logged["val/edited/leaks.loss.auc"] == pytest.approx([after["leaks"]["loss"]["auc"]])
    assert len(logged["comparison/leaks.loss.auc/low"]) == 2


def test_suffixes_are_scored_given_their_prefixes(tmp_path):
    ids = [load_tokenizer("demo")(text)["input_ids"] for text in TEXTS]
    rows = [{"prefix_ids": row[:4], "suffix_ids": row[4:10]} for row in ids]
    other = [{"prefix_ids": row[:4], "suffix_ids": row[:6][::-1]} for row in ids]
    validate(
        tmp_path / "run",
        **{
            "data.members": write_jsonl(tmp_path / "a.jsonl", rows),
            "data.nonmembers": write_jsonl(tmp_path / "b.jsonl", other),
        },
    )
    (row,) = results(tmp_path / "run")
    pairs = [[(r["prefix_ids"], r["suffix_ids"]) for r in some] for some in (rows, other)]
    score = membership(load_model("demo"), load_tokenizer("demo"), *pairs)
    assert row["leaks"]["min_k_plus_plus"]["auc"] == score.auc("min_k_plus_plus")


def test_texts_in_both_classes_are_told(tmp_path, classes, capsys):
    write_jsonl(classes["data.members"], [{"text": text} for text in (*TEXTS, OTHERS[1])])
    validate(tmp_path / "run", **classes)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("1 text is in data.members and in data.nonmembers: nothing can tell them apart") == 1


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails."""

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lightning_kfac.modules.causal_lm.load_model", load)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (None, {"data.nonmembers": None}, "data.members alone tells nothing: set data.nonmembers too"),
        (None, {"data.members": None}, "data.nonmembers alone tells nothing: set data.members too"),
        ([], {}, "m.jsonl: the set is empty"),
        ([{"text": ""}], {}, "line 1: the text is empty"),
        ([{"prefix": "Return", "suffix": ""}], {}, "line 1: the suffix is empty"),
        ([{"prefix_ids": [5], "suffix_ids": [4096]}], {}, "is outside the model's vocabulary"),
        ([{"prefix_ids": [5], "suffix_ids": [6]}], {}, "whole texts as well as suffixes with a prefix"),
        (
            [{"text": "Return it."}, {"prefix_ids": [5], "suffix_ids": [6]}],
            {},
            "data.members holds whole texts as well",
        ),
        (None, {"data.members": "none.jsonl"}, "none.jsonl: no such file or folder"),
        (None, {"data.nonmembers": "none"}, "none: no such file or folder"),
        (None, {"data.members": "{source: x, field: y}"}, "data.members: unknown field 'field'"),
        (None, {"model.measures.leaks.k": "0"}, "leaks.k is 0.0; it must be greater than 0, and at most 1"),
        (None, {"model.measures.leaks.reference": "./none"}, "./none: no such folder"),
        (None, {"data.sets.members": "demo:unseen.jsonl"}, "the name 'members' stands for something else"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_model_is_loaded(
    tmp_path, classes, capsys, no_model, rows, changes, message
):
    options = dict(classes)
    if rows is not None:
        options["data.members"] = write_jsonl(tmp_path / "m.jsonl", rows)
    options = {name: value for name, value in (options | changes).items() if value is not None}
    with pytest.raises(SystemExit) as stopped:
        validate(tmp_path / "run", **options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.rpartition("error: ")[2].count("\n") == 1, error


def test_a_reference_needs_members_and_the_same_tokenizer(tmp_path, classes, capsys, no_model):
    from tests.common import build_model

    folder = tmp_path / "other"
    build_model("llama", vocab_size=2048).save_pretrained(folder)
    tokenizer = load_tokenizer("demo")
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save_pretrained(folder)
    options = {"model.measures.leaks.reference": folder}
    for sets, message in (
        (classes, "its tokenizer differs from the model's, so their losses are of other tokens"),
        ({"data.memorized": "demo:unseen.jsonl"}, "there is nothing to compare; set data.members and data.nonmembers"),
    ):
        with pytest.raises(SystemExit):
            validate(tmp_path / "run", **sets, **options)
        assert message in capsys.readouterr().err


def test_arrays_of_another_tokenizer(tmp_path, capsys, no_model):
    np.save(tmp_path / "train_prefix.npy", np.full((3, 5), 7))
    np.save(tmp_path / "train_suffix.npy", np.full((3, 5), 50_000))
    with pytest.raises(SystemExit):
        validate(tmp_path / "run", **{"data.members": tmp_path, "data.nonmembers": tmp_path})
    error = capsys.readouterr().err
    assert "suffix id 50000 is outside the model's vocabulary (0 to 2047); was the set made with another" in error


def test_bulk_share_of_recited_and_of_clean_windows(tmp_path, few, demo_factors):
    options = {
        "data.memorized": few,
        "data.heldout": "embedded",
        "data.heldout_tokens": 3000,
        "data.clean_windows": 5,
        "data.seq_len": 128,
        "data.members": "memorized",
        "data.nonmembers": "clean",
        "model.measures.leaks.factors": demo_factors,
    }
    validate(tmp_path / "run", **options)
    (row,) = results(tmp_path / "run")
    found = row["leaks"]
    names = [f"model.layers.3.mlp.{projection}_proj" for projection in ("gate", "up")]
    assert found["members"] == row["n_sequences"] and found["nonmembers"] == row["clean/n_sequences"] == 5
    for measure in ("bulk_share", "bulk_share_random"):
        assert list(found[measure]["layers"]) == names and 0 < found[measure]["mean_members"] < 1
    assert found["bulk_share"]["auc"] >= 0.9 and found["bulk_share"]["mean_members"] > 0.2
    assert row["measured"]["members"] == "memorized" and row["measured"]["nonmembers"] == "clean"


def test_wrong_factors_of_the_bulk_share(tmp_path, classes, demo_factors, capsys, no_model):
    from tests.common import build_model

    build_model("llama", vocab_size=2048).save_pretrained(tmp_path / "other")
    load_tokenizer("demo").save_pretrained(tmp_path / "other")
    option = "model.measures.leaks.factors"
    for sets, changes, message in (
        (classes, {option: tmp_path}, "metadata.json"),
        (
            {"data.memorized": "demo:unseen.jsonl"},
            {option: demo_factors},
            "there is nothing to measure; set data.members",
        ),
        (
            classes,
            {option: demo_factors, "model.model_name": tmp_path / "other"},
            "the factors are of model.layers.3.mlp",
        ),
        ({"data.members": "clean", "data.nonmembers": "clean"}, {}, "clean: no such file or folder"),
    ):
        with pytest.raises(SystemExit):
            validate(tmp_path / "run", **(sets | changes))
        assert message in capsys.readouterr().err
