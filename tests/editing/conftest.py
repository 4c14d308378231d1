"""What tests of the editor share."""

import copy

import pytest

from lightning_kfac import collect_factors
from tests.common import batched, projections_of


@pytest.fixture
def collected(any_model, rows):
    """A model of its own for each test, and factors of all MLP layers."""
    model = copy.deepcopy(any_model)
    return model, collect_factors(model, batched(rows, 3), projections=projections_of(model), coupled=True)
