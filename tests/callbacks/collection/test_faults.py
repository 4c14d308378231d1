"""Runs that are killed, stopped, starved of disk or of a rank, and what is left: for real, in processes."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from lightning_kfac import load_factors
from lightning_kfac.callbacks.collection.state_writer import steps
from tests.callbacks.collection.common import kill_and_go_on, look_at_ruins, options, outcome
from tests.forks import ROOT, Run, free_port


@pytest.mark.parametrize("chain", range(5))
def test_kills_anywhere_change_no_bit(forks, texts, whole, tmp_path, chain):
    """Three kills a run: the first spread evenly over all that a run does, the others where chance will have them."""
    reference, events, _ = whole
    chance = random.Random(chain)
    kills = [10 + (2 * chain + 1) * (events - 10) // 10, chance.randrange(5, 80), chance.randrange(5, 80)]
    deaths, _ = kill_and_go_on(forks, options(texts, tmp_path / "run"), tmp_path / "run", tmp_path, kills, reference)
    assert deaths == 3
    assert outcome(tmp_path / "run") == reference
    assert not (tmp_path / "run" / "state").exists() and not list((tmp_path / "run").glob("*.part*"))


@pytest.mark.parametrize("kill_at", [12, 17])
def test_a_kill_before_the_first_batch_leaves_a_folder_that_can_be_used(forks, texts, whole, tmp_path, kill_at):
    """With TensorBoard, whose files Lightning opens early."""
    args, how = options(texts, tmp_path / "run", **{"trainer.logger": "null"}), {"watched": str(tmp_path / "run")}
    code, said = forks.run(args, tmp_path / "log", **how, kill_at=kill_at)
    assert code == -9, said
    code, said = forks.run(options(texts, tmp_path / "run"), tmp_path / "log")
    assert code == 0 and outcome(tmp_path / "run") == whole[0], said


def test_kills_between_any_two_instructions(forks, texts, whole, tmp_path):
    """By the clock, so also in the middle of a write or a product."""
    chance, args = random.Random(3), options(texts, tmp_path / "run")
    for number in range(4):
        how = {"watched": str(tmp_path / "run"), "kill_after": chance.uniform(0.2, 2.0)}
        code, said = forks.run(args, tmp_path / f"log{number}", **how)
        if code == 0:
            break
        assert code == -9, said
        look_at_ruins(tmp_path / "run", whole[0])
    else:
        code, said = forks.run(args, tmp_path / "last")
        assert code == 0, said
    assert outcome(tmp_path / "run") == whole[0]


def test_several_passes_are_resumed_in_the_right_one(forks, texts, tmp_path):
    """One layer a pass, a domain, moments: eight passes; every resumed run finds what the passes before it found."""
    changes = {
        "data.max_tokens": 300,
        "data.domains": json.dumps({"other": str(texts / "heldout.jsonl")}),
        "data.domain_tokens": 200,
        "data.memorized": "null",
        "collect.layers_per_pass": 1,
        "collect.moments": "token",
        "edit.formula": "corrected",
    }
    whole, run = options(texts, tmp_path / "whole", **changes), options(texts, tmp_path / "run", **changes)
    count = tmp_path / "count"
    code, said = forks.run(whole, tmp_path / "log", watched=str(tmp_path / "whole"), count_to=str(count))
    assert code == 0, said
    events = int(count.read_text())
    assert forks.run(run, tmp_path / "log", watched=str(tmp_path / "run"), kill_at=events // 3)[0] == -9
    code, said = forks.run([*run, "--data.domain_tokens", "250"], tmp_path / "log")
    assert code == 2 and "an unfinished run on other text" in said, said
    deaths, said = kill_and_go_on(forks, run, tmp_path / "run", tmp_path, [events // 5, events // 5, events // 5])
    assert deaths == 3 and "of pass" in said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert list(outcome(tmp_path / "run")["files"]).count("factors/moments/layer_0000.safetensors") == 1


def test_snapshots_are_compared_with_the_right_one_after_a_stop(forks, texts, tmp_path):
    changes = {"data.max_tokens": 4500, "data.seq_len": 64, "data.batch_size": 4, "collect.watch_rho": 0.8}
    changes |= {"data.memorized": "null", "data.heldout": "null"}
    whole, run = options(texts, tmp_path / "whole", **changes), options(texts, tmp_path / "run", **changes)
    code, said = forks.run(whole, tmp_path / "log", watched="state/step-", count_to=str(tmp_path / "count"))
    assert code == 0, said
    (overlaps,) = [line for line in said.splitlines() if "kept sets overlap" in line]
    kill_at = int((tmp_path / "count").read_text()) * 3 // 5  # between the two snapshots
    killed, before = forks.run(run, tmp_path / "log", watched="state/step-", kill_at=kill_at)
    assert killed == -9 and ": the first" in before and overlaps not in before
    code, said = forks.run(run, tmp_path / "log")
    assert code == 0 and ": the first" not in said and overlaps in said, said
    names = sorted(path.name for path in (tmp_path / "whole" / "snapshots").iterdir())
    assert sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir()) == names
    assert outcome(tmp_path / "run")["files"] == outcome(tmp_path / "whole")["files"]


@pytest.mark.parametrize("how, ends, by", [("term_after", 143, "SIGTERM"), ("interrupt_after", 130, "Ctrl-C")])
def test_a_signal_stops_cleanly_and_the_command_goes_on(forks, texts, whole, tmp_path, how, ends, by):
    args = options(texts, tmp_path / "run", **{"collect.save_minutes": 60})  # only the signal saves
    code, said = forks.run(args, tmp_path / "log", watched=str(tmp_path / "run" / "config.yaml"), **{how: 0.15})
    assert code == ends and f"stopped by {by}; what was done is kept" in said and "Traceback" not in said, said
    (step,) = steps(tmp_path / "run")
    code, said = forks.run(args, tmp_path / "log")
    assert code == 0 and f"going on after batch {int(step.name.removeprefix('step-'))}" in said
    assert outcome(tmp_path / "run") == whole[0]


@pytest.mark.parametrize("limit, kept", [(400_000, []), (1_500_000, ["factors", "results.jsonl"])])
def test_a_full_disk_is_named_and_nothing_is_lost(forks, texts, whole, tmp_path, limit, kept):
    """A quota on files for which factors, or the edited model, are too large; with room the run goes on."""
    args = options(texts, tmp_path / "run")
    code, said = forks.run(args, tmp_path / "log", limit=limit)
    assert code == 2 and "cannot be written: files of this size are not allowed" in said, said
    assert "Traceback" not in said
    assert ("the state of the collection could not be saved" in said) == (not kept)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert set(kept) == found & {"factors", "edited", "results.jsonl"}
    assert not list((tmp_path / "run").rglob("*.part*"))
    look_at_ruins(tmp_path / "run", whole[0])
    code, said = forks.run(args, tmp_path / "log")
    assert code == 0, said
    assert outcome(tmp_path / "run") == whole[0]


def test_two_runs_in_one_folder(forks, texts, whole, tmp_path):
    args = options(texts, tmp_path / "run")
    first = forks.start(Run(args, str(tmp_path / "first")))
    while not (tmp_path / "run" / "run.json").exists():
        pass
    code, said = forks.run([*args, "--overwrite"], tmp_path / "second")
    assert code == 2 and f"process {first} on " in said and "is writing to this folder" in said, said
    assert forks.wait(first) == 0
    assert outcome(tmp_path / "run") == whole[0]


def test_only_the_same_collection_is_gone_on_with(forks, texts, whole, tmp_path):
    args = options(texts, tmp_path / "run")
    assert forks.run(args, tmp_path / "log", watched=str(tmp_path), kill_at=whole[1] // 3)[0] == -9
    old, new = steps(tmp_path / "run")
    code, said = forks.run([*args, "--model.labels", "gold"], tmp_path / "log")
    assert code == 2 and "an unfinished run whose labels is sampled, here it is gold" in said, said
    assert steps(tmp_path / "run") == [old, new]
    code, said = forks.run([*args, "--ckpt_path", str(tmp_path)], tmp_path / "log")
    assert code == 2 and "is not the state of a collection" in said, said
    (new / "rank-00000.safetensors").write_bytes((new / "rank-00000.safetensors").read_bytes()[:-1])
    code, said = forks.run(args, tmp_path / "log")
    assert code == 2 and "rank-00000.safetensors: damaged" in said and "--overwrite" in said, said
    # An older state is named by hand; another edit may follow the same collection.
    code, said = forks.run([*args, "--ckpt_path", str(old), "--edit.rho", "0.8"], tmp_path / "log")
    assert code == 0 and f"going on after batch {int(old.name.removeprefix('step-'))}" in said, said
    assert outcome(tmp_path / "run") == whole[0]


def test_an_interrupted_evaluation_computes_nothing_twice(forks, texts, whole, tmp_path):
    args = options(texts, tmp_path / "run")
    kept = tmp_path / "run" / "state" / "evaluation-baseline" / "rank-0.jsonl"
    kill = {"watched": "evaluation-baseline", "kill_at": 12}
    assert forks.run(args, tmp_path / "log", **kill)[0] == -9
    before = kept.read_text().splitlines()
    assert len(before) >= 3
    code, said = forks.run(args, tmp_path / "log", watched="evaluation-edited", kill_at=3)
    assert code == -9, said
    after = kept.read_text().splitlines()
    assert [line for line in after if line][: len(before)] == before and len(after) > len(before)
    assert forks.run(args, tmp_path / "log")[0] == 0
    assert outcome(tmp_path / "run") == whole[0]


# -- several ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_of_two(forks, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole-of-two") / "run"
    for code, said in forks.ranks(options(texts, folder), folder.parent / "log", 2):
        assert code == 0, said
    return outcome(folder)


def relative_difference(a, b) -> float:
    return max(
        ((getattr(a[n], s) - getattr(b[n], s)).norm() / getattr(b[n], s).norm()).item() for n in a for s in ("A", "G")
    )


def test_two_ranks_go_on_bit_for_bit_after_one_was_killed(forks, texts, whole_of_two, tmp_path):
    args = options(texts, tmp_path / "run")
    for number, (rank, kill_at) in enumerate([(1, 6), (0, 40), (0, 60), (1, 5)]):
        how = {rank: {"watched": str(tmp_path / "run"), "kill_at": kill_at}}
        ended = forks.ranks(args, tmp_path / f"log{number}", 2, how)
        assert ended[rank][0] == -9, ended[rank][1]
        code, said = ended[1 - rank]
        assert code == 1 and f"error: rank {rank} (process " in said and "Traceback" not in said, said
        look_at_ruins(tmp_path / "run", whole_of_two)
    for code, said in forks.ranks(args, tmp_path / "last", 2):
        assert code == 0, said
    assert outcome(tmp_path / "run") == whole_of_two


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_to_rounding(forks, texts, whole, whole_of_two, tmp_path, before, after):
    """Float32 sums in another order: a relative difference of 1e-6 is some ten roundings."""
    args, kill = options(texts, tmp_path / "run"), {"watched": "state/step-", "kill_at": 20}
    if before == 1:
        assert forks.run(args, tmp_path / "log", **kill)[0] == -9
        ended = forks.ranks(args, tmp_path / "log", 2)
    else:
        assert forks.ranks(args, tmp_path / "log", 2, {0: kill})[0][0] == -9
        ended = [forks.run(args, tmp_path / "log")]
    assert [code for code, _ in ended] == [0] * after, ended
    assert "going on after batch" in ended[0][1]
    factors, known = (load_factors(folder / "factors") for folder in (tmp_path / "run", whole[2]))
    assert [factors[n].n_tokens for n in factors] == [known[n].n_tokens for n in known]
    assert relative_difference(factors, known) < 1e-6


def test_sigterm_stops_all_ranks_between_the_same_batches(forks, texts, whole_of_two, tmp_path):
    args = options(texts, tmp_path / "run", **{"collect.save_minutes": 60})
    how = {0: {"watched": str(tmp_path / "run" / "config.yaml"), "term_after": 0.15}}
    for code, said in forks.ranks(args, tmp_path / "log", 2, how):
        assert code == 143 and "Traceback" not in said, said
    assert len(steps(tmp_path / "run")) == 1
    for code, said in forks.ranks(args, tmp_path / "log", 2):
        assert code == 0, said
    assert outcome(tmp_path / "run") == whole_of_two


def test_the_second_evaluation_of_validate_is_watched_too(forks, texts, whole, tmp_path):
    kept = ("--model.dtype", "--data.heldout", "--data.heldout_tokens", "--data.memorized", "--trainer.logger")
    words = options(texts, "")
    pairs = [pair for pair in zip(words[1::2], words[2::2], strict=True) if pair[0] in kept]
    pairs += [("--model.model_name", whole[2] / "edited"), ("--trainer.default_root_dir", tmp_path / "other")]
    args = ["validate", *(word for pair in pairs for word in pair)]
    ended = forks.ranks(args, tmp_path / "log", 2, {1: {"watched": "evaluation-edited", "kill_at": 3}})
    assert ended[1][0] == -9, ended[1][1]
    assert ended[0][0] == 1 and "error: rank 1 (process " in ended[0][1], ended[0][1]
    for code, said in forks.ranks(args, tmp_path / "log", 2):
        assert code == 0, said


def test_a_sharded_model_goes_on_bit_for_bit(forks, texts, tmp_path):
    """FSDP2: every rank has the sums of its own layers only, here of two input groups."""
    changes = {"collect.projections": "[gate,up,down]", "data.max_tokens": 400}
    args, known = options(texts, tmp_path / "run", **changes), options(texts, tmp_path / "known", **changes)
    for code, said in forks.ranks(known, tmp_path / "log", 2, strategy="fsdp"):
        assert code == 0, said
    kill = {1: {"watched": "state/step-", "kill_at": 12}}
    ended = forks.ranks(args, tmp_path / "log", 2, kill, strategy="fsdp")
    assert ended[1][0] == -9 and ended[0][0] == 1 and "rank 1 (process " in ended[0][1], ended
    code, said = forks.run(args, tmp_path / "log")
    assert code == 2 and "whose shard_factors is True, here it is False" in said, said
    for code, said in forks.ranks(args, tmp_path / "log", 2, strategy="fsdp"):
        assert code == 0, said
    assert outcome(tmp_path / "run") == outcome(tmp_path / "known")


def test_two_nodes(texts, whole_of_two, tmp_path):
    """Two agents of torchrun with one rendezvous, as on two machines, each with one rank."""
    changes = {"trainer.num_nodes": 2, "trainer.devices": 1, "trainer.strategy": "ddp"}
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "train.py", *options(texts, tmp_path / "run", **changes)]
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "kfac",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    }
    how = {"cwd": ROOT, "env": os.environ | slurm | {"OMP_NUM_THREADS": "1"}, "text": True}
    nodes = [subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how) for _ in range(2)]
    try:
        said = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert outcome(tmp_path / "run")["files"] == whole_of_two["files"]


def test_the_slurm_script_starts_every_node_and_asks_for_another_turn(tmp_path):
    """With stand-ins for SLURM's commands: the step waits until it is told to stop."""
    stand_ins = {
        "srun": "echo $@ >> calls; [[ $* == *pgrep* ]] && exec touch stop\n"
        "until [ -e stop ]; do sleep 0.1; done; exit 1",
        "scontrol": 'echo scontrol "$@" >> calls; [ "$1" = show ] && printf "first\\nsecond\\n"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "first,second"}
    command = [
        "bash",
        str(ROOT / "configs/cluster/collect.sbatch"),
        "configs/quickstart.yaml",
        "--collect.blocks",
        "[3]",
    ]
    job = subprocess.Popen(command, cwd=tmp_path, env=env)
    while not (tmp_path / "calls").exists() or "train.py" not in (tmp_path / "calls").read_text():
        time.sleep(0.05)
    time.sleep(0.2)
    job.terminate()
    assert job.wait(20) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    started = next(call for call in calls if "train.py fit --config" in call)
    for words in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint first:20077", "--collect.blocks [3]"):
        assert words in started
    assert "--trainer.num_nodes 2 --trainer.devices 8 --trainer.strategy ddp" in started
    assert calls[-1] == "scontrol requeue 77" and "SLURM_JOB_ID=$SLURM_JOB_ID" in calls[-2]
