"""Layers and ranks of a config."""

import pytest

from lightning_kfac.attention.config import CrystallizeConfig
from lightning_kfac.errors import InputError


def test_ranks_of_a_config():
    shapes = {0: (4, 24), 1: (4, 24)}
    assert CrystallizeConfig([-1]).resolve(shapes) == ([1], [1, 2, 4, 8, 16, 24])
    assert CrystallizeConfig([1, 0], [8, 0]).resolve(shapes) == ([0, 1], [0, 8])
    for ranks, message in (([25], "rank 25 is above 24"), ([-1], "name at least one rank"), ([], "name at least one")):
        with pytest.raises(InputError, match=message):
            CrystallizeConfig([0], ranks).resolve(shapes)
