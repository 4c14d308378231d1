"""Runs of train.py with a domain: collections of several texts, moments, and the three-way comparison."""

import json

import numpy as np
import pytest
import torch
import yaml

from lightning_kfac import EditConfig, KFACEditor, collect_factors, collect_moments, load_factors
from lightning_kfac.cli.train import main
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.moments import load_moments
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.storage.results import read_results
from tests.common import build_model, small, write_jsonl
from tests.forks import ROOT, run_train

FACTS = [
    {"prompt": f"{a} + {b} =", "answer": str(a + b), "text": f"{a} + {b} = {a + b}"} for a in range(8) for b in range(5)
]


@pytest.fixture
def facts(tmp_path):
    return write_jsonl(tmp_path / "facts.jsonl", FACTS)


def domain_options(folder, few, facts, **changes):
    options = {
        "data.domains.sums": facts,
        "data.questions.sums": facts,
        "edit.rho": 0.7,
        "collect.projections": "[gate, up]",
    }
    return small(folder, few, **(options | changes))


def rows_of(texts, seq_len):
    """Documents joined with the end-of-text token and cut into rows, one token at a time."""
    tokenizer = load_tokenizer("demo")
    ids = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return [{"input_ids": torch.tensor([ids[i : i + seq_len]])} for i in range(0, len(ids), seq_len)]


def assert_close(found, expected, tolerance=1e-5):
    for name, layer in expected.items():
        assert found[name].n_tokens == layer.n_tokens
        for a, b in ((found[name].A, layer.A), (found[name].G, layer.G)):
            assert (a - b).norm() <= tolerance * b.norm()


def test_a_run_with_a_domain_compares_three_ways(tmp_path, few, facts, capsys):
    folder = tmp_path / "run"
    main(["fit", *domain_options(folder, few, facts, **{"trainer.logger": "null"})])
    baseline, general, union = read_results(folder / "results.jsonl")
    assert [r["stage"] for r in (baseline, general, union)] == ["baseline", "general", "union"]
    assert baseline["edit"] is None and general["edit"]["alpha"] is None
    assert union["edit"]["alpha"] == {"sums": 1.0} and union["edit"]["mix"] == "scores"
    assert union["edit"]["fraction_kept"] == general["edit"]["fraction_kept"]  # budget count
    assert all(r["sums/n_questions"] == 40 and 0 <= r["sums/exact_acc"] <= 1 for r in (baseline, general, union))
    out = capsys.readouterr().out
    assert "sums (40 questions)" in out and "answers right" in out
    # The domain's factors are those of its text, and the checkpoint that stays is the mixed one.
    model, layers = load_model("demo"), ["gate", "up"]
    domain = collect_factors(model, rows_of([f["text"] for f in FACTS], 64), blocks=[3], projections=layers)
    assert_close(load_factors(folder / "domains" / "sums"), domain)
    KFACEditor(
        model,
        load_factors(folder / "factors"),
        EditConfig(rho=0.7),
        domains={"sums": load_factors(folder / "domains" / "sums")},
    ).apply()
    edited = load_model(str(folder / "edited"), "float32").state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, edited[name], atol=1e-6)
    assert len(list((folder / "factors" / "bases").glob("*.safetensors"))) == 3  # two G, one A


def test_general_factors_are_reused_where_they_are_there(tmp_path, few, facts, capsys):
    folder = tmp_path / "run"
    options = domain_options(folder, few, facts, **{"collect.reuse": "true"})
    main(["fit", *options])
    first = load_factors(folder / "factors")["model.layers.3.mlp.up_proj"]
    written = (folder / "factors" / "metadata.json").stat().st_mtime_ns
    rows = read_results(folder / "results.jsonl")
    capsys.readouterr()
    main(["fit", *options, "--overwrite"])
    assert "not collected again" in capsys.readouterr().err
    assert (folder / "factors" / "metadata.json").stat().st_mtime_ns == written
    assert torch.equal(load_factors(folder / "factors")["model.layers.3.mlp.up_proj"].G, first.G)
    for a, b in zip(rows, read_results(folder / "results.jsonl"), strict=True):
        assert {k: v for k, v in a.items() if k != "timestamp"} == {k: v for k, v in b.items() if k != "timestamp"}
    # Another budget is another collection.
    main(["fit", *options, "--overwrite", "--data.max_tokens", "500"])
    assert load_factors(folder / "factors").metadata["max_tokens"] == 500
    assert (folder / "factors" / "metadata.json").stat().st_mtime_ns != written


def test_a_domain_that_was_not_read_is_no_domain(tmp_path, few, facts, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *domain_options(tmp_path, few, facts, **{"trainer.max_steps": 1})])
    assert "ended before the domain sums was read" in capsys.readouterr().err
    assert (tmp_path / "factors" / "metadata.json").is_file() and not (tmp_path / "edited").exists()


def test_other_text_under_the_same_name_is_collected_again(tmp_path, few, facts, capsys):
    corpus = write_jsonl(tmp_path / "text.jsonl", [{"text": "one two three four five six seven"}] * 5)
    options = {"collect.reuse": "true", "data.corpus": corpus}
    options = domain_options(tmp_path / "run", few, facts, **options)
    main(["fit", *options])
    write_jsonl(corpus, [{"text": "eight nine ten eleven twelve thirteen"}] * 6)
    main(["fit", *options, "--overwrite"])
    assert "not collected again" not in capsys.readouterr().err


def test_moments_are_added_to_factors_that_are_there(tmp_path, few, capsys):
    options = {"collect.reuse": "true", "edit.rho": 0.7}
    main(["fit", *small(tmp_path, few, **options)])
    written = (tmp_path / "factors" / "metadata.json").stat().st_mtime_ns
    options |= {"collect.moments": "token", "edit.formula": "corrected"}
    main(["fit", *small(tmp_path, few, **options), "--overwrite"])
    assert (tmp_path / "factors" / "metadata.json").stat().st_mtime_ns == written
    assert (tmp_path / "factors" / "moments" / "metadata.json").is_file()
    assert read_results(tmp_path / "results.jsonl")[1]["edit"]["formula"] == "corrected"


def test_two_ranks_agree_on_domains_and_moments(tmp_path, few, facts):
    for n in (1, 2):
        changes = {"trainer.devices": n, "trainer.strategy": "ddp" if n > 1 else "auto", "data.batch_size": 2}
        changes |= {"collect.moments": "token", "edit.formula": "corrected"}
        run_train(["fit", *domain_options(tmp_path / str(n), few, facts, **changes)])
    one, two = tmp_path / "1", tmp_path / "2"
    for place in ("factors", "domains/sums"):
        assert_close(load_factors(two / place), load_factors(one / place), 1e-6)
    a, b = (load_factors(folder / "factors") for folder in (one, two))
    for place in ("factors", "domains/sums"):
        for name in a:
            x = load_moments(one / place, a, BasisCache.beside(a), name)
            y = load_moments(two / place, b, BasisCache.beside(b), name)
            # The bases of the two runs differ by rounding, which turns vectors of close eigenvalues.
            assert x.shape == y.shape and (x.sum() - y.sum()).abs() <= 1e-4 * x.sum()
    for x, y in zip(read_results(one / "results.jsonl"), read_results(two / "results.jsonl"), strict=True):
        assert x["sums/n_questions"] == y["sums/n_questions"] == 40
        assert x["sums/exact_acc"] == y["sums/exact_acc"] and x["n_sequences"] == y["n_sequences"]


def test_moments_of_a_run_are_those_of_python(tmp_path, few):
    folder = tmp_path / "run"
    options = {"collect.moments": "sequence", "edit.rho": 0.7, "edit.formula": "corrected_modified"}
    main(["fit", *small(folder, few, **options)])
    factors, model = load_factors(folder / "factors"), load_model("demo", "float32")
    rows = [torch.from_numpy(r.astype("int64")) for r in _packed(folder)]
    expected = collect_moments(model, [{"input_ids": r[None]} for r in rows], factors, moments="sequence")
    name = "model.layers.3.mlp.up_proj"
    found = load_moments(folder / "factors", factors, BasisCache.beside(factors), name)
    assert (found - expected[name]).norm() <= 1e-5 * expected[name].norm()
    assert read_results(folder / "results.jsonl")[1]["edit"]["formula"] == "corrected_modified"
    # The same edit again, from the disk.
    KFACEditor(model, factors, EditConfig(rho=0.7, formula="corrected_modified")).apply()
    edited = load_model(str(folder / "edited"), "float32")
    assert torch.allclose(edited.get_submodule(name).weight, model.get_submodule(name).weight, atol=1e-6)


def _packed(folder):
    (file,) = (folder / "data").glob("corpus-*.tokens")
    tokens = np.fromfile(file, dtype=np.int32)
    return [tokens[i : i + 64] for i in range(0, len(tokens), 64)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edit.formula": "corrected"}, "--collect.moments token"),
        ({"edit.formula": "random"}, "takes no domain"),
        ({"edit.mode": "ablate"}, "give the domain's alone"),
        ({"edit.alpha": "{code: 1.0}"}, "the domains are sums"),
        ({"edit.layers": '{"9": {"up": 0.5}}'}, "no factors for block 9"),
        ({"edit.layers": '{"3": {"up": {"formula": "corrected"}}}'}, "needs moments measured"),
        ({"data.questions.memorized": "x.jsonl"}, "stands for something else"),
        ({"data.questions.sums": "none.jsonl"}, "cannot be read"),
        ({"collect.watch_rho": "0.8"}, "watch_rho needs one pass"),
    ],
)
def test_what_does_not_fit_a_domain(tmp_path, few, facts, changes, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *domain_options(tmp_path / "run", few, facts, **changes)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_shipped_config_protects_the_domain(tmp_path):
    """configs/hessian_union.yaml on less text and fewer sequences."""
    cut = {"data.max_tokens": 20_000, "data.heldout_tokens": 4000, "data.sets": "null"}
    cut |= {"trainer.default_root_dir": tmp_path, "trainer.accelerator": "cpu", "trainer.logger": "false"}
    words = [word for name, value in cut.items() for word in (f"--{name}", str(value))]
    main(["fit", "--config", str(ROOT / "configs" / "hessian_union.yaml"), *words])
    baseline, general, union = read_results(tmp_path / "results.jsonl")
    assert baseline["arithmetic/exact_acc"] >= 0.98 and baseline["strict_acc"] >= 0.95
    assert union["arithmetic/exact_acc"] >= general["arithmetic/exact_acc"] + 0.1
    assert union["edit"]["fraction_kept"] == general["edit"]["fraction_kept"]
    assert union["edit"]["basis"] == "mixed" and union["strict_acc"] <= 0.2


def test_gsm8k_config_on_a_tiny_model(tmp_path, mixture):
    """As shipped, with local files for the downloads."""
    model = tmp_path / "model"
    build_model("olmo2", torch.bfloat16, num_hidden_layers=32, vocab_size=2048).save_pretrained(model)
    load_tokenizer("demo").save_pretrained(model)
    config = yaml.safe_load((ROOT / "configs" / "hessian_union_gsm8k.yaml").read_text())["data"]
    rows = [{"question": f"What is {a} and 1?", "answer": f"{a} + 1\n#### {a + 1},000"} for a in range(3)]
    file = write_jsonl(tmp_path / "gsm.jsonl", rows)
    for kind in ("domains", "questions"):
        config[kind]["gsm8k"] |= {"source": str(file), "subset": None}
    config["questions"]["gsm8k"]["max_new_tokens"] = 2
    memorized = write_jsonl(tmp_path / "m.jsonl", [{"prefix": "Return the", "suffix": " value"}])
    main([
        "fit", "--config", str(ROOT / "configs" / "hessian_union_gsm8k.yaml"), "--model.model_name", str(model),
        "--data.corpus", str(mixture), "--data.heldout", "embedded", "--data.heldout_tokens", "100",
        "--data.domains", json.dumps(config["domains"]), "--data.questions", json.dumps(config["questions"]),
        "--data.memorized", str(memorized), "--data.max_tokens", "40", "--data.seq_len", "16",
        "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    rows = read_results(tmp_path / "run" / "results.jsonl")
    assert [row["stage"] for row in rows] == ["baseline", "general", "union"]
    assert [row["gsm8k/n_questions"] for row in rows] == [3, 3, 3]
