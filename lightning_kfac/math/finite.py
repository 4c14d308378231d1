"""Whether all numbers of a tensor are finite."""

import math

from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """True where no entry is NaN or infinite: both ends of the range tell, in one pass and without a mask.

    Args:
        values: Of any shape, with at least one entry; real.

    Example:
        >>> import torch
        >>> all_finite(torch.tensor([1.0, -2.0])), all_finite(torch.tensor([1.0, float("nan"), 2.0]))
        (True, False)
    """
    least, largest = values.aminmax()  # NaN is both
    return math.isfinite(least) and math.isfinite(largest)
