"""Compare ways to suppress recitation, each at the weakest strength that does: what it costs, and what comes back."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.attacks.attack import Attack
from lightning_kfac.attacks.registry import KINDS as ATTACKS
from lightning_kfac.attacks.registry import attack_of
from lightning_kfac.attacks.relearning import TEXT
from lightning_kfac.cli.advice import apply_words, cost_in_words, show_advice
from lightning_kfac.cli.attacked import AttackedModel, PlannedAttack
from lightning_kfac.cli.compared import ComparedMethods, Done, Kinds, MeasuredReport, Methods, Row
from lightning_kfac.cli.learned import content_of_sequences, in_halves, to_learn
from lightning_kfac.cli.options import (
    add_model_options,
    add_precision_option,
    model_tokenizer,
    named_model,
    note_other_tokenizer,
    open_factors,
    open_model,
)
from lightning_kfac.console import command_line, console, show, track_count, visible
from lightning_kfac.data.halves import Halves
from lightning_kfac.editing.config import EditConfig
from lightning_kfac.editing.edited_model import edit_details, save_edited
from lightning_kfac.editing.editor import KFACEditor
from lightning_kfac.errors import InputError
from lightning_kfac.factors.folder import FactorFolder
from lightning_kfac.methods.method import Method
from lightning_kfac.methods.registry import METHODS, methods_of
from lightning_kfac.methods.training import TrainedMethod
from lightning_kfac.models.choices import Blocks, Projections
from lightning_kfac.models.fingerprint import weights_fingerprint
from lightning_kfac.models.source import ModelSource
from lightning_kfac.modules.evaluator import ModelEvaluator
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.reporting.competitors import (
    CHOOSING,
    CHOSEN_BY,
    Chosen,
    chosen,
    comparison_table,
    method_rows,
    most_recovered,
    needs_table,
    strength,
)
from lightning_kfac.storage.files import writing
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.manifest import remove_ours
from lightning_kfac.storage.run_folder import CONFIG, EVENTS, RESULTS, STATE, STATUS

NOTED = True
HALVES = "halves"
EDITED = "edited"
ATTACKED = "attacked"
COMPARED = "compared.json"
FIGURES = COMPARED
OUTPUTS = (RESULTS, COMPARED, HALVES, EDITED, ATTACKED, EVENTS, CONFIG, STATUS)
DEFAULT_ATTACKS = ["quantization", "relearning"]
NOT_ASKED = {"planted", "exposures", "shuffle", "domains", "domain_tokens", "mining"}
DRAWN = (CHOSEN_BY, "strict_acc", "perplexity", "ndcg@10")


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser)
    parser.add_argument("--factors", type=str, help="Factor folder: its layers are those that every method changes.")
    parser.add_argument("--blocks", type=Blocks, default="all", help="Only these; by default all that have factors.")
    parser.add_argument("--projections", type=Projections | None, help="Only these; by default all that have factors.")
    parser.add_argument("--output", type=str, default="runs/compare", help="Folder of results and edited models.")
    parser.add_argument(
        "--methods",
        type=list[str | dict[str, Any]],
        default=[*METHODS],
        help=f"Each by its name ({', '.join(METHODS)}), or a mapping of name, settings and strengths to try.",
    )
    parser.add_argument(
        "--attacks",
        type=list[str | dict[str, Any]],
        default=DEFAULT_ATTACKS,
        help=f"On the model of each method: names ({', '.join(ATTACKS)}) or mappings (docs/attacks.md); [] for none.",
    )
    parser.add_argument("--target", type=float, default=0.1, help="Strict accuracy to reach on the half that chooses.")
    parser.add_argument("--half_seed", type=int, default=0, help="Decides which half methods may see.")
    parser.add_argument("--device", type=str, help="Where to compute edits; by default where the model is.")
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to train and measure: auto, cpu, gpu.")
    add_precision_option(parser)
    parser.add_class_arguments(TextData, "data", skip=NOT_ASKED)


def run(options: Namespace) -> None:
    """Measures every method that is not in the folder yet, attacks the chosen ones; then shows and recommends."""
    kinds = Kinds([method for entry in options.methods for method in methods_of(entry)])
    if not kinds.by_label:
        raise InputError("--methods is empty: name at least one", "methods")
    attacks = list(dict.fromkeys(map(attack_of, options.attacks)))
    comparison = _Comparison.opened(options, kinds)
    comparison.measure()
    _show(comparison, comparison.attack(attacks))


@dataclass(frozen=True)
class _Comparison:
    """Methods on one model with all that they are measured by.

    Attributes:
        options: Of the command.
        source: The model.
        factors: Of the layers that are changed.
        halves: Of the memorized set.
        data: Measures the reported half, for attacks.
        content: Identifies what it measures.
        kinds: The methods.
        methods: Applies them.
        measured: Their results.
        fingerprint: Of the layers before they are changed.
    """

    options: Namespace
    source: ModelSource
    factors: FactorFolder
    halves: Halves
    data: TextData
    content: str
    kinds: Kinds
    methods: Methods
    measured: ComparedMethods
    fingerprint: str

    @classmethod
    def opened(cls, options: Namespace, kinds: Kinds) -> "_Comparison":
        """Reads all; what cannot be compared is refused before the work."""
        folder = Path(options.output)
        factors = open_factors(options)
        source = named_model(options, factors.metadata, factors.path)
        settings = _settings(options)
        halves, data = in_halves(source, settings | {"sets": None}, options.half_seed, folder / HALVES)
        if min(map(len, halves)) < 2:
            raise InputError("data.memorized: each half needs at least two sequences, better fifty", "data.memorized")
        sets = {CHOOSING: str(folder / HALVES / "shown.jsonl"), **(settings["sets"] or {})}
        reported = str(folder / HALVES / "reported.jsonl")
        both = TextData(**settings | {"memorized": reported, "sets": sets})
        data.read_as(source)
        content = data.measured()
        evaluator = ModelEvaluator(source, options.dtype, both, folder, options.accelerator)
        note_other_tokenizer(factors, both.tokenizer_fingerprint)
        model = open_model(source, options)
        where = EditConfig(blocks=options.blocks, projections=options.projections)
        editor = KFACEditor(model, factors, where, dtype=options.precision, device=options.device, repeated=True)
        every = [method for of_kind in kinds.by_label.values() for method in of_kind]
        trains = any(isinstance(method, TrainedMethod) for method in every)
        retain = to_learn(TEXT, halves, data, source, folder, "methods: text to retain") if trains else []
        methods = Methods(editor, where, halves.shown, retain, folder / STATE, options.accelerator)
        methods.check(every)
        weights = weights_fingerprint(model, factors), factors.content()
        context = weights, sorted(methods.layers), both.measured(), options.dtype, options.precision
        measured = ComparedMethods(evaluator, folder / RESULTS, context, content_of_sequences(retain))
        before = weights_fingerprint(model, methods.layers)
        return cls(options, source, factors, halves, data, content, kinds, methods, measured, before)

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.options.output)

    def rows(self, label: str | None = None) -> list[Row]:
        """Results of the unedited model and of the methods, or of one kind."""
        kinds = self.kinds.by_label
        some = list(kinds.values()) if label is None else [kinds[label]]
        keys = [self.measured.baseline, *(self.measured.key(method) for of_kind in some for method in of_kind)]
        return [self.measured.rows[key] for key in keys if key in self.measured.rows]

    def chosen(self, label: str) -> Row | None:
        """The weakest of a kind, of those measured, that suppresses enough."""
        return next((one.row for one in chosen(self.rows(label), self.options.target) if one.reached), None)

    def path(self, label: str) -> Path:
        """Of the chosen model of a kind."""
        return self.folder / EDITED / re.sub(r"\W+", "_", label.lower()).strip("_")

    def measure(self) -> None:
        """Measures what is missing, and saves of each kind the weakest that suppresses enough."""
        todo = {label: self._missing(label) for label in self.kinds.by_label}
        total = sum(map(len, self.kinds.by_label.values()))
        missing = sum(map(len, todo.values()))
        console.print(
            f"{self.folder}: {total} strengths of {len(todo)} methods on {self.source}, {total - missing} of them "
            f"measured before; {len(self.halves.shown)} sequences choose, {len(self.halves.reported)} are reported, "
            "which no method sees"
        )
        if not missing:
            return
        self.measured.measure_baseline(self.methods.editor.model)
        done = itertools.count(1)
        with track_count("compare", "strengths", total=missing) as advance_to:
            for label, methods in todo.items():

                def measured(applied: Done, label: str = label) -> None:
                    self.measured.measure(applied, label)
                    self._save(applied, label)
                    advance_to(next(done))

                if methods:
                    self.methods.run(methods, self.measured.key, measured)

    def _missing(self, label: str) -> list[Method]:
        """Those of a kind without a result, or the chosen one where its model is gone."""
        of_kind = self.kinds.by_label[label]
        missing = [method for method in of_kind if self.measured.key(method) not in self.measured.rows]
        best = self.chosen(label)
        if missing or best is None or self._saved(label) == best["point"]:
            return missing
        return [method for method in of_kind if self.measured.key(method) == best["point"]]

    def _saved(self, label: str) -> str | None:
        """Which result the saved model of a kind belongs to."""
        path = self.path(label)
        return edit_details(str(path)).get("point") if path.is_dir() else None

    def _save(self, applied: Done, label: str) -> None:
        """Writes the model, if it is the chosen one as far as is known."""
        best = self.chosen(label)
        key = self.measured.key(applied.method)
        if best is None or best["point"] != key or self._saved(label) == key:
            return
        save_edited(
            applied.model,
            model_tokenizer(self.source),
            self.path(label),
            MeasuredReport(applied.report, key),
            source=self.source,
            fingerprint=self.fingerprint,
            factors={name: value for name, value in self.factors.metadata.items() if name != "layers"},
        )

    def attack(self, attacks: Sequence[Attack]) -> dict[str, list[Row]]:
        """What attacks get out of the model of each method, by its label: from the folder, or measured now."""
        reached = [label for label in self.kinds.by_label if self.chosen(label) is not None] if attacks else []
        return {label: self._attack(label, attacks) for label in reached}

    def _attack(self, label: str, attacks: Sequence[Attack]) -> list[Row]:
        edited = ModelSource.named(str(self.path(label)))
        folder = self.folder / ATTACKED / self.path(label).name
        plan = [PlannedAttack.of(attack, self.halves, self.data, edited, folder) for attack in attacks]
        evaluator = ModelEvaluator(edited, self.options.dtype, self.data, folder, self.options.accelerator)
        context = edit_details(edited)["point"], self.content, self.options.dtype
        measured = AttackedModel(evaluator, folder / RESULTS, context)
        abouts = [about for planned in plan for about in planned.abouts]
        if missing := [about for about in abouts if not measured.done(about)]:
            model = open_model(edited, self.options)
            measured.measure_pair(lambda: self.methods.editor.model, model)
            done = itertools.count(1)
            with track_count(f"attack {label}", "attacks", total=len(missing)) as advance_to:
                for planned in plan:
                    planned.run(measured, model, folder, self.options.accelerator, lambda: advance_to(next(done)))
        return measured.shown(abouts)


def _settings(options: Namespace) -> dict[str, Any]:
    """Of the data; what a comparison cannot do without is there."""
    settings = options.data.as_dict()
    for name in ("memorized", "heldout"):
        if not settings.get(name):
            raise InputError(f"a comparison measures recitation and perplexity: set data.{name}", f"data.{name}")
    if CHOOSING in (settings.get("sets") or {}):
        raise InputError(f"data.sets: {CHOOSING} is the half that chooses; give the set another name", "data.sets")
    return settings


def _show(comparison: _Comparison, attacked: Mapping[str, list[Row]]) -> None:
    """Tables, TensorBoard, and one recommended command."""
    rows = comparison.rows()
    target = comparison.options.target
    show(comparison_table(rows, target))
    show(needs_table(rows, target, attacked))
    _to_tensorboard(method_rows(rows), comparison.folder / EVENTS)
    found = chosen(rows, target)
    reached = [one for one in found if one.reached]
    compared: dict[str, Any] = {"target": target, "chosen": {one.label: one.row["point"] for one in reached}}
    places = {label: f"{ATTACKED}/{comparison.path(label).name}/{RESULTS}" for label in attacked}
    compared |= {"attacked": places}
    console.print(f"results, {EDITED}/ (one model a method) and tensorboard/ are in {comparison.folder}/")
    if reached:
        # Of what a method was shown it says nothing that it suppresses it: those come second.
        blind = [one for one in reached if "forget set" not in one.row["method"]["needs"]]
        best = (blind or reached)[0]
        compared["command"] = _command(best, comparison)
        compared["expected"] = cost_in_words(rows[0], best.row)
        notes = [*_failures(best, attacked, target), *(_cheaper(reached[0], attacked) if reached[0] != best else [])]
        show_advice(compared["command"], compared["expected"], notes)
    else:
        least = min(one.row[CHOSEN_BY] for one in found)
        console.print(f"No method reaches strict {target:g} on the half that chooses; the least is {least:.3f}.")
    write_json(comparison.folder / COMPARED, compared, checksum=False)


def _command(one: Chosen, comparison: _Comparison) -> str:
    """What makes this model again."""
    options = comparison.options
    output = f"{comparison.folder}-{comparison.path(one.label).name}"
    edit = one.row["edit"]
    if "formula" in edit:
        return command_line("apply", *apply_words(edit, options.factors, options.model, output))
    method = next(m for m in comparison.kinds.by_label[one.label] if comparison.measured.key(m) == one.row["point"])
    about = method.about()
    entry = json.dumps([{"name": about.pop("method"), **about}])
    config = comparison.folder / CONFIG
    return command_line("compare", "--config", config, "--methods", entry, "--attacks", "[]", "--output", output)


def _failures(best: Chosen, attacked: Mapping[str, list[Row]], target: float) -> list[str]:
    """Where the recommended method fails."""
    notes = []
    if "forget set" in best.row["method"]["needs"]:
        notes.append("It was shown the half that chose it, and needs the text that is to be forgotten.")
    for key, value in best.row.items():
        name, slash, figure = key.partition("/")
        if slash and figure == "strict_acc" and name != CHOOSING and value is not None and value > target:
            notes.append(f"It does not bring {name} to {target:g}: strict accuracy {value:.2f}.")
    if best.row["strict_acc"] > target:
        notes.append(f"On the half that chose nothing it does not reach {target:g}.")
    if came := most_recovered(attacked.get(best.label, [])):
        notes.append(f"Of the attacks brings most back: {came}.")
    return notes


def _cheaper(one: Chosen, attacked: Mapping[str, list[Row]]) -> list[str]:
    """A method that costs less and was shown the half that chose it."""
    came = most_recovered(attacked.get(one.label, []))
    return [
        f"{one.label} ({strength(one.row)}) costs less, perplexity {one.row['perplexity']:.4g}, but was shown the half "
        f"that chose it: of 100 sequences that it was not shown it leaves {100 * one.row['strict_acc']:.0f}"
        + (f", and of what it suppressed comes back most under {came}." if came else ".")
    ]


def _to_tensorboard(kinds: Mapping[str, Sequence[Row]], board: Path) -> None:
    """One run for each method, so that TensorBoard draws them in one chart."""
    remove_ours(board)  # all of it is written again each time
    with writing(board):
        for label, rows in kinds.items():
            with SummaryWriter(str(board / visible(label).replace("/", "_"))) as writer:
                for number, row in enumerate(rows):
                    figures = {f"hp/{key}": row[key] for key in DRAWN if row.get(key) is not None}
                    for key, value in figures.items():
                        writer.add_scalar(f"{key.removeprefix('hp/')} by strength", value, number)
                    settings = {"method": visible(label), row["method"]["strength"]: row["method"]["amount"]}
                    writer.add_hparams(settings, figures, run_name=strength(row), global_step=0)
