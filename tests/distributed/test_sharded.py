"""Models and factors spread over two ranks (FSDP2) against one process that holds everything."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_kfac import InputError, KFACEditor, load_factors
from lightning_kfac.callbacks import CurvatureCollector, EditCallback
from lightning_kfac.callbacks.mining import SUMMARY, MiningWriter
from lightning_kfac.cli.train import main
from lightning_kfac.distributed.lockstep import Lockstep
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.distributed.sharding import full_state, is_sharded, whole
from lightning_kfac.distributed.strategies import FrozenDDPStrategy, ShardedStrategy, strategy_for
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.evaluation.evaluation import Measures
from lightning_kfac.mining.windows import Mining
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.models.targets import same_but_the_expert
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from tests.common import ARCHITECTURES, build_model, results, small
from tests.forks import NativeCrash, run_train
from tests.mixtures import PROJECTIONS as EXPERTS
from tests.mixtures import build_mixture

ROWS, SEQ_LEN = 23, 8
TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "use_distributed_sampler": False,
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}
# Name of a run -> family of the model, strategy of two ranks, settings of module and collector.
RUNS = {
    "olmo2": ("olmo2", ShardedStrategy, {}, {}),
    "gpt2": ("gpt2", ShardedStrategy, {}, {"projections": ["up", "down"]}),
    "gold passes": ("olmo2", ShardedStrategy, {"labels": "gold"}, {"layers_per_pass": 5, "coupled": True}),
    "two draws": ("llama", ShardedStrategy, {"mc_samples": 2}, {"projections": ["q", "k", "v", "o"], "coupled": True}),
    "bfloat16": ("qwen3", ShardedStrategy, {"dtype": "bfloat16"}, {"blocks": [1, 2]}),
    "bfloat16 ddp": ("qwen3", FrozenDDPStrategy, {"dtype": "bfloat16"}, {"blocks": [1, 2]}),
    "whole head": ("olmo2", ShardedStrategy, {}, {"modules": ["lm_head", ".*up_proj"]}),
    "ddp": ("olmo2", FrozenDDPStrategy, {}, {"shard_factors": True}),
    "experts": ("olmoe", ShardedStrategy, {}, {"projections": EXPERTS, "coupled": True}),
    "experts ddp": ("olmoe", FrozenDDPStrategy, {}, {"projections": EXPERTS, "blocks": [0]}),
}
EDITED = ("olmo2", "gpt2", "ddp", "experts")


class Watcher(CurvatureCollector):
    """Notes how many bytes this rank's accumulators have."""

    accumulated = 0

    def on_train_batch_end(self, *args) -> None:
        sums = self.course.session.capture.sums.values() if self.course.running else ()
        moments = [moment for s in sums for moment in (s.G, s.A) if moment is not None]
        kept = [getattr(moment, "kept", moment) for moment in moments]
        panels = [panel for m in kept if m is not None for panel in (*m._recent, *(m._settled or []))]
        self.accumulated = max(self.accumulated, sum(panel.nbytes for panel in panels))
        super().on_train_batch_end(*args)


def text_data(folder: Path, **settings) -> TextData:
    return TextData(
        str(folder / "text.jsonl"),
        max_tokens=ROWS * SEQ_LEN - 3,
        seq_len=SEQ_LEN,
        batch_size=2,
        tokenizer="demo",
        heldout=str(folder / "text.jsonl"),
        heldout_tokens=150,
        memorized=str(folder / "memorized.jsonl"),
        eval_batch_size=2,
        **settings,
    )


def fit(folder: Path, name: str, size: int) -> dict:
    """One run; what it gave beside its files."""
    family, strategy, module, collector = RUNS[name]
    collect = Watcher(**({"projections": ["gate", "up", "down"]} | collector))
    edit = [EditCallback(EditConfig(rho=0.6))] if name in EDITED else []
    model = CausalLM(str(folder / family), measures=Measures(position_stress=2), **module)
    trainer = Trainer(
        devices=size,
        strategy=strategy() if size > 1 else "auto",
        default_root_dir=folder / f"{name}-{size}",
        callbacks=[collect, *edit],
        limit_val_batches=None if edit else 0,
        **TRAINER,
    )
    trainer.fit(model, text_data(folder))
    sharded = is_sharded(model.model)
    assert sharded == (size > 1 and strategy is ShardedStrategy)
    weights = {name: whole(p.detach()).contiguous().clone() for name, p in model.model.named_parameters()}
    return {
        "accumulated": collect.accumulated,
        "planned": collect.plan.factor_bytes,
        "results": model.results,
        "weights": weights,
        "fingerprint": weights_fingerprint(model.model, collect.factors),
    }


def loading(mesh, folder: Path) -> None:
    """Every family, loaded in parts, equals the ordinary loading."""
    ids = torch.arange(1, 21).view(2, 10)
    for family in ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            module = CausalLM(str(folder / family), dtype=dtype)
            module._device_mesh, module._trainer = mesh
            module.configure_model()
            expected = load_model(str(folder / family), dtype)
            compare_models(module.model, expected, ids)
    module = CausalLM(architecture={**ARCHITECTURES["olmo2"], "vocab_size": 61}, seed=3)
    module._device_mesh, module._trainer = mesh
    module.configure_model()
    random = [whole(parameter) for parameter in module.model.parameters()]
    torch.manual_seed(3)
    alone = load_model(None, architecture={**ARCHITECTURES["olmo2"], "vocab_size": 61})
    assert all(torch.equal(a, b) for a, b in zip(random, alone.parameters(), strict=True))


@torch.no_grad()
def compare_models(model, expected, ids) -> None:
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(parts) >= len(list(model.parameters())) - 2
    assert sum(p.to_local().numel() for p in parts) <= 0.6 * sum(p.numel() for p in parts)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == t.dtype and torch.equal(whole(ours[n]), t) for n, t in theirs.items())
    tied = expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model(ids).logits, expected(ids).logits)
    state, theirs = full_state(model), expected.state_dict()
    assert current_ranks().rank or state.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())
    names = [name for name, _ in model.named_modules() if name.endswith(("up_proj", "c_fc"))]
    assert weights_fingerprint(model, names) == weights_fingerprint(expected, names)


def lockstep(folder: Path, model) -> None:
    """Ranks that run the model unequally often; then one of them fails."""
    alone, rank = load_model(str(folder / "olmo2")), current_ranks().rank
    steps, ids = Lockstep(model), torch.arange(1, 5)[None]
    for counts in ((3, 0), (0, 2), (1, 1), (0, 0)):
        with steps, torch.no_grad():
            for length in range(1, counts[rank] + 1):
                assert torch.equal(model(ids[:, :length]).logits, alone(ids[:, :length]).logits)
    with pytest.raises(InputError, match="only here"), steps, torch.no_grad():
        for length in (1, 2):
            model(ids[:, :length])
            if rank == 1:
                raise InputError("only here")


@torch.no_grad()
def edit_and_restore(folder: Path, model) -> None:
    """An edit from factors on disk, taken back bit for bit."""
    alone = load_model(str(folder / "olmo2"))
    factors, ranks = load_factors(folder / "olmo2-2" / "factors"), current_ranks()
    for config in (EditConfig(rho=0.4), EditConfig(rho=0.3, mode="ablate", blocks=[1])):
        expected, editor = KFACEditor(alone, factors, config), KFACEditor(model, factors, config, ranks=ranks)
        planned = editor.apply(dry_run=True)
        assert all(torch.equal(whole(a), b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
        # The same factors and weights: every bit is that of one process.
        assert editor.apply().layers == planned.layers == expected.apply().layers
        assert all(torch.equal(whole(a), b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
        editor.restore()
        expected.restore()
        assert all(torch.equal(whole(a), b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def damaged(folder: Path) -> str:
    """The error of a collection in which only one rank owns the layer that goes wrong."""
    collect = CurvatureCollector(blocks=[0, 1], projections=["down"])
    trainer = Trainer(
        devices=2,
        strategy=ShardedStrategy(),
        default_root_dir=folder / "damaged",
        callbacks=[collect],
        limit_val_batches=0,
        **TRAINER,
    )
    with pytest.raises(InputError) as error:
        trainer.fit(CausalLM(str(folder / "broken")), text_data(folder))
    return str(error.value)


def mine(folder: Path, size: int) -> None:
    data = text_data(folder, prefix_len=3, suffix_len=2, mining=Mining(likely=0.0))
    trainer = Trainer(
        devices=size,
        strategy=ShardedStrategy() if size > 1 else "auto",
        default_root_dir=folder / f"mined-{size}",
        callbacks=[MiningWriter()],
        inference_mode=False,
        **TRAINER,
    )
    trainer.predict(CausalLM(str(folder / "olmo2")), data, return_predictions=False)


def work(folder: Path) -> None:
    """What one of two processes does."""
    rank = int(os.environ["RANK"])
    for name in RUNS:
        torch.save(fit(folder, name, 2), folder / f"{name}-2-{rank}.pt")
    (folder / f"error-{rank}").write_text(damaged(folder))
    mine(folder, 2)
    trainer = Trainer(devices=2, strategy=ShardedStrategy(), default_root_dir=folder / "v", **TRAINER)
    module = CausalLM(str(folder / "olmo2"))
    for stage in ("one", "two"):
        trainer.validate(module, text_data(folder), verbose=False)
        module.turn_to(stage, str(folder / "olmo2"))
    module.configure_model()
    lockstep(folder, module.model)
    edit_and_restore(folder, module.model)
    loading((module._device_mesh, trainer), folder)


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory):
    """What two ranks wrote.

    Once in some fifty runs of this file the C library of a rank found its heap damaged, which Python code cannot do;
    under the checks of glibc and valgrind it never happened. So after such an end all is begun again, once, and said.
    """
    try:
        return of_two_ranks(forks, tmp_path_factory.mktemp("sharded"))
    except NativeCrash as crash:
        warnings.warn(f"begun again after a crash outside of Python: {crash}", stacklevel=1)
        return of_two_ranks(forks, tmp_path_factory.mktemp("sharded"))


def of_two_ranks(forks, folder):
    vocabulary = len(load_tokenizer("demo"))
    for family in ARCHITECTURES:
        layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
        build_model(family, vocab_size=vocabulary, **layers).save_pretrained(folder / family)
    build_mixture("olmoe", vocab_size=vocabulary).save_pretrained(folder / "olmoe")
    broken = load_model(str(folder / "olmo2"))
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    broken.save_pretrained(folder / "broken")
    text = [{"text": f"Row {i} says {i * i} and {i % 7}, not {i % 11}."} for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    # One rank gets the long suffixes, and decodes much longer.
    sequences = [{"prefix_ids": [5 + i, 7, 9], "suffix_ids": [i + 2] * (12 if i % 2 else 2)} for i in range(7)]
    (folder / "memorized.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sequences))
    forks.run_on_ranks("tests.distributed.test_sharded", folder, 2)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """By name: what one process gave, and each of two ranks."""
    loaded = {
        name: [torch.load(folder / f"{name}-2-{rank}.pt", weights_only=False) for rank in range(2)] for name in RUNS
    }
    return {name: (fit(folder, name, 1), *ranks) for name, ranks in loaded.items()}


@pytest.mark.parametrize("name", RUNS)
def test_factors_and_counts_are_those_of_one_process(folder, runs, name):
    # In bfloat16 logits depend on the rows beside, so there the same rows are run, by two ranks with whole models.
    other = "bfloat16 ddp-2" if name.startswith("bfloat16") else f"{name}-1"
    one, two = (load_factors(folder / run / "factors") for run in (other, f"{name}-2"))
    assert list(one) == list(two) and len(one) >= 5
    assert two.metadata["fingerprint"] == one.metadata["fingerprint"]
    counted = ROWS * SEQ_LEN - 3 - ROWS
    assert one.metadata["n_tokens"] == two.metadata["n_tokens"] == counted
    for layer in one:
        assert one[layer].n_tokens == two[layer].n_tokens
        beside = same_but_the_expert(layer, one)
        assert sum(one[other].n_tokens for other in beside) == counted * (2 if len(beside) > 1 else 1)
        assert one.shared_A(layer) == two.shared_A(layer)
        assert one[layer].matrices.keys() == two[layer].matrices.keys()
        for side, a in one[layer].matrices.items():
            assert (a - two[layer].matrices[side]).norm() < 1e-6 * a.norm(), (layer, side)


@pytest.mark.parametrize("name", ["olmo2", "gpt2", "ddp"])
def test_accumulators_are_halved(runs, name):
    one, *two = runs[name]
    assert one["accumulated"] > 0 and sum(rank["accumulated"] for rank in two) == one["accumulated"]
    assert max(rank["accumulated"] for rank in two) <= 0.55 * one["accumulated"]
    assert two[0]["planned"] < 0.75 * one["planned"]  # with a panel on its way, which weighs in a model this small


@pytest.mark.parametrize("name", EDITED)
def test_edited_weights_are_those_of_one_process(folder, runs, name):
    one, *two = runs[name]
    source = dict(load_model(str(folder / RUNS[name][0])).named_parameters())
    for layer, weight in one["weights"].items():
        assert torch.equal(two[0]["weights"][layer], two[1]["weights"][layer])
        # A basis turns by (difference of factors) / (gap of eigenvalues), so this is wider than 1e-6.
        assert (weight - two[0]["weights"][layer]).norm() <= 1e-3 * weight.norm(), layer
        assert torch.equal(weight, source[layer]) == torch.equal(two[0]["weights"][layer], source[layer])
    assert two[0]["fingerprint"] == two[1]["fingerprint"]


@pytest.mark.parametrize("name", EDITED)
def test_saved_models_are_what_was_edited(folder, runs, name):
    saved = load_model(str(folder / f"{name}-2" / "edited"))
    weights = runs[name][1]["weights"]
    assert all(torch.equal(parameter, weights[n]) for n, parameter in saved.named_parameters())
    configs = [json.loads((folder / f"{name}-{n}" / "edited" / "config.json").read_text()) for n in (1, 2)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", EDITED)
def test_figures_are_those_of_one_process(runs, name):
    one, *two = runs[name]
    assert {"perplexity", "ndcg@10", "strict_acc", "stress/stress"} & set(one["results"]) and one["results"]
    expected = {name: value for name, value in one["results"].items() if value is not None}
    for rank in two:
        assert {name for name, value in rank["results"].items() if value is None} == set(one["results"]) - set(expected)
        found = {name: rank["results"][name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_an_error_reaches_all_ranks_as_the_same(folder):
    messages = {(folder / f"error-{rank}").read_text() for rank in range(2)}
    assert len(messages) == 1 and "the input of model.layers.1.mlp.down_proj has NaN or infinite" in messages.pop()


def test_mining_finds_what_one_process_finds(folder):
    mine(folder, 1)
    one, two = (json.loads((folder / f"mined-{size}" / SUMMARY).read_text()) for size in (1, 2))
    same = ("windows", "checked", "recited", "kept", "fingerprint")
    assert {key: one[key] for key in same} == {key: two[key] for key in same} and one["checked"] > 0


# -- the command line -------------------------------------------------------------------------------------------


def test_train_py_with_fsdp(tmp_path, few):
    for size, strategy in ((1, "auto"), (2, "fsdp")):
        options = {"trainer.devices": size, "trainer.strategy": strategy, "edit.rho": 0.8, "data.batch_size": 2}
        run_train(["fit", *small(tmp_path / str(size), few, **options)])
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    assert [row["stage"] for row in two] == ["baseline", "edited"]
    for a, b in zip(one, two, strict=True):
        for key in ("strict_acc", "loose_acc", "n_sequences"):
            assert a[key] == b[key]
        for key in ("avg_levenshtein_norm", "perplexity", "ndcg@10"):
            assert a[key] == pytest.approx(b[key], rel=1e-6)
    # Both matrices of the layer were decomposed once.
    assert len(list((tmp_path / "2" / "factors" / "bases").iterdir())) == 2


def settings(strategy) -> dict:
    return {"strategy": strategy, "accelerator": "cpu", "devices": 2, "num_nodes": 1}


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp_cpu_offload", "fsdp_cpu_offload cannot collect curvature; use --trainer.strategy fsdp"),
        ("deepspeed_stage_3", "deepspeed_stage_3 cannot collect curvature; use --trainer.strategy fsdp"),
        (ModelParallelStrategy(), r"tensor_parallel_size auto\) is not supported; use --trainer.strategy fsdp"),
        (ModelParallelStrategy(1, 2), r"tensor_parallel_size 2\) is not supported; use --trainer.strategy fsdp"),
        ("ddp_spawn", "use --trainer.strategy ddp"),
    ],
)
def test_wrong_strategies_are_refused(strategy, message):
    with pytest.raises(InputError, match=message):
        strategy_for(settings(strategy))


def test_fsdp_strategies():
    assert isinstance(strategy_for(settings("fsdp")), ShardedStrategy)
    assert isinstance(strategy_for(settings(ModelParallelStrategy(2, 1))), ShardedStrategy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.training.lr": "0.1"}, "trainer.strategy fsdp is for collections"),
        ({"collect.moments": "token"}, "collect.moments needs all factors on every rank"),
        ({"collect.watch_rho": "0.5"}, "collect.watch_rho needs all factors on every rank"),
    ],
)
def test_wrong_uses_of_fsdp_are_refused(tmp_path, few, capfd, changes, message):
    options = {"trainer.strategy": "fsdp", "trainer.devices": "2"} | changes
    with pytest.raises(SystemExit):
        main(["fit", *small(tmp_path, few, **options)])
    assert message in capfd.readouterr().err


if __name__ == "__main__":
    work(Path(sys.argv[1]))
