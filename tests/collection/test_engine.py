"""Slices of the head, of rows, and checkpoints of the activations must leave the factors as they are."""

import pytest

from lightning_kfac import collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.engine import CurvatureEngine
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.models.targets import resolve_targets
from tests.collection.common import run_engine
from tests.common import assert_same, batched, build_model, padded, projections_of


@pytest.mark.parametrize("labels", ["gold", "sampled"])
@pytest.mark.parametrize("settings", [{"head_chunk": 1}, {"head_chunk": 7}, {"rows_at_once": 2, "head_chunk": 1000}])
def test_slices_change_nothing(any_model, rows, labels, settings):
    layers = resolve_targets(any_model, projections=projections_of(any_model))
    loss = FisherLoss(labels, seed=3)
    whole, total = run_engine(any_model, padded(rows), loss, layers)
    sliced, sliced_total = run_engine(any_model, padded(rows), loss, layers, **settings)
    assert_same(sliced, whole, 2e-6)
    assert sliced_total == pytest.approx(total, rel=1e-6)


def test_gradient_checkpointing_changes_nothing(rows):
    model = build_model("olmo2")
    plain = collect_factors(model, batched(rows, 3), labels="gold")
    layers = resolve_targets(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.requires_grad_(False).train()  # it is inactive in eval mode; OLMo-2 has no dropout
    with CurvatureCapture(layers) as capture:
        for batch in batched(rows, 3):
            loss = FisherLoss("gold")
            last, _ = CurvatureEngine(model, capture, loss).run(loss.prepare(batch))
            last.backward()
        found = capture.results()
    assert_same(found, plain)
