"""Valid positions and sampled labels against loops over tokens."""

import numpy as np
import pytest
import torch

from lightning_kfac.math import loss
from lightning_kfac.math.loss import IGNORED, next_tokens, sample_labels, uniforms, valid_positions
from tests.common import generator


def test_valid_positions():
    attend = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    assert valid_positions(attend).tolist() == [[True, True, False, False], [False, True, True, False]]
    labels = torch.tensor([[5, 5, -100, 5], [5, 5, 5, 5]])
    assert valid_positions(attend, labels)[0].tolist() == [True, False, False, False]


def test_uniforms_depend_on_sample_position_and_draw_only():
    index = torch.tensor([3, 8])
    position = torch.arange(6).repeat(2, 1)
    together = uniforms(7, index, position)
    assert together.dtype == torch.float64 and ((together >= 0) & (together < 1)).all()
    assert torch.equal(uniforms(7, index[1:], position[1:, :4])[0], together[1, :4])
    shifted = torch.tensor([[0, 0, 0, 1, 2, 3]])  # left padding
    assert torch.equal(uniforms(7, index[:1], shifted)[0, 2:], together[0, :4])
    for other in (uniforms(8, index, position), uniforms(7, index + 1, position), uniforms(7, index, position, draw=1)):
        assert not torch.isin(other, together).any()


def test_sampled_labels_invert_the_cumulative_distribution():
    logits = 3 * torch.randn(50, 13, generator=generator())
    u = torch.rand(50, generator=generator(1), dtype=torch.float64)
    expected = []
    for row, number in zip(logits.double().numpy(), u.tolist(), strict=True):
        cdf = np.cumsum(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        expected.append(next(k for k in range(13) if cdf[k] > number * cdf[-1]))
    assert sample_labels(logits, u).tolist() == expected
    assert sample_labels(logits, torch.zeros(50, dtype=torch.float64)).tolist() == [0] * 50
    # A class of probability zero is never drawn, whatever u.
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).repeat(1001, 1)
    drawn = sample_labels(logits, torch.linspace(0, 1 - 1e-16, 1001, dtype=torch.float64))
    assert set(drawn.tolist()) == {1, 3}


def test_sampled_labels_have_the_right_frequencies():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    n = 20_000
    u = uniforms(0, torch.arange(n // 100), torch.arange(100).repeat(n // 100, 1)).flatten()
    counts = sample_labels(logits.repeat(n, 1), u).bincount(minlength=4)
    expected = n * logits.softmax(-1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.27  # 99.9 % quantile with 3 degrees of freedom; the seed is fixed


# -- positions and targets ---------------------------------------------------------------------------------


def test_valid_positions_are_a_loop():
    attend = torch.rand(6, 9, generator=generator()) > 0.3
    labels = torch.randint(0, 50, (6, 9), generator=generator(1))
    labels[torch.rand(6, 9, generator=generator(2)) > 0.7] = -100
    kept = attend.clone()
    for given in (None, labels):
        found = valid_positions(attend, given)
        assert found.dtype == torch.bool and torch.equal(attend, kept)
        for row in range(6):
            for t in range(9):
                real = t < 8 and bool(attend[row, t]) and bool(attend[row, t + 1])
                assert found[row, t] == (real and (given is None or labels[row, t + 1] != -100))


def test_one_position_carries_no_loss():
    assert valid_positions(torch.ones(2, 1).bool(), torch.ones(2, 1).long()).tolist() == [[False], [False]]
    assert next_tokens(torch.tensor([[7]])).tolist() == [[-100]]


def test_next_tokens():
    tokens = torch.tensor([[5, 6, 7], [8, 0, 9]])
    assert next_tokens(tokens).tolist() == [[6, 7, -100], [0, 9, -100]]
    assert next_tokens(tokens).dtype == torch.int64 and IGNORED == -100


# -- uniform numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0, 1, 5])
def test_uniforms_are_philox_numbers(draw):
    """Position p of a row takes the p-th number of its stream, the first where p is padding."""
    index, position = torch.tensor([3, 2**40]), torch.tensor([[-2, -1, 0, 1, 7], [4, 3, 2, 1, 0]])
    found = uniforms(11, index, position, draw)
    assert found.dtype == torch.float64 and found.shape == (2, 5) and found.device.type == "cpu"
    for row, number in enumerate(index.tolist()):
        bits = np.random.Philox(key=np.array([11, number], dtype=np.uint64), counter=[0, 0, 0, draw])
        stream = np.random.Generator(bits).random(8)
        assert found[row].tolist() == [stream[max(p, 0)] for p in position[row].tolist()]
    if draw == 0:
        assert torch.equal(found, uniforms(11, index, position))


def test_seeds_and_rows_of_64_bits():
    wide = uniforms(2**64 - 1, torch.tensor([2**63 - 1]), torch.tensor([[0, 1]]))
    assert not torch.equal(wide, uniforms(2**32 - 1, torch.tensor([2**31 - 1]), torch.tensor([[0, 1]])))


def test_rows_and_their_numbers_must_match():
    with pytest.raises(ValueError, match="zip"):
        uniforms(0, torch.tensor([1]), torch.zeros(2, 3).long())


# -- labels ------------------------------------------------------------------------------------------------


def smallest_class(logits, u):
    """The smallest k with cdf_k > u cdf_last, in float64."""
    weights = np.exp(logits.double().numpy() - logits.double().max().item())
    cdf = np.cumsum(weights / weights.sum())
    return next((k for k in range(len(cdf)) if cdf[k] > u * cdf[-1]), len(cdf) - 1)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9])
def test_slices_change_no_label(n, monkeypatch):
    monkeypatch.setitem(loss.AT_ONCE, "cpu", 28)  # four rows of seven
    logits = 3 * torch.randn(n, 7, generator=generator(n))
    u = torch.rand(n, generator=generator(1), dtype=torch.float64)
    assert sample_labels(logits, u).tolist() == [smallest_class(*pair) for pair in zip(logits, u.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_labels_keep_the_shape_of_the_positions(dtype):
    logits = torch.randn(2, 3, 5, generator=generator(), dtype=torch.float64).to(dtype)
    u = torch.rand(2, 3, generator=generator(1), dtype=torch.float64)
    found = sample_labels(logits, u)
    assert found.dtype == torch.int64 and found.shape == (2, 3)
    expected = [[smallest_class(logits[i, j], u[i, j].item()) for j in range(3)] for i in range(2)]
    assert found.tolist() == expected


def test_a_number_on_the_edge_of_a_class_draws_the_next():
    """Four equal classes have the float64 bounds 1/4, 1/2, 3/4 exactly."""
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, np.nextafter(0.5, 0), np.nextafter(1, 0)], dtype=torch.float64)
    assert sample_labels(torch.zeros(6, 4), u).tolist() == [0, 1, 2, 3, 1, 3]


def test_numbers_are_shares_of_the_last_sum():
    """The sum of 1000 probabilities is 1 but for some units of rounding: u on a bound, times it, may lie below."""
    off = 0
    for seed in range(8):
        logits = torch.randn(1, 1000, generator=generator(seed), dtype=torch.float64)
        cdf = logits.softmax(-1).cumsum(-1)[0].tolist()
        off += cdf[-1] != 1
        for u in cdf[400:900:100]:
            expected = next(k for k in range(1000) if cdf[k] > u * cdf[-1])
            assert sample_labels(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [expected]
    assert off


def test_one_draws_the_last_class():
    """u cdf_last rounds to cdf_last itself: no class lies above, so the last is taken."""
    assert sample_labels(torch.zeros(1, 3), torch.ones(1).double()).tolist() == [2]
    assert sample_labels(torch.zeros(1, 1), torch.tensor([0.5]).double()).tolist() == [0]


def test_the_softmax_is_taken_in_float64():
    """A class of probability 2^-30 lies beyond float32: of a number just below 1 it is drawn all the same."""
    logits = torch.tensor([[0.0, -30 * np.log(2.0)]]).float()
    u = torch.tensor([1 - 2.0**-31, 1 - 2.0**-29], dtype=torch.float64)
    assert sample_labels(logits.repeat(2, 1), u).tolist() == [1, 0]


def test_sampling_builds_no_graph():
    logits = torch.zeros(2, 3, requires_grad=True)
    seen = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor), lambda kept: kept)
    with hook:
        sample_labels(logits, torch.zeros(2).double())
    assert not seen
