"""Audit a model: which of these texts come out of it, how surely, and where? Writes one page with a verdict."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from lightning_kfac.assets import resolve_path
from lightning_kfac.cli.options import add_model_options
from lightning_kfac.console import command_line, console, filled, show
from lightning_kfac.data.corpus import Corpus
from lightning_kfac.data.names import NONMEMBERS
from lightning_kfac.data.passages import Passages, check_lengths, load_passages
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.audit import CHANCE, MEASURES, check_chance
from lightning_kfac.metrics.described import Sampling
from lightning_kfac.models.language import most_positions
from lightning_kfac.models.loading import load_config, load_tokenizer
from lightning_kfac.models.source import ModelSource
from lightning_kfac.storage.files import new_file
from lightning_kfac.storage.json_files import write_json
from lightning_kfac.storage.run_folder import CONFIG, STATE, STATUS, RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_kfac.cli.audited import Found
    from lightning_kfac.math.strips import Strip

NOTED = True
PRINTS = True
PAGE = "audit.html"
FIGURES = "audit.json"
PASSAGES = "passages.jsonl"
WRITTEN = (PAGE, FIGURES, PASSAGES, CONFIG, STATUS)
# What is audited where nothing is named: as in configs/audit.yaml.
EMBEDDED: dict[str, Any] = {
    "model": "demo",
    "texts": "demo:planted_report.jsonl",
    "documents": {"embedded": True, "split": "planted"},
    "nonmembers": "demo:unseen.jsonl",
    "heldout": "embedded",
}
MEASURE = "texts@1000"
Source = str | dict[str, bool | str | None]


def add_options(parser: ArgumentParser) -> None:
    """Options of the command."""
    add_model_options(parser, otherwise="An edited one is compared with the model that its edit.json names.")
    texts = (
        "Whose text: a memorized set (JSONL with prefix and suffix, .npy, ...), or a file or folder of text or records."
    )
    parser.add_argument("--texts", type=Source | None, help=texts)
    documents = "More documents to draw as strips; they do not count in the verdict. Long texts are drawn in any case."
    parser.add_argument("--documents", type=Source | None, help=documents)
    parser.add_argument("--documents_tokens", type=int, default=20_000, help="Token budget of these documents.")
    nonmembers = "Texts like --texts that the model was not trained on: can a membership test tell the two apart?"
    parser.add_argument("--nonmembers", type=Source | None, help=nonmembers)
    parser.add_argument("--prefix_len", type=int | None, help="Tokens of a prefix. (default: 64; of a set its own)")
    parser.add_argument("--suffix_len", type=int | None, help="Tokens of a suffix. (default: 48; of a set its own)")
    parser.add_argument(
        "--heldout", type=Source | None, help="Text for perplexity and nDCG; embedded, or like --texts."
    )
    parser.add_argument("--heldout_tokens", type=int, default=20_000, help="Token budget of the held-out text.")
    parser.add_class_arguments(Sampling)
    chance = "A passage comes out in n tries where the chance of at least one is this (p of (n, p)-discoverable)."
    parser.add_argument("--chance", type=float, default=CHANCE, help=chance)
    above = "End with exit status 1 where the measure of the model is above this share."
    parser.add_argument("--fail_above", type=float | None, help=above)
    measure = (
        "Which: texts of which a passage comes out in N tries, such passages, greedy recitation, or expected shares."
    )
    parser.add_argument("--measure", type=Literal[MEASURES], default=MEASURE, help=measure)
    parser.add_argument("--batch_size", type=int, default=64, help="Passages at once.")
    parser.add_argument("--accelerator", type=str, default="auto", help="Where to evaluate: auto, cpu, gpu.")
    differing = "Where transformers ignores tokenizer.json: use the file's own tokenizer (true) or the other (false)."
    parser.add_argument("--data.own_tokenizer", type=bool | None, default=None, help=differing)
    parser.add_argument("--output", type=str, default="runs/audit", help="Folder of the page and the figures.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier audit in the same folder.")


def run(options: Namespace) -> int:
    """Audits; 1 where the measure is above --fail-above, else 0."""
    if options.model is None and options.texts is None:
        for name, value in EMBEDDED.items():
            options[name] = options[name] or value
    sampling = _checked(options)
    return int(_audited(options, sampling)["exceeded"])


def _checked(options: Namespace) -> Sampling:
    """How samples are drawn; raises ``InputError`` for options that cannot be used."""
    for name in ("model", "texts"):
        if not options[name]:
            raise InputError(f"--{name} is missing; without --model and --texts the embedded demo is audited")
    for name, least in (("batch_size", 1), ("heldout_tokens", 2), ("documents_tokens", 2)):
        if options[name] < least:
            raise InputError(f"--{name} is {options[name]}; it must be at least {least}")
    try:
        check_lengths(options.prefix_len, options.suffix_len)
        check_chance(options.chance, options.fail_above, options.measure, options.near_verbatim)
        return Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})
    except InputError as error:
        said = str(error).removeprefix("extraction.")
        raise InputError(f"--{said}") from None


def _audited(options: Namespace, sampling: Sampling) -> dict[str, Any]:
    """What is written to the folder, which is made only when all input has been read."""
    # Here, so that the help does not wait for it.
    from lightning_kfac.cli.audited import TEXTS, described, excerpts_of, measured, strips_along, subject_of

    model = ModelSource.named(
        options.model, options.revision, options.gguf_file, options.adapter, options.trust_remote_code
    )
    config = load_config(model).get_text_config()
    subject = subject_of(model, config.vocab_size)
    tokenizer = load_tokenizer(model, own_tokenizer=options.data.own_tokenizer)
    sets = _passages(options, tokenizer, config.vocab_size, most_positions(config))
    texts = sets[TEXTS]
    folder = RunFolder(options.output, "audit", WRITTEN, "output")
    folder.lock()
    try:
        _claim(folder, options)
        found = measured(options, sampling, subject, folder.path, sets)
        audit = described(options, sampling, subject, sets, found)
        excerpts = excerpts_of(texts, found, options.chance, tokenizer)
        strips = [strip for name in sets if name != NONMEMBERS for strip in strips_along(name, sets[name], found)]
        _write(folder.path, audit, excerpts, strips, texts, found)
        folder.finish()
    finally:
        folder.unlock()
    _tell(audit, folder.path)
    return audit


def _passages(
    options: Namespace, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, most: int | None
) -> dict[str, Passages]:
    """Of the texts, of the documents that are only drawn, and of texts that the model has not seen."""
    from lightning_kfac.cli.audited import DOCUMENTS, TEXTS

    sets = {}
    for name, source, budget in (
        (TEXTS, options.texts, None),
        (DOCUMENTS, options.documents, options.documents_tokens),
        (NONMEMBERS, options.nonmembers, None),
    ):
        if source:
            lengths = {"prefix_len": options.prefix_len, "suffix_len": options.suffix_len, "max_tokens": budget}
            sets[name] = load_passages(source, tokenizer, vocab_size, **lengths)
            _check_passages(sets[name], most, options.prior_ratio)
    if options.heldout:
        Corpus.parse(options.heldout, "heldout").check()
    return sets


def _check_passages(texts: Passages, most: int | None, prior_ratio: bool) -> None:
    longest = max(len(passage.prefix) + len(passage.suffix) for passage in texts.passages)
    if most is not None and longest > most:
        raise InputError(
            f"{texts.source}: a passage of {longest} tokens, but the model takes at most {most} positions; lower "
            "--prefix-len or --suffix-len"
        )
    if prior_ratio and len(texts.passages) < 2:
        raise InputError(f"{texts.source}: one passage, and --prior-ratio needs the prefix of another")


def _claim(folder: RunFolder, options: Namespace) -> None:
    """The folder is ours: a finished audit is replaced only if asked for, an interrupted one goes on."""
    sources = options.texts, options.documents, options.nonmembers
    folder.check(options.overwrite, [resolve_path(source) for source in sources if isinstance(source, str)])
    if options.overwrite and not folder.interrupted:
        folder.replace(*WRITTEN, STATE)
    folder.claim(command_line(*sys.argv[1:]))


def _write(
    folder: Path,
    audit: dict[str, Any],
    excerpts: list[dict[str, Any]],
    strips: "list[Strip]",
    texts: Passages,
    found: "Mapping[str, Found]",
) -> None:
    """The page last: it says that the audit is whole."""
    from lightning_kfac.cli.audited import finite
    from lightning_kfac.reporting.audit_page import audit_page

    with new_file(folder / PASSAGES) as partial, open(partial, "w", encoding="utf-8") as file:
        for number, passage in enumerate(texts.passages):
            log_p = {name: finite(one.texts.log_p[number]) for name, one in found.items()}
            strict = {name: bool(one.texts.strict[number]) for name, one in found.items()}
            row = {"text": passage.text, "start": passage.start, "log_p": log_p, "strict": strict}
            file.write(json.dumps(row) + "\n")
    write_json(folder / FIGURES, audit, checksum=False)
    text = audit_page(audit | {"excerpts": excerpts}, strips)
    with new_file(folder / PAGE) as partial:
        partial.write_text(text, "utf-8")


def _tell(audit: Mapping[str, Any], folder: Path) -> None:
    from lightning_kfac.reporting.audit_page import figures_table

    for text in audit["verdict"]:
        for line in filled(text).splitlines():
            console.print(line)
    show(figures_table(audit))
    console.print(f"{folder / PAGE}, {FIGURES} and {PASSAGES}")
    if audit["exceeded"]:
        console.print(f"{audit['measure']} is {audit['value']:.3f}, above --fail-above {audit['fail_above']:g}")
