"""Methods that train: steps against plain float64 loops on two blocks, two ranks, a stop, and what is refused."""

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
from lightning_kfac.methods.training import NPO, BalancedSubnet, GradientAscent
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.modules.measured_training import Checkpoints, train_and_measure
from lightning_kfac.modules.sequence_training import SequenceSteps, SequenceTraining
from lightning_kfac.modules.unlearning import TRAININGS, UnlearningLM
from lightning_kfac.storage.manifest import Manifest
from tests.common import VOCAB, build_model, generator
from tests.modules.test_sequence_training import QUIET, made

METHODS = [
    GradientAscent(steps=3, weight=0.3, lr=1e-2, batch_size=3, seed=1),
    NPO(steps=3, weight=0.6, lr=1e-2, batch_size=3, seed=1, beta=0.7),
    BalancedSubnet(steps=3, weight=0.7, lr=3.0, batch_size=3, seed=1, ratio=0.1),
]
BY_NAME = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def text(n=4):
    return [
        MemorizedSequence([], torch.randint(1, VOCAB, (7,), generator=generator(50 + i)).tolist()) for i in range(n)
    ]


def module(method, model=None, forget=None):
    model = build_model("olmo2", num_hidden_layers=2) if model is None else model
    layers = resolve_targets(model, [1], ["gate", "up"])
    return TRAININGS[type(method)](model, layers, made() if forget is None else forget, text(), method)


def trainer(steps=3, devices=1):
    strategy = DDPStrategy() if devices > 1 else "auto"
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, **QUIET)


def row_log_p(model, row):
    """Log probability of a row's targets, in the model's precision, and their number."""
    ids = torch.tensor([[*row.prefix, *row.suffix]])
    first = max(1, len(row.prefix))
    log_p = F.log_softmax(model(ids).logits[0], -1)
    terms = [log_p[place - 1, ids[0, place]] for place in range(first, ids.shape[1])]
    return torch.stack(terms).sum(), len(terms)


def masks(scores, ratio):
    """1 for each weight but the share ``ratio`` with the largest |score|."""
    kept = []
    for one in scores:
        mask = torch.ones(one.numel(), dtype=torch.float64)
        mask[one.detach().abs().flatten().argsort(descending=True)[: round(ratio * one.numel())]] = 0
        kept.append(mask.view(one.shape))
    return kept


def plain_loss(model, method, reference, numbers, text_numbers):
    """Of one step, by the definitions of the field."""
    rows = [row_log_p(model, made()[n]) for n in numbers]
    kept = [row_log_p(model, text()[n]) for n in text_numbers]
    if isinstance(method, NPO):
        powers = [(p - reference[n]).exp() ** method.beta for (p, _), n in zip(rows, numbers, strict=True)]
        first = torch.stack([2 / method.beta * (1 + power).log() for power in powers]).mean()
    else:
        first = sum(p for p, _ in rows) / sum(n for _, n in rows)
    return method.weight * first - (1 - method.weight) * sum(p for p, _ in kept) / sum(n for _, n in kept)


class PlainSubnet:
    """Scores, whose gradient is that of the masked weight times -W sign(score)."""

    def __init__(self, model, names, method):
        numbers = torch.Generator().manual_seed(method.seed)
        self.weights = [model.get_parameter(name) for name in names]
        self.start = [weight.detach().clone() for weight in self.weights]
        drawn = [torch.rand(w.shape, generator=numbers) * 2 - 1 for w in self.start]
        self.scores = [(d / 24**0.5).double().requires_grad_() for d in drawn]
        self.ratio = method.ratio

    def mask(self):
        for weight, start, mask in zip(self.weights, self.start, masks(self.scores, self.ratio), strict=True):
            weight.data = start * mask
            weight.grad = None

    def gradients(self):
        for weight, start, scores in zip(self.weights, self.start, self.scores, strict=True):
            scores.grad = -weight.grad * start * scores.detach().sign()


def plain(method):
    """Losses of a loop in float64, and the weights that it ends with."""
    model = build_model("olmo2", torch.float64, num_hidden_layers=2).requires_grad_(False)
    names = [f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")]
    trained = [model.get_parameter(name).requires_grad_() for name in names]
    subnet = PlainSubnet(model, names, method) if isinstance(method, BalancedSubnet) else None
    optimizer = torch.optim.SGD(subnet.scores, method.lr, 0.9) if subnet else torch.optim.Adam(trained, method.lr)
    with torch.no_grad():
        reference = [row_log_p(model, row)[0] for row in made()]
    forget, retain = (SequenceSteps(rows, 3, method.seed) for rows in (made(), text()))
    losses = []
    for step in range(method.steps):
        optimizer.zero_grad()
        if subnet:
            subnet.mask()
        loss = plain_loss(model, method, reference, forget.numbers(step), retain.numbers(step))
        loss.backward()
        if subnet:
            subnet.gradients()
        optimizer.step()
        losses.append(loss.item())
    if subnet:
        subnet.mask()
    return losses, {name: weight.detach() for name, weight in zip(names, trained, strict=True)}


@BY_NAME
def test_steps_are_those_of_a_plain_loop_in_the_chosen_layers_alone(method):
    losses, weights = plain(method)
    model = build_model("olmo2", num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = module(method, model)
    trainer().fit(training)
    assert training.losses == pytest.approx(losses, rel=1e-4) and losses[-1] < losses[0]
    with training.as_stored() as stored:
        after = {name: p.detach().clone() for name, p in stored.named_parameters()}
    assert set(after) == set(before)
    for name in before:
        assert torch.equal(before[name], model.get_parameter(name))
        if name in weights:
            moved = (after[name] - before[name]).norm()
            assert (after[name] - weights[name]).norm() < 0.01 * moved, name
        else:
            assert torch.equal(after[name], before[name]), name
    if isinstance(method, BalancedSubnet):
        dropped = after["model.layers.1.mlp.up_proj.weight"] == 0
        assert int(dropped.sum()) == round(0.1 * dropped.numel())


@BY_NAME
def test_narrow_weights_are_trained_in_float32_and_measured_as_they_are(method):
    model = build_model("gpt2", torch.bfloat16)
    layers = resolve_targets(model, [1], ["up"])
    training = TRAININGS[type(method)](model, layers, made(), text(), method)
    trainer().fit(training)
    with training.as_stored() as stored:
        assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
        name = "transformer.h.1.mlp.c_fc.weight"
        assert not torch.equal(stored.get_parameter(name), model.get_parameter(name))
    assert {p.dtype for p in training.parameters()} == {torch.float32}


@BY_NAME
@pytest.mark.filterwarnings("ignore:Found .* module")
def test_a_stop_changes_nothing(tmp_path, method):
    Manifest(tmp_path).create("compare")  # what is not listed is not removed

    def run(kept=None, stop=None, steps=(1, 3)):
        found = {}

        def measure(step, model):
            if step == stop:
                raise KeyboardInterrupt
            found[step] = model.model.layers[1].mlp.up_proj.weight.detach().clone()

        training = module(method)
        train_and_measure(training, steps, measure, tmp_path, "cpu", kept)
        return found, training

    whole, first = run()
    kept = Checkpoints(tmp_path / "state", "key")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(kept, stop=3)
    rest, second = run(kept, steps=(3,))
    assert torch.equal(rest[3], whole[3]) and not torch.equal(whole[1], whole[3])
    assert second.losses == first.losses[1:]
    if isinstance(method, NPO):
        assert torch.equal(first.reference, second.reference)


@pytest.mark.filterwarnings("ignore:Found .* module")
def test_a_training_that_is_measured_at_its_end_alone_goes_on_all_the_same(tmp_path, monkeypatch):
    Manifest(tmp_path).create("compare")
    kept = Checkpoints(tmp_path / "state", "key", "training")
    found = []

    def run():
        training = module(METHODS[2])
        train_and_measure(training, (3,), lambda step, model: found.append(step), tmp_path, "cpu", kept, every=1)
        return training.losses

    step = UnlearningLM.training_step

    def killed(training, batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(training, batch, number)

    monkeypatch.setattr(UnlearningLM, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run()
    assert not found and kept.before(3).name == "key-00000002.ckpt"
    monkeypatch.setattr(UnlearningLM, "training_step", step)
    rest = run()
    assert found == [3] and not (tmp_path / "state").exists()
    assert rest == run()[2:]


def test_a_method_sees_its_half_and_text_alone(monkeypatch):
    rows = made()
    seen = []
    log_p = UnlearningLM.log_p

    def noted(training, tokens, weights):
        seen.extend(tokens.input_ids.tolist())
        return log_p(training, tokens, weights)

    monkeypatch.setattr(UnlearningLM, "log_p", noted)
    trainer().fit(module(METHODS[0], forget=rows[:2]))
    given = [[*row.prefix, *row.suffix] for row in [*rows[:2], *text()]]
    assert len(seen) == 18 and all(any(ids[: len(row)] == row for row in given) for ids in seen)


@BY_NAME
def test_what_cannot_be_trained_is_refused(monkeypatch, method):
    with pytest.raises(InputError, match="the forget set has 1 sequences; it takes two or more"):
        module(method, forget=made()[:1])
    model = build_model("olmo2", num_hidden_layers=2)
    packed = resolve_targets(model, [1], ["up"])
    packed["model.layers.1.mlp.up_proj"].module.weight = torch.nn.Parameter(
        torch.zeros(40, 24, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"up_proj is a Linear with weights of int8.*without quantization"):
        TRAININGS[type(method)](model, packed, made(), text(), method)
    training = module(method)
    monkeypatch.setattr(SequenceTraining, "trainer", SimpleNamespace(strategy=ShardedStrategy()))
    with pytest.raises(InputError, match="ShardedStrategy cannot train sequences here; use one device, or ddp"):
        training.setup("fit")


# -- two ranks ------------------------------------------------------------------------------------------------------


def work(folder):
    """What one of two processes does."""
    for method in METHODS:
        training = module(method)
        trainer(devices=2).fit(training)
        with training.as_stored() as stored:
            weight = stored.model.layers[1].mlp.up_proj.weight.detach().clone()
        found = {"losses": training.losses, "weight": weight}
        torch.save(found, folder / f"{method.name}-{training.trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def on_two_ranks(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    forks.run_on_ranks("tests.modules.test_unlearning", folder, 2)
    return folder


@BY_NAME
def test_two_ranks_have_the_loss_curve_of_one(on_two_ranks, method):
    one = module(method)
    trainer().fit(one)
    ranks = [torch.load(on_two_ranks / f"{method.name}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0]["losses"] == ranks[1]["losses"] and torch.equal(ranks[0]["weight"], ranks[1]["weight"])
    assert ranks[0]["losses"] == pytest.approx(one.losses, abs=1e-5)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
