"""What the figures of spectra show of an edit."""

import pytest

from lightning_kfac import EditConfig
from lightning_kfac.callbacks.spectrum import _cuts


@pytest.mark.parametrize(("formula", "shown"), [("original", True), ("modified", False)])
def test_figures_show_the_cut_of_this_edit_only(formula, shown):
    names = [f"model.layers.{block}.mlp.up_proj" for block in (1, 2, 3)]
    edit = EditConfig(rho=0.7, formula=formula, blocks=[1, 2])
    cuts = _cuts(edit, names, 4)
    assert cuts == ({names[0]: 0.7, names[1]: 0.7} if shown else {})
