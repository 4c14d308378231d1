"""Training on sequences: its batches, its loss and steps against plain loops, on two ranks, and after a stop."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F

from lightning_kfac import InputError
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.distributed.strategies import ShardedStrategy
from lightning_kfac.modules.sequence_training import SequenceSteps, SequenceTraining
from tests.common import VOCAB, build_model, generator

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
LR = {"adam": 1e-2, "sgd": 0.3}


def made(n=5):
    """Sequences of other lengths, the last one without a prefix."""
    ids = [torch.randint(1, VOCAB, (6 + i,), generator=generator(i)).tolist() for i in range(n)]
    return [MemorizedSequence(row[: 3 if i < n - 1 else 0], row[3 if i < n - 1 else 0 :]) for i, row in enumerate(ids)]


def module(batch_size=3, steps=4, optimizer="adam", seed=1):
    model = build_model("olmo2")
    settings = {"steps": steps, "batch_size": batch_size, "optimizer": optimizer, "lr": LR[optimizer], "seed": seed}
    return SequenceTraining(model, made(), **settings)


def trainer(steps=4, devices=1, **more):
    strategy = DDPStrategy() if devices > 1 else "auto"
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, **QUIET, **more)


def plain_loss(model, rows):
    """Mean of -log p over the tokens after each prefix, row by row."""
    terms = []
    for row in rows:
        ids = torch.tensor([[*row.prefix, *row.suffix]])
        first = max(1, len(row.prefix))
        log_p = F.log_softmax(model(ids).logits[0], -1)
        terms += [-log_p[place - 1, ids[0, place]] for place in range(first, ids.shape[1])]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_ranks_share_out_the_batches_of_each_step(world, batch_size):
    rows = made()
    whole = SequenceSteps(rows, batch_size, seed=4)
    stream = [number for step in range(10) for number in whole.numbers(step)]
    assert all(sorted(stream[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, len(stream) - 4, 5))
    for step in range(10):
        shares = [SequenceSteps(rows, batch_size, 4, rank, world)[step] for rank in range(world)]
        assert sorted(n for share in shares for n in share["index"]) == sorted(whole.numbers(step))
        targets = sum(len(rows[n].suffix) - (not rows[n].prefix) for n in whole.numbers(step))
        assert {share["n_targets"] for share in shares} == {targets}
        assert sum(int(share["tokens"].valid.sum()) for share in shares) == targets


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_are_those_of_a_plain_loop(optimizer):
    trained = module(optimizer=optimizer)
    model = build_model("olmo2")
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    plain = kind(model.parameters(), lr=LR[optimizer])
    batches = SequenceSteps(made(), 3, seed=1)
    losses = []
    for step in range(4):
        loss = plain_loss(model, [made()[n] for n in batches.numbers(step)])
        plain.zero_grad()
        loss.backward()
        plain.step()
        losses.append(loss.item())
    trainer().fit(trained)
    assert trained.losses == pytest.approx(losses, rel=1e-4)  # Adam's first steps are signs of rounded gradients
    assert losses[3] < losses[0]


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_takes_the_same_steps_to_the_bit(tmp_path, stop):
    whole = module()
    trainer().fit(whole)
    first = module()
    begun = trainer(stop)
    begun.fit(first)
    begun.save_checkpoint(tmp_path / "state.ckpt", weights_only=False)
    second = module()
    trainer().fit(second, ckpt_path=tmp_path / "state.ckpt", weights_only=True)
    assert first.losses + second.losses == whole.losses
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_dropout_stays_off():
    model = build_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    training = SequenceTraining(model, made(), steps=1, batch_size=3, lr=1e-3)
    trainer(1).fit(training)
    expected = plain_loss(build_model("gpt2"), [made()[n] for n in SequenceSteps(made(), 3).numbers(0)])
    assert training.losses == pytest.approx([expected.item()], rel=1e-5)


def test_what_cannot_be_trained_is_refused(monkeypatch):
    with pytest.raises(InputError, match="no sequence to train on"):
        SequenceTraining(build_model("olmo2"), [], steps=1, batch_size=1)
    training = module()
    monkeypatch.setattr(SequenceTraining, "trainer", SimpleNamespace(strategy=ShardedStrategy()))
    with pytest.raises(InputError, match="ShardedStrategy cannot train sequences here; use one device, or ddp"):
        training.setup("fit")


# -- two ranks ------------------------------------------------------------------------------------------------------


def work(folder):
    """What one of two processes does."""
    for batch_size in (1, 3):
        trained = module(batch_size)
        trainer(devices=2).fit(trained)
        found = {"losses": trained.losses, "head": trained.model.lm_head.weight.detach().clone()}
        torch.save(found, folder / f"{batch_size}-{trained.trainer.global_rank}.pt")


@pytest.mark.parametrize("batch_size", [1, 3])  # a rank without a sequence, and one with more than the other
def test_two_ranks_have_the_loss_curve_of_one(on_two_ranks, batch_size):
    one = module(batch_size)
    trainer().fit(one)
    ranks = [torch.load(on_two_ranks / f"{batch_size}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["losses"] == ranks[1]["losses"] and torch.equal(ranks[0]["head"], ranks[1]["head"])
    assert ranks[0]["losses"] == pytest.approx(one.losses, abs=1e-5)


@pytest.fixture(scope="module")
def on_two_ranks(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    forks.run_on_ranks("tests.modules.test_sequence_training", folder, 2)
    return folder


if __name__ == "__main__":
    work(Path(sys.argv[1]))
