"""A whole evaluation: the same figures for any batch size and number of ranks, intervals, and what they compare."""

import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_kfac.data.loaders import TokenRows, row_loader, sequence_loader
from lightning_kfac.data.memorized import MemorizedSequence
from lightning_kfac.data.packing import row_offsets
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.evaluation import Evaluation, Measures
from lightning_kfac.evaluation.near_verbatim import near_verbatim
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.math.statistics import wilson
from lightning_kfac.metrics.described import Sampling
from lightning_kfac.metrics.functional import Decoding
from lightning_kfac.models.tokens import TokenBatch
from tests.common import VOCAB, build_model, generator, sequences

COUNT, TOKENS = 13, 207
MEASURES = Measures(position_stress=3, batch_mean_perplexity=True)


def edited_model():
    model = build_model("olmo2", torch.float64)
    with torch.no_grad():
        weight = model.get_submodule("model.layers.2.mlp.up_proj").weight
        weight += 0.1 * torch.randn(weight.shape, generator=generator(7), dtype=weight.dtype)
    return model


@cache
def material():
    """The model before and after an edit, sequences, and the tokens of a text; every evaluation leaves them alone."""
    models = build_model("olmo2", torch.float64), edited_model()
    rows = [MemorizedSequence(p, g) for p, g in zip(*sequences(models[0], COUNT), strict=True)]
    ids = torch.randint(1, VOCAB, (TOKENS,), generator=generator(1)).int().numpy()
    return models, rows, ids


def evaluate(batch_size, rank=0, world_size=1):
    """Baseline and edited evaluation of this rank's share of the data."""
    models, rows, ids = material()
    evaluation = "self"
    for model in models:
        evaluation = Evaluation(["memorized", "unseen"], [], {0}, evaluation, MEASURES)
        for name in ("memorized", "unseen"):
            for batch in sequence_loader(rows, batch_size, rank, world_size):
                evaluation.add_sequences(name, model, batch)
        for batch in row_loader(TokenRows(ids, row_offsets(TOKENS, 16)), batch_size, rank, world_size):
            evaluation.add_text(model, TokenBatch.from_dict(batch))
        evaluation.values = evaluation.results(), evaluation.intervals(), evaluation.differences()
        evaluation.models = models
    return evaluation


@pytest.fixture(scope="module")
def one():
    return evaluate(4)


def assert_same(found, expected, but=()):
    """Rates, counts, lengths and their intervals exactly; what is real-valued of a float64 model to 1e-9."""
    for figures, others in zip(found, expected, strict=True):
        assert figures.keys() == others.keys()
        for name, value in figures.items():
            if name not in but:
                kind = name.split("/")[-1]
                exact = kind not in ("perplexity", "perplexity_batch_mean", "ndcg@10") and "extraction" not in kind
                assert value == (others[name] if exact else pytest.approx(others[name], rel=1e-9)), name


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_any_batch_size_gives_the_same_figures(one, batch_size):
    # The average of exp(batch loss) is there to show that it does not.
    values = evaluate(batch_size).values
    assert_same(values, one.values, but={"perplexity_batch_mean"})
    other = values[0]["perplexity_batch_mean"]
    assert other != pytest.approx(one.values[0]["perplexity_batch_mean"], rel=1e-6)


def work(folder):
    """What each of several ranks does."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    values = evaluate(2, rank, world_size).values
    (folder / f"{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def test_two_ranks_give_the_figures_of_one(one, forks, tmp_path):
    """13 sequences and 13 rows: seven and six, in batches of two."""
    forks.run_on_ranks("tests.evaluation.test_evaluation", tmp_path, 2)
    for rank in range(2):
        values = json.loads((tmp_path / f"{rank}.json").read_text())
        expected = json.loads(json.dumps(one.values))
        assert_same(values, expected, but={"perplexity_batch_mean"})


def test_figures_intervals_and_differences_belong_together(one):
    results, intervals, differences = one.values
    before = one.baseline
    assert results["n_sequences"] == COUNT and results["ndcg@10"] < 1 == before.values[0]["ndcg@10"]
    assert before.values[2] == {} and set(differences) <= set(results)
    strict = round(results["strict_acc"] * COUNT)
    assert intervals["strict_acc"] == list(wilson(strict, COUNT))
    for name, (low, high) in intervals.items():
        assert low <= results[name] <= high
    for name, (change, low, high) in differences.items():
        assert change == pytest.approx(results[name] - before.values[0][name], abs=1e-12)
        assert low <= change <= high


def test_shift_of_what_the_unedited_model_does_not_recite(one):
    before, after = one.baseline.continuations["unseen"], one.continuations["unseen"]
    rest = [i for i in range(COUNT) if i not in one.baseline.recited["unseen"]]
    results = one.values[0]
    assert 0 < len(rest) < COUNT and results["unseen/n_not_recited"] == len(rest)
    assert results["unseen/unchanged"] == pytest.approx(sum(before[i] == after[i] for i in rest) / len(rest), abs=1e-15)
    assert "unseen/unchanged" not in one.baseline.values[0]


def test_perplexity_is_that_of_plain_logits(one):
    ids = torch.randint(1, VOCAB, (TOKENS,), generator=generator(1))
    losses, batches = [], []
    for row in ids.split(16):
        logits = one.models[1](row[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    assert one.values[0]["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-12)
    for start in range(0, len(losses), 4):
        batches.append(torch.cat(losses[start : start + 4]).mean().exp().item())
    assert one.values[0]["perplexity_batch_mean"] == pytest.approx(sum(batches) / len(batches), rel=1e-12)


def test_loss_change_is_a_histogram_by_hand(one):
    before, after = one.baseline.losses, one.losses
    counts = [0] * 80
    for number in range(len(after)):
        rows = before[number], after[number]
        for a, b in zip(*(x.flatten().tolist() for x in rows), strict=True):
            counts[min(79, max(0, math.floor((b - a + 4) / 0.1 + 1e-6)))] += 1
    padding = sum(counts) - int(one.figures["perplexity"].weights.sum())
    found = torch.tensor(one.change_counts)
    assert found.sum() == one.figures["perplexity"].weights.sum()
    assert (torch.tensor(counts) - found).abs().sum() <= padding + 4  # and a value or two on an edge


@pytest.mark.parametrize("name", ["memorized", "unseen"])
def test_extraction_is_that_of_each_sequence_alone(one, name):
    prefix = "" if name == "memorized" else "unseen/"
    decoding = one.sets[name].setting.measures.extraction
    changes = []
    for evaluation, model in zip((one.baseline, one), one.models, strict=True):
        found = {key.removeprefix(prefix): value for key, value in evaluation.values[0].items()}
        rows = [recite(model, [row.prefix], [row.suffix], {0}, False, decoding)[0] for row in material()[1]]
        chances = [math.exp(row.log_p) for row in rows]
        for n in (1, 10, 1000):
            expected = sum(1 - (1 - p) ** n for p in chances) / COUNT
            assert found[f"extraction.expected_at.{n}"] == pytest.approx(expected, rel=1e-9)
        for p in ("0.001", "0.01", "0.1", "0.5"):
            assert found[f"extraction.share_p.{p}"] == sum(chance >= float(p) for chance in chances) / COUNT
        median = statistics.median(row.log_p for row in rows) / math.log(10)
        expected = None if math.isinf(median) else pytest.approx(median, rel=1e-9)
        assert found["extraction.median_log10_p"] == expected
        curve = evaluation.curves[name]
        assert curve == sorted(curve) and curve[0] == pytest.approx(found["extraction.expected_at.1"], rel=1e-12)
        assert evaluation.settings[f"{prefix}extraction.top_k"] == 40
        changes.append(found["extraction.expected_at.10"])
    change, low, high = one.values[2][f"{prefix}extraction.expected_at.10"]
    assert change == pytest.approx(changes[1] - changes[0], abs=1e-12) and low <= change <= high


def test_extraction_is_left_out_where_it_is_not_wanted(one):
    (model, _), rows, _ = material()
    evaluation = Evaluation(["memorized"], [], {0}, None, Measures(extraction=None))
    for batch in sequence_loader(rows, 5, 0, 1):
        evaluation.add_sequences("memorized", model, batch)
    found = evaluation.results()
    assert evaluation.curves == evaluation.settings == {} and not any("extraction" in name for name in found)
    assert {name: one.baseline.values[0][name] for name in found} == found


def test_near_verbatim_and_prior_ratio_are_those_of_each_sequence_alone():
    (model, _), rows, _ = material()
    asked = Sampling(1.2, 30, near_verbatim=2, beams=3, prior_ratio=True)
    found = []
    for batch_size in (4, 9):
        evaluation = Evaluation(["memorized"], [], {0}, None, Measures(extraction=asked))
        for batch in sequence_loader(rows, batch_size, 0, 1):
            evaluation.add_sequences("memorized", model, batch)
        found.append(evaluation.results())
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    ratios, near = [], []
    for number, row in enumerate(rows):
        other = rows[(number + COUNT // 2) % COUNT].prefix
        own, without = (
            recite(model, [prefix], [row.suffix], {0}, False, Decoding(1.2, None))[0].log_p
            for prefix in (row.prefix, other)
        )
        ratios.append((own - without) / math.log(10))
        sampled = recite(model, [row.prefix], [row.suffix], {0}, False, Decoding(1.2, 30))[0].log_p
        near += near_verbatim(model, [row.prefix], [row.suffix], [sampled], asked, 2, 3, {0})
    assert found[0]["prior_ratio_log10"] == pytest.approx(statistics.median(ratios), rel=1e-9)
    for n in (1, 10, 1000):
        expected = statistics.mean(1 - (1 - math.exp(x)) ** n for x in near)
        assert found[0][f"near_verbatim@{n}"] == pytest.approx(expected, rel=1e-6)
        assert found[0][f"near_verbatim@{n}"] > found[0][f"extraction.expected_at.{n}"]
    assert evaluation.settings["near_verbatim_edits"] == 2 and evaluation.settings["near_verbatim_beams"] == 3
    evaluation = Evaluation(["memorized"], [], {0}, None, Measures(extraction=asked))
    with pytest.raises(InputError, match=r"prior_ratio: memorized has one sequence"):
        evaluation.add_sequences("memorized", model, next(iter(sequence_loader(rows[:1], 4, 0, 1))))


def test_wrong_measures():
    with pytest.raises(InputError, match=r"loose_similarity is 1\.2"):
        Measures(loose_similarity=1.2)
    with pytest.raises(InputError, match="position_stress is -1"):
        Measures(position_stress=-1)


def test_loose_similarity_is_an_option():
    (model, _), rows, _ = material()
    batch = {"index": list(range(COUNT)), "prefix": [r.prefix for r in rows], "suffix": [r.suffix for r in rows]}
    rates = []
    for similarity in (0.0, 0.5, 0.75, 1.0):
        evaluation = Evaluation(["memorized"], [], {0}, None, Measures(loose_similarity=similarity))
        evaluation.add_sequences("memorized", model, batch)
        results = evaluation.results()
        rates.append(results["loose_acc"])
    assert rates[0] == 1 and rates == sorted(rates, reverse=True) and rates[-1] == results["strict_acc"] < rates[1]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
