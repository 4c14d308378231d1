"""The parts of going on after a stop, each by itself; whole runs that are killed are in test_faults.py."""

import copy
import json
import shutil

import pytest
import torch
from lightning import Callback, Trainer

from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.callbacks.collection.state_writer import latest_checkpoint, steps
from lightning_kfac.cli.train import TRAINER_DEFAULTS
from lightning_kfac.data.loaders import FILLER, ShardedBatches
from lightning_kfac.distributed.lockstep import Lockstep
from lightning_kfac.distributed.ranks import Ranks
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.log import EvaluationLog
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.storage.results import read_results, replace_result


@pytest.mark.parametrize("n_rows", [1, 9, 17, 24])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 3), (1, 3), (2, 1), (3, 2)])
def test_every_row_is_read_once_over_a_stop(n_rows, before, after):
    first = [ShardedBatches(n_rows, 2, rank, before) for rank in range(before)]
    for stop in range(len(first[0])):
        readers = [iter(sampler) for sampler in first]
        rows = [row for _ in range(stop) for reader in readers for row in next(reader)]
        positions = {tuple(sampler.position.items()) for sampler in first}
        assert len(positions) == 1
        second = [ShardedBatches(n_rows, 2, rank, after) for rank in range(after)]
        for sampler in second:
            sampler.start_at(first[0].position)
        left = [list(sampler) for sampler in second]
        assert len({len(batches) for batches in left}) == 1
        assert len(second[0]) == stop + len(left[0])
        if before == after:
            assert left == [list(reader) for reader in readers]
        rows += [row for batches in left for batch in batches for row in batch]
        assert sorted(row for row in rows if row != FILLER) == list(range(n_rows))
        assert sum(map(len, second[0])) == len(list(range(0, n_rows, after)))  # the next reading is a whole one


@pytest.mark.parametrize("stop", [1, 63, 64, 70])
def test_sums_go_on_bit_for_bit(stop):
    """Also where the running sum has just moved to the second accumulator."""
    batches = torch.randn(140, 5, 300, generator=torch.Generator().manual_seed(0))
    whole, first, second = (SecondMoment(300) for _ in range(3))
    for number, batch in enumerate(batches):
        whole.add(batch)
        if number < stop:
            first.add(batch)
    second.load_state({key: value.clone() for key, value in first.state().items()})
    for batch in batches[stop:]:
        second.add(batch)
    assert torch.equal(whole.sum(), second.sum())
    state = second.state()
    assert all(torch.equal(value, state[key]) for key, value in whole.state().items())


class StopAt(Callback):
    """Breaks a run off."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise RuntimeError("enough")


def collection(folder, *more, **changes):
    """A trainer without the command line, its module and its data."""
    collector = CurvatureCollector(blocks=[3], projections=["up"], save_minutes=0, **changes)
    off = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(
        **TRAINER_DEFAULTS, **off, default_root_dir=folder, callbacks=[collector, *more], accelerator="cpu"
    )
    return collector, trainer, CausalLM("demo"), TextData(max_tokens=700, seq_len=32, batch_size=2, tokenizer="demo")


def test_a_trainer_goes_on_from_a_checkpoint(tmp_path):
    whole, trainer, *job = collection(tmp_path / "whole")
    trainer.fit(*job)
    _, trainer, *job = collection(tmp_path / "run", StopAt(5))
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(*job)
    assert [path.name for path in steps(tmp_path / "run")] == ["step-0000000004", "step-0000000005"]
    checkpoint = latest_checkpoint(tmp_path / "run")
    contents = json.loads(checkpoint.read_text())
    assert contents["global_step"] == 5 and contents["state_dict"] == {}
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    _, trainer, *job = collection(tmp_path / "other", moments="token")
    with pytest.raises(InputError, match="unfinished run whose moments is None, here it is token"):
        trainer.fit(*job, ckpt_path=latest_checkpoint(tmp_path / "other"))
    resumed, trainer, *job = collection(tmp_path / "run")
    trainer.fit(*job, ckpt_path=checkpoint)
    assert not (tmp_path / "run" / "state").exists()
    assert trainer.global_step == 11
    for name, factors in whole.factors.items():
        assert torch.equal(factors.A, resumed.factors[name].A) and torch.equal(factors.G, resumed.factors[name].G)
        assert factors.n_tokens == resumed.factors[name].n_tokens


class ChangesAFile(Callback):
    """Writes to a file in the middle of a run, before its state is written."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.path.write_text(self.path.read_text() + '{"text": "one more"}\n')


def test_a_text_that_changes_while_it_is_read_is_another_text(tmp_path):
    """A state knows its texts as they were when the run began."""
    path = tmp_path / "domain.jsonl"
    path.write_text('{"text": "a domain of few words"}\n' * 20)

    def job(*more):
        collector, trainer, module, _ = collection(tmp_path / "run", *more)
        domains = {"words": str(path)}
        data = TextData(max_tokens=700, seq_len=32, batch_size=2, tokenizer="demo", domains=domains, domain_tokens=90)
        return collector, trainer, module, data

    _, trainer, *parts = job(ChangesAFile(path), StopAt(5))
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(*parts)
    _, trainer, *parts = job()
    with pytest.raises(InputError, match="holds an unfinished run on other text"):
        trainer.fit(*parts, ckpt_path=latest_checkpoint(tmp_path / "run"))


def test_a_text_that_is_gone_once_it_was_read_is_not_missed(tmp_path):
    path = tmp_path / "domain.jsonl"
    path.write_text('{"text": "a domain of few words"}\n' * 20)

    class Removes(ChangesAFile):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.path.unlink(missing_ok=True)

    collector, trainer, module, _ = collection(tmp_path / "run", Removes(path))
    corpus = TextData(str(path), max_tokens=90, seq_len=16, batch_size=1, tokenizer="demo")
    trainer.fit(module, corpus)
    assert not path.exists() and collector.factors


class Asked(Ranks):
    """Counts how often the ranks are asked whether anybody works."""

    asked = 0

    def any(self, value: bool) -> bool:
        self.asked += 1
        return value


def test_a_rank_that_fails_within_a_forward_does_not_wait_for_the_others(demo_model):
    """They wait for its part of a forward that it cannot finish; RankWatch ends them."""
    ranks, ids = Asked(), torch.ones(1, 1, dtype=torch.long)
    model = copy.deepcopy(demo_model)
    steps = Lockstep(model, ranks)
    with steps:
        model(ids)
    assert ranks.asked == 2
    broken = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), steps:
        model(ids)
    assert ranks.asked == 3
    broken.remove()
    with pytest.raises(KeyError), steps:
        model(ids)
        raise KeyError
    assert ranks.asked == 5


def test_evaluations_remember_what_is_whole_and_theirs(tmp_path):
    tensors = torch.randn(3, 4).bfloat16(), torch.arange(6).view(2, 3).int(), torch.tensor(0.1, dtype=torch.float64)
    log = EvaluationLog(tmp_path, "key", 0)
    log.tensors_once("text 0", lambda: tensors)
    log.once("set", lambda: [[1, True]])

    def never():
        raise AssertionError

    again = EvaluationLog(tmp_path, "key", 0)
    found = again.tensors_once("text 0", never)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
    assert again.once("set", never) == [[1, True]]
    with open(tmp_path / "rank-0.jsonl", "a") as file:
        file.write('{"name": "set", "value": [[2, true]], "crc": 1}\n')  # by a disk
        file.write('{"name": "cut off", "val')  # by a kill
    cut = EvaluationLog(tmp_path, "key", 0)
    assert cut.once("cut off", lambda: 3) == 3 and cut.once("set", never) == [[1, True]]
    assert EvaluationLog(tmp_path, "key", 0).once("cut off", never) == 3
    (tmp_path / "rank-0.bin").write_bytes(b"\1" + (tmp_path / "rank-0.bin").read_bytes()[1:])
    assert EvaluationLog(tmp_path, "key", 0).tensors_once("text 0", lambda: tensors)[0] is tensors[0]
    assert EvaluationLog(tmp_path, "other", 0).once("set", lambda: "anew") == "anew"


def test_a_result_takes_the_place_of_its_forerunner(tmp_path):
    path, same = tmp_path / "results.jsonl", ("stage", "rank")
    for row in ({"stage": "baseline", "x": 1}, {"stage": "edited", "x": 2}, {"stage": "baseline", "x": 3}):
        replace_result(path, row, same)
    replace_result(path, {"stage": "lowrank", "rank": 4}, same)
    replace_result(path, {"stage": "lowrank", "rank": 8}, same)
    rows = [{k: v for k, v in row.items() if k not in ("timestamp", "version")} for row in read_results(path)]
    assert rows == [
        {"stage": "baseline", "x": 3},
        {"stage": "edited", "x": 2},
        {"stage": "lowrank", "rank": 4},
        {"stage": "lowrank", "rank": 8},
    ]
