"""Tiny models of many families, as transformers builds them from a config."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.common import COMMON
from tests.mixtures import MIXTURES, build_mixture

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

NARROW = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = NARROW | {"num_key_value_heads": 2}
NARROW_GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
GRANITE = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 40}
# Families with fused weights: model type, settings, and these weights.
FUSED = {
    "phi3": ("phi3", GROUPED, ["gate_up_proj", "qkv_proj"]),
    "glm": ("glm", GROUPED | {"head_dim": 6}, ["gate_up_proj"]),
    "glm4": ("glm4", GROUPED | {"head_dim": 6}, ["gate_up_proj"]),
    "granitemoeshared": ("granitemoeshared", GRANITE, ["input_linear"]),
    "gpt2": ("gpt2", NARROW_GPT, ["c_attn"]),
    "openai-gpt": ("openai-gpt", NARROW_GPT, ["c_attn"]),
    "gpt_bigcode": ("gpt_bigcode", NARROW_GPT | {"multi_query": True}, ["c_attn"]),
    "gpt_bigcode_heads": ("gpt_bigcode", NARROW_GPT | {"multi_query": False}, ["c_attn"]),
    "gpt_neox": ("gpt_neox", NARROW, ["query_key_value"]),
    "gpt_neox_japanese": ("gpt_neox_japanese", NARROW, ["query_key_value"]),
    "bloom": ("bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 4}, ["query_key_value"]),
    "persimmon": ("persimmon", NARROW | {"hidden_size": 32, "qk_layernorm": False}, ["query_key_value"]),
    "falcon": ("falcon", NARROW | {"new_decoder_architecture": True, "num_kv_heads": 2}, ["query_key_value"]),
    "falcon_multi_query": ("falcon", NARROW | {"multi_query": True}, ["query_key_value"]),
    "falcon_heads": ("falcon", NARROW | {"multi_query": False}, ["query_key_value"]),
    "codegen": ("codegen", NARROW_GPT | {"n_inner": None, "rotary_dim": 4}, ["qkv_proj"]),
    "mpt": ("mpt", {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, ["Wqkv"]),
    "dbrx": (
        "dbrx",
        {
            "d_model": 24,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 40},
        },
        ["Wqkv"],
    ),
    "modernbert-decoder": ("modernbert-decoder", NARROW | {"bos_token_id": 1, "sliding_window": 6}, ["Wi"]),
    "moshi": ("moshi", GROUPED | {"ffn_dim": 48, "head_dim": 6}, ["fc1"]),
    "minimax": (
        "minimax",
        GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 6},
        ["qkv_proj"],
    ),
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


def build_fused(name: str) -> nn.Module:
    """One of ``FUSED``, whose norms have random weights too."""
    kind, settings, _ = FUSED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(COMMON | settings))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if hasattr(config, "num_local_experts"):
            model.set_experts_implementation("eager")  # others know no float64
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 4, std=0.15)
    return model


# What every further family gets of these, if its config has such a field; and what some need besides.
ANY = IDS | LLAMA | GPT | BART | {
    "head_dim": 8,
    "num_layers": 2,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 6,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "o_lora_rank": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "shared_intermediate_size": 28,
    "dense_intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
}  # fmt: skip
LATENT = {"head_dim": 4, "num_key_value_heads": 4}  # rows of q have two parts, of which the config tells one
STARTED = {"bos_token_id": 1}
PER_LAYER = {
    "head_dim": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
# Settings beside ``ANY``; ``...`` leaves one of those out.
PARTICULAR = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT,
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "cwm": STARTED,
    "deepseek_v2": LATENT,
    "deepseek_v32": LATENT,
    "electra": {"embedding_size": 32},
    "emu3": {"text_config": STARTED},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": PER_LAYER},
    "gemma4_text": PER_LAYER,
    "gemma4_unified": {"text_config": PER_LAYER},
    "gemma4_unified_text": PER_LAYER,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": HYBRID | HEADS | {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minicpm3": LATENT,
    "mllama": {"text_config": STARTED},
    "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 1, "num_decoder_layers": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    "xlnet": {"max_position_embeddings": ...},
    "youtu": LATENT,
    "zamba": {"layer_types": ..., "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(kind: str) -> PretrainedConfig:
    """The config of a family with the sizes of ``ANY``, those of its parts too, and one block of each type of layer."""
    made = CONFIG_MAPPING[kind]
    return made(**_small(made, PARTICULAR.get(kind, {})))


def _small(made: type[PretrainedConfig], particular: dict) -> dict:
    plain = made()
    settings = {name: value for name, value in ANY.items() if _has(plain, name)}
    parts = {name: type(part) for name in made.sub_configs if (part := getattr(plain, name, None)) is not None}
    settings |= {name: _small(part, particular.get(name, {})) for name, part in parts.items()}
    if types := getattr(plain, "layer_types", None):
        kinds = list(dict.fromkeys(types))
        settings["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        settings["num_hidden_layers"] = len(settings["layer_types"])
    settings |= {name: value for name, value in particular.items() if name not in parts}
    return {name: value for name, value in settings.items() if value is not ...}


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a field that differs from block to block; the error is no AttributeError
        return False


def build_any(family: str) -> nn.Module:
    """A family of the tables above, of ``MIXTURES``, or any that transformers knows: a tiny float32 model."""
    if family in MIXTURES:
        return build_mixture(family)
    if family in FUSED:
        return build_fused(family)
    if family in FAMILIES or family in TWO_WAY:
        return build_family(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(family), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model
