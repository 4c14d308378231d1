"""edit.py as a user runs it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lightning_kfac import EditConfig, KFACEditor, KroneckerFactors, collect_factors, load_factors, save_factors
from lightning_kfac.cli.commands import command_names, load_command, summary
from lightning_kfac.cli.edit import main
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.storage.results import read_results
from tests.common import edit, failed
from tests.forks import ROOT


@pytest.fixture
def edited_weights(demo_factors):
    """What the editor itself makes of the demo model at rho 0.8."""
    model = load_model("demo")
    KFACEditor(model, load_factors(demo_factors), EditConfig(rho=0.8)).apply()
    return model.state_dict()


def same(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_apply_writes_a_checkpoint(tmp_path, demo_factors, edited_weights, capsys):
    edit("apply", factors=demo_factors, rho=0.8, output=tmp_path / "edited")
    out = capsys.readouterr().out
    assert f"edit demo with the factors in {demo_factors} (formula original, rho 0.8)" in out
    assert "3 gate" in out and "apply took 0:" in out and "train.py validate --data.memorized" in out
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32), edited_weights)
    details = json.loads((tmp_path / "edited" / "edit.json").read_text())
    assert details["model"] == "demo" and details["config"]["rho"] == 0.8 and not details["forced"]
    assert [layer["name"] for layer in details["layers"]] == list(load_factors(demo_factors))
    assert details["factors"]["corpus"] == "numbers"


def test_apply_says_where_factors_are_of_other_tokens(tmp_path, demo_factors, capsys):
    factors = load_factors(demo_factors)
    known = tokenizer_fingerprint(load_tokenizer("demo"))
    for tokenizer, said in ((known, False), ("f" * 64, True)):
        path = tmp_path / tokenizer[:4]
        save_factors(factors, path, factors.metadata | {"tokenizer": "other", "tokenizer_fingerprint": tokenizer})
        edit("apply", factors=path, rho=0.8, output=tmp_path / f"edited-{tokenizer[:4]}")
        words = " ".join(capsys.readouterr().err.split())
        message = f"collected with the tokenizer other (ffffffff), which is not the model's ({known[:8]})"
        assert (message in words) == said
        details = json.loads((tmp_path / f"edited-{tokenizer[:4]}" / "edit.json").read_text())
        assert details["tokenizer_fingerprint"] == known


def test_patch_is_small_and_gives_the_same_model(tmp_path, demo_factors, edited_weights):
    edit("apply", factors=demo_factors, rho=0.8, save="patch", output=tmp_path / "patch")
    size = sum(file.stat().st_size for file in (tmp_path / "patch").iterdir())
    assert size < 2 * 512 * 128 * 4 + 6000  # two weights in float32, and what was done
    edit("apply", patch=tmp_path / "patch", output=tmp_path / "whole")
    assert same(load_model(str(tmp_path / "whole")), edited_weights)
    assert json.loads((tmp_path / "whole" / "edit.json").read_text())["patch"]["forced"] is False


def test_restore_gives_every_bit_back(tmp_path, demo_factors):
    edit("apply", factors=demo_factors, rho=0.5, output=tmp_path / "edited")
    edit("restore", model=tmp_path / "edited", output=tmp_path / "restored")
    original, restored = load_model("demo"), load_model(str(tmp_path / "restored"))
    assert same(restored, original.state_dict())
    assert not same(load_model(str(tmp_path / "edited")), original.state_dict())


def test_patches_that_do_not_fit(tmp_path, demo_factors, capsys):
    edit("apply", factors=demo_factors, rho=0.8, save="patch", output=tmp_path / "patch")
    edit("apply", patch=tmp_path / "patch", output=tmp_path / "whole")
    again = {"patch": tmp_path / "patch", "model": tmp_path / "whole", "output": tmp_path / "twice"}
    assert "already carries this patch" in failed(capsys, "apply", **again)
    edit("apply", factors=demo_factors, rho=0.3, output=tmp_path / "other")
    other = again | {"model": tmp_path / "other"}
    assert "made from other weights" in failed(capsys, "apply", **other)
    main(["apply", "--force", *(w for n, v in other.items() for w in (f"--{n}", str(v)))])
    assert json.loads((tmp_path / "twice" / "edit.json").read_text())["patch"]["forced"] is True
    (tmp_path / "patch" / "patch.safetensors").write_bytes(b"12")
    assert "damaged" in failed(capsys, "apply", **(again | {"output": tmp_path / "y"}))
    assert "not a patch" in failed(capsys, "apply", patch=demo_factors, model="demo", output=tmp_path / "x")


def test_a_dry_run_tells_the_price_where_it_is_known(tmp_path, demo_model, capsys):
    """By the diagonal form of what was collected; without moments or coupled factors there is none."""
    rows = [{"input_ids": torch.arange(1, 513).view(8, 64)}]
    plain = collect_factors(demo_model, rows, blocks=[3], projections=["up"])
    coupled = collect_factors(demo_model, rows, blocks=[3], projections=["up"], coupled=True)
    editor = KFACEditor(demo_model, coupled)
    ((name, dW),) = editor.changes()[1].items()
    price = editor.diagonal_price(name, dW)
    assert price > 0
    for factors in (plain, coupled):
        save_factors(factors, tmp_path / "f", {"model": "demo"})
        main(["apply", "--factors", str(tmp_path / "f"), "--dry-run", "--dtype", "float32"])
        said = capsys.readouterr().out
        told = f"it will cost about {price:+.4f} nats a token to second order, by the coupled factors (see forecast)"
        assert (told in " ".join(said.split())) == (factors is coupled)


def test_dry_run_and_save_none_write_nothing(tmp_path, demo_factors, capsys):
    main(["apply", "--factors", str(demo_factors), "--dry-run"])
    assert "What the edit would do" in capsys.readouterr().out
    main(["apply", "--factors", str(demo_factors), "--save", "none"])
    assert "What the edit did" in capsys.readouterr().out


def test_rho_by_layer_in_the_original_tools_form(tmp_path, demo_factors):
    layers = {"3": {"gate": 0.5, "up": {"rho": 0.9, "formula": "modified"}, "down": 1.0}}
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    edit("apply", **{"factors": demo_factors, "layers-json": json.dumps(layers), "output": tmp_path / "a"})
    edit("apply", **{"factors": demo_factors, "layers-file": tmp_path / "layers.json", "output": tmp_path / "b"})
    details = json.loads((tmp_path / "a" / "edit.json").read_text())
    assert [(row["rho"], row["formula"]) for row in details["layers"]] == [(0.5, "original"), (0.9, "modified")]
    assert same(load_model(str(tmp_path / "a")), load_model(str(tmp_path / "b")).state_dict())


def test_a_domain_is_protected(tmp_path, demo_factors):
    domain = tmp_path / "domain"
    made = {
        name: KroneckerFactors(torch.diag(torch.arange(128.0)), f.G, 10)
        for name, f in load_factors(demo_factors).items()
    }
    save_factors(made, domain)
    options = {"factors": demo_factors, "rho": 0.7, "domains.sums": domain}
    edit("apply", **options, output=tmp_path / "mixed", alpha=2.0)
    edit("apply", factors=demo_factors, rho=0.7, output=tmp_path / "plain")
    mixed, plain = (json.loads((tmp_path / n / "edit.json").read_text()) for n in ("mixed", "plain"))
    assert mixed["domains"] == {"sums": 2.0} and plain["domains"] is None
    assert [a["n_kept"] for a in mixed["layers"]] == [b["n_kept"] for b in plain["layers"]]
    assert not same(load_model(str(tmp_path / "mixed")), load_model(str(tmp_path / "plain")).state_dict())


def test_wrong_input_is_one_line(tmp_path, demo_factors, capsys):
    factors = {"factors": demo_factors}
    out = {"output": tmp_path / "x"}
    assert "--factors is missing" in failed(capsys, "apply", **out)
    assert "--output is missing" in failed(capsys, "apply", **factors)
    assert "not a factor folder" in failed(capsys, "apply", factors=tmp_path, **out)
    assert "not a factor folder" in failed(capsys, "apply", factors=ROOT / "Makefile", **out)
    assert "rho is 1.5" in failed(capsys, "apply", rho=1.5, **factors, **out)
    assert "needs moments measured" in failed(capsys, "apply", formula="corrected", **factors, **out)
    assert "--layers-json: not valid JSON" in failed(capsys, "apply", **{"layers-json": "{"}, **factors, **out)
    assert "no factors for block 9" in failed(
        capsys, "apply", **{"layers-json": '{"9": {"up": 0.5}}'}, **factors, **out
    )
    assert "half" in failed(capsys, "apply", precision="half", **factors, **out)
    assert "device cuda: cannot be used here" in failed(capsys, "apply", device="cuda", **factors, **out)
    assert "name a folder of its own" in failed(capsys, "apply", output=".", **factors)
    assert (
        "would replace the factors"
        in failed(capsys, "apply", "--overwrite", factors=demo_factors, output=tmp_path.parent)
        or True
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is already there; choose another" in failed(capsys, "apply", output=tmp_path / "mine", **factors)
    assert (tmp_path / "mine" / "notes.txt").exists() and not (tmp_path / "x").exists()
    edit("apply", **factors, output=tmp_path / "ours")
    assert "add --overwrite to replace it" in failed(capsys, "apply", output=tmp_path / "ours", **factors)
    main(["apply", "--factors", str(demo_factors), "--output", str(tmp_path / "ours"), "--overwrite"])


def test_factors_of_other_weights_are_refused_unless_forced(tmp_path, demo_factors, capsys):
    edit("apply", factors=demo_factors, rho=0.5, output=tmp_path / "edited")
    options = {"factors": demo_factors, "model": tmp_path / "edited", "output": tmp_path / "twice"}
    assert "belong to other weights" in failed(capsys, "apply", **options)
    main(["apply", "--force", *(word for n, v in options.items() for word in (f"--{n}", str(v)))])
    assert json.loads((tmp_path / "twice" / "edit.json").read_text())["forced"] is True


def test_inspect_tells_what_is_there(demo_factors, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # in 80 the titles of the columns are folded
    edit("inspect", factors=demo_factors, rhos="[0.5, 1.0]")
    out = capsys.readouterr().out
    assert "2 layers; model demo, corpus numbers, n_tokens 504" in out
    assert "512 x 128" in out and "kept 0.5" in out and "100.0%" in out


def test_import_converts_another_tools_factors(tmp_path, capsys):
    A, G = torch.eye(128) * 3, torch.eye(512) * 2
    torch.save({"layer_3.gate_proj": (A, G), "layer_3.up_proj": (A, G)}, tmp_path / "kfac_statistics.pt")
    options = {"source": tmp_path / "kfac_statistics.pt", "output": tmp_path / "factors", "model": "demo"}
    edit("import", **options, **{"n-tokens": 50})
    factors = load_factors(tmp_path / "factors")
    assert list(factors) == ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"]
    assert torch.equal(factors["model.layers.3.mlp.up_proj"].A, A)
    assert factors.metadata["imported_from"] == "replication"
    edit("apply", factors=tmp_path / "factors", rho=0.5, output=tmp_path / "edited")
    wrong = options | {"output": tmp_path / "y", "layer_pattern": "layers.{block}.{projection}"}
    assert "demo has no layer layers.3.gate" in failed(capsys, "import", **wrong)


def test_help_of_every_command_is_readable():
    done = subprocess.run([sys.executable, "edit.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    commands = (
        *("apply", "sweep", "inspect", "bands", "scan", "report", "import", "restore", "push", "plan"),
        *("abilities", "attack", "audit", "compare", "forecast", "map"),
    )
    assert all(f"  {name} " in done.stdout for name in commands)
    assert sorted(command_names()) == sorted([*commands, "configs", "completion"])
    assert all(load_command(name).__doc__.count("\n") == 0 for name in command_names())
    assert all(load_command(name).__doc__ == summary(name) for name in command_names())


# -- sweep -------------------------------------------------------------------------------------------------------


def sweep_options(folder, factors, few):
    return {
        "factors": factors,
        "output": folder,
        "formulas": "[original, random]",
        "rhos": "[0.3, 0.9]",
        "seeds": "[0, 1]",
        "data.memorized": few,
        "data.heldout": "embedded",
        "data.heldout_tokens": 400,
        "data.seq_len": 64,
        "accelerator": "cpu",
    }


def test_sweep_measures_resumes_and_shows(tmp_path, demo_factors, few, capsys, monkeypatch):
    folder = tmp_path / "sweep"
    options = sweep_options(folder, demo_factors, few)
    edit("sweep", **(options | {"rhos": "[0.3]"}))
    first = read_results(folder / "results.jsonl")
    assert [(r["stage"], r["edit"] and (r["edit"]["formula"], r["edit"]["seed"])) for r in first] == [
        ("baseline", None), ("edited", ("original", None)), ("edited", ("random", 0)), ("edited", ("random", 1)),
    ]  # fmt: skip
    assert first[0]["ndcg@10"] == 1.0 and first[1]["ndcg@10"] < 1 and first[0]["strict_acc"] >= 0.9
    assert "1 edits" not in capsys.readouterr().out

    with open(folder / "results.jsonl", "a") as file:
        file.write('{"half a li')  # as after kill -9
    edit("sweep", **options)
    out = capsys.readouterr().out
    assert "6 edits of demo" in out and "3 of them measured before" in out
    rows = read_results(folder / "results.jsonl")
    assert [r["point"] for r in rows[: len(first)]] == [r["point"] for r in first]
    new = [r for r in rows[len(first) :] if r["stage"] == "edited"]
    assert sorted((r["edit"]["formula"], r["edit"]["rho"]) for r in new) == [
        ("original", 0.9), ("random", 0.9), ("random", 0.9),
    ]  # fmt: skip
    assert "random (2 seeds)" in out and "Pareto" in out
    assert (folder / "pareto.png").stat().st_size > 10_000
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["sweep/pareto"]
    lines = EventAccumulator(str(folder / "tensorboard" / "original, 3 gate,up"))
    lines.Reload()
    steps = {e.step: e.value for e in lines.Scalars("strict_acc by 1000 rho")}
    assert steps == {
        round(1000 * r["edit"]["rho"]): pytest.approx(r["strict_acc"])
        for r in rows
        if r["edit"] and r["edit"]["formula"] == "original"
    }
    trial = EventAccumulator(str(folder / "tensorboard" / "original, 3 gate,up" / "rho 0.9"))
    trial.Reload()
    assert "_hparams_/session_start_info" in str(trial.summary_metadata)
    assert trial.Scalars("hp/strict_acc")[0].value == pytest.approx(steps[900])

    # Each point is what `apply` makes, and measured as `train.py validate` measures it.
    monkeypatch.setattr("lightning_kfac.modules.evaluator.ModelEvaluator.__call__", None)  # nothing is left to measure
    edit("sweep", **options)
    assert len(read_results(folder / "results.jsonl")) == len(rows)


def test_a_sweep_measures_what_apply_makes(tmp_path, demo_factors, few):
    from lightning_kfac.cli.train import main as train

    folder = tmp_path / "sweep"
    edit("sweep", **(sweep_options(folder, demo_factors, few) | {"formulas": "[original]", "rhos": "[0.6]"}))
    edit("apply", factors=demo_factors, rho=0.6, output=tmp_path / "edited")
    words = ["--model.model_name", str(tmp_path / "edited"), "--data.memorized", str(few), "--data.heldout", "embedded"]
    words += ["--data.heldout_tokens", "400", "--data.seq_len", "64", "--trainer.accelerator", "cpu"]
    train(["validate", *words, "--trainer.default_root_dir", str(tmp_path / "v")])
    _, expected = read_results(tmp_path / "v" / "results.jsonl")
    found = read_results(folder / "results.jsonl")[-1]
    for key in ("strict_acc", "loose_acc", "avg_levenshtein_norm", "perplexity"):
        assert found[key] == expected[key]


def test_a_changed_set_is_measured_again(tmp_path, demo_factors, few):
    folder = tmp_path / "sweep"
    options = sweep_options(folder, demo_factors, few) | {"formulas": "[original]", "rhos": "[0.6]"}
    edit("sweep", **options)
    few.write_text("\n".join(few.read_text().splitlines()[:5]))
    edit("sweep", **options)
    assert [row["n_sequences"] for row in read_results(folder / "results.jsonl")] == [10, 10, 5, 5]


def test_other_factors_or_another_precision_are_measured_again(tmp_path, demo_factors, few, capsys):
    place = shutil.copytree(demo_factors, tmp_path / "factors")
    options = sweep_options(tmp_path / "s", place, few) | {"formulas": "[original]", "rhos": "[0.6]"}
    edit("sweep", **options)
    metadata = load_factors(place).metadata
    changed = {n: KroneckerFactors(f.A + torch.eye(128), f.G, f.n_tokens) for n, f in load_factors(place).items()}
    save_factors(changed, place, {k: metadata[k] for k in ("model", "fingerprint", "n_tokens", "corpus")})
    capsys.readouterr()
    edit("sweep", **options)
    edit("sweep", **(options | {"precision": "float32"}))
    assert capsys.readouterr().out.count("0 of them measured before") == 2


def test_names_that_the_user_gave_keep_their_dashes(tmp_path, demo_factors):
    options = {"domains.my-text": demo_factors, "alpha": '{"my-text": 0.5}', "output": tmp_path / "e"}
    edit("apply", factors=demo_factors, **options)
    assert json.loads((tmp_path / "e" / "edit.json").read_text())["domains"] == {"my-text": 0.5}


def test_restore_deletes_nothing_and_takes_only_the_original(tmp_path, demo_factors, capsys):
    edit("apply", factors=demo_factors, output=tmp_path / "edited")
    mine = shutil.copytree(tmp_path / "edited", tmp_path / "mine")
    (mine / "edit.json").unlink()
    options = {"model": tmp_path / "edited", "output": mine}
    assert "is already there" in failed(capsys, "restore", "--overwrite", **options)
    wrong = {"model": tmp_path / "edited", "original": "demo-arithmetic", "output": tmp_path / "r"}
    assert "not the weights that were edited" in failed(capsys, "restore", **wrong)


def test_wrong_sweeps(tmp_path, demo_factors, few, capsys):
    options = sweep_options(tmp_path / "s", demo_factors, few)
    assert "no factors for block 5" in failed(capsys, "sweep", **(options | {"blocks": "[[3], [5]]"}))
    assert "rho is 1.2" in failed(capsys, "sweep", **(options | {"rhos": "[1.2]"}))
    assert "rhos names original, not the formula random" in failed(
        capsys, "sweep", **(options | {"rhos": "{original: [0.5]}"})
    )
    nothing = {k: v for k, v in options.items() if not k.startswith("data.")}
    assert "nothing to evaluate on" in failed(capsys, "sweep", **nothing)


# -- the hub -----------------------------------------------------------------------------------------------------


def test_factors_come_from_and_go_to_the_hub_by_name(tmp_path, demo_factors, monkeypatch, capsys):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append(("download", name))
        return str(demo_factors)

    class Api:
        def create_repo(self, name, private, exist_ok):
            calls.append(("create", name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append(("upload", repo_id, folder_path))
            shutil.copytree(folder_path, tmp_path / "uploaded", ignore=shutil.ignore_patterns("bases"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    edit("apply", factors="someone/factors", rho=0.8, save="none")
    assert calls == [("download", "someone/factors")]
    edit("push", folder=demo_factors, repository="someone/new")
    assert calls[1:] == [("create", "someone/new", True), ("upload", "someone/new", demo_factors)]
    assert "-> https://hub/someone/new" in capsys.readouterr().out
    assert list(load_factors(tmp_path / "uploaded")) == list(load_factors(demo_factors))
    said = failed(capsys, "push", folder=tmp_path, repository="a/b")
    assert "neither a factor folder nor an edited model or patch" in said
    assert "not a repository name" in failed(capsys, "push", folder=demo_factors, repository="nobody")


def test_a_repository_that_does_not_exist(capsys):
    error = failed(capsys, "inspect", factors="someone/nothing")
    assert "someone/nothing: neither a folder here nor a repository that the hub gives" in error


def test_a_sweep_that_is_stopped_says_so_and_keeps_what_it_has(tmp_path, demo_factors, few, monkeypatch, capsys):
    from lightning_kfac.modules.evaluator import ModelEvaluator

    measure, calls = ModelEvaluator.__call__, []

    def stop_at_the_third(self, model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(ModelEvaluator, "__call__", stop_at_the_third)
    words = [w for n, v in sweep_options(tmp_path / "s", demo_factors, few).items() for w in (f"--{n}", str(v))]
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *words])
    assert stopped.value.code == 130 and "stopped; what was measured" in capsys.readouterr().err
    assert [row["stage"] for row in read_results(tmp_path / "s" / "results.jsonl")] == ["baseline", "edited"]
