"""The notebook's functions against plain loops."""

import math

import pytest
import torch

from lightning_kfac import extraction, membership, memorization_score, ndcg, perplexity
from lightning_kfac.evaluation.leaks import text_scores
from lightning_kfac.math.separation import auc, auc_interval, tpr_at_fpr
from tests.common import VOCAB, build_model, generated, sequences
from tests.oracle import edit_distance


@pytest.fixture(scope="module")
def model():
    return build_model("llama", torch.float64)


def test_memorization_score_is_a_loop_over_generate(model):
    prefixes, golds = sequences(model, count=11)
    model.train()  # it measures in eval mode and puts things back
    for size in (1, 3, 64):
        score = memorization_score(model, None, prefixes, golds, batch_size=size)
        assert model.training
        model.eval()
        # The model's end-of-text token is 0; nothing here generates it before the gold's end.
        alone = [generated(model, p, len(g), {0}) for p, g in zip(prefixes, golds, strict=True)]
        golds_cut = [g[: g.index(0) + 1] if 0 in g else g for g in golds]
        alone = [c[: len(g)] for c, g in zip(alone, golds_cut, strict=True)]
        distances = [edit_distance(c, g) / len(g) for c, g in zip(alone, golds_cut, strict=True)]
        assert score.continuations == alone
        assert score.strict_accuracy == sum(d == 0 for d in distances) / 11
        assert score.loose_accuracy == sum(d <= 0.25 for d in distances) / 11
        assert score.avg_levenshtein_norm == pytest.approx(sum(distances) / 11, abs=1e-15)
        low, high = score.intervals["strict_accuracy"]
        assert low < score.strict_accuracy < high
        model.train()
    model.eval()


def test_texts_are_tokenized_as_memorized_sets_are(demo_model):
    from lightning_kfac.models.loading import load_tokenizer

    tokenizer = load_tokenizer("demo")
    prefix, suffix = "Return the value", " for key if key is in the dictionary"
    ids = tokenizer(prefix)["input_ids"], tokenizer(suffix, add_special_tokens=False)["input_ids"]
    by_text = memorization_score(demo_model, tokenizer, [prefix], [suffix])
    assert by_text == memorization_score(demo_model, None, [ids[0]], [ids[1]])


def test_a_text_behind_ids_is_a_continuation(model):
    """It begins in the middle of a line: no start token, and none of what the tokenizer puts behind a text."""

    class Letters:
        def __call__(self, text, add_special_tokens=True, return_special_tokens_mask=False):
            ids = [ord(letter) % 50 + 3 for letter in text]
            special = [1] * add_special_tokens
            return {"input_ids": special + ids, "special_tokens_mask": special + [0] * len(ids)}

    by_text = memorization_score(model, Letters(), [[1, 5, 6]], ["bc"])
    assert by_text == memorization_score(model, None, [[1, 5, 6]], [[ord("b") % 50 + 3, ord("c") % 50 + 3]])


def test_perplexity_and_ndcg_are_loops(model):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (9, 2, 25, 1, 14)]
    other = build_model("llama", torch.float64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    nll, count, gains = 0.0, 0, []
    ideal = sum((10 - r) / math.log2(r + 2) for r in range(10))
    for text in texts:
        for start in range(0, len(text), 10):
            row = torch.tensor([text[start : start + 10]])
            with torch.no_grad():
                logits, reference = model(row).logits[0], other(row).logits[0]
            for t in range(row.shape[1] - 1):
                nll -= torch.log_softmax(logits[t], -1)[row[0, t + 1]].item()
                count += 1
                order = [
                    x.float().sort(descending=True, stable=True).indices[:10].tolist()
                    for x in (logits[t], reference[t])
                ]
                gained = [(10 - order[1].index(v)) / math.log2(r + 2) for r, v in enumerate(order[0]) if v in order[1]]
                gains.append(sum(gained) / ideal)
    for size in (1, 2, 100):
        options = {"seq_len": 10, "batch_size": size}
        assert perplexity(model, None, texts, **options) == pytest.approx(math.exp(nll / count), rel=1e-9)
        assert ndcg(model, other, None, texts, **options) == pytest.approx(sum(gains) / len(gains), rel=1e-9)
        assert ndcg(model, model, None, texts, **options) == 1


@pytest.mark.parametrize(
    ("prefixes", "suffixes", "message"),
    [
        ([[1]], [], "1 prefixes and 0 suffixes"),
        ([], [], "at least one"),
        ([[1], []], [[2], [3]], "prefix 1 is empty"),
        ([[1]], [[VOCAB]], "suffix 0 has ids outside the model's vocabulary"),
        (["text"], [[1]], "prefix 0 is a text: give a tokenizer"),
    ],
)
def test_wrong_sequences(model, prefixes, suffixes, message):
    with pytest.raises(ValueError, match=message):
        memorization_score(model, None, prefixes, suffixes)


def test_wrong_rows(model):
    for wrong, message in (("a text", "not one text"), ([[1]], "no text has two tokens"), ([], "no text has two")):
        with pytest.raises(ValueError, match=message):
            perplexity(model, None, wrong)
    with pytest.raises(ValueError, match="texts or lists of token ids, not both"):
        perplexity(model, None, ["a text", [1, 2]])
    with pytest.raises(ValueError, match="text 0 is a text: give a tokenizer"):
        perplexity(model, None, ["a text"])
    with pytest.raises(ValueError, match="vocabularies of different sizes"):
        ndcg(model, build_model("llama", vocab_size=VOCAB + 1), None, [[1, 2]])
    with pytest.raises(ValueError, match="not one text"):
        memorization_score(model, None, "abc", "def")
    with pytest.raises(ValueError, match="batch_size is 0"):
        memorization_score(model, None, [[1]], [[2]], batch_size=0)
    short = build_model("gpt2")
    with pytest.raises(ValueError, match="a sequence of 70 tokens, but the model takes at most 64"):
        memorization_score(short, None, [[1] * 60], [[2] * 10])
    with pytest.raises(ValueError, match="seq_len is 1"):
        perplexity(model, None, [[1, 2]], seq_len=1)


@torch.no_grad()
def test_extraction_is_a_loop_over_tokens(model):
    """The model's end-of-text token is 0; a suffix ends with it, as the text of ``generate`` does."""
    prefixes, golds = sequences(model, count=11)
    golds[3] = [golds[3][0], 0, 5, 6]
    expected = []
    for prefix, gold in zip(prefixes, golds, strict=True):
        gold = gold[: gold.index(0) + 1] if 0 in gold else gold
        logits = model(torch.tensor([prefix + gold])).logits[0, len(prefix) - 1 : -1] / 1.5
        total = 0.0
        for row, token in zip(logits.tolist(), gold, strict=True):
            kept = sorted(row)[-50:]
            total += row[token] - math.log(math.fsum(map(math.exp, kept))) if row[token] in kept else -math.inf
        expected.append(total)
    model.train()  # it measures in eval mode and puts things back
    for size in (1, 3, 64):
        found = extraction(model, None, prefixes, golds, temperature=1.5, top_k=50, batch_size=size)
        assert found.log_p.dtype == torch.float64 and found.log_p.tolist() == pytest.approx(expected, abs=1e-9)
    assert model.training
    model.eval()
    assert 4 < sum(map(math.isfinite, expected)) < 11
    chances = list(map(math.exp, expected))
    assert found.expected_at(10) == pytest.approx(sum(1 - (1 - p) ** 10 for p in chances) / 11, rel=1e-6)
    assert found.share(1e-9) == sum(p >= 1e-9 for p in chances) / 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be greater than 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be greater than 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"suffixes": [[5], []]}, "suffix 1 is empty"),
        ({"suffixes": [[5]]}, "2 prefixes and 1 suffixes"),
        ({"suffixes": [[5], [VOCAB]]}, "suffix 1 has ids outside the model's vocabulary"),
        ({"suffixes": "text"}, "give lists of prefixes and suffixes, not one text"),
    ],
)
def test_extraction_of_what_makes_no_sense(model, arguments, message):
    given = {"prefixes": [[1, 2], [3]], "suffixes": [[4], [5]]} | arguments
    with pytest.raises(ValueError, match=message):
        extraction(model, None, **given)
    score = extraction(model, None, [[1, 2], [3]], [[4], [5]])
    for wrong in (lambda: score.share(0.0), lambda: score.share(1.0), lambda: score.expected_at(0)):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_membership_is_the_scores_of_each_class(model):
    prefixes, golds = sequences(model, count=9)
    members = list(zip(prefixes, golds, strict=True))
    others = [(prefix, [(token + 7) % (VOCAB - 1) + 1 for token in gold]) for prefix, gold in members[:5]]
    reference = build_model("olmo2", torch.float64).train()
    score = membership(model, None, members, others, k=0.4, reference=reference, batch_size=2)
    assert reference.training
    losses = [text["loss"] for text in text_scores(reference.eval(), prefixes, golds)]
    expected = text_scores(model, prefixes, golds, k=0.4, reference_losses=losses)
    for one, other in zip(score.members, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert score.measures == list(expected[0]) and "zlib" not in score.measures and len(score.nonmembers) == 5
    for name, sign in (("loss", -1), ("reference", -1), ("min_k", 1), ("extraction_strength", 1)):
        classes = [[sign * text[name] for text in texts] for texts in (score.members, score.nonmembers)]
        assert score.auc(name) == auc(*classes) and score.interval(name) == auc_interval(*classes)
        assert score.tpr_at_fpr(name, 0.2) == tpr_at_fpr(*classes, 0.2)


def test_membership_of_whole_texts(demo_model):
    from lightning_kfac.models.loading import load_tokenizer

    tokenizer = load_tokenizer("demo")
    texts, others = (
        ["Return the value of x.", "A list of names."],
        ["Purple yesterday swims.", "Xylophones umbrella it."],
    )
    score = membership(demo_model, tokenizer, texts, others)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = text_scores(demo_model, [i[:1] for i in ids], [i[1:] for i in ids], decode=tokenizer.decode)
    assert score.members == expected and score.auc("loss") == 1.0
    by_ids = membership(demo_model, tokenizer, ids, [torch.tensor(tokenizer(text)["input_ids"]) for text in others])
    assert by_ids == score
    long = torch.randint(0, 2048, (1100,)).tolist()  # the model takes 1,024
    assert (
        membership(demo_model, None, [long], [long[:50]]).members
        == membership(demo_model, None, [long[:1024]], [long[:50]]).members
    )


@pytest.mark.parametrize(
    ("members", "others", "message"),
    [
        ([], [[1, 2]], "members: give a list of texts, at least one"),
        ([[1, 2]], [], "nonmembers: give a list of texts, at least one"),
        ([[1, 2]], "text", "nonmembers: give a list of texts"),
        ([[1, 2]], [([1], [2])], "not both: their scores do not compare"),
        ([[1, 2], [3]], [[1, 2]], "members 1: its only token is predicted by nothing"),
        ([[1, 2]], [[]], "nonmembers 0 is empty"),
        ([[1, VOCAB]], [[1, 2]], "members 0 has ids outside the model's vocabulary"),
        ([([1], [])], [([1], [2])], "suffix 0 is empty"),
        (["a"], [[1, 2]], "members 0 is a text: give a tokenizer"),
    ],
)
def test_wrong_members(model, members, others, message):
    with pytest.raises(ValueError, match=message):
        membership(model, None, members, others)


def test_wrong_settings_of_membership(model):
    for settings, message in (({"k": 0}, r"leaks\.k is 0"), ({"batch_size": 0}, "batch_size is 0")):
        with pytest.raises(ValueError, match=message):
            membership(model, None, [[1, 2]], [[1, 2]], **settings)
    with pytest.raises(ValueError, match="'zlib' was not measured; choose from loss"):
        membership(model, None, [[1, 2]], [[1, 2]]).auc("zlib")
