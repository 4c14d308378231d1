"""Coupled factors, collected with A and G: against every token in float64, and what they must not depend on."""

import copy

import pytest
import torch

from lightning_kfac import InputError, collect_factors, collect_moments, load_factors, save_factors
from lightning_kfac.collection.fisher import FisherLoss
from lightning_kfac.collection.memory import plan_memory
from lightning_kfac.math.covariance import accumulator_numbers
from lightning_kfac.math.importance import coupled, curvature_along
from lightning_kfac.models.targets import resolve_targets
from tests.common import TOLERANCE, batched, build_model, projections_of, relative_error
from tests.mixtures import build_mixture, expert_pairs, projections
from tests.oracle import sampled_targets


def token_pairs(model, names, rows, targets) -> dict:
    """a [n, d_in] and g [n, d_out] of every position that counts, one unpadded row at a time, in float64."""
    layers = dict(model.double().named_modules())
    pairs = {name: ([], []) for name in names}
    for row, labels in zip(rows, targets, strict=True):
        seen = {}

        def remember(layer, args, output, seen=seen):
            output.retain_grad()
            seen[layer] = args[0].detach(), output

        handles = [layers[name].register_forward_hook(remember) for name in names]
        logits = model(input_ids=torch.tensor([row])).logits[0, : len(labels)]
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name in names:
            a, z = seen[layers[name]]
            pairs[name][0].append(a[0, : len(labels)])
            pairs[name][1].append(z.grad.view(-1, z.shape[-1])[: len(labels)])
    return {name: (torch.cat(a), torch.cat(g)) for name, (a, g) in pairs.items()}


def coupled_by_hand(a, g) -> tuple:
    """Sums over tokens, one outer product after the other: of ||g||^2 a a^T and of ||a||^2 g g^T."""
    A = sum(float(y @ y) * torch.outer(x, x) for x, y in zip(a, g, strict=True))
    G = sum(float(x @ x) * torch.outer(y, y) for x, y in zip(a, g, strict=True))
    return A, G


@pytest.mark.parametrize("labels", ["gold", "sampled"])
@pytest.mark.parametrize(("size", "side"), [(1, "right"), (3, "left"), (99, "right")])
def test_against_every_token(any_model, rows, labels, size, side):
    rows = [row for row in rows if len(row) > 1]
    chosen = {"projections": projections_of(any_model), "labels": labels, "seed": 5}
    found = collect_factors(any_model, batched(rows, size, side), coupled=True, **chosen)
    plain = collect_factors(any_model, batched(rows, size, side), **chosen)
    double = copy.deepcopy(any_model).double()
    targets = [row[1:] for row in rows] if labels == "gold" else sampled_targets(double, rows, seed=5)
    for name, (a, g) in token_pairs(double, list(found), rows, targets).items():
        A, G = coupled_by_hand(a, g)
        assert relative_error(found[name].A_coupled, A / len(a)) < TOLERANCE, name
        assert relative_error(found[name].G_coupled, G / len(a)) < TOLERANCE, name
        assert torch.equal(found[name].A, plain[name].A) and torch.equal(found[name].G, plain[name].G)
        assert plain[name].A_coupled is None and plain[name].G_coupled is None


def test_several_draws(rows):
    """Means over positions and draws, as G is one."""
    model = build_model("llama")
    several = collect_factors(model, batched(rows, 3), projections=["up"], mc_samples=3, coupled=True)
    double = copy.deepcopy(model).double()
    for name, factors in several.items():
        sums = []
        for draw in range(3):
            targets = sampled_targets(double, rows, seed=0, draw=draw)
            a, g = token_pairs(double, [name], rows, targets)[name]
            sums.append(coupled_by_hand(a, g))
        A, G = (sum(matrices) / (3 * len(a)) for matrices in zip(*sums, strict=True))
        assert relative_error(factors.A_coupled, A) < TOLERANCE and relative_error(factors.G_coupled, G) < TOLERANCE


def test_identities_of_the_moments(rows):
    """In complete bases r and c are the row and column sums of the token moments; exact in float64."""
    model = build_model("olmo2")
    found = collect_factors(model, batched(rows, 3), labels="gold", coupled=True)
    measured = collect_moments(model, batched(rows, 3), found, labels="gold")
    pairs = token_pairs(copy.deepcopy(model), list(found), rows, [row[1:] for row in rows])
    for name, (a, g) in pairs.items():
        n = len(a)
        A, G = (matrix / n for matrix in coupled_by_hand(a, g))
        (_, U_A), (_, U_G) = torch.linalg.eigh(a.T @ a / n), torch.linalg.eigh(g.T @ g / n)
        moments = ((g @ U_G) ** 2).T @ (a @ U_A) ** 2 / n
        r, c = curvature_along(G, U_G), curvature_along(A, U_A)
        assert relative_error(r, moments.sum(1)) < 1e-10 and relative_error(c, moments.sum(0)) < 1e-10
        assert r.sum().item() == pytest.approx(c.sum().item(), rel=1e-10)
        assert torch.linalg.eigvalsh(G).sum().item() == pytest.approx(torch.linalg.eigvalsh(A).sum().item(), rel=1e-10)
        values, own = torch.linalg.eigh(G)
        assert relative_error(curvature_along(G, own), values) < 1e-10
        S = coupled(r, c)
        assert relative_error(S.sum(1), r) < 1e-10 and relative_error(S.sum(0), c) < 1e-10
        # What the engine gives, in float32.
        basis = [torch.linalg.eigh(getattr(found[name], side).double())[1].flip(1) for side in "GA"]
        r, c = curvature_along(found[name].G_coupled, basis[0]), curvature_along(found[name].A_coupled, basis[1])
        assert relative_error(r, measured[name].double().sum(1)) < 1e-5
        assert relative_error(c, measured[name].double().sum(0)) < 1e-5


def test_passes_and_parts_change_nothing(rows):
    model = build_model("olmo2")
    whole = collect_factors(model, batched(rows, 3), coupled=True)
    parts = collect_factors(model, batched(rows, 3), coupled=True, layers_per_pass=2)
    for name in whole:
        for side, matrix in whole[name].matrices.items():
            assert relative_error(parts[name].matrices[side], matrix) < 1e-6


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_experts(family):
    """Each over the tokens that came to it; none came: zero."""
    text = [torch.randint(1, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 5, 2, 7)]
    model = build_mixture(family)
    found = collect_factors(model, batched(text, 3), projections=projections(family), labels="gold", coupled=True)
    for name, pairs in expert_pairs(copy.deepcopy(model), text).items():
        n = len(pairs)
        assert found[name].n_tokens == n
        if not n:
            assert not found[name].A_coupled.any() and not found[name].G_coupled.any()
            continue
        A, G = coupled_by_hand(*zip(*pairs, strict=True))
        assert relative_error(found[name].A_coupled, A / n) < 1e-5, name
        assert relative_error(found[name].G_coupled, G / n) < 1e-5, name


def test_a_loss_of_your_own(rows):
    model = build_model("gpt2")
    batches = batched(rows, 3)

    def loss(model, batch):
        return model(input_ids=batch["input_ids"]).logits.logsumexp(-1).sum()

    found = collect_factors(model, batches, projections=["up"], loss_fn=loss, coupled=True)
    assert all(set(factors.matrices) == {"A", "G", "A_coupled", "G_coupled"} for factors in found.values())


def test_the_plan_counts_them():
    """Gate and up share A and nothing else."""
    model = build_model("olmo2")
    layers = resolve_targets(model)
    plain = plan_memory(model, layers, FisherLoss(), 4, 32).factor_bytes
    more = sum(accumulator_numbers(size) for layer in layers.values() for size in layer.shape)
    assert plan_memory(model, layers, FisherLoss(), 4, 32, coupled=True).factor_bytes == plain + 4 * more


def test_folders(tmp_path, rows):
    """Format 2 with them, 1 without; each matrix is stored, and A still once for gate and up."""
    model = build_model("olmo2")
    found = collect_factors(model, batched(rows, 3), coupled=True)
    save_factors(found, tmp_path / "f", {"corpus": "rows"})
    folder = load_factors(tmp_path / "f")
    assert folder.metadata["format"] == 2 and len({folder.shared_A(name) for name in folder}) == 6
    for name, factors in folder.items():
        assert list(factors.matrices) == ["G", "A", "G_coupled", "A_coupled"]
        assert all(torch.equal(matrix, found[name].matrices[side]) for side, matrix in factors.matrices.items())
    plain = {name: collect_factors(model, batched(rows, 3))[name] for name in found}
    save_factors(plain, tmp_path / "f", {})
    assert load_factors(tmp_path / "f").metadata["format"] == 1
    text = (tmp_path / "f" / "metadata.json").read_text().replace('"format": 1', '"format": 3')
    (tmp_path / "f" / "metadata.json").write_text(text.replace('"checksum"', '"other"'))
    with pytest.raises(InputError, match="factor format 3; this version reads formats 1 and 2"):
        load_factors(tmp_path / "f")
