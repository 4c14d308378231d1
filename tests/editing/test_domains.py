"""Collections of several texts, moments, and the three-way comparison, through train.py and from Python."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_kfac import (
    EditConfig,
    InputError,
    KFACEditor,
    collect_factors,
    collect_moments,
    load_factors,
    save_factors,
)
from lightning_kfac.cli.train import main
from lightning_kfac.data.questions import QuestionSet
from lightning_kfac.editing import editor as editor_module
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.sweep import average_seeds, compare_formulas, grid, pareto_front, weakest_settings
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.factors.moments import load_moments
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.storage.results import read_results
from lightning_kfac.storage.tensor_files import read_header, save_tensors
from tests.common import (
    batched,
    build_model,
    projections_of,
    small,
    write_jsonl,
)
from tests.conftest import run_train
from tests.forks import ROOT
from tests.oracle import full_sort_selection

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
    main(["fit", *domain_options(folder, few, facts)])
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
    options = domain_options(tmp_path / "run", few, facts, **{"collect.reuse": "true", "data.corpus": corpus})
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
        changes |= {"collect.moments": "token", "edit.formula": "corrected", "trainer.logger": "false"}
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
    import numpy as np

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
    cut |= {"trainer.default_root_dir": tmp_path, "trainer.accelerator": "cpu"}
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


# -- questions -----------------------------------------------------------------------------------------------------


def test_answers_are_found_by_pattern_and_cut_at_stops(tmp_path):
    gsm = QuestionSet("f", answer_pattern=r"####\s*(-?[\d.,]+)", stop=("\n\n", "Question:"))
    assert gsm.extract("a = 3\nb = 4\n#### 1,234") == "1234"
    assert gsm.answer_in("so\n#### 7\n\n#### 9") == "7" and gsm.answer_in("I do not know") == ""
    assert gsm.answer_in("#### 5 Question: #### 6") == "5"
    assert QuestionSet.parse("math", {"source": "f", "stop": "Question:"}).stop == ("Question:",)
    plain = QuestionSet("f")
    assert plain.answer_in(" 19\n20") == "19" and plain.extract("Paris, France") == "Paris, France"
    rows = [{"question": "2 and 2?", "answer": "2+2\n#### 4"}]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    asked = QuestionSet.parse(
        "math",
        {"source": str(file), "prompt_field": "question", "template": "Q: {prompt} A:", "few_shot": "Q: 1? A: 1 ",
         "answer_pattern": r"####\s*(.+)"},
    )  # fmt: skip
    tokenizer = load_tokenizer("demo")
    (question,) = asked.load(tokenizer, 2048)
    assert tokenizer.decode(question.prompt) == "Q: 1? A: 1 Q: 2 and 2? A:" and question.answer == "4"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "x"}], {}, "line 1: no text in the field 'answer'"),
        ([{"prompt": "x", "answer": "y"}], {"answer_pattern": r"\d+"}, "finds no answer in 'answer'"),
        ([], {}, "there is no question"),
        ([{"prompt": "x", "answer": "y"}], {"template": "Q"}, "lacks {prompt}"),
        ([{"prompt": "x", "answer": "y"}], {"answer_pattern": "("}, "no regular expression"),
        ([{"prompt": "x", "answer": "y"}], {"patterns": "("}, "unknown field 'patterns'"),
        ([{"prompt": "x", "answer": "y"}], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([{"prompt": "x", "answer": "y"}], {"stop": [""]}, "not empty"),
        ([{"prompt": "x " * 50, "answer": "y"}], {"max_new_tokens": 80}, "at most 128 positions"),
    ],
)
def test_wrong_questions(tmp_path, rows, settings, message):
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        QuestionSet.parse("math", {"source": str(file), **settings}).load(load_tokenizer("demo"), 2048, 128)


# -- the editor over many edits ---------------------------------------------------------------------------------


@pytest.fixture
def collected(any_model, rows):
    import copy

    model = copy.deepcopy(any_model)
    return model, collect_factors(model, batched(rows, 3), projections=projections_of(model))


def test_compare_formulas_starts_from_and_returns_to_the_original(collected, rows):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    moments = collect_moments(model, batched(rows, 3), factors)
    seen = []

    def evaluate(model):
        seen.append({name: p.clone() for name, p in model.state_dict().items()})
        return {"n": len(seen)}

    table = compare_formulas(model, factors, evaluate, rhos=[0.5, 0.9], formulas=FORMULAS, moments=moments)
    assert [row["n"] for row in table] == list(range(1, 2 + 2 * len(FORMULAS))) and table[0]["edit"] is None
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert all(torch.equal(p, original[n]) for n, p in seen[0].items())
    for row, weights in zip(table[1:], seen[1:], strict=True):  # what a fresh editor makes
        config = EditConfig(rho=row["edit"]["rho"], formula=row["edit"]["formula"])
        editor = KFACEditor(model, factors, config, moments=moments)
        assert editor.apply().fraction_kept == row["edit"]["fraction_kept"]
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
        editor.restore()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_itself_again_after_an_error(collected, error):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}

    def evaluate(model):
        if any(not torch.equal(p, original[n]) for n, p in model.state_dict().items()):
            raise error("stop")
        return {}

    with pytest.raises(error):
        compare_formulas(model, factors, evaluate, rhos=[0.5])
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())


def test_an_edit_that_is_stopped_half_way_changes_nothing(collected, monkeypatch):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    editor, done = KFACEditor(model, factors, EditConfig(rho=0.5)), []
    edit = editor_module.edit_layer

    def stop_at_the_third(*args):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return edit(*args)

    monkeypatch.setattr(editor_module, "edit_layer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        editor.apply()
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert editor.apply().layers  # and can be done again


def test_dry_run_reports_and_touches_nothing(collected):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    editor = KFACEditor(model, factors, EditConfig(rho=0.5))
    dry = editor.apply(dry_run=True)
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert editor.apply().layers == dry.layers and 0 < dry.relative_change < 1


def test_float32_bases_give_nearly_the_same_edit(collected):
    model, factors = collected
    name = next(iter(factors))
    exact = KFACEditor(model, factors, EditConfig(rho=0.7))
    exact.apply()
    expected = model.get_submodule(name).weight.clone()
    exact.restore()
    KFACEditor(model, factors, EditConfig(rho=0.7), dtype="float32").apply()
    found = model.get_submodule(name).weight
    assert (found - expected).norm() <= 1e-3 * expected.norm()  # at most a component at the threshold differs


def test_bases_are_computed_once_and_kept_beside_the_factors(tmp_path, rows, monkeypatch):
    model = build_model("llama")
    save_factors(collect_factors(model, batched(rows, 3)), tmp_path / "f")
    solve, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(len(m)), solve(m))[1])
    factors = load_factors(tmp_path / "f")
    for rho in (0.5, 0.7):
        editor = KFACEditor(model, factors, EditConfig(rho=rho))
        editor.apply()
        editor.restore()
    # 3 blocks: G of gate, up (40) and down (24); A of gate and up together (24) and of down (40)
    assert sorted(sizes) == [24] * 6 + [40] * 9
    sizes.clear()
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert not sizes
    damaged = next((tmp_path / "f" / "bases").iterdir())
    damaged.write_bytes(b"12")
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert len(sizes) == 1  # only the damaged one
    KFACEditor(model, load_factors(tmp_path / "f"), dtype="float32").apply(dry_run=True)
    assert len(sizes) == 16  # another precision is another basis


def test_moments_of_another_basis_are_refused(tmp_path, few):
    main(["fit", *small(tmp_path, few, **{"collect.moments": "token"})])
    factors, model = load_factors(tmp_path / "factors"), load_model("demo", "float32")
    config = EditConfig(formula="corrected")
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config, dtype="float32").apply()
    KFACEditor(model, factors, config).apply(dry_run=True)
    for file in (tmp_path / "factors" / "bases").iterdir():
        file.unlink()
    KFACEditor(model, factors, config).apply(dry_run=True)  # computed again to the last bit
    bases = list((tmp_path / "factors" / "bases").iterdir())
    for file in bases:  # as whole, and as good a basis as the one before
        tensors, metadata = load_file(file), read_header(file, "").metadata
        tensors["vectors"][:, 0] *= -1
        save_tensors(tensors, file, metadata)
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config).apply()
    # Moments of older versions do not say which bits they mean: only a basis that was not computed since then.
    about = tmp_path / "factors" / "moments" / "metadata.json"
    older = json.loads(about.read_text())
    older = {
        "moments": "token",
        "layers": {n: {k: e[k] for k in ("file", "bases")} for n, e in older["layers"].items()},
    }
    about.write_text(json.dumps(older))
    KFACEditor(model, factors, config).apply(dry_run=True)
    for file in bases:
        file.unlink()
    with pytest.raises(InputError, match="were measured in another basis"):
        KFACEditor(model, factors, config).apply()


def test_corrected_selects_by_the_moments(rows):
    model = build_model("olmo2")
    factors = collect_factors(model, batched(rows, 3), blocks=[1], projections=["up"])
    moments = collect_moments(model, batched(rows, 3), factors)
    (name,) = factors
    report = KFACEditor(model, factors, EditConfig(rho=0.6, formula="corrected"), moments=moments).apply(dry_run=True)
    assert report.layers[0].n_kept == len(full_sort_selection(moments[name].double(), 0.6))


def test_pareto_front_and_weakest_settings():
    def row(formula, rho, strict, perplexity):
        edit = {"formula": formula, "rho": rho, "seed": None, "fraction_kept": rho, "mass_kept": rho}
        return {"edit": edit | {"relative_change": 0.1}, "strict_acc": strict, "perplexity": perplexity}

    rows = [row("a", 0.9, 0.5, 10.0), row("a", 0.8, 0.1, 11.0), row("a", 0.7, 0.0, 13.0), row("b", 0.9, 0.05, 12.0),
            row("b", 0.8, 0.05, 14.0), row("c", 0.9, 0.2, 20.0), row("a", 0.8, 0.1, 11.0)]  # fmt: skip
    assert pareto_front(rows) == [0, 1, 2, 3, 6]
    weakest = weakest_settings(rows, 0.1)
    assert [(r["edit"]["formula"], r["edit"]["rho"]) for r in weakest] == [("a", 0.8), ("b", 0.9)]


def test_the_grid_keeps_what_the_config_says():
    base = EditConfig(alpha=0.25, budget="mass")
    (config,) = grid(base, formulas=["magnitude"], rhos=[0.5])
    assert (config.budget, config.alpha) == ("mass", 0.25)
    (config,) = grid(base, formulas=["original"], rhos=[0.5], mixing=True)
    assert config.alpha == 0.25
    assert [c.alpha for c in grid(base, formulas=["original"], rhos=[0.5], alphas=[0, 1], mixing=True)] == [0, 1]
    assert len(grid(EditConfig(mix="union"), formulas=["original"], rhos=[0.5], alphas=[0, 1], mixing=True)) == 1
    with pytest.raises(InputError, match="leave layers out"):
        grid(EditConfig(layers={"0": {"up": 0.5}}), formulas=["original"], rhos=[0.5])


def test_means_over_seeds_where_a_figure_is_missing():
    edit = {"formula": "random", "seed": 0, "fraction_kept": 0.5, "mass_kept": 0.5, "relative_change": 0.5}
    rows = [{"edit": edit | {"seed": n}, "perplexity": p, "strict_acc": 0.2} for n, p in enumerate((3.0, None))]
    assert average_seeds(rows)[0]["perplexity"] is None and average_seeds(rows)[0]["strict_acc"] == 0.2


def test_configs_of_an_edit_survive_json():
    config = EditConfig(layers={"3": {"up": {"rho": 0.5, "formula": "modified"}}})
    assert json.loads(json.dumps(config.layers)) == config.layers
