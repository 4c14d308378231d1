"""What an edit may be asked for."""

import json

import pytest

from lightning_kfac import EditConfig, InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "factors", "basis": "general"}, "makes a basis of its own"),
        ({"budget": "mass", "formula": "lowest"}, "has no mass"),
        ({"budget": "half"}, "unknown budget 'half'"),
        ({"basis": "own"}, "unknown basis"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"layers": {"0": {"up": 1.5}}}, "layers: block 0, up: rho is 1.5"),
        ({"layers": {"0": {"up": {"rhos": 1}}}}, "unknown field 'rhos'"),
        ({"layers": {"zero": {"up": 0.5}}}, "block 'zero' must be a number"),
        ({"layers": {"0": {"up": 0.5}}, "blocks": [0]}, "leave blocks and projections out"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        EditConfig(**settings)


@pytest.mark.parametrize("wrong", [{"rho": 1.2}, {"rho": float("nan")}, {"formula": "best"}, {"mode": "drop"}])
def test_wrong_config(wrong):
    with pytest.raises(InputError):
        EditConfig(**wrong)


def test_configs_of_an_edit_survive_json():
    config = EditConfig(layers={"3": {"up": {"rho": 0.5, "formula": "modified"}}})
    assert json.loads(json.dumps(config.layers)) == config.layers
