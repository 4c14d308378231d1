"""What a capture keeps of the layers: whatever their inputs look like, and no more than needed."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import InputError, collect_factors
from lightning_kfac.collection.capture import CurvatureCapture
from lightning_kfac.models.targets import resolve_targets
from tests.common import TOLERANCE, assert_same, batched, build_model, padded, projections_of, relative_error
from tests.oracle import one_row_factors


def test_shared_inputs_are_accumulated_once(rows):
    model = build_model("llama")
    layers = resolve_targets(model, projections=("gate", "up", "down", "q", "k", "v", "o"))
    with CurvatureCapture(layers) as capture:
        model.requires_grad_(False)
        batch = padded(rows[:2])
        capture.begin(batch["attention_mask"].bool())
        model(**batch).logits.sum().backward()
    holders = {name.rpartition(".")[2] for name, sums in capture.sums.items() if sums.A is not None}
    assert holders == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    factors = capture.results()
    assert factors["model.layers.0.mlp.gate_proj"].A is factors["model.layers.0.mlp.up_proj"].A


def test_nothing_below_the_lowest_target_is_differentiated(rows):
    model = build_model("olmo2").requires_grad_(False)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, o, i=i: outputs.update({i: o if torch.is_tensor(o) else o[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    with CurvatureCapture(resolve_targets(model, [1], ["up"])) as capture:
        batch = padded(rows[:2])
        capture.begin(batch["attention_mask"].bool())
        loss = model(**batch).logits.sum()
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert [outputs[i].requires_grad for i in range(3)] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert capture.root.grad is None


def test_wrong_no_valid_token():
    model = build_model("olmo2")
    with pytest.raises(InputError, match="no valid token"):
        collect_factors(model, [{"input_ids": torch.ones(2, 1, dtype=torch.long)}])
    with pytest.raises(InputError, match="no valid token"):
        collect_factors(model, [])


def test_wrong_nan_names_the_layer(rows):
    model = build_model("olmo2")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"batch 0: the input of model\.layers\.1\.mlp\.down_proj"):
        collect_factors(model, batched(rows, 3))


def test_dense_batches_equal_masked_ones(any_model, rows):
    ids = torch.tensor([rows[0], rows[2], rows[5]])
    settings = {"projections": projections_of(any_model)}
    masked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert_same(
        collect_factors(any_model, [{"input_ids": ids}], **settings), collect_factors(any_model, [masked], **settings)
    )


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_models_that_flatten_or_write_in_place(family, rows):
    """OPT hands rows and positions to its MLP as one dimension; Falcon adds to outputs in place."""
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "pad_token_id": 0,
    }
    settings |= {"ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 64} if family == "opt" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    names = [r".*fc[12]"] if family == "opt" else [r".*mlp\.dense.*"]
    alone = collect_factors(model, [{"input_ids": torch.tensor([row])} for row in rows], modules=names, labels="gold")
    together = collect_factors(model, batched(rows, 3), modules=names, labels="gold")
    expected = one_row_factors(copy.deepcopy(model), list(alone), rows, [row[1:] for row in rows])
    assert_same(together, alone)
    for name, (A, G, n) in expected.items():
        assert alone[name].n_tokens == n
        assert relative_error(alone[name].A, A.reshape(len(A), -1)) < TOLERANCE
        assert relative_error(alone[name].G, G) < TOLERANCE
