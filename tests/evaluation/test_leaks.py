"""Scores of texts against one forward a text in float64, for any batch and number of ranks."""

import json
import math
import sys
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_kfac.data.loaders import sequence_loader
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation import leaks
from lightning_kfac.evaluation.evaluation import Evaluation
from lightning_kfac.evaluation.leaks import text_losses, text_scores
from lightning_kfac.evaluation.recitation import recite
from tests.common import VOCAB, build_model, generator, sequences
from tests.oracle import logits_alone

COUNT = 11


def decode(ids):
    return " ".join(f"w{token}" for token in ids)


def by_hand(model, prefix, suffix, k):
    """The scores of one suffix, from a forward over it alone."""
    logits = logits_alone(model, [*prefix, *suffix])[len(prefix) - 1 : -1].tolist()
    log_p, standard, hits = [], [], []
    for row, token in zip(logits, suffix, strict=True):
        best = max(row)
        total = math.log(math.fsum(math.exp(x - best) for x in row)) + best
        logs = [x - total for x in row]
        mean = math.fsum(math.exp(x) * x for x in logs)
        deviation = math.sqrt(math.fsum(math.exp(x) * (x - mean) ** 2 for x in logs))
        log_p.append(logs[token])
        standard.append((logs[token] - mean) / deviation)
        hits.append(row.index(best) == token)
    lowest = max(1, int(k * len(suffix) + 1e-9))
    tail = next(n for n in range(len(hits) + 1) if n == len(hits) or not hits[-1 - n])
    return {
        "loss": -math.fsum(log_p) / len(log_p),
        "zlib": -math.fsum(log_p) / len(log_p) / len(zlib.compress(decode(suffix).encode())),
        "min_k": math.fsum(sorted(log_p)[:lowest]) / lowest,
        "min_k_plus_plus": math.fsum(sorted(standard)[:lowest]) / lowest,
        "exact_match": sum(hits) / len(hits),
        "extraction_strength": tail / len(hits),
    }


def test_scores_are_those_of_each_text_alone(monkeypatch):
    model = build_model("olmo2", torch.float64)
    prefixes, suffixes = sequences(model, COUNT)
    expected = [by_hand(model, p, s, 0.3) for p, s in zip(prefixes, suffixes, strict=True)]
    assert len({round(score["extraction_strength"], 3) for score in expected}) > 3
    for most in (1, 60, leaks.TOKENS_AT_ONCE):
        monkeypatch.setattr(leaks, "TOKENS_AT_ONCE", most)
        found = text_scores(model, prefixes, suffixes, k=0.3, decode=decode)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
    other = build_model("llama", torch.float64)
    losses = text_losses(other, prefixes, suffixes)
    against = text_scores(model, prefixes, suffixes, reference_losses=losses)
    for score, mine, p, s in zip(against, expected, prefixes, suffixes, strict=True):
        assert "zlib" not in score
        assert score["reference"] == pytest.approx(mine["loss"] - by_hand(other, p, s, 0.3)["loss"], rel=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_texts_of_one_length_need_no_mask(family):
    model = build_model(family, torch.float64)
    rows = torch.randint(0, VOCAB, (3, 12), generator=generator()).tolist()
    found = text_scores(model, [row[:1] for row in rows], [row[1:] for row in rows])
    for score, row in zip(found, rows, strict=True):
        assert score["loss"] == pytest.approx(by_hand(model, row[:1], row[1:], 0.2)["loss"], rel=1e-9)


def test_what_is_recited_matches_to_its_end():
    model = build_model("olmo2", torch.float64)
    prefixes, suffixes = sequences(model, COUNT)
    strict = [recital.strict for recital in recite(model, prefixes, suffixes)]
    scores = text_scores(model, prefixes, suffixes)
    assert [score["exact_match"] == 1 for score in scores] == strict
    assert [score["extraction_strength"] == 1 for score in scores] == strict and True in strict


def test_nothing_to_score():
    assert text_scores(build_model("olmo2"), [], []) == []


def test_a_damaged_model_is_named():
    model = build_model("olmo2")
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        text_scores(model, [[1]], [[2, 3]])


def evaluate(batch_size, rank=0, world_size=1):
    """Baseline and edited evaluation of this rank's share of two classes."""
    before = build_model("olmo2", torch.float64)
    after = build_model("olmo2", torch.float64)
    with torch.no_grad():
        weight = after.get_submodule("model.layers.1.mlp.up_proj").weight
        weight += 0.1 * torch.randn(weight.shape, generator=generator(7), dtype=weight.dtype)
    classes = {
        "members": [MemorizedSequence(p, s) for p, s in zip(*sequences(before, COUNT), strict=True)],
        "nonmembers": [
            MemorizedSequence(p, torch.randint(1, VOCAB, (len(s),), generator=generator(i)).tolist())
            for i, (p, s) in enumerate(zip(*sequences(before, COUNT - 2, seed=3), strict=True))
        ],
    }
    evaluation = "self"
    for model in (before, after):
        evaluation = Evaluation([], [], {0}, evaluation)
        for name, rows in classes.items():
            losses = {i: i / 10 for i in range(len(rows))}
            for batch in sequence_loader(rows, batch_size, rank, world_size):
                evaluation.add_members(name, model, batch, decode, losses)
        evaluation.values = evaluation.results(), evaluation.intervals(), evaluation.differences(), evaluation.settings
    return evaluation


@pytest.fixture(scope="module")
def one():
    return evaluate(4)


def assert_same(found, expected):
    for figures, others in zip(found, expected, strict=True):
        assert figures.keys() == others.keys()
        for name, value in figures.items():
            assert value == pytest.approx(others[name], rel=1e-9, nan_ok=True), name


@pytest.mark.parametrize("batch_size", [1, 100])
def test_any_batch_size_gives_the_same_figures(one, batch_size):
    assert_same(evaluate(batch_size).values, one.values)


def test_two_ranks_give_the_figures_of_one(one, forks, tmp_path):
    """Eleven members and nine others: six and five on a rank, in batches of two."""
    forks.run_on_ranks("tests.evaluation.test_leaks", tmp_path, 2)
    for rank in range(2):
        assert_same(json.loads((tmp_path / f"{rank}.json").read_text()), json.loads(json.dumps(one.values)))


def test_figures_intervals_and_changes_belong_together(one):
    results, intervals, differences, settings = one.values
    assert settings["leaks.members"] == COUNT and settings["leaks.nonmembers"] == COUNT - 2
    assert set(intervals) == {name for name in results if name.endswith(".auc")} == set(differences)
    assert len(intervals) == 7 and results["leaks.loss.auc"] > 0.5
    for name, (low, high) in intervals.items():
        assert low <= results[name] <= high
        assert [settings[name.replace("auc", bound)] for bound in ("low", "high")] == [low, high]
        change, below, above = differences[name]
        assert change == pytest.approx(results[name] - one.baseline.values[0][name])
        assert below <= change <= above


if __name__ == "__main__":  # a rank of the test above
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    values = evaluate(2, rank, dist.get_world_size()).values
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()
