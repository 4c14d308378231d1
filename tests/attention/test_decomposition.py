"""Ground states, residuals and their projections."""

import torch

from lightning_kfac.attention.decomposition import decompose, ground_state, project, sharpness


def test_ties_go_to_the_lowest_index():
    p = torch.tensor([[[[0.1, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]]]])
    values = torch.arange(4.0).view(1, 1, 4, 1)
    assert ground_state(p, values).flatten().tolist() == [1, 0]
    assert ground_state(torch.full((1, 1, 1, 1000), 1e-3), torch.arange(1000.0).view(1, 1, 1000, 1)).item() == 0


def test_decomposition_is_exact_and_shares_grouped_values():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 4, 3, 5, generator=generator).softmax(-1)
    values = torch.randn(2, 2, 5, 6, generator=generator)
    output = torch.einsum("bhts,bhsd->bthd", p, values[:, [0, 0, 1, 1]])
    ground, residual = decompose(output, p, values)
    assert torch.allclose(ground + residual, output, atol=1e-7)
    for b, t, h in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        assert torch.equal(ground[b, t, h], values[b, h // 2, p[b, h, t].argmax()])


def test_projection_and_sharpness():
    residual = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    directions = torch.eye(4).expand(2, 4, 4)
    assert torch.equal(project(residual, directions[..., :0]), torch.zeros_like(residual))
    assert torch.equal(project(residual, directions[..., :3])[..., 3], torch.zeros(3, 2))
    assert torch.allclose(project(residual, directions), residual)
    entropy, mass = sharpness(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.bfloat16))
    assert torch.allclose(entropy, torch.tensor([0, 0.5]).new_tensor([0, torch.log(torch.tensor(2.0))]))
    assert mass.tolist() == [1, 0.5] and mass.dtype == torch.float32
