"""Attacks by the names and settings of a config, and what is wrong with them in one line."""

import json
import math

import pytest
import torch

from lightning_kfac import InputError
from lightning_kfac.attacks.asking import PromptShift, Sampling
from lightning_kfac.attacks.registry import KINDS, attack_of
from lightning_kfac.attacks.relearning import Relearning
from lightning_kfac.math.statistics import Figure
from lightning_kfac.metrics import described
from lightning_kfac.metrics.described import Measures


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_defaults_and_comes_back_from_its_results(name):
    attack = attack_of(name)
    about = json.loads(json.dumps(attack.about()))
    assert about["name"] == name and attack_of(about) == attack and attack.label


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nose", "'nose' is no attack; choose from quantization, noise,"),
        ({"norm": 1.0}, "attacks: one has no name"),
        ({"name": "noise", "size": 1}, "noise has no setting 'size'; it has norm, seed"),
        ({"name": "noise", "norm": "much"}, "noise: norm is 'much'; it must be a number"),
        ({"name": "noise", "seed": True}, "noise: seed is True; it must be a whole number"),
        ({"name": "quantization", "scheme": "fp4"}, "scheme is 'fp4'; it must be one of int8, int4, nf4"),
        ({"name": "quantization", "group": 1.5}, "group is 1.5; it must be a whole number or null"),
        ({"name": "relearning", "steps": 5}, "steps is 5; it must be a list of whole numbers"),
        ({"name": "relearning", "steps": []}, "name numbers of steps"),
        ({"name": "relearning", "steps": [1, -1]}, "name numbers of steps"),
        ({"name": "relearning", "lr": 0}, "lr is 0; it must be greater than 0"),
        ({"name": "relearning", "batch_size": 0}, "batch_size is 0"),
        ({"name": "sampling", "tries": 0}, "tries is 0"),
        ({"name": "sampling", "temperature": 0.0}, "temperature is 0"),
        ({"name": "prompt_shift", "tokens": 0}, "tokens is 0"),
    ],
)
def test_what_is_wrong_is_named(value, message):
    with pytest.raises(InputError, match=r"attacks|extraction") as refused:
        attack_of(value)
    assert message in str(refused.value)


def test_sampling_gets_what_many_draws_give():
    """By hand: probabilities 1/2, 1/1000 and none, in 10 draws of each."""
    attack = Sampling(tries=10, temperature=0.5, top_k=None)
    assert attack.measures(Measures()).extraction == described.Sampling(0.5, None, 1.0)
    log10_p = torch.tensor([0.5, 0.001, 0.0], dtype=torch.float64).log10()
    got = attack.got({"extraction.median_log10_p": Figure(log10_p, torch.ones(3).double(), median=True)})
    assert got.sums.tolist() == pytest.approx([1 - 0.5**10, 1 - 0.999**10, 0.0], rel=1e-9)
    assert got.value == pytest.approx((2 - 0.5**10 - 0.999**10) / 3) and math.isfinite(got.value)
    assert attack.label == "10 samples, temperature 0.5, top_k None"


def test_prompts_are_shifted_with_the_prefix_among_them():
    measures = PromptShift(7).measures(Measures(loose_similarity=0.5))
    assert measures == Measures(loose_similarity=0.5, position_stress=7, include_unperturbed=True)


def test_results_name_only_settings_with_a_say():
    attack = Relearning(steps=(1, 5), weights="full")
    assert attack.after(5)["steps"] == 5 and "rank" not in attack.after(5)
    assert Relearning(weights="lora").after(1)["rank"] == 8
