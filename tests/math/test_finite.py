"""NaN and infinity are found wherever they stand."""

import pytest
import torch

from lightning_kfac.math.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_found_anywhere(dtype, bad):
    """Also behind the last whole vector register, and in a matrix that is turned or cut out."""
    values = torch.randn(7, 19, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place in [(0, 0), (3, 7), (6, 17), (6, 18)]:
        spoilt = values.clone()
        spoilt[place] = bad
        assert not all_finite(spoilt) and not all_finite(spoilt.T)
        assert not all_finite(spoilt[place[0] :, place[1] :])
        assert all_finite(values) and all_finite(values.T)
