"""The cost model against counters, allocations and files, and edit.py plan as a user runs it."""

import itertools
import shlex
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.scaling import counted_flops, modelled_flops, run_batches, tables
from lightning_kfac.cli.train import main as train
from lightning_kfac.collection import memory as run_time
from lightning_kfac.collection.collect import frozen
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.factors.folder import save_factors
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import SHAPES, published_config, read_architecture
from lightning_kfac.planning.hardware import HARDWARE
from lightning_kfac.planning.run import Job, fewest_devices, plan_run
from tests.common import ARCHITECTURES, COMMON, build_model, edit, failed
from tests.forks import ROOT

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
# Experts cannot be tracked.
CASES = [(f, c) for f in FAMILIES for c in CHOICES if f not in EXPERTS or c in ("attention", "o")]


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
    return resolve_targets(model, blocks, projections)


# -- FLOPs -----------------------------------------------------------------------------------------------------------


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
    paper = read_architecture(build("mixtral"))
    experts = cost.experts_apart(paper, [1, 2])
    dense = [cost.Product(f"{b}{p}", *shape, b, stage) for b in (1, 2) for p, shape, stage in
             (("g", (40, 24), 2), ("u", (40, 24), 2), ("d", (24, 40), 3))]  # fmt: skip
    assert cost.accumulator_bytes(experts) == 4 * cost.accumulator_bytes(dense)
    assert cost.covariance_flops(experts) == 2 * cost.covariance_flops(dense)
    assert cost.experts_apart(read_architecture(build("llama")), [1]) == []


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("olmo2-1b", 1.485), ("olmo2-7b", 7.299), ("llama3-8b", 8.030), ("qwen3-8b", 8.191), ("llama3-70b", 70.554),
     ("mixtral-8x7b", 46.703), ("olmoe-7b", 6.919)],
)  # fmt: skip
def test_published_shapes_have_the_published_number_of_parameters(shape, billions):
    module = skeleton(published_config(shape))
    paper = read_architecture(module)
    assert paper.parameters == sum(p.numel() for p in module.parameters())
    assert paper.parameters == pytest.approx(billions * 1e9, rel=1e-3)
    assert paper.root_parameters + paper.blocks * paper.block_parameters == paper.parameters


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
    assert cost.accumulator_bytes(tracked) == run_time._factor_bytes(layers, capture.leaders, list(layers))


def test_what_ranks_send_is_as_large_as_modelled(collected):
    model, layers, capture = collected
    sent = []
    capture.reduce(lambda tensor: sent.append(tensor.nbytes) or tensor)
    counters = 8 * len(layers)
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


# -- ranks -----------------------------------------------------------------------------------------------------------


def test_the_busiest_rank_has_little_more_than_it_must():
    """Against every assignment; the greedy one is never more than 4/3 of the best (Graham, 1969)."""
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 3):
        costs = torch.randint(1, 50, (7,), generator=generator).tolist()
        loads = ([sum(c for c, r in zip(costs, owner, strict=True) if r == rank) for rank in range(ranks)]
                 for owner in itertools.product(range(ranks), repeat=len(costs)))  # fmt: skip
        best = min(map(max, loads))
        assert best <= cost.largest_share(costs, ranks) <= 4 / 3 * best


@pytest.fixture(scope="module")
def seven():
    """OLMo-2 7B, all blocks."""
    module = skeleton(published_config("olmo2-7b"))
    paper = read_architecture(module)
    return paper, Job(tuple(paper.select(resolve_targets(module, "all", ["gate", "up", "down"]))), 20_000_000)


def test_sharded_factors_halve_on_two_ranks(seven):
    big = HARDWARE["h200"]
    whole, half = (plan_run(*seven, big, 2, 2, strategy) for strategy in ("ddp", "fsdp"))
    assert len(whole.passes) == len(half.passes) == 1
    assert half.memory["accumulators"] <= 0.55 * whole.memory["accumulators"]
    outside = 2 * seven[0].root_parameters  # embedding and head, in bfloat16, are whole on every rank
    assert half.memory["weights"] == outside + (whole.memory["weights"] - outside) / 2


def test_time_is_work_over_rates(seven):
    """The paper's job on 16 GPUs, by hand."""
    paper, job = seven
    few = tuple(p for p in job.tracked if p.block in (23, 24, 25) and p.stage == cost.GATE_UP)
    job = Job(few, 1_000_000, seq_len=512, rows=8)
    h100 = HARDWARE["h100"]
    ddp, fsdp = (plan_run(paper, job, h100, 16, 8, strategy) for strategy in ("ddp", "fsdp"))
    steps = 16  # of 16 x 4096 tokens, the last one not full
    assert ddp.steps == fsdp.steps == steps
    rate = 989e12 * 0.4
    block = 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 4096 * 512
    assert ddp.seconds["forward"] == pytest.approx(steps * 4096 * (32 * block + 2 * 4096 * 100352) / rate, rel=1e-6)
    triangles = 4 * (6 * 11008 * 11009 + 3 * 4096 * 4097) // 2
    link = 8 * 50e9 * 0.8  # the node's adapters, slower than NVLink
    assert ddp.seconds["communication"] == pytest.approx(2 * triangles * 15 / 16 / link)
    # All blocks, and again from block 23 up; panels as far down as the diagonal: 9 sixteenths of a square.
    gathered = 2 * (paper.parameters - paper.root_parameters) * (32 + 9) / 32 * 15 / 16
    panels = 4 * (6 * 11008**2 + 3 * 4096**2) * 9 / 16
    assert fsdp.seconds["communication"] == pytest.approx(steps * (gathered + panels) / link)
    group = 9 * (2 * 11008**3 + 4096**3)  # three groups, one a rank
    assert ddp.seconds["eigenbases"] == pytest.approx(group / (0.02 * 67e12))
    assert ddp.disk["resume states"] == 16 * fsdp.disk["resume states"] == 16 * 2 * cost.accumulator_bytes(few)


def test_host_memory_of_a_node(seven):
    """By hand: a shared A once; under fsdp three groups (gate and up of a block) on 16 ranks, at most one each."""
    paper, job = seven
    few = replace(job, tracked=tuple(p for p in job.tracked if p.block in (23, 24, 25) and p.stage == cost.GATE_UP))
    h200, weights = HARDWARE["h200"], 2 * paper.parameters
    group = 4 * (2 * 11008**2 + 4096**2)
    everything = 32 * (group + 4 * (4096**2 + 11008**2))
    assert everything > weights > 3 * group
    assert plan_run(paper, few, h200, 1, 1).host_memory == weights
    assert plan_run(paper, job, h200, 1, 1).host_memory == everything
    assert plan_run(paper, few, h200, 16, 8, "ddp").host_memory == 8 * weights
    assert plan_run(paper, job, h200, 16, 8, "ddp").host_memory == 8 * everything
    assert plan_run(paper, few, h200, 16, 2, "fsdp").host_memory == weights + 2 * group
    assert plan_run(paper, few, h200, 8, 8, "fsdp").host_memory == weights + 3 * group


def test_a_cap_and_fixed_passes_are_planned(seven):
    """The accumulators of a cap of 30 GB stay below it; the edit may use what it could before."""
    paper, job = seven
    free, capped, fixed = (
        plan_run(paper, replace(job, **changes), HARDWARE["h200"], 1, 1)
        for changes in ({}, {"most_memory": 30e9}, {"layers_per_pass": 5})
    )
    assert len(free.passes) == 1 and len(capped.passes) > 1 and capped.fits
    assert 0.5 * 30e9 < sum(capped.memory.values()) - capped.memory["weights"] <= 30e9
    assert capped.edit_capacity == free.edit_capacity == free.capacity > capped.capacity
    assert [len(names) for names in fixed.passes] == [5] * 19 + [1]
    assert not plan_run(paper, replace(job, most_memory=1e9), HARDWARE["h200"], 1, 1).fits


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("collect: {layers_per_pass: 3}", "6 passes"),
        ("collect: {max_memory_gb: 0.01}", "does not fit"),
        ("data: {max_tokens: 9}\nmodel: {model_name: demo, mc_samples: 2}", "not in this plan: model.mc_samples"),
        ("collect: {moments: token, shard_factors: true}", "not in this plan: collect.moments, collect.shard_factors"),
        ("data: {max_tokens: 9, domains: {other: embedded}}", "not in this plan: data.domains"),
        ("collect: {moments: null, shard_factors: false}\nmodel: {model_name: demo, mc_samples: 1}", "fits yes"),
    ],
)
def test_settings_of_a_config_are_planned_or_named(text, said, tmp_path, capsys):
    sections = {"model": {"model_name": "demo"}, "data": {"max_tokens": 9}} | yaml.safe_load(text)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sections))
    edit("plan", train_config=tmp_path / "a.yaml", hardware="cpu")
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert ("not in this plan" in out) == ("not in this plan" in said)


def test_a_batch_has_no_more_rows_than_the_text(seven):
    """20 million tokens are 39,063 rows of 512, 4,883 a rank, however large the batch."""
    paper, job = seven
    short, long = (plan_run(paper, replace(job, rows=rows), HARDWARE["h200"], 8, 8, "ddp") for rows in (4883, 10**6))
    assert long.steps == short.steps == -(-4883 // short.rows_at_once)
    assert long.seconds == short.seconds and long.memory == short.memory
    forward = cost.token_flops(paper, job.tracked, 512).forward * 20e6 / 8
    assert long.seconds["forward"] == pytest.approx(forward / (989e12 * 0.4), rel=1e-3)  # the last row is not full


def test_passes_are_cut_where_memory_ends(seven):
    paper, job = seven
    plan = plan_run(paper, job, HARDWARE["h100"], 1, 1)
    assert len(plan.passes) == 2 and plan.fits
    assert [name for names in plan.passes for name in names] == [p.name for p in job.tracked]
    one = plan_run(paper, job, HARDWARE["h200"], 1, 1)
    assert len(one.passes) == 1 and plan.flops.forward == 2 * one.flops.forward
    assert plan.flops.covariance == pytest.approx(one.flops.covariance, rel=0.01)


@pytest.mark.parametrize(("gigabytes", "passes"), [(1, 1), (0.12, 1), (0.08, 2), (0.073, 3)])
def test_plans_on_paper_cut_as_the_run_does(demo_model, gigabytes, passes):
    """The same passes and accumulators as the plan at run time in the same memory; activations within a twentieth."""
    layers, paper = resolve_targets(demo_model), read_architecture(demo_model)
    with frozen(demo_model):
        run = run_time.plan_memory(demo_model, layers, FisherLoss(), 16, 64, max_memory_gb=gigabytes)
    job = Job(tuple(paper.select(layers)), 10_000, seq_len=64, rows=16, element=4)
    room = 4 * paper.parameters + gigabytes * 1e9 / run_time.USABLE
    planned = plan_run(paper, job, replace(HARDWARE["cpu"], memory=room), 1, 1)
    assert planned.passes == run.passes and len(run.passes) == passes
    assert planned.memory["accumulators"] == run.factor_bytes
    assert planned.memory["logits"] == run.head_bytes
    rows = planned.memory["activations"] / planned.rows_at_once, run.activation_bytes / run.rows_at_once
    assert rows[0] == pytest.approx(rows[1], rel=0.05)
    assert planned.rows_at_once == run.rows_at_once


def test_the_fewest_devices_fit_and_half_of_them_do_not():
    module = skeleton(published_config("llama3-70b"))
    paper = read_architecture(module)
    job = Job(tuple(paper.select(resolve_targets(module, [57], ["gate", "up"]))), 1_000_000)
    found = fewest_devices(paper, job, HARDWARE["h100"])
    assert found == 4
    assert plan_run(paper, job, HARDWARE["h100"], found, 8).fits
    assert not plan_run(paper, job, HARDWARE["h100"], found // 2, 8).fits


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quickstart", "olmo2_1b", "olmo2_7b", "llama3_8b", "qwen3_8b"])
def test_shipped_configs_can_be_planned_without_a_network(name, capsys):
    edit("plan", train_config=ROOT / "configs" / f"{name}.yaml", devices=2)
    out = " ".join(capsys.readouterr().out.split())
    assert f"train.py fit --config {ROOT}/configs/{name}.yaml --trainer.devices 2 --trainer.strategy ddp" in out
    assert "fits yes" in out and "Computed, not measured" in out


def test_a_plan_says_everything(capsys):
    options = {"blocks": "[57, 58, 59]", "projections": "[gate, up]", "devices": 8, "nodes": 8}
    edit("plan", shape="llama3-70b", tokens=20_000_000, **options)
    out = " ".join(capsys.readouterr().out.split())
    for part in ("70.55 billion parameters, 6 projections, 20,000,000 tokens, on 64 x h100 on 8 nodes", "accumulators",
                 "gathered weights", "fits yes", "1 pass, 77 steps each", "communication in the collection",
                 "eigenbases", "resume states", "host memory of one node 1",
                 "fsdp: weights and factors sharded", "On each node:"):  # fmt: skip
        assert part in out, part
    assert (
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 --rdzv-id collect "
        "train.py fit --model.model_name meta-llama/Llama-3.1-70B --data.corpus TEXT --data.max_tokens 20000000 "
        "--collect.blocks '[57, 58, 59]' --collect.projections '[gate, up]' --model.dtype bfloat16 --trainer.devices 8 "
        "--trainer.num_nodes 8 --trainer.strategy fsdp"
    ) in out


def test_what_does_not_fit_says_what_would(capsys):
    edit("plan", shape="llama3-70b", tokens=1000, blocks="[57]", strategy="ddp", devices=8)
    out = capsys.readouterr().out
    assert "does not fit" in out and "with --strategy auto it fits on 4 of these devices" in out
    assert "(only powers of two were tried)" in " ".join(out.split())
    assert "train.py fit" not in out
    edit("plan", shape="llama3-70b", tokens=1000, blocks="[57]", memory_gb=2)
    assert "4,096 of these devices are too few" in capsys.readouterr().out


def test_experts_are_not_tracked_and_the_plan_says_so(capsys):
    edit("plan", shape="olmoe-7b", tokens=1000)
    out = " ".join(capsys.readouterr().out.split())
    assert "64 projections" in out and "--collect.projections '[q, k, v, o]'" in out
    # 16 blocks of 64 experts: two G of 1024, a G and an A of 2048, an A of 1024, in 4 panels
    gigabytes = 16 * 64 * (3 * 1024**2 + 2 * 2048**2) * 2 * 0.625 * 4 / 1e9
    assert f"{gigabytes:.1f} GB of accumulators" in out


@pytest.mark.parametrize("dtype", [None, "auto", "float32"])
@pytest.mark.parametrize("name", ["shape", "model", "config"])
def test_a_dtype_that_was_assumed_is_in_the_command(name, dtype, tmp_path, capsys):
    """Nothing asks the checkpoint of a published name, so train.py has to be told what the plan counts with."""
    hub, options = "allenai/OLMo-2-0425-1B", {"tokens": 1000} | ({"dtype": dtype} if dtype else {})
    (tmp_path / "a.yaml").write_text(f"model: {{model_name: {hub}, dtype: auto}}")
    edit("plan", **options, **{"shape": {"shape": "olmo2-1b"}, "model": {"model": hub},
                               "config": {"train_config": tmp_path / "a.yaml"}}[name])  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    said = "float32" if dtype == "float32" else "bfloat16"
    assert out.count("--model.dtype") == 1 and f"--model.dtype {said}" in out
    assert f"weights {5.94 if said == 'float32' else 2.97:.1f} GB" in out


def test_options_override_the_config_and_the_hardware(capsys):
    edit("plan", train_config=ROOT / "configs" / "quickstart.yaml", tokens=1000, dtype="bfloat16", hardware="cpu",
         memory_gb=1, efficiency=1, peak_tflops=1, link_gb=1, network_gb=1)  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "1,000 tokens" in out and "weights 3.7 MB" in out
    assert "--data.max_tokens 1000 --model.dtype bfloat16 --trainer.devices 1 --trainer.accelerator cpu" in out


def test_the_printed_command_is_one_that_train_takes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    edit("plan", train_config="configs/quickstart.yaml", tokens=1000, blocks="[2, 3]", projections="[up]")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "train.py fit" in line)
    words = shlex.split(line)[1:]
    assert words[:2] == ["train.py", "fit"]
    with pytest.raises(SystemExit) as stopped:
        train([*words[1:], "--print_config"])
    assert not stopped.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["max_tokens"] == 1000 and config["collect"]["blocks"] == [2, 3]
    assert config["collect"]["projections"] == ["up"] and str(config["trainer"]["devices"]) == "1"


def test_wrong_plans_are_one_line(tmp_path, capsys):
    good = {"shape": "olmo2-1b", "tokens": 1000}
    for changes, said in (
        ({"shape": "olmo3"}, "choose from olmo2-1b"),
        ({"model": "demo"}, "one of --train_config, --model or --shape"),
        ({"hardware": "abacus"}, "choose from a100"),
        ({"tokens": 0}, "--tokens must be"),
        ({"seq_len": -1}, "--seq_len must be"),
        ({"devices": 0}, "--devices is 0"),
        ({"nodes": -2}, "--nodes is -2"),
        ({"strategy": "fsdp"}, "needs several devices"),
        ({"strategy": "tp"}, "strategy"),
        ({"efficiency": 1.5}, "--efficiency is 1.5"),
        ({"memory_gb": 0}, "--memory_gb is 0"),
        ({"peak_tflops": ".nan"}, "--peak_tflops is nan"),
        ({"blocks": "[99]"}, "block 99 does not exist"),
        ({"projections": "[gat]"}, "unknown projection 'gat'"),
        ({"modules": "[lm_head]"}, "leave it out of --modules"),
        ({"shape": "mixtral-8x7b", "projections": "[gate]"}, "3-D parameter, which cannot be tracked"),
    ):
        assert said in failed(capsys, "plan", **good | changes), changes
    assert "say which model" in failed(capsys, "plan", tokens=1)
    assert "--tokens must be" in failed(capsys, "plan", shape="olmo2-1b")
    assert "no such folder" in failed(capsys, "plan", model="./nowhere", tokens=1)
    for text, said in (
        ("model: [", "not valid YAML"),
        ("data: {}", "no section `model`"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncrystallize: {}", "plan is for collections"),
        ("model: {model_name: demo, training: {lr: 1}}\ndata: {max_tokens: 5}", "plan is for collections"),
        ("model: {model_name: demo, dtype: int8}\ndata: {max_tokens: 5}", "model.dtype is 'int8'"),
        ("model: {model_name: 3}\ndata: {max_tokens: 5}", "model_name must be a text"),
        ("model: {architecture: {model_type: nonsense}}\ndata: {max_tokens: 5}", "architecture"),
        ("model: {architecture: {model_type: olmo2, hidden_size: many}}\ndata: {max_tokens: 5}", "hidden_size"),
        ("model: {architecture: {model_type: olmo2, hidden_size: -4}}\ndata: {max_tokens: 5}", "no causal language"),
        ("model: {architecture: {model_type: t5}}\ndata: {max_tokens: 5}", "no causal language"),
        ("model: {architecture: {model_type: mamba}}\ndata: {max_tokens: 5}", "not a decoder of blocks"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {blocks: 3}", "--blocks must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {projections: up}", "--projections must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: many}", "--tokens must be"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {max_memory_gb: -1}", "max_memory_gb is -1"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {layers_per_pass: 0}", "must be at least 1"),
        ("model: {model_name: demo}\ndata: {max_tokens: 5}\ncollect: {layers_per_pass: x}", "a whole number"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert said in failed(capsys, "plan", train_config=path), text
    assert "cannot be read" in failed(capsys, "plan", train_config=tmp_path)
    deep = tmp_path / "deep.txt"
    deep.write_text("[" * 100_000)
    assert "nested too deeply" in failed(capsys, "plan", train_config=deep)


# -- docs/scaling.md -------------------------------------------------------------------------------------------------


def test_the_tables_in_the_docs_are_what_the_code_says_now():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert tables() in text, "paste what `python -m benchmarks.scaling` prints into docs/scaling.md"
    assert all(hub in text for hub, _ in (SHAPES[name] for name in ("olmo2-1b", "olmo2-7b", "llama3-70b")))
