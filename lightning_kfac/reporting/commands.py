"""Commands that a reader of results may want."""

from collections.abc import Mapping
from typing import Any

from lightning_kfac.editing.formulas import FORMULAS


def apply_words(edit: Mapping[str, Any], factors: object, model: str | None, output: object) -> list[object]:
    """The words of the command ``apply`` that makes a curvature edit.

    Args:
        edit: Its ``summary``.
        factors: Their folder.
        model: Where the factors do not say it.
        output: The folder to write.
    """
    words: list[object] = ["--factors", factors]
    words += ["--model", model] if model else []
    words += ["--blocks", str(edit["blocks"]), "--projections", f"[{', '.join(edit['projections'])}]"]
    words += [] if edit["formula"] == "original" else ["--formula", edit["formula"]]
    words += ["--seed", edit["seed"]] if FORMULAS[edit["formula"]].seeded else []
    return [*words, "--rho", f"{edit['rho']:g}", "--output", output]
