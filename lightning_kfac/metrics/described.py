"""What every metric says of itself: how its figures are called and shown, and what it makes of an observation.

A metric is a pure function in ``functional/`` and one class, listed in ``registry.py``. Evaluations, tables, pages and
TensorBoard know it from there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self, override

from lightning_kfac.errors import InputError
from lightning_kfac.metrics.functional import LOOSE_SIMILARITY, Decoding, Leaks
from lightning_kfac.metrics.functional.near_verbatim import check_near_verbatim

Group = Literal["set", "stress", "general", "questions"]


class Label(NamedTuple):
    """How a figure is called and shown.

    Attributes:
        title: In tables.
        style: Format of its value.
        better: Which way it is better after an edit that should suppress recitation and leave everything else.
        short: Title of its column in a sweep; None leaves it out there.
        counter: The result that says of how many sequences the figure is, where few of them tell nothing.
        panel: Where figures that compare stages draw it: with the other ``rates``, which lie in [0, 1], or by itself.
        aside: Not among the rows of tables; a section of its own has it.
        meaning: For the legend of tables.
    """

    title: str
    style: str
    better: Literal["higher", "lower"]
    short: str | None = None
    counter: str | None = None
    panel: Literal["rates", "own"] | None = None
    aside: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Sampling(Decoding):
    """How tokens are drawn, and what is told of samples beside the probability of each sequence.

    Args:
        near_verbatim: Also how likely samples lie within so many token edits (a lower bound, by a beam search, which
            costs as much as some samples); 0 leaves it out.
        beams: Of that search, for each sequence.
        prior_ratio: Also how much likelier sequences are behind their own prefix than behind that of another one, of
            all tokens (top_k and top_p do not apply); costs two more forwards.
    """

    near_verbatim: int = 0
    beams: int = 16
    prior_ratio: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.near_verbatim:
            check_near_verbatim(self.near_verbatim, self.beams)

    @property
    def whole(self) -> Decoding:
        """The same temperature, and every token."""
        return Decoding(self.temperature, None, 1.0)


@dataclass(frozen=True)
class Measures:
    """What an evaluation measures beside the ordinary.

    Args:
        loose_similarity: Least similarity (1 - Levenshtein / length) of a loose recitation.
        position_stress: The t of the position stress of the set ``memorized`` (the paper's is 20); 0 leaves it out.
        include_unperturbed: Let the prefix itself count among the prompts of the position stress.
        batch_mean_perplexity: Also average exp(batch loss) as the original script does; depends on the batch size.
        extraction: How the tokens are drawn of which it is told how likely they give a set; null leaves it out.
        leaks: How members are told from non-members, where there are such.
    """

    loose_similarity: float = LOOSE_SIMILARITY
    position_stress: int = 0
    include_unperturbed: bool = False
    batch_mean_perplexity: bool = False
    extraction: Sampling | None = Sampling()
    leaks: Leaks = Leaks()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        given = vars(self)["extraction"]
        if type(given) is Decoding:  # a scheme alone, from Python
            object.__setattr__(self, "extraction", Sampling(**vars(given)))
        if not 0 <= self.loose_similarity <= 1:
            raise InputError(f"measures.loose_similarity is {self.loose_similarity}; it must lie between 0 and 1")
        if self.position_stress < 0:
            raise InputError(f"measures.position_stress is {self.position_stress}; it must not be negative")


class Setting(NamedTuple):
    """What an evaluation is, for a metric to decide whether it has a say.

    Attributes:
        measures: What is asked for.
        end_of_text: Ids at which a continuation ends.
        compared: There is an evaluation of the unedited model.
        ranked: There are rankings of the unedited model, its own or another's.
        main: Of sequences: whether they are the set ``memorized``.
        layers: Those of which bulk shares are measured.
    """

    measures: Measures
    end_of_text: Collection[int]
    compared: bool
    ranked: bool
    main: bool = False
    layers: Sequence[str] = ()


@dataclass(frozen=True)
class SequencesSeen:
    """A batch of a memorized set, and how the model continued it.

    Attributes:
        index: Numbers of the sequences.
        golds, continuations: Token ids.
        near_ties: Whose verdict hangs on logits that are equal within the model's precision.
        before: The unedited model's continuations of the sequences that it does not recite, by number.
        stress: Recited lengths without and with perturbed prompts, where that was measured.
        stressed: The golds of that, up to their end of text.
        log_p: How likely the golds are drawn, where that was measured: natural logarithms.
        log_near: How likely something near them is drawn, at least, where that was measured.
        prior_ratio: How much likelier they are behind their own prefixes than behind others, where that was measured.
    """

    index: Sequence[int]
    golds: Sequence[Sequence[int]]
    continuations: Sequence[Sequence[int]]
    near_ties: Sequence[bool]
    before: Mapping[int, Sequence[int]]
    stress: Sequence[tuple[int, int]] | None
    stressed: Sequence[Sequence[int]]
    log_p: Sequence[float] | None = None
    log_near: Sequence[float] | None = None
    prior_ratio: Sequence[float] | None = None


@dataclass(frozen=True)
class AnswersSeen:
    """A batch of questions: numbers, given and right answers."""

    index: Sequence[int]
    answers: Sequence[str]
    golds: Sequence[str]


@dataclass(frozen=True)
class TextSeen:
    """A batch of held-out text, and what the model said of it.

    Attributes:
        index: int64 [B], numbers of the rows.
        valid: bool [B, T].
        losses: float64 [B, T].
        ranking: int64 [B, T, k], the model's likeliest next tokens.
        reference: The same of the unedited model, where there is one.
        before: float32 [B, T], the unedited model's losses, where there is one.
        documents: int64 [B, T], the document of each target, where it is known.
    """

    index: Tensor
    valid: Tensor
    losses: Tensor
    ranking: Tensor
    reference: Tensor | None
    before: Tensor | None
    documents: Tensor | None = None


@dataclass(frozen=True)
class TextsScored:
    """A batch of members or of non-members, and how the model scores them.

    Attributes:
        index: Numbers of the texts in their class.
        member: Whether the model was trained on them.
        scores: Of each text, by the name of the measure.
    """

    index: Sequence[int]
    member: bool
    scores: Sequence[Mapping[str, float]]


class Described(Metric):
    """A torchmetrics class that an evaluation can feed and show.

    Attributes:
        labels: Of its figures, by name, in the order of tables.
        group: The heading under which they stand.
        seen: What it is fed with.
        prefix: Stands before the names of its figures.
        quiet: Gives no figure where it has counted nothing.
    """

    labels: ClassVar[dict[str, Label]] = {}
    group: ClassVar[Group] = "general"
    seen: ClassVar[type[Any]]
    prefix: ClassVar[str] = ""
    quiet: ClassVar[bool] = False

    @classmethod
    def asked(cls, setting: Setting) -> Self | None:
        """One for an evaluation, or None where it has nothing to say there."""
        return cls()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What stands beside its figures in ``results.jsonl``, such as what they depend on; after ``compute``."""
        return {}

    def observe(self, seen: Any) -> None:
        """Takes of a batch what it needs."""
        raise NotImplementedError
