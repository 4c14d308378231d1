"""A few published architectures, for plans without a network."""

from typing import Any

# By a short name: the model on the hub and what its config.json says.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2-1b": (
        "allenai/OLMo-2-0425-1B",
        {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352},
    ),
    "olmo2-7b": (
        "allenai/OLMo-2-1124-7B",
        {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352},
    ),
    "llama3-8b": (
        "meta-llama/Llama-3.1-8B",
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "qwen3-8b": (
        "Qwen/Qwen3-8B-Base",
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    ),
    "llama3-70b": (
        "meta-llama/Llama-3.1-70B",
        {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
         "num_experts_per_tok": 2},
    ),
    "olmoe-7b": (
        "allenai/OLMoE-1B-7B-0924",
        {"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64,
         "num_experts_per_tok": 8},
    ),
}  # fmt: skip
