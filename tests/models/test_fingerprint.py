"""Fingerprints of weights."""

import copy

from lightning_kfac.models.fingerprint import weights_fingerprint
from tests.common import build_model


def test_fingerprint():
    model = build_model("olmo2")
    tracked = ["model.layers.1.mlp.up_proj"]
    known = weights_fingerprint(model, tracked)
    assert weights_fingerprint(copy.deepcopy(model), tracked) == known
    rounded = copy.deepcopy(model).bfloat16()
    assert weights_fingerprint(copy.deepcopy(rounded).float(), tracked) == weights_fingerprint(rounded, tracked)
    model.model.layers[1].mlp.up_proj.weight.data[39, 23] += 1e-3
    assert weights_fingerprint(model, tracked) != known
