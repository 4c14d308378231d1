"""Many edits of one model, and which of them are best."""

import pytest
import torch

from lightning_kfac import EditConfig, InputError, KFACEditor, collect_moments
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.editing.sweep import (
    at_equal_share,
    average_seeds,
    compare_formulas,
    grid,
    pareto_front,
    weakest_settings,
)
from tests.common import batched


def test_compare_formulas_starts_from_and_returns_to_the_original(collected, rows):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}
    moments = collect_moments(model, batched(rows, 3), factors)
    seen = []

    def evaluate(model):
        seen.append({name: p.clone() for name, p in model.state_dict().items()})
        return {"n": len(seen)}

    table = compare_formulas(model, factors, evaluate, rhos=[0.5, 0.9], formulas=FORMULAS, moments=moments)
    assert [row["n"] for row in table] == list(range(1, 2 + 2 * len(FORMULAS))) and table[0]["edit"] is None
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert all(torch.equal(p, original[n]) for n, p in seen[0].items())
    for row, weights in zip(table[1:], seen[1:], strict=True):  # what a fresh editor makes
        config = EditConfig(rho=row["edit"]["rho"], formula=row["edit"]["formula"])
        editor = KFACEditor(model, factors, config, moments=moments)
        assert editor.apply().fraction_kept == row["edit"]["fraction_kept"]
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
        editor.restore()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_itself_again_after_an_error(collected, error):
    model, factors = collected
    original = {name: p.clone() for name, p in model.state_dict().items()}

    def evaluate(model):
        if any(not torch.equal(p, original[n]) for n, p in model.state_dict().items()):
            raise error("stop")
        return {}

    with pytest.raises(error):
        compare_formulas(model, factors, evaluate, rhos=[0.5])
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())


def test_pareto_front_and_weakest_settings():
    def row(formula, rho, strict, perplexity):
        edit = {"formula": formula, "rho": rho, "seed": None, "fraction_kept": rho, "mass_kept": rho}
        return {"edit": edit | {"relative_change": 0.1}, "strict_acc": strict, "perplexity": perplexity}

    rows = [row("a", 0.9, 0.5, 10.0), row("a", 0.8, 0.1, 11.0), row("a", 0.7, 0.0, 13.0), row("b", 0.9, 0.05, 12.0),
            row("b", 0.8, 0.05, 14.0), row("c", 0.9, 0.2, 20.0), row("a", 0.8, 0.1, 11.0)]  # fmt: skip
    assert pareto_front(rows) == [0, 1, 2, 3, 6]
    weakest = weakest_settings(rows, 0.1)
    assert [(r["edit"]["formula"], r["edit"]["rho"]) for r in weakest] == [("a", 0.8), ("b", 0.9)]


def test_the_grid_keeps_what_the_config_says():
    base = EditConfig(alpha=0.25, budget="mass")
    (config,) = grid(base, formulas=["magnitude"], rhos=[0.5])
    assert (config.budget, config.alpha) == ("mass", 0.25)
    (config,) = grid(base, formulas=["original"], rhos=[0.5], mixing=True)
    assert config.alpha == 0.25
    assert [c.alpha for c in grid(base, formulas=["original"], rhos=[0.5], alphas=[0, 1], mixing=True)] == [0, 1]
    assert len(grid(EditConfig(mix="union"), formulas=["original"], rhos=[0.5], alphas=[0, 1], mixing=True)) == 1
    with pytest.raises(InputError, match="leave layers out"):
        grid(EditConfig(layers={"0": {"up": 0.5}}), formulas=["original"], rhos=[0.5])


def test_means_over_seeds_where_a_figure_is_missing():
    edit = {"formula": "random", "seed": 0, "fraction_kept": 0.5, "mass_kept": 0.5, "relative_change": 0.5}
    rows = [{"edit": edit | {"seed": n}, "perplexity": p, "strict_acc": 0.2} for n, p in enumerate((3.0, None))]
    assert average_seeds(rows)[0]["perplexity"] is None and average_seeds(rows)[0]["strict_acc"] == 0.2


def test_kinds_at_an_equal_share():
    """Of each formula the nearest; none where even that keeps another number by more than a quarter."""

    def row(formula, rho, kept, perplexity):
        edit = {"formula": formula, "rho": rho, "fraction_kept": kept, "mass_kept": rho, "relative_change": 0.5}
        return {"edit": edit, "perplexity": perplexity}

    rows = [{"edit": None, "perplexity": 5.0}, row("original", 0.8, 0.19, 7.0), row("original", 0.9, 0.3, 6.0)]
    rows += [row("modified", 0.9, 0.22, 6.5), row("foof", 0.5, 0.1, 9.0)]
    found = at_equal_share(rows, 0.2)
    assert [(r["edit"]["formula"], r["edit"]["rho"]) for r in found] == [("modified", 0.9), ("original", 0.8)]
