"""Published shapes."""

import pytest

from lightning_kfac.models.loading import skeleton
from lightning_kfac.planning.architecture import published_config, read_architecture


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("olmo2-1b", 1.485), ("olmo2-7b", 7.299), ("llama3-8b", 8.030), ("qwen3-8b", 8.191), ("llama3-70b", 70.554),
     ("mixtral-8x7b", 46.703), ("olmoe-7b", 6.919)],
)  # fmt: skip
def test_published_shapes_have_the_published_number_of_parameters(shape, billions):
    module = skeleton(published_config(shape))
    paper = read_architecture(module)
    assert paper.parameters == sum(p.numel() for p in module.parameters())
    assert paper.parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert paper.root_parameters + paper.blocks * paper.block_parameters == paper.parameters
