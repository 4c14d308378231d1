"""The scan of blocks and projections: what it tries and what it recommends."""

import math

import pytest

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.scan import candidates, places, recommended, single_edits, worthwhile

LAYERS = {block: ["gate", "up"] for block in (2, 3, 4, 6)}
BEFORE = {"strict_acc": 1.0, "perplexity": 20.0}


def row(strict, perplexity):
    return {"strict_acc": strict, "perplexity": perplexity}


def test_places_of_layers():
    names = [f"model.layers.{block}.mlp.{projection}_proj" for block in (10, 2) for projection in ("up", "down")]
    assert places([*names, "lm_head"]) == {2: ["up", "down"], 10: ["up", "down"]}


def test_every_block_and_projection_alone():
    edits = [(edit.blocks, edit.projections) for edit in single_edits(LAYERS, EditConfig())]
    expected = [([b], p) for b in LAYERS for p in (["gate", "up"], ["gate"], ["up"])]
    assert edits == expected
    assert len(single_edits({3: ["up"]}, EditConfig())) == 1


def test_worth_is_recitation_taken_over_cost():
    assert worthwhile(BEFORE, row(0.4, 22.0)) == pytest.approx(0.6 / math.log(1.1))
    assert worthwhile(BEFORE, row(0.4, 19.0)) == 0.6 / 1e-3  # cheaper than nothing counts as nothing


def test_candidates_are_windows_of_the_best_blocks():
    rows = {2: row(0.9, 20.1), 3: row(0.1, 20.5), 4: row(0.2, 20.5), 6: row(0.0, 40.0)}
    tried = candidates(rows, BEFORE, LAYERS, EditConfig(), [0.7, 0.8], widest=2)
    windows = list(dict.fromkeys(tuple(edit.blocks) for edit in tried))
    assert windows[:2] == [(3,), (4,)] and (3, 4) in windows
    assert not any(6 in window and len(window) > 1 for window in windows)  # 4 and 6 are no neighbours
    assert {edit.rho for edit in tried} == {0.7, 0.8} and len(tried) == 2 * len(windows)


def test_the_cheapest_that_reaches_the_target():
    assert recommended([row(0.2, 20), row(0.1, 22), row(0.0, 21), row(0.05, 30)], 0.1) == 2
    assert recommended([row(0.2, 20)], 0.1) is None
    assert recommended([row(0.0, None), row(0.0, math.inf), row(0.1, 30)], 0.1) == 2
    assert worthwhile(BEFORE, row(0.0, None)) == -math.inf
