"""What a collection says of itself."""

import pytest

from lightning_kfac.cli.main import main
from tests.common import small

WIDEST = 512  # of the demo model


@pytest.mark.parametrize(("budget", "said"), [(200, True), (600, False)])
def test_fewer_tokens_than_dimensions_are_told(tmp_path, few, capsys, budget, said):
    changes = {"data.max_tokens": budget, "data.heldout": "null", "data.memorized": "null"}
    main(["fit", *small(tmp_path / "run", few, **changes)])
    told = f"tokens are fewer than the {WIDEST} dimensions of model.layers.3.mlp.up_proj" in capsys.readouterr().err
    assert told == said
