"""(d) Collection at the shape of OLMoE: 64 experts a block, 8 a token."""

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.collection import collecting, kinds_of_kernels, rates
from benchmarks.gpu.parts import Part, product_rate, random_model, random_rows
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning.architecture import read_architecture
from lightning_kfac.planning.cost import token_flops

PROJECTIONS = ("expert_gate", "expert_up", "expert_down")
SHAPE = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512}  # fmt: skip


def run(part: Part) -> None:
    """All steps."""
    limit = part.step("limit", lambda: product_rate(part, torch.bfloat16, 256 if part.small else 8192))
    model = random_model("olmoe", SMALL if part.small else SHAPE, part.device, torch.bfloat16)
    batch = random_rows(model.config.vocab_size, 4 if part.small else 32, 32 if part.small else 512, part.device)
    for name, blocks in {"last block": [-1], "last four blocks": [-4, -3, -2, -1][-len(model.model.layers) :]}.items():
        part.step(name, lambda blocks=blocks: measure(part, model, batch, blocks, limit or float("nan")))


def measure(part: Part, model: nn.Module, batch: dict, blocks: list[int], limit: float) -> dict[str, Any]:
    """Tokens a second, share of the limit, kinds of kernels."""
    paper = read_architecture(model)
    layers = resolve_targets(model, blocks, PROJECTIONS)
    flops = token_flops(paper, paper.select(layers), batch["input_ids"].shape[1])
    with collecting(model, batch, blocks, "sampled", PROJECTIONS) as (session, step):
        found = rates(part, batch, part.median(step), sum(flops), limit)
        found |= {"layers": len(layers), "plan": str(session.plan), "flops_per_token": flops._asdict()}
        return found | kinds_of_kernels(part, step)
