"""Ranks that share out rows: factors, counts, the edit and its errors are those of one process."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_kfac import InputError, KFACEditor, load_factors
from lightning_kfac.callbacks import CurvatureCollector, EditCallback
from lightning_kfac.callbacks.collection.collector import find_collector
from lightning_kfac.distributed.ranks import Ranks, current_ranks, rounds, share_out
from lightning_kfac.distributed.strategies import FrozenDDPStrategy
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.factors.kronecker import KroneckerFactors
from lightning_kfac.models.loading import load_model, load_tokenizer
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from tests.common import build_model
from tests.forks import free_port

ROWS, SEQ_LEN = (9, 17, 23, 1000), 8
CASES = [(rows, labels) for rows in ROWS for labels in ("sampled", "gold")]
EDITED = (23, "sampled")


def regroup(size: int, port: int) -> None:
    """From here on only the first ``size`` ranks compute together, or a process alone where size is 1."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    if size == 1:
        for name in ("LOCAL_RANK", "RANK", "NODE_RANK"):
            os.environ.pop(name, None)
        rank_zero_only.rank = 0


def fit(folder: Path, size: int, rows: int, labels: str, again: bool = False) -> CausalLM:
    """One collection on so many rows, the last of them ragged; the text is read as a stream unless ``again``."""
    run = folder / f"{size}-{rows}-{labels}"
    data = TextData(
        str(folder / "text.jsonl"),
        max_tokens=rows * SEQ_LEN - 3,
        seq_len=SEQ_LEN,
        batch_size=2 if rows < 100 else 100,
        tokenizer="demo",
    )
    callbacks = [CurvatureCollector(projections=["gate", "up", "down"], coupled=True)]
    if (rows, labels) == EDITED:
        callbacks.append(EditCallback(EditConfig(rho=0.6)))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=size,
        strategy=FrozenDDPStrategy() if size > 1 else "auto",
        max_epochs=1,
        use_distributed_sampler=False,
        default_root_dir=run,
        callbacks=callbacks,
        **quiet,
    )
    assert again == bool(list((run / "data").glob("*.tokens")))
    module = CausalLM(str(folder / "model"), labels=labels)
    trainer.fit(module, data)
    return module


def wrong_on_one_rank(folder: Path) -> str:
    """The message of an edit for which only one rank has bad factors."""
    model = load_model(str(folder / "model"))
    factors = dict(load_factors(folder / "3-9-gold" / "factors"))
    ranks = current_ranks()
    owners = {name: number % ranks.size for number, name in enumerate(factors)}
    bad = next(name for name in factors if owners[name] == 1)
    if ranks.rank == 1:
        G = factors[bad].G.clone()
        G[0, 0] = torch.nan
        factors[bad] = KroneckerFactors(factors[bad].A, G, factors[bad].n_tokens)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        KFACEditor(model, factors, EditConfig(rho=0.5), ranks=ranks, owners=owners).apply()
    except InputError as error:
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        return str(error)
    return "no error"


def work(folder: Path) -> None:
    """What one of three processes does: all cases with three ranks, then with two, and the third alone."""
    rank = int(os.environ["RANK"])
    ports = iter((folder / "ports").read_text().split())
    for size in (3, 2 if rank < 2 else 1):
        if size < 3:
            regroup(size, next(ports))
        for case in CASES:
            module = fit(folder, size, *case)
            if case == EDITED:
                weights = {name: p.clone().contiguous() for name, p in module.model.named_parameters()}
                torch.save(weights, folder / f"edited-{size}-{rank}.pt")
                edit = next(c for c in module.trainer.callbacks if isinstance(c, EditCallback))
                computed = find_collector(module.trainer, edit).bases._computed
                (folder / f"computed-{size}-{rank}").write_text(json.dumps(sorted(computed)))
        fit(folder, size, *CASES[0], again=True)
        if size == 3:
            (folder / f"error-{rank}").write_text(wrong_on_one_rank(folder))


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    vocabulary = len(load_tokenizer("demo"))
    build_model("olmo2", vocab_size=vocabulary, eos_token_id=0).save_pretrained(folder / "model")
    text = [{"text": f"Row {i} says {i * i} and {i % 7}, not {i % 11}."} for i in range(900)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    (folder / "ports").write_text(str(free_port()))
    forks.run_on_ranks("tests.distributed.test_ddp", folder, 3)
    return folder


@pytest.mark.parametrize(("rows", "labels"), CASES)
@pytest.mark.parametrize("size", [2, 3])
def test_factors_and_counts_are_those_of_one_process(folder, size, rows, labels):
    one, more = (load_factors(folder / f"{n}-{rows}-{labels}" / "factors") for n in (1, size))
    assert more.metadata["world_size"] == size and list(one) == list(more) and len(one) == 9
    for name in one:
        assert one[name].n_tokens == more[name].n_tokens == rows * SEQ_LEN - 3 - rows
        for side in ("A", "G", "A_coupled", "G_coupled"):
            a, b = getattr(one[name], side), getattr(more[name], side)
            assert (a - b).norm() < 1e-6 * a.norm(), (name, side)


@pytest.mark.parametrize("size", [2, 3])
def test_the_edit_is_the_same_on_every_rank(folder, size):
    """Bit for bit over ranks; against one process only as far as the factors agree."""
    one = torch.load(folder / "edited-1-2.pt", weights_only=True)
    ranks = [torch.load(folder / f"edited-{size}-{rank}.pt", weights_only=True) for rank in range(size)]
    source = dict(load_model(str(folder / "model")).named_parameters())
    for name, weight in one.items():
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:])
        assert torch.equal(weight, source[name]) == ("mlp" not in name)
        # A basis turns by (difference of factors) / (gap of eigenvalues), so this is wider than 1e-6.
        assert (weight - ranks[0][name]).norm() < 1e-3 * weight.norm(), name
    saved = load_model(str(folder / f"{size}-23-sampled" / "edited"))
    assert all(torch.equal(parameter, ranks[0][name]) for name, parameter in saved.named_parameters())


def test_eigenbases_are_computed_once_by_one_rank(folder):
    """Three blocks with two G and one A from gate and up, one of each from down: 15 matrices."""
    for size in (1, 2, 3):
        ranks = [json.loads(path.read_text()) for path in folder.glob(f"computed-{size}-*")]
        assert len(ranks) == size and sum(map(len, ranks)) == 15 and min(map(len, ranks)) >= 3
        kept = {path.stem for path in (folder / f"{size}-23-sampled" / "factors" / "bases").iterdir()}
        assert kept == set().union(*ranks)


def test_an_error_of_one_rank_is_raised_on_all(folder):
    messages = {(folder / f"error-{rank}").read_text() for rank in range(3)}
    assert len(messages) == 1 and "G of model.layers.0.mlp.up_proj" in messages.pop()


# -- sharing out ------------------------------------------------------------------------------------------------


def test_layers_that_share_an_input_have_one_owner_and_loads_are_even():
    names = [f"{block}.{part}" for block in range(6) for part in ("gate", "up", "down")]
    groups = {name: name.replace("gate", "up") for name in names}
    owners = share_out(dict.fromkeys(names, 1.0), groups, 3)
    assert list(owners) == names
    assert all(owners[f"{b}.gate"] == owners[f"{b}.up"] for b in range(6))
    assert sorted(list(owners.values()).count(rank) for rank in range(3)) == [6, 6, 6]
    taken = list(itertools.chain(*rounds(names, owners)))
    assert sorted(taken) == sorted(names)
    assert all(len({owners[n] for n in some}) == len(some) for some in rounds(names, owners))


def test_one_process_keeps_the_order_of_the_layers():
    assert list(rounds(["b", "a"], {"a": 0, "b": 0})) == [["b"], ["a"]]


def test_errors_of_one_process_are_its_own():
    with pytest.raises(ZeroDivisionError), Ranks().together():
        1 / 0  # noqa: B018
    Ranks().raise_together(None)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
