"""train.py as a user runs it: the main job, every shipped config, and wrong input."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_kfac import load_factors
from lightning_kfac.assets import DEMO
from lightning_kfac.cli.train import main
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.models.checkpoints import save_checkpoint
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from tests.common import build_model, results, scalars, small, write_jsonl
from tests.forks import ROOT, run_train

CONFIGS = ROOT / "configs"
FAMILIES = {
    "olmo2_1b": ("olmo2", 16),
    "olmo2_7b": ("olmo2", 32),
    "llama3_8b": ("llama", 32),
    "qwen3_8b": ("qwen3", 36),
}


# -- the main job -----------------------------------------------------------------------------------------------


def test_quickstart_reaches_its_figures(quickstart):
    baseline, edited = results(quickstart[0])
    assert (baseline["stage"], edited["stage"]) == ("baseline", "edited")
    assert baseline["n_sequences"] == edited["n_sequences"] == 100
    assert baseline["strict_acc"] >= 0.95 and baseline["unseen/strict_acc"] <= 0.02
    assert baseline["ndcg@10"] == 1.0
    assert edited["strict_acc"] <= 0.10
    assert edited["perplexity"] <= 1.10 * baseline["perplexity"]
    assert edited["ndcg@10"] >= 0.90
    assert (edited["edit"]["blocks"], edited["edit"]["projections"]) == ([3, 4], ["gate", "up"])
    assert edited["edit"]["rho"] == 0.8 and 0 < edited["edit"]["fraction_kept"] < 0.5
    assert baseline["edit"] is None and edited["model"] == "demo"


def test_quickstart_prints_what_a_person_needs_in_order(quickstart):
    folder, out = quickstart
    order = [
        "1. collect the curvature of 4 layers of demo on 100,000 tokens of embedded:train",
        "plan: 4 projections, 1 pass,",
        "Before and after",
        "strict accuracy",
        "nDCG@10",
        "Continuations of memorized sequences",
        "  true continuation  ",
        f"Outputs in {folder}/: factors/, edited/, results.jsonl, config.yaml",
        f"tensorboard.main --logdir {folder}/tensorboard",
    ]
    places = [out.find(text) for text in order]
    assert -1 not in places and places == sorted(places), (order, places, out)
    assert "Traceback" not in out and "Warning" not in out


def test_quickstart_leaves_a_loadable_edited_model(quickstart):
    folder = quickstart[0]
    edited = AutoModelForCausalLM.from_pretrained(folder / "edited", dtype=torch.float32)
    source = load_model("demo", "float32")
    changed = [n for n, p in edited.named_parameters() if not torch.equal(p, source.get_parameter(n))]
    names = [f"model.layers.{b}.mlp.{p}_proj" for b in (3, 4) for p in ("gate", "up")]
    assert sorted(changed) == sorted(f"{name}.weight" for name in names)
    details = json.loads((folder / "edited" / "edit.json").read_text())
    assert [layer["name"] for layer in details["layers"]] == names
    assert (
        load_tokenizer(str(folder / "edited"))("Return")["input_ids"] == load_tokenizer("demo")("Return")["input_ids"]
    )


def test_quickstart_writes_factors_with_their_story(quickstart):
    factors = load_factors(quickstart[0] / "factors")
    assert len(factors) == 4
    metadata = factors.metadata
    rows = -(-100_000 // 128)
    assert metadata["n_tokens"] == 100_000 - rows  # each row's last token has no next one
    expected = {"model": "demo", "tokenizer": "demo", "corpus": "embedded:train", "labels": "sampled"}
    expected |= {"precision": "float32", "seed": 0, "world_size": 1, "format": 1}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["fingerprint"] == weights_fingerprint(load_model("demo", "float32"), factors)


def test_quickstart_says_everywhere_which_tokenizer_made_the_ids(quickstart):
    folder = quickstart[0]
    edit = json.loads((folder / "edited" / "edit.json").read_text())
    said = [load_factors(folder / "factors").metadata, edit, edit["factors"], *results(folder)]
    known = tokenizer_fingerprint(load_tokenizer(str(folder / "edited")))
    assert [part["tokenizer_fingerprint"] for part in said] == [known] * 5


def test_quickstart_is_in_tensorboard(quickstart):
    events, values = scalars(quickstart[0])
    baseline, edited = results(quickstart[0])
    for stage, row in (("baseline", baseline), ("edited", edited)):
        for name in ("strict_acc", "loose_acc", "avg_levenshtein_norm", "perplexity", "ndcg@10", "unseen/strict_acc"):
            assert values[f"val/{stage}/{name}"] == [pytest.approx(row[name], rel=1e-6)]
    assert len(values["collect/loss_per_token"]) >= 4 and values["collect/n_tokens"] == [99_218]
    assert 10_000 < values["collect/n_tokens_on_rank_0"][0] < values["collect/n_tokens_on_rank_0"][-1] < 99_218
    assert "hp/strict_acc" in values
    (text,) = events.Tensors("continuations/text_summary")
    assert b"**edited**" in text.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in str(events.summary_metadata)


def test_saved_config_runs_again(quickstart, tmp_path, few):
    saved = quickstart[0] / "config.yaml"
    assert yaml.safe_load(saved.read_text())["edit"]["rho"] == 0.8
    main(["fit", "--config", str(saved), *small(tmp_path / "again", few, **{"data.sets": "null"})])
    assert [row["stage"] for row in results(tmp_path / "again")] == ["baseline", "edited"]


def test_intervals_and_changes_are_recorded(quickstart):
    """In results.jsonl and in TensorBoard, the same."""
    _, values = scalars(quickstart[0])
    before, after = results(quickstart[0])
    assert not before["differences"]
    for name in ("strict_acc", "unseen/loose_acc", "perplexity", "ndcg@10"):
        low, high = after["intervals"][name]
        change, *bounds = after["differences"][name]
        assert low < after[name] < high or (low == after[name] == 0 < high)
        assert change == pytest.approx(after[name] - before[name], abs=1e-12)
        assert low - after[name] <= 0 <= high - after[name] and bounds[0] <= change <= bounds[1]
        logged = [values[f"comparison/{name}{end}"] for end in ("", "/low", "/high")]
        assert [line[1] for line in logged] == pytest.approx([after[name], low, high], rel=1e-6)
        assert logged[0][0] == pytest.approx(before[name], rel=1e-6)
        assert values[f"change/edited/{name}"] == pytest.approx([change], rel=1e-6)


def validate(folder, memorized="demo:planted_report.jsonl", **changes):
    options = small(folder, memorized, **changes)
    options = [o for o in options if not o.startswith("--collect")]
    main(["validate", *(o for o in options if o not in ("[3]", "[up]"))])
    return results(folder)


def test_sets_by_their_fields(tmp_path):
    """Where prefix and suffix lie is said on the command line; the same rows give the same figures."""
    rows = [json.loads(line) for line in (DEMO / "planted_report.jsonl").read_text("utf-8").splitlines()[:4]]
    heads = [{"head": row["prefix_ids"], "tail": row["suffix_ids"]} for row in rows]
    np.save(tmp_path / "some_prefix.npy", np.array([row["prefix_ids"] for row in rows], dtype=np.uint16))
    np.save(tmp_path / "some_suffix.npy", np.array([row["suffix_ids"] for row in rows], dtype=np.uint16))
    fields = {
        "source": str(write_jsonl(tmp_path / "heads.jsonl", heads)),
        "prefix_field": "head",
        "suffix_field": "tail",
    }
    sets = {"again": fields, "arrays": str(tmp_path / "some_suffix.npy")}
    options = {"data.memorized": json.dumps(fields), "data.sets": json.dumps(sets), "data.heldout": "null"}
    (row,) = validate(tmp_path / "v", **options)
    assert row["strict_acc"] == row["again/strict_acc"] == row["arrays/strict_acc"] == 1 and row["n_sequences"] == 4
    assert row["measured"]["sets"] == {
        "memorized": fields["source"],
        "again": fields["source"],
        "arrays": sets["arrays"],
    }


def test_validate_compares_an_edited_checkpoint_with_its_source(quickstart, tmp_path, capsys):
    edited = results(quickstart[0])[1]
    before, after = validate(tmp_path / "v", **{"model.model_name": quickstart[0] / "edited"})
    assert (before["stage"], after["stage"]) == ("baseline", "edited")
    assert (before["model"], before["edit"]) == ("demo", None)
    assert after["edit"] == edited["edit"] and before["ndcg@10"] == 1
    for name in ("strict_acc", "loose_acc", "avg_levenshtein_norm", "n_sequences"):
        assert after[name] == edited[name]
    shown = capsys.readouterr()
    assert "change" in shown.out and "note:" not in shown.err


def test_validate_without_a_baseline(quickstart, tmp_path, few, capsys):
    changes = {"model.model_name": quickstart[0] / "edited", "model.skip_baseline": "true"}
    (row,) = validate(tmp_path / "v", few, **changes)
    assert row["stage"] == "edited" and row["ndcg@10"] is None and not row["differences"]
    assert "the unedited model is skipped; --model.reference names" in capsys.readouterr().err


def test_validate_with_a_source_that_is_gone(quickstart, tmp_path, few, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(quickstart[0] / "edited", copy)
    details = json.loads((copy / "edit.json").read_text())
    (copy / "edit.json").write_text(json.dumps(details | {"model": str(tmp_path / "gone")}))
    (row,) = validate(tmp_path / "v", few, **{"model.model_name": copy})
    assert row["stage"] == "edited" and row["ndcg@10"] is None
    assert "cannot be found" in capsys.readouterr().err
    # The user's own reference is an error instead.
    with pytest.raises(SystemExit):
        validate(tmp_path / "w", few, **{"model.model_name": copy, "model.reference": tmp_path / "gone"})
    assert "no such folder" in capsys.readouterr().err


def test_validate_with_another_reference(quickstart, tmp_path, few, capsys):
    """A reference that is not what was edited is said to be so."""
    folder = tmp_path / "other"
    model = load_model("demo", "float32")
    model.get_submodule("model.layers.3.mlp.up_proj").weight.data.mul_(1.01)
    save_checkpoint(model, load_tokenizer("demo"), folder)
    changes = {"model.model_name": quickstart[0] / "edited", "model.reference": folder}
    before, _ = validate(tmp_path / "v", few, **changes)
    assert before["model"] == str(folder)
    assert "has other weights than the model that was edited" in capsys.readouterr().err


def test_predict_finds_a_planted_window(tmp_path, few):
    tokenizer = load_tokenizer("demo")
    planted = [json.loads(line) for line in few.read_text().splitlines()]
    texts = [(row["prefix"] + row["suffix"], row["prefix_ids"] + row["suffix_ids"]) for row in planted]
    whole = next(text for text, ids in texts if tokenizer(text)["input_ids"] == ids)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "short"}, {"text": "x " * 300}, {"text": whole}])
    folder = tmp_path / "mined"
    options = ["--data.corpus", str(corpus), "--trainer.default_root_dir", str(folder)]
    main(["predict", "--model.model_name", "demo", *options])
    with pytest.raises(SystemExit):  # a second run must not replace it unasked
        main(["predict", "--model.model_name", "demo", *options])
    (found,) = [json.loads(line) for line in (folder / "memorized.jsonl").read_text().splitlines()]
    assert (found["document"], found["offset"], found["match_length"]) == (2, 0, 48)
    assert found["prefix"] + found["suffix"] == whole


# -- every shipped config ---------------------------------------------------------------------------------------


def test_every_config_is_tested():
    unions = {"hessian_union", "hessian_union_gsm8k"}  # test_domains.py
    elsewhere = {"sweep", "mine", "scan", *unions}  # test_edit.py, callbacks/test_mining.py, commands/test_scan.py
    elsewhere |= {"crystallize", "crystallize_gpt2"}  # callbacks/test_crystallize.py
    elsewhere |= {"attack", "audit"}  # commands/test_attack.py, commands/test_audit.py
    elsewhere |= {"own_model"}  # test_own_model.py
    elsewhere |= {"abilities", "image_labels"}  # commands/test_abilities.py, test_images.py
    elsewhere |= {"competitors", "competitors_1b"}  # commands/test_compare.py
    small = {"quickstart", "demo_model", "demo_arithmetic", "demo_sources", "plant", *elsewhere}
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {*small, *FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_large_model_configs_on_a_tiny_model(name, tmp_path, mixture):
    """The same architecture and number of blocks, a few columns wide; local shards for the downloads.

    One of them is drawn: figures of the others would be of the same layers.
    """
    family, n_layers = FAMILIES[name]
    model_folder = tmp_path / "model"
    build_model(family, torch.bfloat16, num_hidden_layers=n_layers, vocab_size=2048).save_pretrained(model_folder)
    load_tokenizer("demo").save_pretrained(model_folder)
    pq.write_table(pa.table({"text": ["A held-out text. " * 20] * 3, "meta": [1, 2, 3]}), tmp_path / "pile.parquet")
    rows = [{"prefix": "Return the", "target_suffix": " value of x"}, {"prefix": "A class", "target_suffix": " of y"}]
    few = write_jsonl(tmp_path / "m.jsonl", rows)
    config = CONFIGS / f"{name}.yaml"
    sets = {key: str(few) for key in yaml.safe_load(config.read_text())["data"].get("sets", {})}
    main([
        "fit", "--config", str(config), "--model.model_name", str(model_folder),
        "--data.corpus", str(mixture), "--data.heldout.source", str(tmp_path / "pile.parquet"),
        "--data.memorized", str(few), "--data.sets", json.dumps(sets), "--data.max_tokens", "40",
        "--data.seq_len", "16", "--data.heldout_tokens", "100",
        "--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
        "--trainer.logger", "null" if name == "olmo2_1b" else "false",
    ])  # fmt: skip
    baseline, edited = results(tmp_path / "run")
    assert edited["edit"]["rho"] == 0.6 and edited["perplexity"] > 1
    assert set(sets) == {key.partition("/")[0] for key in baseline if "/" in key}
    factors = load_factors(tmp_path / "run" / "factors")
    assert factors.metadata["precision"] == "bfloat16" and len(factors) == 6
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "edited").dtype == torch.bfloat16


def test_large_model_configs_name_the_right_corpus():
    for name in FAMILIES:
        data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]
        assert Corpus.parse(data["corpus"]).source == "allenai/dolmino-mix-1124"
        assert data["heldout"]["source"] == "NeelNanda/pile-10k" and data["max_tokens"] == 20_000_000


@pytest.mark.parametrize("name", ["demo_model", "demo_arithmetic", "demo_sources", "plant"])
def test_training_configs(tmp_path, few, name):
    """`plant` is for a model and texts that benchmarks.real_model makes; here it plants in the demo model."""
    begun = ["--model.model_name", "demo", "--data.corpus", "embedded", "--data.heldout", "embedded"]
    main([
        "fit", "--config", str(CONFIGS / f"{name}.yaml"), *(begun if name == "plant" else []),
        "--data.max_tokens", "4000" if name == "demo_model" else "1500", "--data.planted", f"[{few}]",
        "--data.exposures", "2", "--data.memorized", str(few), "--data.sets", "null", "--data.heldout_tokens", "500",
        "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
        "--trainer.default_root_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    model = load_model(str(tmp_path / "run" / "model"))
    shipped = load_model("demo")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    _, values = scalars(tmp_path / "run")
    if name == "demo_model":  # the others begin trained
        assert values["train/loss"][-1] < values["train/loss"][0]
    assert len(values["train/loss"]) >= 1
    assert not (tmp_path / "run" / "factors").exists()


# -- ranks ------------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_factors_of_one(tmp_path, few):
    """1,069 tokens are 17 rows of 64, the last ragged: nine rows and eight, in batches of two. Started by Lightning."""
    rows = [{"text": f"Return {i} values, of which {i % 7} are lists." * 3} for i in range(99)]
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    options = {"data.corpus": text, "data.heldout": text, "data.max_tokens": 1069}
    options |= {"data.batch_size": 2, "edit.rho": 0.8}
    run_train(["fit", *small(tmp_path / "1", few, **options)])
    options |= {"trainer.devices": 2, "trainer.strategy": "ddp"}
    done = subprocess.run(
        [sys.executable, "train.py", "fit", *small(tmp_path / "2", few, **options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_factors(tmp_path / n / "factors") for n in "12")
    assert two.metadata["world_size"] == 2
    for name in one:
        assert one[name].n_tokens == two[name].n_tokens == 1069 - 17
        for a, b in ((one[name].A, two[name].A), (one[name].G, two[name].G)):
            assert (a - b).norm() / a.norm() < 1e-6
    for a, b in zip(results(tmp_path / "1"), results(tmp_path / "2"), strict=True):
        for key in ("strict_acc", "loose_acc", "n_sequences"):
            assert a[key] == b[key]
        for key in ("avg_levenshtein_norm", "perplexity", "ndcg@10"):
            assert a[key] == pytest.approx(b[key], rel=1e-6)


# -- more ways to run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The factors of a layer in float32."""
    folder = tmp_path_factory.mktemp("exact")
    main(["fit", *small(folder / "run", "null")])
    return load_factors(folder / "run" / "factors")["model.layers.3.mlp.up_proj"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, few, exact, precision):
    main(["fit", *small(tmp_path, few, **{"trainer.precision": precision})])
    layer = load_factors(tmp_path / "factors")["model.layers.3.mlp.up_proj"]
    assert layer.A.dtype == torch.float32
    # A has no sampled labels in it; bfloat16 rounds the activations to 8 bits.
    assert (layer.A - exact.A).norm() / exact.A.norm() < (1e-5 if precision == "64-true" else 2e-2)


def test_several_passes_give_the_factors_of_one(tmp_path, few):
    settings = {"collect.blocks": "[2, 3]", "collect.projections": "[gate, up]", "edit.rho": "0.8"}
    main(["fit", *small(tmp_path / "1", few, **settings)])
    main(["fit", *small(tmp_path / "3", few, **settings, **{"collect.layers_per_pass": 3})])
    one, three = (load_factors(tmp_path / n / "factors") for n in "13")
    assert list(one) == list(three) and len(one) == 4
    for name in one:
        assert torch.equal(one[name].A, three[name].A) and torch.equal(one[name].G, three[name].G)
    assert [row["stage"] for row in results(tmp_path / "3")] == ["baseline", "edited"]
    assert results(tmp_path / "1")[1]["perplexity"] == results(tmp_path / "3")[1]["perplexity"]


def test_a_fit_cut_short_still_has_its_baseline(tmp_path, few):
    main(["fit", *small(tmp_path, few, **{"trainer.max_steps": "1", "data.batch_size": "2", "edit.rho": "0.8"})])
    baseline, edited = results(tmp_path)
    assert (baseline["stage"], baseline["ndcg@10"]) == ("baseline", 1.0) and edited["ndcg@10"] < 1
    assert load_factors(tmp_path / "factors").metadata["n_tokens"] == 2 * 63


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", "Title: some plain text about nothing.\n" * 40),
        ("one.jsonl", json.dumps({"text": "only one line " * 60})),
    ],
)
def test_files_as_corpus(tmp_path, few, name, content):
    (tmp_path / name).write_text(content)
    options = {"data.corpus": tmp_path / name, "data.heldout": tmp_path / name, "data.max_tokens": 100}
    main(["fit", *small(tmp_path / "run", few, **options)])
    assert load_factors(tmp_path / "run" / "factors").metadata["n_tokens"] == 98
    assert results(tmp_path / "run")[0]["perplexity"] > 1


# -- wrong input ------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_model(tmp_path):
    """The demo model with one NaN weight in block 3."""
    model = load_model("demo", "float32")
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer("demo").save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def fails(capfd, args):
    """Runs a command that must end with code 2; returns its message, the only thing beside progress on stderr."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    error = capfd.readouterr().err
    progress, _, message = error.rpartition("error: ")
    assert message and all(line.startswith("plan: ") or "documents" in line for line in progress.splitlines()), error
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collect.blocks": "[9]"}, "block 9 does not exist; the model has blocks 0 to 5"),
        ({"collect.projections": "[gates]"}, "unknown projection 'gates'; choose from gate"),
        ({"collect.modules": "['.*nothing']"}, "matches no layer. Layers are named like model.layers.0"),
        ({"edit.rho": "1.5"}, "rho is 1.5"),
        ({"edit.rho": ".nan"}, "rho is nan"),
        ({"edit.formula": "best"}, "formula"),
        ({"edit.blocks": "[1]"}, "there are no factors for block 1, only for 3"),
        ({"data.corpus": "none.jsonl"}, "none.jsonl: no such file"),
        ({"data.memorized": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"data.seq_len": "2000"}, "the model takes at most 1024 positions"),
        ({"model.model_name": "./nothing"}, "./nothing: no such folder"),
        ({"trainer.accumulate_grad_batches": "2"}, "accumulate_grad_batches must be 1"),
        ({"trainer.max_epochs": "2"}, "max_epochs must be 1"),
        ({"trainer.strategy": "ddp_spawn"}, "use --trainer.strategy ddp"),
        ({"model.training.lr": "0.1", "edit.rho": "0.5"}, "an edit needs a collection"),
        ({"mistake": "1"}, "mistake"),
        ({"data.eval_batch_size": "0"}, "data.eval_batch_size is 0; it must be at least 1"),
        ({"data.heldout_tokens": "-5"}, "data.heldout_tokens is -5"),
        ({"data.corpus.fail": "1"}, "corpus"),
        ({"model.measures.extraction.temperature": "0"}, "extraction.temperature is 0.0; it must be greater than 0"),
        ({"model.measures.extraction.top_k": "0"}, "extraction.top_k is 0; it must be at least 1, or null"),
        ({"model.measures.extraction.top_p": "1.5"}, "extraction.top_p is 1.5; it must be greater than 0, and at most"),
        ({"trainer.precision": "16-true"}, "float16 gradients overflow"),
        ({"trainer.devices": "0"}, "trainer: "),
        ({"trainer.strategy": "dddp"}, "trainer: "),
        ({"trainer.devices": "two"}, "trainer: "),
        ({"trainer.accelerator": "gpu"}, "trainer: "),
        ({"trainer.accelerator": "tpu"}, "trainer: "),
        ({"collect.modules": "[lm_head]", "edit.rho": "0.5"}, "lm_head shares its weight with model.embed_tokens"),
    ],
)
def test_wrong_options_end_before_any_work(tmp_path, few, capfd, changes, message):
    folder = tmp_path / "run"
    assert message in fails(capfd, ["fit", *small(folder, few, **changes)])
    assert not folder.exists()


def test_wrong_config_files(tmp_path, capfd):
    assert "none.yaml: cannot be read" in fails(capfd, ["fit", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "bad.yaml: not valid YAML" in fails(capfd, ["fit", "--config", str(tmp_path / "bad.yaml")])
    (tmp_path / "unknown.yaml").write_text("models: {model_name: demo}")
    assert "models" in fails(capfd, ["fit", "--config", str(tmp_path / "unknown.yaml")])


def test_wrong_model_folder(tmp_path, few, capfd):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text((DEMO / "config.json").read_text())
    options = small(tmp_path / "run", few, **{"model.model_name": folder})
    assert "the model folder has no weights" in fails(capfd, ["fit", *options])
    (folder / "model.safetensors").write_bytes(b"12345678")
    assert "model.safetensors: damaged or incomplete" in fails(capfd, ["fit", *options])
    whole = (DEMO / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: damaged or incomplete" in fails(capfd, ["fit", *options])
    (folder / "model.safetensors").write_bytes(whole)
    assert f"tokenizer {folder}: " in fails(capfd, ["fit", *options])


def test_finished_runs_are_not_overwritten_unasked(tmp_path, few, capfd):
    args = ["fit", *small(tmp_path / "run", few, **{"trainer.logger": "null"})]
    main(args)
    known = (tmp_path / "run" / "factors" / "metadata.json").read_bytes()
    assert "already holds a finished run; add --overwrite" in fails(capfd, args)
    assert (tmp_path / "run" / "factors" / "metadata.json").read_bytes() == known
    main([*args, "--overwrite"])
    assert len(results(tmp_path / "run")) == 1


def test_foreign_folders_are_left_alone(tmp_path, few, capfd):
    """A model that somebody keeps in `model/` of the folder is not an output of ours."""
    folder = tmp_path / "mine"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "notes").write_text("mine")
    assert "no run of this program wrote it" in fails(capfd, ["fit", *small(folder, few)])
    assert (folder / "model" / "notes").read_text() == "mine"


def test_a_run_does_not_eat_its_own_input(tmp_path, few, capfd):
    main(["fit", *small(tmp_path / "run", few, **{"edit.rho": "0.8"})])
    again = small(tmp_path / "run", few, **{"model.model_name": tmp_path / "run" / "edited"})
    assert "lies in the folder that this run would replace" in fails(capfd, ["fit", *again, "--overwrite"])


def test_an_earlier_run_outlives_a_failing_one(tmp_path, few, capfd, broken_model):
    args = small(tmp_path / "run", few)
    main(["fit", *args])
    known = (tmp_path / "run" / "factors" / "metadata.json").read_bytes()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a text"}\n{"text": "anoth')
    wrong = small(tmp_path / "run", few, **{"data.corpus": corpus})
    assert "corpus.jsonl, line 2: not valid JSON" in fails(capfd, ["fit", *wrong, "--overwrite"])
    assert (tmp_path / "run" / "factors" / "metadata.json").read_bytes() == known
    broken = small(tmp_path / "run", few, **{"model.model_name": broken_model})
    assert "NaN" in fails(capfd, ["fit", *broken, "--overwrite"])
    assert (tmp_path / "run" / "previous" / "factors" / "metadata.json").read_bytes() == known


def test_wrong_corpora_are_named(tmp_path, few, capfd):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl: has no text" in fails(
        capfd, ["fit", *small(tmp_path / "run", few, **{"data.corpus": tmp_path / "empty.jsonl"})]
    )
    narrow = build_model("olmo2")  # 61 token ids; the demo's tokenizer has 2,048
    narrow.save_pretrained(tmp_path / "narrow")
    options = {"model.model_name": tmp_path / "narrow", "data.tokenizer": "demo", "data.memorized": "null"}
    options["collect.blocks"] = "[1]"
    message = fails(capfd, ["fit", *small(tmp_path / "run", few, **options)])
    assert "vocabulary ends at 60; set data.tokenizer" in message


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_with_too_few_devices_is_refused(forks, tmp_path, few, rank):
    """Each of its processes; torchrun itself is started in test_faults.py."""
    args = ["fit", *small(tmp_path / "run", few, **{"trainer.devices": 1})]
    env = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "LOCAL_WORLD_SIZE": "2"}
    code, said = forks.run(args, tmp_path / "log", env=env)
    assert code == 2 and "torchrun started 2 processes" in said, said
    assert not (tmp_path / "run").exists()


def test_nothing_to_evaluate(capfd):
    assert "nothing to evaluate on" in fails(capfd, ["validate", "--model.model_name", "demo"])


def test_unfinished_runs_start_again(tmp_path, few, capfd, broken_model):
    args = small(tmp_path / "run", few)
    broken = small(tmp_path / "run", few, **{"model.model_name": broken_model})
    message = fails(capfd, ["fit", *broken])
    assert "batch 0: the gradient at model.layers.3.mlp.up_proj has NaN" in message
    assert not (tmp_path / "run" / "factors").exists()
    main(["fit", *args])
    assert len(results(tmp_path / "run")) == 1
