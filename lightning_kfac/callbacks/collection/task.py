"""What a collection needs of a task: of its LightningModule, and of a data module that has several texts.

``CausalLM`` and ``TextData`` are the ones of language modelling. A plain loader will do where there is one text only.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule
from torch import nn

from lightning_kfac.collection.objective import Objective, Runs
from lightning_kfac.data.loaders import Position
from lightning_kfac.data.names import CORPUS, domain_text

# What metadata says of a text where nobody knows it.
UNKNOWN_TEXT = dict.fromkeys(
    ("tokenizer", "tokenizer_fingerprint", "corpus", "text", "max_tokens", "n_documents", "seq_len")
)


class TaskModule(Protocol):
    """A LightningModule whose ``training_step`` returns ``self.collection.run(batch)``.

    Attributes:
        model: Whose layers are tracked; there from ``on_fit_start`` on.
        model_name: As metadata says it.
        objective: What is differentiated. The batches that reach the module are such as it takes.
        frozen: No parameter is trained.
        skip_baseline: Do not evaluate the model before an edit.
        collection: Set when the fit starts.
        stage, results, edited_layers: For an edit: what the next validation evaluates, what the last one found (empty
            before it), and the names of the layers that the edit may change.
    """

    model: nn.Module
    model_name: str | None
    objective: Objective
    frozen: bool
    skip_baseline: bool
    collection: Runs | None
    stage: str
    results: Mapping[str, Any]
    edited_layers: Collection[str]

    def about(self) -> dict[str, Any]:
        """What metadata of factors says of the objective."""


def task_of(pl_module: LightningModule) -> TaskModule:
    """The LightningModule of a fit as the task whose curvature is collected."""
    return pl_module  # type: ignore[return-value]  # Lightning's hooks say the base class


@runtime_checkable
class TextsInTurn(Protocol):
    """A data module that gives one text after the other, and can go on in the middle of one.

    Attributes:
        domains: The texts beside the corpus, by name.
        text_in_turn: The one whose rows the next training loader gives: ``corpus``, or ``domain_text(name)``.
        resume_at: Where in it, if not at its beginning.
    """

    domains: Mapping[str, Any]
    text_in_turn: str
    resume_at: Position | None

    def rows_identity(self, name: str) -> str:
        """Identifies the rows of ``corpus`` or a domain, and their order."""

    def about(self, name: str) -> dict[str, Any]:
        """What metadata of factors says of ``corpus`` or a domain."""


def name_in_turn(text: str) -> str:
    """What a data module calls the corpus, or a domain of this name, in ``text_in_turn``."""
    return CORPUS if text == CORPUS else domain_text(text)
