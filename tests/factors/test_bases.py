"""Eigenbases that are kept beside the factors."""

import torch

from lightning_kfac import EditConfig, KFACEditor, collect_factors, load_factors, save_factors
from tests.common import batched, build_model


def test_bases_are_computed_once_and_kept_beside_the_factors(tmp_path, rows, monkeypatch):
    model = build_model("llama")
    save_factors(collect_factors(model, batched(rows, 3)), tmp_path / "f")
    solve, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(len(m)), solve(m))[1])
    factors = load_factors(tmp_path / "f")
    for rho in (0.5, 0.7):
        editor = KFACEditor(model, factors, EditConfig(rho=rho))
        editor.apply()
        editor.restore()
    # 3 blocks: G of gate, up (40) and down (24); A of gate and up together (24) and of down (40)
    assert sorted(sizes) == [24] * 6 + [40] * 9
    sizes.clear()
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert not sizes
    damaged = next((tmp_path / "f" / "bases").iterdir())
    damaged.write_bytes(b"12")
    KFACEditor(model, load_factors(tmp_path / "f"), EditConfig(rho=0.9)).apply(dry_run=True)
    assert len(sizes) == 1  # only the damaged one
    KFACEditor(model, load_factors(tmp_path / "f"), dtype="float32").apply(dry_run=True)
    assert len(sizes) == 16  # another precision is another basis
