"""Methods in kinds, from weak to strong."""

from lightning_kfac.cli.compared import Kinds, about_strength
from lightning_kfac.methods.registry import methods_of


def kinds(*entries):
    found = Kinds([method for entry in entries for method in methods_of(entry)])
    return {label: [method.amount for method in methods] for label, methods in found.by_label.items()}


def test_strengths_stand_from_weak_to_strong_under_a_label_of_their_own():
    assert kinds(
        {"name": "formula", "rho": [0.6, 0.9, 0.7, 0.9]},
        {"name": "npo", "steps": [40, 10]},
        {"name": "npo", "steps": [20], "lr": 1e-5},
        {"name": "block_deletion", "block": "quintile", "quintile": [5, 5]},
        {"name": "block_deletion", "share": [0.5]},
        {"name": "npo", "steps": 20},
    ) == {
        "K-FAC, original": [0.9, 0.7, 0.6],
        "NPO": [10, 20, 40],
        "NPO (2)": [20],
        "block deletion, quintile 5x5": [0.2],
        "block deletion, flattest": [0.5],
    }


def test_a_strength_says_which_way_it_suppresses():
    (formula,) = methods_of("formula")
    assert about_strength(formula) == {"strength": "rho", "amount": 0.6, "falling": True, "needs": "curvature"}
    (subnet,) = methods_of({"name": "balanced_subnet", "ratio": 0.1})
    assert about_strength(subnet)["falling"] is False and about_strength(subnet)["needs"] == "forget set and text"
