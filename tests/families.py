"""Tiny models of many families, as transformers builds them from a config."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
IDS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PLACES = {"max_position_embeddings": 96}
LLAMA = PLAIN | PLACES | {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
BERT = PLAIN | PLACES | {"is_decoder": True, "pad_token_id": 1}
BART = PLACES | {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "forced_eos_token_id": None,
    "pad_token_id": 2,
}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2, "conv_kernel": 4}
HYBRID = {"mamba_d_state": 8, "mamba_d_conv": 2, "mamba_expand": 2}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

# Family -> settings beside IDS. A family's name is its ``model_type`` up to a space.
FAMILIES = {
    "llama": LLAMA,
    "olmo2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neox": PLAIN | PLACES,
    "gpt_neo": PLACES
    | {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "opt": PLAIN | PLACES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": PLAIN | PLACES,
    "xglm": PLACES | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "ctrl": GPT | {"dff": 48},
    "openai-gpt": GPT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 96, "expansion_ratio": 2},
    "falcon alibi": PLAIN | PLACES | {"alibi": True, "parallel_attn": False, "multi_query": False},
    "mistral": LLAMA | {"sliding_window": 6},
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "roberta": BERT,
    "camembert": BERT,
    "xlm-roberta": BERT,
    "xlm-roberta-xl": BERT,
    "data2vec-text": BERT,
    "xmod": BERT | {"languages": ["en"], "default_language": "en"},
    "bert": BERT,
    "roformer": BERT | {"embedding_size": 32, "rotary_value": True},
    "bart": BART,
    "mbart": BART,
    "pegasus": BART,
    "marian": BART | {"decoder_vocab_size": VOCABULARY},
    "plbart": BART,
    "blenderbot": BART,
    "trocr": BART,
    "xlm": PLACES | {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "causal": True, "pad_index": 2, "n_langs": 1},
    "xlnet one-way": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "attn_type": "uni"},
    "recurrent_gemma": PLAIN
    | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6, "num_key_value_heads": 1, "head_dim": 8},
    "rwkv": PLAIN | {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2},
    "mamba": STATE,
    "mamba2": STATE | {"head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": STATE,
    "jamba": LLAMA
    | HYBRID
    | {
        "num_hidden_layers": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "bamba": LLAMA | HYBRID | HEADS | {"attn_layer_indices": [1]},
    "zamba2": LLAMA
    | {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_d_state": 8,
        "mamba_d_conv": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
    "falcon_h1": LLAMA | HYBRID | HEADS | {"mamba_d_ssm": 64},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
# Families that see what comes behind a token, and are refused.
TWO_WAY = {
    "bert encoder": BERT | {"is_decoder": False},
    "roberta encoder": BERT | {"is_decoder": False},
    "xlm two-way": FAMILIES["xlm"] | {"causal": False},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
}


def build_family(name: str, std: float | None = 0.15) -> nn.Module:
    """A tiny float32 model in eval mode; ``std`` of its matrices, None for the family's own initial weights."""
    config = AutoConfig.for_model(name.split()[0], **(IDS | (FAMILIES | TWO_WAY)[name]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2 and std is not None:
                nn.init.normal_(parameter, std=std)
    return model
