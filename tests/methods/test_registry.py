"""Methods by the names, settings and strengths of a config, and what is wrong with them in one line."""

import json

import pytest

from lightning_kfac import InputError
from lightning_kfac.methods.registry import METHODS, methods_of


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults_and_says_what_it_is(name):
    (method,) = methods_of(name)
    about = json.loads(json.dumps(method.about()))
    settings = {key: value for key, value in about.items() if key != "method"}
    assert about["method"] == name and methods_of({"name": name, **settings}) == [method]
    assert method.label and method.amount > 0 and method.strength in METHODS[name].__dataclass_fields__


def test_a_list_of_strengths_is_a_method_for_each():
    found = methods_of({"name": "balanced_subnet", "ratio": [0.01, 0.02], "steps": 5})
    assert [(method.ratio, method.steps) for method in found] == [(0.01, 5), (0.02, 5)]
    assert methods_of({"name": "formula", "formula": "modified", "rho": [0.7]})[0].config().formula == "modified"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("npoo", "methods: 'npoo' is no method; choose from formula, block_deletion,"),
        ({"ratio": 1}, "methods: one has no name"),
        ({"name": "npo", "rho": 1}, "npo has no setting 'rho'; it has steps, weight, lr, batch_size, seed, beta"),
        ({"name": "npo", "steps": [1.5]}, "npo: steps is 1.5; it must be a whole number"),
        ({"name": "npo", "steps": []}, "npo: steps is empty; name at least one"),
        ({"name": "npo", "steps": -1}, "steps is -1; it must be 0 or more"),
        ({"name": "npo", "beta": 0}, "beta is 0; it must be greater than 0"),
        ({"name": "gradient_ascent", "weight": 1.5}, "weight is 1.5; it must be between 0 and 1"),
        ({"name": "gradient_ascent", "lr": 0}, "lr is 0; it must be greater than 0"),
        ({"name": "gradient_ascent", "batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"name": "balanced_subnet", "ratio": [0.1, 2]}, "ratio is 2; it must be between 0 and 1"),
        ({"name": "block_deletion", "block": "tail"}, "block is 'tail'; it must be one of flattest, head, quintile"),
        ({"name": "block_noise", "quintile": [1, 6]}, "quintile is [1, 6]; name two numbers from 1 to 5"),
        ({"name": "coherent_step", "nu": -1}, "nu is -1; it must be 0 or more"),
        ({"name": "formula", "formula": "best"}, "unknown formula 'best'; choose from original,"),
        ({"name": "formula", "rho": 2}, "rho"),
    ],
)
def test_what_is_wrong_is_named(value, message):
    with pytest.raises(InputError) as refused:
        methods_of(value)
    assert message in str(refused.value)
