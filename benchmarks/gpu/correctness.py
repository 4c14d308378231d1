"""(a) Is what the GPU computes right?"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.parts import Part, error, random_model, random_rows
from benchmarks.recitation import by_generate
from lightning_kfac import EditConfig, KFACEditor, collect_factors
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.evaluation.recitation import recite
from lightning_kfac.math.covariance import SecondMoment
from lightning_kfac.math.loss import sample_labels, uniforms
from lightning_kfac.models.compiled import compiled_between
from lightning_kfac.models.loading import load_model

DENSE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 2048}  # fmt: skip
EXPERTS = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 2048}  # fmt: skip
OF_EXPERTS = ("expert_gate", "expert_up", "expert_down")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Float32 with float32 sums is right to 1e-6 on a CPU. In bfloat16 the model's own rounding is what is seen: there the
# GPU may be as far from float64 as twice the CPU is.
FLOAT32_ERROR = 1e-5


def run(part: Part) -> None:
    """All steps."""
    part.step("sum of products", lambda: sums(part))
    for name, dtype in DTYPES.items():
        part.step(f"dense {name}", lambda dtype=dtype: dense(part, dtype))
        part.step(f"experts {name}", lambda dtype=dtype: experts(part, dtype))
    if not part.small:  # compiling for a CPU takes a minute
        for name, dtype in DTYPES.items():
            part.step(f"compiled {name}", lambda dtype=dtype: compiled(part, dtype))
    part.step("sampled labels", lambda: labels(part))
    part.step("edit", lambda: edit(part))
    for name, dtype in DTYPES.items():
        part.step(f"recitation {name}", lambda dtype=dtype: recitation(part, dtype))


def sums(part: Part) -> dict[str, Any]:
    """X^T X of bfloat16 and float32 vectors over 70 batches, so that the second accumulator is used."""
    found: dict[str, Any] = {}
    for size in (64, 300, 640):
        for name, dtype in DTYPES.items():
            moment = SecondMoment(size, part.device)
            exact = torch.zeros(size, size, dtype=torch.float64)
            for seed in range(70):
                x = torch.randn(33, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
                moment.add(x.to(part.device))
                exact += x.double().T @ x.double()
            found[f"{size} {name}"] = error(moment.sum(), exact)
            found[f"{size} {name} trace"] = abs(float(moment.trace()) / float(exact.trace()) - 1)
    return found | {"right": max(found.values()) < 1e-6}


def dense(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """Factors of all projections against plain autograd in float64 on the CPU."""
    shape = DENSE | ({"num_hidden_layers": 2, "hidden_size": 64} if part.small else {})
    model = random_model("olmo2", shape, part.device, dtype)
    batch = ragged(model.config.vocab_size)
    exact = autograd_factors(model, batch)
    here = {name: value.to(part.device) for name, value in batch.items()}
    found = collect_factors(model, [here], labels="gold")
    gpu = worst(found, exact)
    on_cpu = worst(collect_factors(copy.deepcopy(model).cpu(), [batch], labels="gold"), exact)
    right = gpu < FLOAT32_ERROR if dtype == torch.float32 else gpu < 2 * on_cpu
    return {"layers": len(exact), "error": gpu, "error_on_cpu": on_cpu, "right": right}


def compiled(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """Factors of a model that is compiled between the tracked layers, beside those of the same model as it is."""
    model = random_model("olmo2", DENSE, part.device, dtype)
    batch = ragged(model.config.vocab_size)
    exact = autograd_factors(model, batch)
    here = {name: value.to(part.device) for name, value in batch.items()}
    plain = worst(collect_factors(model, [here], labels="gold"), exact)
    with compiled_between(model, list(exact)):
        found = worst(collect_factors(model, [here], labels="gold"), exact)
    return {"error": found, "error_not_compiled": plain, "right": found < max(FLOAT32_ERROR, 2 * plain)}


def experts(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """Factors of every expert against the CPU's, in float64 and in the dtype; a router's near ties may go elsewhere."""
    model = random_model("olmoe", EXPERTS | ({"hidden_size": 64} if part.small else {}), part.device, dtype)
    batch = random_rows(model.config.vocab_size, 6, 96, "cpu")
    here = {name: value.to(part.device) for name, value in batch.items()}
    found = collect_factors(model, [here], projections=OF_EXPERTS, labels="gold")
    wide = copy.deepcopy(model).cpu().double()
    wide.set_experts_implementation("eager")  # grouped products take no float64
    exact = collect_factors(wide, [batch], projections=OF_EXPERTS, labels="gold")
    on_cpu = collect_factors(copy.deepcopy(model).cpu(), [batch], projections=OF_EXPERTS, labels="gold")
    moved = max(abs(found[name].n_tokens - exact[name].n_tokens) for name in exact)
    gpu, cpu = worst(found, exact), worst(on_cpu, exact)
    right = gpu < FLOAT32_ERROR if dtype == torch.float32 else gpu < 2 * cpu
    return {"layers": len(exact), "error": gpu, "error_on_cpu": cpu, "tokens_elsewhere": moved, "right": right}


def ragged(vocabulary: int) -> dict[str, Tensor]:
    """Rows of 96, 60, 33 and 2 tokens, padded on either side."""
    batch = random_rows(vocabulary, 4, 96, "cpu")
    mask = torch.ones(4, 96, dtype=torch.int64)
    mask[1, 60:] = 0
    mask[2, :63] = 0
    mask[3, 2:] = 0
    return {"input_ids": batch["input_ids"], "attention_mask": mask}


def autograd_factors(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of gate, up and down by the definition: float64, gold labels, no code of ours."""
    model = copy.deepcopy(model).cpu().double().requires_grad_(True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str):
        def hook(layer, args, output):
            output.retain_grad()
            seen[name] = (args[0], output)

        return hook

    for name, layer in model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj")):
            layer.register_forward_hook(see(name))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    counts = (mask[:, :-1] * mask[:, 1:]).bool()
    F.cross_entropy(logits[:, :-1][counts], ids[:, 1:][counts], reduction="sum").backward()
    found = {}
    for name, (a, z) in seen.items():
        of_input, of_gradient = a[:, :-1][counts].detach(), z.grad[:, :-1][counts]
        found[name] = (of_input.T @ of_input / len(of_input), of_gradient.T @ of_gradient / len(of_input))
    return found


def worst(found: dict, exact: dict) -> float:
    """The largest error of a factor."""
    errors = []
    for name, reference in exact.items():
        A, G = reference if isinstance(reference, tuple) else (reference.A, reference.G)
        if A.any() and G.any():
            errors += [error(found[name].A, A), error(found[name].G, G)]
    return max(errors)


def labels(part: Part) -> dict[str, Any]:
    """Draws from the very same logits on both devices."""
    found = {}
    for name, dtype in DTYPES.items():
        for vocabulary in (2048, 2048 if part.small else 100352):
            logits = (3 * torch.randn(512, vocabulary, generator=torch.Generator().manual_seed(0))).to(dtype)
            u = uniforms(0, torch.arange(4), torch.arange(128).repeat(4, 1)).flatten()
            drawn = sample_labels(logits.to(part.device), u).cpu()
            found[f"{vocabulary} {name}"] = int((drawn != sample_labels(logits, u)).sum())
    return {"different": found, "right": not any(found.values())}


def edit(part: Part) -> dict[str, Any]:
    """An edit on the GPU against the same on the CPU, and back bit for bit."""
    model = load_model("demo", "float32").to(part.device)
    rows = random_rows(model.config.vocab_size, 8, 128, part.device)
    factors = collect_factors(model, [rows], blocks=[3, 4], projections=["gate", "up"], labels="gold")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    editor = KFACEditor(model, factors, EditConfig(rho=0.8))
    editor.apply()
    edited = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    editor.restore()
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    there = model.cpu()
    KFACEditor(there, factors, EditConfig(rho=0.8)).apply()
    apart = max(error(edited[f"{name}.weight"], there.state_dict()[f"{name}.weight"]) for name in factors)
    moved = max(error(edited[f"{name}.weight"], before[f"{name}.weight"]) for name in factors)
    right = same and apart < 1e-5
    return {"restored_bit_for_bit": same, "gpu_from_cpu": apart, "edited_from_unedited": moved, "right": right}


def recitation(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """Verdicts of one forward against transformers' generate; those that differ must be marked as near ties."""
    model = load_model("demo", "float32").to(part.device, dtype)
    found = {}
    for name in ("planted_report", "unseen"):
        sequences = load_memorized(f"demo:{name}.jsonl", None, model.config.vocab_size)
        rows = [[*s.prefix, *s.suffix] for s in sequences][: 5 if part.small else None]
        tokens = torch.tensor(rows, device=part.device)
        with torch.no_grad():
            generated = by_generate(model, tokens[:, :64], tokens[:, 64:])
        recitals = recite(model, [r[:64] for r in rows], [r[64:] for r in rows])
        different = [r for r, wanted in zip(recitals, generated, strict=True) if r.strict != wanted]
        found[name] = {
            "recited": sum(r.strict for r in recitals),
            "by_generate": sum(generated),
            "different": len(different),
            "of_them_near_ties": sum(r.near_tie for r in different),
        }
    return found | {"right": all(one["different"] == one["of_them_near_ties"] for one in found.values())}
