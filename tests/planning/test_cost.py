"""The cost model against counters, allocations and files."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.scaling import counted_flops, modelled_flops, run_batches
from lightning_kfac import collect_factors
from lightning_kfac.collection import memory as run_time
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.factors.folder import save_factors
from lightning_kfac.math.covariance import accumulator_numbers
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import published_config, read_architecture
from tests.common import ARCHITECTURES, COMMON, build_model

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 16},
    "qwen2_moe": {  # with an expert that every token sees
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
}


FAMILIES = [*ARCHITECTURES, *EXPERTS]
T, BLOCKS = 20, 3
CHOICES = {
    "gate_up": ([1, 2], ["gate", "up"]),
    "up": ([1], ["up"]),
    "down": ([2], ["down"]),
    "all": ("all", ["gate", "up", "down"]),
    "attention": ([1, 2], ["q", "k", "v", "o"]),
    "o": ([0], ["o"]),
}


CASES = [(f, c) for f in FAMILIES for c in CHOICES]


def build(family, dtype=torch.float32, **changes):
    """A small model, of experts too."""
    if family in ARCHITECTURES:
        return build_model(family, dtype, **changes).requires_grad_(False)
    shape = {"hidden_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, **shape | EXPERTS[family] | COMMON | changes)
    config._experts_implementation = "eager"  # one product an expert, which a counter sees
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def choose(model, choice):
    """The layers of a choice, in the form that the family has them."""
    blocks, projections = CHOICES[choice]
    family = model.config.model_type
    if family == "gpt2" and "q" in projections:
        return resolve_targets(model, modules=[r".*\.[12]\.attn\.c_(attn|proj)"])
    if family == "gpt2":
        projections = [p for p in projections if p != "gate"]
    if family in EXPERTS:
        projections = [f"expert_{p}" if p in ("gate", "up", "down") else p for p in projections]
    return resolve_targets(model, blocks, projections)


@pytest.mark.parametrize(("family", "choice"), CASES)
def test_flops_are_those_that_torch_counts(family, choice):
    """Every matrix product of forward, backward and covariances, exactly; attention's own apart."""
    model = build(family)
    layers = choose(model, choice)
    products, _ = counted_flops(model, layers, rows=2, seq_len=T)
    assert products == modelled_flops(model, layers)


@pytest.mark.parametrize("choice", ["gate_up", "attention", "o"])
@pytest.mark.parametrize("family", ["olmo2", "llama", "qwen3", "gpt2"])
def test_flops_of_attention(family, choice):
    """Eager attention does the whole square: twice as much forward, and backward four products, not five halves."""
    model = build(family)
    model.set_attn_implementation("eager")
    layers, paper = choose(model, choice), read_architecture(model)
    counted, _ = counted_flops(model, layers, rows=2, seq_len=T)
    tracked = paper.select(layers)
    extra = cost.token_flops(paper, tracked, T), cost.token_flops(paper, tracked, 0)
    forward, backward = extra[0].forward - extra[1].forward, extra[0].backward - extra[1].backward
    assert backward > 0
    assert counted == sum(extra[1]) + 2 * forward + (4 * 2 / 2 / 2.5) * backward


def test_flops_at_full_size_are_those_of_the_design():
    """OLMo-2 7B: about 405 MFLOP forward a block; one triangle in 8 panels is 9/16 of G's 242 and A's 33.5 MFLOP."""
    module = skeleton(published_config("olmo2-7b"))
    paper = read_architecture(module)
    block = sum(product.flops for product in paper.products if product.block == 5)
    assert block == pytest.approx(405e6, rel=1e-3)
    tracked = paper.select(resolve_targets(module, [5], ["gate", "up"]))
    assert cost.covariance_flops(tracked) == pytest.approx((2 * 242.3e6 + 33.55e6) * 9 / 16, rel=1e-3)


def test_flops_of_an_edit():
    layer = cost.Product("", 12, 20, 0, 0)
    W, G, A = torch.ones(12, 20), torch.ones(12, 12), torch.ones(20, 20)
    counter = FlopCounterMode(display=False)
    with counter:
        G @ (G.T @ W @ A) @ A.T
    assert cost.edit_flops([layer]) == counter.get_total_flops()


def test_tracking_experts_costs_as_many_factors_as_there_are_experts():
    """As if every expert were an MLP of its own that sees k of E tokens."""
    model = build("mixtral")
    paper = read_architecture(model)
    experts = paper.select(resolve_targets(model, [1, 2], ["expert_gate", "expert_up", "expert_down"]))
    assert len(experts) == 2 * 3 * 4
    dense = [cost.Product(f"{b}{p}", *shape, b, stage) for b in (1, 2) for p, shape, stage in
             (("g", (40, 24), 2), ("u", (40, 24), 2), ("d", (24, 40), 3))]  # fmt: skip
    assert cost.accumulator_bytes(experts) == 4 * cost.accumulator_bytes(dense)
    assert cost.covariance_flops(experts) == 2 * cost.covariance_flops(dense)
    assert cost.eigen_flops(experts) == 4 * cost.eigen_flops(dense)
    assert cost.edit_flops(experts) == 4 * cost.edit_flops(dense)


def test_fused_rows_cost_less_than_the_whole():
    """Three G of a third of the size, and one A."""
    model = build("gpt2")
    paper = read_architecture(model)
    parts = paper.select(resolve_targets(model, [1], ["q", "k", "v"]))
    assert [(p.d_out, p.d_in) for p in parts] == [(24, 24)] * 3
    assert sorted(cost.matrix_sizes(parts)) == [24] * 4
    assert sorted(cost.matrix_sizes(paper.select(["transformer.h.1.attn.c_attn"]))) == [24, 72]


@pytest.fixture(scope="module")
def collected():
    """A model whose matrices have one, two and four panels, after enough batches for the second accumulators."""
    model = build("olmo2", hidden_size=256, intermediate_size=520)
    layers = resolve_targets(model, [0, 2], ["gate", "up", "down", "k"])
    return model, layers, run_batches(model, layers, 1, 4, batches=65)


def test_accumulators_are_as_large_as_modelled(collected):
    model, layers, capture = collected
    moments = [m for sums in capture.sums.values() for m in (sums.A, sums.G) if m is not None]
    panels = [panel for m in moments for panel in (*m._recent, *m._settled)]
    tracked = read_architecture(model).select(layers)
    assert cost.accumulator_bytes(tracked) == sum(panel.untyped_storage().nbytes() for panel in panels)
    assert cost.accumulator_bytes(tracked) == run_time._factor_bytes(
        layers, capture.leaders, list(layers), 1, coupled=False
    )
    # The second accumulator of a GPU is in host memory.
    assert cost.resident_bytes(tracked, "cpu") == cost.accumulator_bytes(tracked)
    assert cost.resident_bytes(tracked, "cuda") == sum(p.untyped_storage().nbytes() for m in moments for p in m._recent)


def test_coupled_factors_are_counted(collected, tmp_path):
    """Two more matrices a layer, of which nothing is shared: in memory, on the disk and in the products' arithmetic."""
    model, layers, _ = collected
    tracked = read_architecture(model).select(layers)
    coupled = [replace(product, coupled=True) for product in tracked]
    more = [size for layer in layers.values() for size in layer.shape]
    assert sorted(cost.factor_sizes(coupled)) == sorted([*cost.matrix_sizes(tracked), *more])
    assert cost.factor_sizes(tracked) == cost.matrix_sizes(tracked) == cost.matrix_sizes(coupled)
    leaders = {name: name for name in layers} | {n: n.replace("up", "gate") for n in layers if "up" in n}
    assert cost.accumulator_bytes(coupled) == run_time._factor_bytes(layers, leaders, list(layers), 1, coupled=True)
    assert cost.eigen_flops(coupled) == cost.eigen_flops(tracked)
    assert cost.covariance_flops(coupled) - cost.covariance_flops(tracked) == sum(map(accumulator_numbers, more))
    batch = {"input_ids": torch.ones(1, 9, dtype=torch.long)}
    factors = collect_factors(model, [batch], modules=[re.escape(name) for name in layers], coupled=True)
    save_factors(factors, tmp_path / "factors")
    real = sum(file.stat().st_size for file in (tmp_path / "factors").iterdir())
    assert cost.triangle_bytes(coupled) == pytest.approx(real, rel=0.01)


def test_what_ranks_send_is_as_large_as_modelled(collected):
    model, layers, capture = collected
    sent = []
    capture.reduce(lambda tensor: sent.append(tensor.nbytes) or tensor)
    counters = 8 * (len(layers) + 1)
    assert cost.triangle_bytes(read_architecture(model).select(layers)) == sum(sent) - counters


def test_a_factor_folder_is_as_large_as_modelled(collected, tmp_path):
    model, layers, capture = collected
    save_factors(capture.snapshot(lambda tensor: tensor), tmp_path / "factors")
    real = sum(file.stat().st_size for file in (tmp_path / "factors").iterdir())
    assert cost.triangle_bytes(read_architecture(model).select(layers)) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "choice"), [(f, c) for f, c in CASES if f != "qwen2_moe" and c in ("gate_up", "all", "attention")]
)
def test_activations_are_about_those_that_autograd_keeps(family, choice, dtype):
    """Against the probe of the run-time plan. Small terms (scales of norms, softmax's sums) are left out; LayerNorm
    keeps bfloat16 where RMSNorm keeps float32, so that GPT-2 gets up to a fifth too much; norms after the
    lowest tracked output are left out, so that OLMo-2 gets up to a ninth too little.
    """
    wide = {"n_embd": 128, "n_inner": 352} if family == "gpt2" else {"hidden_size": 128, "intermediate_size": 352}
    model = build(family, dtype, **wide)
    layers, paper = choose(model, choice), read_architecture(model)
    model.config._experts_implementation = "grouped_mm"
    probed, _ = run_time._try_out(model, layers, FisherLoss(), 8, 1)
    widest = max(max(layer.shape) for layer in layers.values())
    kept = probed - run_time.WIDEST_AT_ONCE * widest * dtype.itemsize
    assert 0.85 < cost.activation_bytes(paper, paper.select(layers), dtype.itemsize) / kept < 1.25


def test_the_busiest_rank_has_little_more_than_it_must():
    """Against every assignment; the greedy one is never more than 4/3 of the best (Graham, 1969)."""
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 3):
        costs = torch.randint(1, 50, (7,), generator=generator).tolist()
        loads = ([sum(c for c, r in zip(costs, owner, strict=True) if r == rank) for rank in range(ranks)]
                 for owner in itertools.product(range(ranks), repeat=len(costs)))  # fmt: skip
        best = min(map(max, loads))
        assert best <= cost.largest_share(costs, ranks) <= 4 / 3 * best
