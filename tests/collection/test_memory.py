"""The plan: passes and rows that fit into a memory."""

import pytest
import torch

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.models.targets import resolve_targets
from tests.common import batched, build_model


def test_plan_fits_into_what_it_is_given(rows):
    model = build_model("olmo2")
    layers = resolve_targets(model)
    free = plan_memory(model, layers, FisherLoss(), rows=4, seq_len=32)
    assert len(free.passes) == 1 and len(free.passes[0]) == 9 and free.rows_at_once == 4
    # gate and up share one A: 3 x (G gate, G up, A both, G down, A down), two accumulators each
    assert free.factor_bytes == 3 * 2 * 4 * (40**2 + 40**2 + 24**2 + 24**2 + 40**2)
    row = free.activation_bytes // 4
    cap = (free.factor_bytes // 2 + free.head_bytes + row) / 1e9
    tight = plan_memory(model, layers, FisherLoss(), rows=4, seq_len=32, max_memory_gb=cap)
    assert len(tight.passes) > 1 and sum(map(len, tight.passes)) == 9
    assert tight.factor_bytes + tight.activation_bytes + tight.head_bytes <= cap * 1e9
    assert str(free).startswith("9 projections, 1 pass, 0.1 MB of factors")


def test_wrong_memory():
    model = build_model("olmo2")
    with pytest.raises(InputError, match=r"does not fit into 0\.0 MB: .* it needs \d+\.\d MB"):
        plan_memory(model, resolve_targets(model), FisherLoss(), 4, 32, max_memory_gb=1e-6)
    with pytest.raises(InputError, match="layers_per_pass is 0"):
        plan_memory(model, resolve_targets(model), FisherLoss(), 4, 32, layers_per_pass=0)


def test_activation_estimate_is_what_autograd_keeps(rows):
    """The estimate from a few tokens against the memory that a full row really keeps."""
    model = build_model("llama", intermediate_size=400, hidden_size=240).requires_grad_(False)
    layers = resolve_targets(model)
    plan = plan_memory(model, layers, FisherLoss("gold"), rows=1, seq_len=48)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    loss = FisherLoss("gold")
    with CurvatureCapture(layers) as capture, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        capture.begin(None)
        next(iter(loss.draws(model, loss.prepare({"input_ids": torch.ones(1, 48).long()}), 16)))
    assert sum(kept.values()) <= plan.activation_bytes <= 1.6 * sum(kept.values())


def test_wrong_float16(rows):
    with pytest.raises(InputError, match="is in float16, whose gradients overflow"):
        collect_factors(build_model("olmo2").half(), batched(rows, 3))
