"""How figures are called and shown: what the metrics say of themselves, in the forms that tables need."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_kfac.metrics.leaks import OBJECT, SCORES
from lightning_kfac.metrics.near_verbatim import NearVerbatim, PriorRatio
from lightning_kfac.metrics.registry import LABELS, names_of

METRICS = LABELS
OF_A_SET = names_of("set")
OF_STRESS = names_of("stress")
OF_GENERAL = names_of("general")
OF_QUESTIONS = names_of("questions")
# Of a sweep, with shorter names.
SWEEP_COLUMNS = {name: (label.short, label.style) for name, label in LABELS.items() if label.short is not None}
OF_EXTRACTION = [name for name in LABELS if name.startswith("extraction.")]
OF_EXTRACTION_OPTIONS = [*NearVerbatim.labels, *PriorRatio.labels]
DRAWN = [name for name, label in LABELS.items() if label.panel is not None]
FEWEST_SHOWN = 10
# What a person reads for the name of a stage in results; others read as they are.
STAGES = {"baseline": "unedited"}
INTERVALS = "95 % intervals; shares: Wilson, other figures: bootstrap, changes: paired bootstrap; n/a: not known"
# Of members against non-members: by the name of the measure.
OF_LEAKS = {name: f"{OBJECT}.{name}" for name in SCORES}


def stage_label(stage: str) -> str:
    """How an evaluated model is called.

    Example:
        >>> stage_label("baseline"), stage_label("edited")
        ('unedited', 'edited')
    """
    return STAGES.get(stage, stage)


def legend(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the figures of these records mean, a line each: ``strict accuracy: share of ...``."""
    records = list(records)
    names = [name for name in LABELS if any(key.rpartition("/")[2] == name for record in records for key in record)]
    lines: dict[str, list[str]] = {}
    for name in names:
        if LABELS[name].meaning and not LABELS[name].aside:
            lines.setdefault(LABELS[name].meaning, []).append(LABELS[name].title)
    return [f"{_together(titles)}: {meaning}" for meaning, titles in lines.items()]


def _together(titles: list[str]) -> str:
    """Titles of figures of one kind: ``extracted by one sample, ... in 1,000 samples``."""
    return titles[0].partition(" by ")[0] if len(titles) > 1 else titles[0]


def measured_leaks(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The measures of members against non-members that any record has."""
    records = list(records)
    return [name for name, key in OF_LEAKS.items() if any(f"{key}.auc" in record for record in records)]


def is_drawn(records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a figure of all stages would show anything."""
    return any(key.rpartition("/")[2] in DRAWN for record in records for key in record)


def is_telling(key: str, records: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any record has the figure; where a figure names its counter, of more than a few sequences."""
    prefix, slash, kind = key.rpartition("/")
    counter = LABELS[kind].counter
    return any(
        key in record and (counter is None or record.get(f"{prefix}{slash}{counter}", 0) >= FEWEST_SHOWN)
        for record in records
    )
