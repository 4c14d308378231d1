"""Counts of what comes out, against loops over passages and texts."""

import math
import random

import pytest
import torch

from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.audit import MEASURES, Extractable, check_chance
from lightning_kfac.math.statistics import interval, wilson


def made(single):
    rng = random.Random(0)
    text = list(range(40)) if single else sorted([*range(9), *(rng.randrange(9) for _ in range(31))])
    p = [rng.choice([0.0, 0.9, 0.07, 1e-3, 5e-4, 1e-7]) for _ in text]
    log_p = torch.tensor([math.log(x) if x else -math.inf for x in p], dtype=torch.float64)
    strict = torch.tensor([x == 0.9 for x in p])
    return Extractable(torch.tensor(text), log_p, strict, log_p / 2), text, p


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("chance", [0.5, 0.01, 0.95])
def test_figures_are_counted(single, chance):
    found, text, p = made(single)
    figures = found.figures(chance)
    assert tuple(figures) == MEASURES
    for n in (10, 1000):
        out = [1 - (1 - x) ** n >= chance for x in p]
        texts = {t for t, o in zip(text, out, strict=True) if o}
        assert found.comes_out(n, chance).tolist() == out
        assert figures[f"passages@{n}"].value == pytest.approx(sum(out) / len(p))
        assert figures[f"texts@{n}"].value == pytest.approx(len(texts) / len(set(text)))
        assert interval(figures[f"texts@{n}"]) == wilson(len(texts), len(set(text)))
    for n in (1, 10, 1000):
        assert figures[f"expected@{n}"].value == pytest.approx(sum(1 - (1 - x) ** n for x in p) / len(p))
    near = sum(1 - (1 - math.sqrt(x)) ** 1000 for x in p) / len(p)
    assert figures["near_verbatim@1000"].value == pytest.approx(near)
    assert figures["strict"].value == pytest.approx(sum(x == 0.9 for x in p) / len(p))
    assert figures["strict"].rate == single
    # Passages of a text are no sample of others: what is resampled are texts.
    assert len(figures["expected@10"].sums) == len(set(text))
    assert figures["expected@10"].weights.tolist() == [text.count(t) for t in sorted(set(text))]


def test_what_cannot_be_asked():
    for arguments, said in (
        ((0.0, None, "strict", 0), "chance is 0"),
        ((1.0, None, "strict", 0), "chance is 1"),
        ((math.nan, None, "strict", 0), "chance is nan"),
        ((0.5, 1.5, "strict", 0), "fail_above is 1.5"),
        ((0.5, None, "near_verbatim@1000", 0), "measured only where near_verbatim is set"),
    ):
        with pytest.raises(InputError, match=said):
            check_chance(*arguments)
