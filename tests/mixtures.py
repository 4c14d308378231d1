"""Small mixtures of experts, and the same models with one ``nn.Linear`` an expert, run one position at a time."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 61
E = 4
K = 2
COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": E, "num_experts_per_tok": K}
ROUTED = {"n_routed_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
# Settings, and the blocks that have experts.
MIXTURES = {
    "olmoe": (EXPERTS, [0, 1]),
    "qwen3_moe": (EXPERTS | {"moe_intermediate_size": 20, "head_dim": 8}, [0, 1]),
    "qwen2_moe": (EXPERTS | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28}, [0, 1]),
    "mixtral": (LOCAL, [0, 1]),
    "gpt_oss": (LOCAL | {"head_dim": 8}, [0, 1]),  # transposed, gate and up alternate, biases
    "deepseek_v3": (ROUTED | LATENT | {"first_k_dense_replace": 1}, [1]),  # a dense block first
    "granitemoe": (LOCAL, [0, 1]),
    "phimoe": (LOCAL, [0, 1]),
    "llama4_text": (  # transposed; each expert gets all positions, zero where not routed to it
        LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "head_dim": 8},
        [0, 1],
    ),
    "nemotron_h": (  # no gate
        ROUTED
        | {
            "layers_block_type": ["attention", "moe"],
            "moe_latent_size": None,
            "moe_shared_expert_intermediate_size": 28,
        },
        [1],
    ),
    "longcat_flash": (  # two more experts, without weights
        ROUTED
        | LATENT
        | {"num_layers": 2, "head_dim": 4, "expert_ffn_hidden_size": 20, "moe_topk": 2, "zero_expert_num": 2},
        [0, 1],
    ),
}
PROJECTIONS = ("expert_gate", "expert_up", "expert_down")


def build_mixture(family, **changes):
    settings = COMMON | MIXTURES[family][0] | changes
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    torch.set_rng_state(state)
    return model


def projections(family):
    return PROJECTIONS[1:] if family == "nemotron_h" else PROJECTIONS


class LinearExperts(nn.Module):
    """The experts of a module as ``nn.Linear``, called for one position after another."""

    def __init__(self, experts):
        super().__init__()
        self.kind = type(experts).__name__
        self.act_fn = getattr(experts, "act_fn", None)
        self.settings = {name: getattr(experts, name) for name in ("alpha", "limit") if hasattr(experts, name)}
        self.gate, self.up, self.down = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        transposed = self.kind in ("GptOssExperts", "Llama4TextExperts")
        for e in range(len(experts.down_proj)):
            first = (experts.up_proj if self.kind == "NemotronHExperts" else experts.gate_up_proj)[e].detach()
            down = experts.down_proj[e].detach()
            if transposed:
                first, down = first.T, down.T
            bias = experts.gate_up_proj_bias[e].detach() if hasattr(experts, "gate_up_proj_bias") else None
            if self.kind == "GptOssExperts":
                rows = [slice(0, None, 2), slice(1, None, 2)]
            elif self.kind == "NemotronHExperts":
                rows = [slice(0, 0), slice(None)]
            else:
                half = len(first) // 2
                rows = [slice(0, half), slice(half, None)]
            for where, r in zip((self.gate, self.up), rows, strict=True):
                where.append(linear(first[r], None if bias is None else bias[r]))
            down_bias = experts.down_proj_bias[e].detach() if hasattr(experts, "down_proj_bias") else None
            self.down.append(linear(down, down_bias))

    def expert(self, e, x):
        if e >= len(self.down):
            return x
        gate, up = self.gate[e](x), self.up[e](x)
        if self.kind == "NemotronHExperts":
            middle = self.act_fn(up)
        elif self.kind == "GptOssExperts":
            gate = gate.clamp(max=self.settings["limit"])
            up = up.clamp(-self.settings["limit"], self.settings["limit"])
            middle = (up + 1) * gate * torch.sigmoid(gate * self.settings["alpha"])
        else:
            middle = self.act_fn(gate) * up
        return self.down[e](middle)

    def forward(self, hidden, indices=None, weights=None):
        if indices is None:  # Llama 4
            parts = hidden.view(len(self.down), -1, hidden.shape[-1])
            found = []
            for e, part in enumerate(parts):
                for self.position, x in enumerate(part):
                    found.append(self.expert(e, x) if x.any() else torch.zeros_like(x))
            return torch.stack(found)
        rows = []
        for self.position, (x, chosen, shares) in enumerate(zip(hidden, indices.tolist(), weights, strict=True)):
            rows.append(sum(self.expert(e, x) * share for e, share in zip(chosen, shares, strict=True)))
        return torch.stack(rows)


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def with_linear_experts(model):
    """Puts ``LinearExperts`` in place of a model's experts; the name of each module of experts -> its module."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(".experts") and hasattr(module, "down_proj")
    }
    made = {}
    for name, experts in found.items():
        parent, _, leaf = name.rpartition(".")
        made[name] = LinearExperts(experts)
        setattr(model.get_submodule(parent), leaf, made[name])
    return made


def expert_pairs(model, rows):
    """(a, g) of every position that came to each expert's projections, by plain autograd in float64, row by row.

    A row's last position has no next token, and is left out. The loss has the text's own next tokens as labels.
    Keys are those of the design.
    """
    model = model.double()
    experts = with_linear_experts(model)
    seen = {}
    for name, module in experts.items():
        gated = module.kind != "NemotronHExperts"
        for e in range(len(module.down)):
            places = {f"{name}.down_proj.{e}": module.down[e]}
            if gated:
                places |= {f"{name}.gate_up_proj.{e}.gate": module.gate[e], f"{name}.gate_up_proj.{e}.up": module.up[e]}
            else:
                places[f"{name}.up_proj.{e}"] = module.up[e]
            for key, layer in places.items():
                seen[key] = []

                def remember(layer, args, output, key=key, module=module):
                    output.retain_grad()
                    seen[key].append((module.position, args[0].detach(), output))

                layer.register_forward_hook(remember)
    found = {key: [] for key in seen}
    for row in rows:
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        loss = -logits[:-1].log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum()
        loss.backward()
        for key, pairs in seen.items():
            found[key] += [(a, z.grad) for position, a, z in pairs if position < len(row) - 1]
            pairs.clear()
    return found


def expert_factors(model, rows):
    """A, G and count of every expert's projections, see ``expert_pairs``."""
    factors = {}
    for key, pairs in expert_pairs(model, rows).items():
        A = sum((torch.outer(a, a) for a, _ in pairs), torch.zeros(()))
        G = sum((torch.outer(g, g) for _, g in pairs), torch.zeros(()))
        factors[key] = A, G, len(pairs)
    return factors
