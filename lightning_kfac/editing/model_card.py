"""The model card of an edited checkpoint or a patch: what it is, what was measured, and what was not.

Its front matter is what the Hugging Face hub reads (``huggingface_hub.ModelCardData``).
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_kfac.console import PROGRAM, counted
from lightning_kfac.data.names import MEMORIZED
from lightning_kfac.models.source import ModelSource
from lightning_kfac.storage.files import new_file
from lightning_kfac.storage.json_files import read_json
from lightning_kfac.storage.run_folder import EDIT_FILE

if TYPE_CHECKING:
    from lightning_kfac.metrics.described import Label

CARD = "README.md"
TAGS = ["memorization", "unlearning", "k-fac", "model-editing", PROGRAM]
# Of the source's card these are its licence and its language; base_model of a local copy is the hub's name of it.
CARRIED = ("license", "license_name", "license_link", "language")
NOT_MEASURED = (
    "Whether the text can be had in other ways: other prompts, paraphrases, fine-tuning, quantization. The edit "
    f"disrupts recall; it is no proof of deletion (`{PROGRAM} attack` tries some).",
    "Abilities beyond what the table shows: facts and arithmetic may suffer more than perplexity tells.",
    "Other texts than those of the table, and other seeds.",
)
CITATION = """@article{merullo2025memorization,
  title   = {From Memorization to Reasoning in the Spectrum of Loss Curvature},
  author  = {Merullo, Jack and Vatsavaya, Srihita and Bushnaq, Lucius and Lewis, Owen},
  journal = {arXiv preprint arXiv:2510.24256},
  year    = {2025}
}"""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
Row = Mapping[str, Any]


def write_card(folder: Path, before: Row | None, after: Row | None) -> None:
    """Writes the card of an edited checkpoint or a patch again, with what was measured.

    Args:
        folder: It holds ``edit.json``.
        before, after: Results of the unedited and the edited model: figures, and ``intervals`` and ``differences``.
    """
    details = read_json(folder / EDIT_FILE, "edit the model again")
    with new_file(folder / CARD) as partial:
        partial.write_text(model_card(details, before, after), "utf-8")


def model_card(details: Mapping[str, Any], before: Row | None = None, after: Row | None = None) -> str:
    """The text of ``README.md``.

    Args:
        details: Contents of ``edit.json``; a patch has ``patch``.
        before, after: As for ``write_card``; None where nothing was measured.

    Example:
        >>> summary = {"formula": "original", "rho": 0.8, "blocks": [3], "projections": ["up"]}
        >>> card = model_card({"model": "a/base", "summary": summary, "version": "0.1"})
        >>> [line for line in card.splitlines() if line.startswith(("base_model:", "# "))]
        ['base_model: a/base', '# An edit of a/base']
    """
    source = ModelSource.recorded(details)
    is_patch = "patch" in details
    name = "a model" if source is None else _shown(source)
    parts = [
        f"---\n{_front_matter(source, is_patch)}\n---",
        f"# {'A patch' if is_patch else 'An edit'} of {_plain(name)}",
        _about(name, is_patch),
        f"## The edit\n\n{_settings(details)}",
        f"## Measured\n\n{_measured(before, after)}",
        "## Not measured\n\n" + "\n".join(f"- {text}" for text in NOT_MEASURED),
        f"## How to use it\n\n{_use(name, is_patch)}",
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n\nMade with lightning_kfac {details.get('version', '')}.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(source: ModelSource | None, is_patch: bool) -> str:
    from huggingface_hub import ModelCardData  # not needed before something is written

    carried = {} if source is None else _card_of(source)
    found = {key: carried[key] for key in CARRIED if carried.get(key)}
    base = _on_the_hub(source) or carried.get("base_model")
    if base:
        found |= {"base_model": base, "base_model_relation": "finetune"}
    library = "lightning-kfac" if is_patch else "transformers"
    about = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=TAGS, **found)
    return about.to_yaml()


def _on_the_hub(source: ModelSource | None) -> str | None:
    """The hub's name of a model that is no local folder."""
    if source is None or source.path.exists() or not HUB_NAME.fullmatch(source.name):
        return None
    return source.name


def _card_of(source: ModelSource) -> dict[str, Any]:
    """The front matter of the source's own card; empty where it has none or it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.repocard import metadata_load

    with suppress(Exception):  # of the hub, of its connection, of a card that is no YAML: nothing is carried over
        path = source.path / CARD
        if not source.path.exists():
            path = Path(hf_hub_download(source.name, CARD, revision=source.revision))
        found = metadata_load(path) if path.is_file() else None
        return found if isinstance(found, dict) else {}
    return {}


def _shown(source: ModelSource) -> str:
    """A hub name as it is; of a local folder its last part, for a card is read elsewhere."""
    return source.path.name if source.path.exists() and "/" in source.name else str(source)


def _about(name: str, is_patch: bool) -> str:
    what = "The weights that an edit of" if is_patch else "The weights of"
    rest = "changed; everything else stays as it is" if is_patch else "with a few matrices changed"
    return (
        f"{what} {_plain(name)} {rest}, to make the model recite less of what it has memorized. For each of these "
        "matrices the edit finds the directions that the loss on general text is sensitive to, by the K-FAC curvature, "
        "keeps the strongest, and drops the rest."
    )


def _settings(details: Mapping[str, Any]) -> str:
    summary = details.get("summary") or {}
    factors = details.get("factors") or {}
    layers = details.get("layers") or []
    rows = {
        "method": summary.get("method") or "curvature edit",
        "formula": summary.get("formula"),
        "rho": summary.get("rho"),
        "mode": summary.get("mode"),
        "blocks": _listed(summary.get("blocks")),
        "projections": _listed(summary.get("projections")),
        "layers changed": len(layers) or None,
        "components kept": _share(summary.get("fraction_kept")),
        "change of the weights": _share(summary.get("relative_change"), "of their norm, mean over the layers"),
        "curvature of": _curvature(factors),
        "forced": "yes: the factors belong to other weights or tokens" if details.get("forced") else None,
    }
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines, "", f"`{EDIT_FILE}` has every layer."])


def _curvature(factors: Mapping[str, Any]) -> str | None:
    if not factors.get("n_tokens"):
        return None
    labels = f", {factors['labels']} labels" if factors.get("labels") else ""
    return f"{counted(factors['n_tokens'], 'token')} of {factors.get('corpus') or 'a text'}{labels}"


def _measured(before: Row | None, after: Row | None) -> str:
    if after is None:
        command = f"{PROGRAM} validate --model.model_name FOLDER --data.memorized FILE"
        return f"Nothing yet. `{command}` measures it beside the unedited model."
    keys = [key for key in after if _is_shown(key) and after[key] is not None]
    lines = [(_plain(_title(key)), _figure(before, key), _figure(after, key), _change(after, key)) for key in keys]
    rows = [f"| {' | '.join(line)} |" for line in lines]
    sets = {key.rpartition("/")[0] or MEMORIZED: counted(after[key], "sequence") for key in _counts(after)}
    counts = [f"{_plain(name)}: {count}" for name, count in sets.items()]
    notes = ["In brackets: 95 % intervals.", *([f"Sets: {'; '.join(counts)}."] if counts else [])]
    head = ["| | unedited | edited | change |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", " ".join(notes)])


def _is_shown(key: str) -> bool:
    label = _labels().get(key.rpartition("/")[2])
    return label is not None and not label.aside


def _counts(row: Row) -> list[str]:
    return [key for key in row if key.endswith("n_sequences")]


def _title(key: str) -> str:
    prefix, _, name = key.rpartition("/")
    return f"{prefix}: {_labels()[name].title}" if prefix else _labels()[name].title


def _figure(row: Row | None, key: str) -> str:
    value = None if row is None else row.get(key)
    if row is None or value is None:
        return ""
    style = _labels()[key.rpartition("/")[2]].style
    return style.format(value) + _bounds((row.get("intervals") or {}).get(key), style)


def _change(row: Row, key: str) -> str:
    value, *bounds = (row.get("differences") or {}).get(key) or [None]
    style = _labels()[key.rpartition("/")[2]].style.replace(":", ":+")
    return "" if value is None else style.format(value) + _bounds(bounds, style)


def _bounds(bounds: Any, style: str) -> str:
    if not bounds or None in bounds or bounds[0] == bounds[1]:
        return ""
    return f" [{style.format(bounds[0])}, {style.format(bounds[1])}]"


def _use(name: str, is_patch: bool) -> str:
    if is_patch:
        words = ["--model", name, "--patch", "FOLDER_OR_REPOSITORY", "--output", "NEW_FOLDER"]
        return f"```\npip install lightning-kfac\n{PROGRAM} apply {' '.join(words)}\n```"
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")\n```'
    )


def _listed(values: Any) -> str | None:
    return ", ".join(map(str, values)) if values else None


def _share(value: float | None, of: str = "") -> str | None:
    return None if value is None else f"{100 * value:.1f} % {of}".strip()


def _plain(text: object) -> str:
    """As Markdown in a table: what is markup there is shown."""
    return re.sub(r"([\\`*\[\]<>#|~&!$])", r"\\\1", " ".join(str(text).split()))


def _labels() -> "Mapping[str, Label]":
    """What is known of each figure; torchmetrics, which it takes, is not needed to apply an edit."""
    from lightning_kfac.metrics.registry import LABELS

    return LABELS
