"""When to stop: snapshots of a real run."""

import pytest
import torch

from lightning_kfac import InputError, load_factors
from lightning_kfac.callbacks import CurvatureCollector
from lightning_kfac.cli.train import main
from tests.common import (
    scalars,
    small,
)


def test_a_collection_stops_when_nothing_moves(tmp_path, few):
    settings = {"collect.watch_rho": 0.8, "data.max_tokens": 20000, "data.batch_size": 8, "data.heldout": "null"}
    main(["fit", *small(tmp_path / "all", few, **settings, **{"trainer.logger": "null"})])
    main(["fit", *small(tmp_path / "early", few, **settings, **{"collect.stop_overlap": 0.5, "edit.rho": 0.8})])
    folders = sorted((tmp_path / "all" / "snapshots").iterdir(), key=lambda p: int(p.name))
    assert [int(f.name) for f in folders] == [2520, 4536, 8568, 16632]
    assert load_factors(folders[1]).metadata["n_tokens"] == 4536
    early = load_factors(tmp_path / "early" / "factors")
    assert early.metadata["n_tokens"] == 4536
    for name, layer in load_factors(folders[1]).items():
        assert torch.equal(layer.A, early[name].A) and torch.equal(layer.G, early[name].G)
    _, values = scalars(tmp_path / "all")
    overlaps = values["overlap/model.layers.3.mlp.up_proj"]
    assert len(overlaps) == 3 and all(0.5 < value < 1 for value in overlaps) and overlaps[-1] > overlaps[0]
    assert (tmp_path / "early" / "edited").is_dir()


@pytest.mark.parametrize("wrong", [{"stop_overlap": 0.5}, {"watch_rho": 2.0}, {"watch_rho": 0.5, "stop_overlap": 3}])
def test_wrong_watching(wrong):
    with pytest.raises(InputError):
        CurvatureCollector(**wrong)
