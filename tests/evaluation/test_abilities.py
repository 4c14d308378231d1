"""Abilities: who knows the answers is right always, who always gives the same one by chance; figures against loops."""

import numpy as np
import pytest
import torch

from lightning_kfac import InputError, collect_factors
from lightning_kfac.data.ability_tasks import AbilityTask, TokenQuestion, local_tasks, recitation_task
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.evaluation.abilities import (
    Answers,
    ModelReader,
    answer,
    compare,
    loss_and_share,
    low_shares,
    task_texts,
)
from lightning_kfac.factors.bases import BasisCache
from lightning_kfac.loading import load_tokenizer
from tests.common import build_model, generated
from tests.data.test_ability_tasks import sentences


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def tasks(tokenizer):
    passages = [MemorizedSequence([5, 6, n], [7, n, 8]) for n in range(9, 15)]
    return [*local_tasks(sentences(40), tokenizer, 24), recitation_task(passages)]


class Oracle:
    """Looks every answer up."""

    def __init__(self, tasks):
        asked = [one for task in tasks for one in task.asked]
        self.known = {(tuple(one.prompt), tuple(one.options[one.right])) for one in asked}
        self.written = {tuple(one.prompt): one.options[one.right] for one in asked}

    def losses(self, prompts, options):
        return [float((tuple(p), tuple(o)) not in self.known) for p, o in zip(prompts, options, strict=True)]

    def writes(self, prompts, lengths):
        return [self.written[tuple(prompt)] for prompt in prompts]


class Constant:
    """Finds all options equally likely, and always writes the same."""

    def __init__(self, gold):
        self.gold = gold

    def losses(self, prompts, options):
        return [1.0] * len(prompts)

    def writes(self, prompts, lengths):
        return [self.gold] * len(prompts)


def test_a_lookup_scores_1_and_a_constant_chance(tasks, tokenizer):
    oracle = Oracle(tasks)
    for task in tasks:
        scores = list(answer(task, oracle, tokenizer).scores.values())
        assert scores == [1.0] * len(task.asked), task.name
        golds = [one.options[0] for one in task.asked]
        constant = Constant(max(golds, key=golds.count))
        assert np.mean(list(answer(task, constant, tokenizer).scores.values())) == pytest.approx(task.chance), task.name


def test_a_number_with_another_digit_is_another_number(tokenizer):
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" 1", "7", "\n")}
    task = AbilityTask("additions", "arithmetic", (TokenQuestion([5], [ids[" 1"]]),) * 3, numbers=True)

    class Writer(Constant):
        def writes(self, prompts, lengths):
            assert lengths == [len(ids[" 1"]) + 1] * 3
            return [ids[" 1"] + ids["7"], ids[" 1"] + ids["\n"], ids[" 1"]]

    assert list(answer(task, Writer(None), tokenizer).scores.values()) == [0, 1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_answers_as_plain_torch_does(family):
    model = build_model(family)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, n).tolist() for n in (3, 7, 7, 1, 12)]
    options = [rng.integers(1, 60, n).tolist() for n in (1, 2, 3, 2, 1)]
    reader = ModelReader(model)
    losses = reader.losses(prompts, options)
    for prompt, option, loss in zip(prompts, options, losses, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + option])).logits[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(option) - 1)
        assert loss == pytest.approx(-sum(log_p[i, t].item() for i, t in zip(places, option, strict=True)), rel=1e-4)
    lengths = [4, 1, 2, 3, 5]
    assert reader.writes(prompts, lengths) == [
        generated(model, prompt, length, [0]) for prompt, length in zip(prompts, lengths, strict=True)
    ]


def answers(task, group, scores, **more):
    return Answers(task, group, "acc", {str(n): float(s) for n, s in enumerate(scores)}, **more)


def test_identical_models_keep_everything():
    before = [answers("a", "logic", [1, 0, 1, 1]), answers("b", "arithmetic", [0.5, 0.25, 1])]
    tasks, groups = compare(before, before)
    assert [task.retention.value for task in (*tasks, *groups)] == [1] * 4
    assert tasks[0].p == 1 and tasks[1].p is None and (tasks[0].lost, tasks[0].gained) == (0, 0)


def test_documents_are_paired_by_name_and_groups_pool_them():
    before = [answers("z", "recitation", [1, 1]), answers("x", "logic", [1, 1, 0, 1]), answers("y", "logic", [1, 0])]
    after = [Answers("x", "logic", "acc", {"3": 0.0, "1": 1.0, "2": 1.0, "9": 1.0}), answers("y", "logic", [1, 1])]
    tasks, groups = compare(before, after)
    assert [(task.name, task.n, task.lost, task.gained) for task in tasks] == [("x", 3, 1, 1), ("y", 2, 0, 1)]
    assert tasks[0].unedited.value == tasks[0].edited.value == pytest.approx(2 / 3)
    (logic,) = groups
    assert (logic.name, logic.n, logic.lost, logic.gained) == ("logic", 5, 1, 2)
    assert logic.retention.value == pytest.approx(4 / 3)


def test_what_is_at_chance():
    chosen = answers("a", "logic", [1, 1, 0, 0] * 10, chance=0.5)
    nothing = answers("b", "arithmetic", [0] * 40, chance=0.0)
    known = answers("c", "recitation", [1] * 39 + [0], chance=0.1)
    tasks, _ = compare([chosen, nothing, known], [chosen, nothing, known])
    assert {task.name: task.at_chance for task in tasks} == {"a": True, "b": True, "c": False}
    assert tasks[1].retention is None and tasks[1].record()["retention"] is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([answers("a", "logic", [1])], [answers("b", "logic", [1])], "no task was answered by both models; .* one: a"),
        ([answers("a", "logic", [1])], [Answers("a", "logic", "acc", {"7": 1.0})], "a: .* no document in common"),
        ([answers("a", "logic", [1])], [Answers("a", "logic", "f1", {"0": 1.0})], "judged by acc before and by f1"),
    ],
)
def test_answers_that_cannot_be_compared(before, after, message):
    with pytest.raises(InputError, match=message):
        compare(before, after)


def test_losses_and_shares_are_ranked():
    kept = [9, 7, 8, 3, 5]
    before = [answers(str(n), "logic", [1] * 10, chance=0.5) for n in range(6)]
    after = [answers(str(n), "logic", [1] * k + [0] * (10 - k)) for n, k in enumerate([*kept, 0])]
    before[5] = answers("5", "logic", [1, 0] * 5, chance=0.5)  # at chance: left out
    tasks, _ = compare(before, after)
    found = loss_and_share(tasks, {str(n): 10.0 - k for n, k in enumerate([*kept, 0])})
    assert found.value.value == 1 and found.value.low < 1 and found.tasks == ("0", "1", "2", "3", "4")
    assert loss_and_share(tasks, {"0": 0.1, "1": 0.2, "2": 0.4}) is None


def test_low_shares_against_a_loop():
    """Inputs of the layer one position at a time, components one by one."""
    model = build_model("llama")
    factors = collect_factors(model, [{"input_ids": torch.arange(1, 41).view(4, 10)}], blocks=[1], projections=["up"])
    task = AbilityTask("t", "logic", (TokenQuestion([3, 4, 5], [[9], [6, 7]], 1), TokenQuestion([8], [[2], [1]])))
    found = low_shares(model, factors, BasisCache(), task_texts([task]))
    ((name, layer),) = factors.items()
    module = model.get_submodule(name)
    seen = []
    handle = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0].double()))
    with torch.no_grad():
        for row in ([3, 4, 5, 6, 7], [8, 2]):
            model(torch.tensor([row]))
    handle.remove()
    mu, U_A = torch.linalg.eigh(layer.A.double())
    lam, U_G = torch.linalg.eigh(layer.G.double())
    C = U_G.T @ module.weight.detach().double() @ U_A
    importance = lam[:, None] * mu[None]
    low = importance <= importance.flatten().sort().values[importance.numel() // 2 - 1]
    # The last token predicts nothing, and does not count.
    inputs = torch.cat([x[:-1] for x in seen]) @ U_A
    energy = {part: (inputs @ (C * mask).T).square().sum() for part, mask in (("low", low), ("high", ~low))}
    assert found["t"] == pytest.approx((energy["low"] / (energy["low"] + energy["high"])).item(), rel=1e-4)
