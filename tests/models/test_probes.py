"""What a model turns out to be when it is tried."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_kfac import collect_factors
from lightning_kfac.models.cached_rows import has_plain_cache
from lightning_kfac.models.probes import is_plain_head, takes_own_mask
from tests.common import TOLERANCE, batched, build_model, relative_error
from tests.oracle import one_row_factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen3", "gpt2"])
def test_models_that_bear_gaps_and_masks_are_known(family, dtype):
    model = build_model(family, dtype=dtype)
    assert has_plain_cache(model) and takes_own_mask(model)


def test_tracked_head_and_capped_logits_take_the_whole_logits(rows):
    model = build_model("llama", tie_word_embeddings=False)
    assert is_plain_head(model)
    found = collect_factors(model, batched(rows, 3), modules=["lm_head"], labels="gold")
    expected = one_row_factors(copy.deepcopy(model), ["lm_head"], rows, [row[1:] for row in rows])["lm_head"]
    assert relative_error(found["lm_head"].G, expected[1]) < TOLERANCE
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **settings)).eval()
    gemma.lm_head.weight.data.mul_(50)  # so that the cap matters
    assert not is_plain_head(gemma)
    found = collect_factors(gemma, batched(rows, 3), labels="gold")
    expected = one_row_factors(copy.deepcopy(gemma), list(found), rows, [row[1:] for row in rows])
    for name, (A, G, _) in expected.items():
        assert relative_error(found[name].A, A) < TOLERANCE and relative_error(found[name].G, G) < TOLERANCE
