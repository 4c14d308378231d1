"""The benchmark compares like with like, and counts right."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import images
from benchmarks.conventional import conventional_factors
from benchmarks.limits import least_flops_per_token
from benchmarks.soak import grown, soak
from benchmarks.with_bergson import bergson_factors
from lightning_kfac import collect_factors
from tests.common import build_model, relative_error


def test_the_conventional_way_computes_the_same_factors():
    """With one batch of N positions its mean loss scales g by 1 / N, and G by 1 / N^2."""
    model = build_model("olmo2")
    batch = [{"input_ids": torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(0))}]
    ours = collect_factors(model, batch, blocks=[1, 2], labels="gold")
    theirs = conventional_factors(model, batch, [1, 2], ("gate", "up", "down"), blocks_per_pass=1)
    assert set(ours) == set(theirs)
    for name, (A, G, n) in theirs.items():
        assert n == ours[name].n_tokens == 33
        assert relative_error(A, ours[name].A) < 1e-5
        assert relative_error(G * n**2, ours[name].G) < 1e-5


def test_bergson_computes_the_same_factors():
    pytest.importorskip("bergson", reason="bergson is not installed: see benchmarks/README.md")
    model = build_model("olmo2").requires_grad_(False)
    batch = [{"input_ids": torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(0))}]
    ours = collect_factors(model, batch, blocks=[1, 2], labels="gold")
    for name, sums in bergson_factors(model, list(ours), batch).items():
        assert relative_error(sums["A"] / 33, ours[name].A) < 1e-5
        assert relative_error(sums["G"] / 33, ours[name].G) < 1e-5


def test_least_flops_are_those_of_the_matrix_products():
    """Against torch's own counter, attention apart: it counts the whole square, the limit half of it."""
    model = build_model("olmo2").requires_grad_(False)
    ids = torch.ones(1, 21, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids[:, :-1])
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counts.items() if "attention" not in op)
    flops = least_flops_per_token(model.config, 1, 20, [1, 2], ("gate", "up", "down"))
    attention = 3 * 2 * 2 * 24 * 10
    assert (flops["forward"] - attention) * 20 == products
    assert flops["covariance"] == 2 * (40**2 + 40**2 + 24**2 + 24**2 + 40**2)
    # Backward: the head, one block above the lowest, and down_proj of the lowest (to gate and up).
    block = 2 * (4 * 24 * 24 + 3 * 24 * 40)
    assert flops["backward"] == 2 * 24 * 61 + block + 2 * (2 * 2 * 24 * 10) + 2 * 24 * 40


def test_a_soak_counts_and_finds_what_grows(tmp_path):
    rows = soak(tmp_path / "run", batches=12, every=2, save_seconds=0)
    assert [row["batch"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(row["resident_mb"] > 100 and row["open_files"] > 3 and row["files_on_disk"] > 3 for row in rows)
    flat = [{"resident_mb": 450.0, "open_files": 8, "threads": 2, "files_on_disk": 10} for _ in range(30)]
    assert grown(flat) == []
    for name, step in (("resident_mb", 0.5), ("open_files", 1), ("threads", 1), ("files_on_disk", 1)):
        rising = [row | {name: row[name] + number * step} for number, row in enumerate(flat)]
        assert len(grown(rising)) == 1 and grown(rising)[0].startswith(f"{name} grew by ")


def test_images_of_one_seed():
    """Cut down: rho 1 is the unedited model, and the summary takes the weakest edit that reaches a target."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'lightning-kfac[images]'")
    rows = images.rows_of_seed(0, epochs=3, rhos=(0.9, 1.0), decays=(1.0,))
    unedited = [row for row in rows if row["edit"] is None and row["weight_decay"] is None]
    whole = [row for row in rows if row["edit"] and row["edit"]["rho"] == 1]
    assert len(unedited) == 2 and len(whole) == len(images.FORMULAS) + 2
    for row in whole:
        assert [row[name] for name in images.FIGURES] == [unedited[0][name] for name in images.FIGURES]
    found = {(line["way"], line["positions"]): line for line in images.summary(rows, (1.0,))}
    assert found["original", "all"]["val_acc"]["mean"] == unedited[0]["val_acc"]
    decayed = next(row for row in rows if row["weight_decay"])
    assert found["weight decay", None]["wrong_label_acc"]["mean"] == decayed["wrong_label_acc"]


def test_committed_figures_of_images_hang_together():
    known = json.loads(images.RESULT.read_text())
    assert sorted({row["seed"] for row in known["rows"]}) == list(images.SEEDS) == sorted(map(int, known["cpu_s"]))
    assert json.loads(json.dumps(images.summary(known["rows"]))) == known["summary"]
    per_seed = 2 + len(images.RHOS) * (len(images.FORMULAS) + 2) + len(images.DECAYS)
    assert len(known["rows"]) == len(images.SEEDS) * per_seed
    assert all(0 <= row[name] <= 1 for row in known["rows"] for name in images.FIGURES)
