"""Plans of whole runs, by hand and against the plan at run time."""

from dataclasses import replace

import pytest

from lightning_kfac.collection import memory as run_time
from lightning_kfac.collection.collect import frozen
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.models.loading import skeleton
from lightning_kfac.models.targets import resolve_targets
from lightning_kfac.planning import cost
from lightning_kfac.planning.architecture import published_config, read_architecture
from lightning_kfac.planning.hardware import HARDWARE
from lightning_kfac.planning.run import Job, fewest_devices, plan_run


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
    assert ddp.seconds["eigenbases"] == pytest.approx(group / 10e12)
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
    plan = plan_run(paper, job, replace(HARDWARE["h100"], memory=48e9), 1, 1)
    assert len(plan.passes) == 2 and plan.fits
    assert [name for names in plan.passes for name in names] == [p.name for p in job.tracked]
    one = plan_run(paper, job, HARDWARE["h100"], 1, 1)
    assert len(one.passes) == 1 and plan.flops.forward == 2 * one.flops.forward
    assert plan.flops.covariance == pytest.approx(one.flops.covariance, rel=0.01)


@pytest.mark.parametrize(("gigabytes", "passes"), [(1, 1), (0.06, 1), (0.045, 2), (0.038, 3)])
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
