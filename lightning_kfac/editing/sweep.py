"""Many edits of one model: each starts from and returns to the original weights."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.editor import Factors, KFACEditor, Moments
from lightning_kfac.editing.formulas import FORMULAS, FormulaName
from lightning_kfac.errors import InputError
from lightning_kfac.models.choices import Blocks

Alpha = float | dict[str, float]
Evaluate = Callable[[nn.Module], Mapping[str, Any]]


def compare_formulas(
    model: nn.Module,
    factors: Factors,
    evaluate: Evaluate,
    *,
    rhos: Sequence[float] = (0.6,),
    formulas: Sequence[FormulaName] = ("original",),
    alphas: Sequence[Alpha] | None = None,
    seeds: Sequence[int] = (0,),
    config: EditConfig | None = None,
    domains: Mapping[str, Factors] | None = None,
    moments: Moments | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Edits a model in every way of a grid, and evaluates each.

    The model has its original weights again afterwards, also after an error.

    Args:
        model: The model that the factors were collected on.
        factors: By dotted layer name.
        evaluate: Measures the model as it is; gives figures by name.
        rhos, formulas: The grid.
        alphas: Weights of the domains, each a number or a mapping by domain; by default that of ``config``.
        seeds: For the formula ``random``.
        config: Everything else (blocks, projections, mode, mix).
        domains, moments, device: As for ``KFACEditor``.

    Returns:
        One row an edit, the first of them the unedited model (``edit`` is None): ``edit``, what was done and
        what it kept (see ``EditReport.summary``), and the figures of ``evaluate``.

    Example:
        >>> from lightning_kfac import collect_factors
        >>> from lightning_kfac.loading import load_model
        >>> import torch
        >>> model, rows = load_model("demo"), [{"input_ids": torch.arange(1, 257).view(2, 128)}]
        >>> factors = collect_factors(model, rows, blocks=[3], projections=["up"])
        >>> norm = lambda model: {"norm": round(model.model.layers[3].mlp.up_proj.weight.norm().item(), 1)}
        >>> table = compare_formulas(model, factors, norm, rhos=[0.5, 0.9], formulas=["original", "random"])
        >>> [row["edit"] and (row["edit"]["formula"], row["edit"]["rho"]) for row in table]
        [None, ('original', 0.5), ('original', 0.9), ('random', 0.5), ('random', 0.9)]
        >>> table[1]["norm"] < table[2]["norm"] < table[0]["norm"]
        True
    """
    config = config or EditConfig()
    editor = KFACEditor(model, factors, config, domains=domains, moments=moments, device=device, repeated=True)
    configs = grid(config, formulas=formulas, rhos=rhos, alphas=alphas, seeds=seeds, mixing=bool(domains))
    for point in configs:
        editor.check(point)
    return [{"edit": None, **evaluate(model)}, *run(editor, configs, evaluate)]


def grid(
    base: EditConfig,
    *,
    formulas: Sequence[FormulaName],
    rhos: Sequence[float] | Mapping[str, Sequence[float]],
    alphas: Sequence[Alpha] | None = None,
    blocks: Sequence[Blocks] | None = None,
    projections: Sequence[Sequence[str]] | None = None,
    seeds: Sequence[int] = (0,),
    mixing: bool = False,
) -> list[EditConfig]:
    """Every combination, without those that differ in nothing that matters to them.

    Args:
        rhos: For all formulas, or for each by name.
        mixing: There are domains, so alphas count.

    Raises:
        InputError: A formula has no rhos, or a setting is wrong.
    """
    if base.layers is not None:
        raise InputError("a grid varies one rho for all layers: leave layers out")
    if isinstance(rhos, Mapping) and (absent := [formula for formula in formulas if formula not in rhos]):
        raise InputError(f"rhos names {', '.join(rhos)}, not the formula {absent[0]}")
    points = [(formula, rho) for formula in formulas for rho in (rhos[formula] if isinstance(rhos, Mapping) else rhos)]
    chosen: Sequence[Sequence[str] | None] = projections or [base.projections]
    configs = []
    for block, projection, (formula, rho) in itertools.product(blocks or [base.blocks], chosen, points):
        record = FORMULAS[formula]
        weights = [base.alpha] if alphas is None or not mixing or base.mix == "union" else alphas
        alone = record.curvature is None  # takes no domain
        weights = [0.0] if mixing and alone else weights
        for seed, alpha in itertools.product(seeds if record.seeded else [base.seed], weights):
            configs.append(
                replace(
                    base,
                    formula=formula,
                    blocks=block,
                    projections=projection,
                    rho=rho,
                    seed=seed,
                    alpha=alpha,
                    mix="scores" if alone else base.mix,
                    basis=None if alone else base.basis,
                    budget=base.budget if record.mass else None,
                    rho_G=base.rho_G if record.rectangle else None,
                    rho_A=base.rho_A if record.rectangle else None,
                )
            )
    return configs


def run(editor: KFACEditor, configs: Iterable[EditConfig], evaluate: Evaluate) -> Iterator[dict[str, Any]]:
    """Applies, evaluates and takes back one edit after the other; gives a row for each."""
    for config in configs:
        report = editor.apply(config)
        try:
            row = {"edit": report.summary(), **evaluate(editor.model)}
        finally:
            editor.restore()
        yield row


def point_key(config: EditConfig, *context: object) -> str:
    """Identifies an edit in its context (weights, factors, data), for resuming."""
    text = json.dumps([asdict(config), *map(str, context)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def average_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ only in their seed become one with the means, and ``n_seeds``."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(_setting(row["edit"]) if row["edit"] else None, sort_keys=True), []).append(row)
    return [_mean(group) for group in groups.values()]


def pareto_front(rows: Sequence[Mapping[str, Any]], x: str = "strict_acc", y: str = "perplexity") -> list[int]:
    """Numbers of the rows that no other beats: none is as good in both figures and better in one (less is better)."""
    points = [(row.get(x), row.get(y)) for row in rows]
    known = [(i, (a, b)) for i, (a, b) in enumerate(points) if a is not None and b is not None]
    return [
        i for i, (a, b) in known if not any(c <= a and d <= b and (c, d) != (a, b) for j, (c, d) in known if j != i)
    ]


def weakest_settings(
    rows: Sequence[Mapping[str, Any]], target: float, key: str = "strict_acc", cost: str = "perplexity"
) -> list[Mapping[str, Any]]:
    """Of each kind of edit the weakest (largest rho; under ablate the least) with ``key`` at ``target`` or below.

    Ordered by ``cost``. A kind is everything but rho and seed; kinds that never get there are left out.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["edit"] is None or row.get(key) is None or row[key] > target:
            continue
        kind = json.dumps({k: v for k, v in _setting(row["edit"]).items() if k != "rho"}, sort_keys=True)
        sign = -1 if row["edit"].get("mode") == "ablate" else 1
        if kind not in best or sign * row["edit"]["rho"] > sign * best[kind]["edit"]["rho"]:
            best[kind] = row
    return sorted(best.values(), key=lambda row: row.get(cost) or float("inf"))


def at_equal_share(rows: Sequence[Mapping[str, Any]], share: float) -> list[Mapping[str, Any]]:
    """Of each kind of edit the row that keeps nearest to a share of the components, where it is within a quarter of it.

    rho is a share of another importance for each formula, so kinds are not comparable at an equal rho.
    """
    nearest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["edit"] is None:
            continue
        kind = json.dumps({k: v for k, v in _setting(row["edit"]).items() if k != "rho"}, sort_keys=True)
        known = nearest.get(kind)
        if known is None or _away(row, share) < _away(known, share):
            nearest[kind] = row
    near = [row for row in nearest.values() if _away(row, share) <= share / 4]
    return sorted(near, key=lambda row: row.get("perplexity") or float("inf"))


def _away(row: Mapping[str, Any], share: float) -> float:
    return float(abs(row["edit"]["fraction_kept"] - share))


OUTCOMES = ("fraction_kept", "mass_kept", "relative_change")


def _setting(edit: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in edit.items() if k not in (*OUTCOMES, "seed")}


def _mean(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = dict(group[0])
    if len(group) == 1:
        return first | {"n_seeds": 1}
    for name in first:
        values = [row.get(name) for row in group]
        if any(isinstance(value, float) for value in values):
            known = [value for value in values if value is not None]
            first[name] = sum(known) / len(known) if len(known) == len(values) else None
    for name in ("intervals", "differences"):  # of one seed only
        first.pop(name, None)
    first["edit"] = first["edit"] | {k: sum(row["edit"][k] for row in group) / len(group) for k in OUTCOMES}
    return first | {"n_seeds": len(group)}
