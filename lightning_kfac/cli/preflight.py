"""Before anything expensive: all input is checked, and ``fit`` says what it will do."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Trainer

from lightning_kfac.assets import resolve_path
from lightning_kfac.callbacks import CrystallizationStudy, CurvatureCollector, EditCallback
from lightning_kfac.callbacks.mining import MINED, SEARCHED
from lightning_kfac.callbacks.typed import find_callback
from lightning_kfac.console import console, counted
from lightning_kfac.distributed.strategies import ShardedStrategy
from lightning_kfac.editing.checks import check_untied
from lightning_kfac.errors import InputError
from lightning_kfac.evaluation.bulk import check_layers
from lightning_kfac.factors.folder import load_factors
from lightning_kfac.mining.windows import check_window
from lightning_kfac.models.language import most_positions
from lightning_kfac.models.layer import Layer
from lightning_kfac.models.loading import check_stored, load_config, load_tokenizer, skeleton
from lightning_kfac.models.source import ModelSource
from lightning_kfac.models.targets import count_blocks, narrow
from lightning_kfac.models.tokenizer_identity import tokenizer_fingerprint
from lightning_kfac.modules import CausalLM
from lightning_kfac.modules.text_data import TextData
from lightning_kfac.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_fit(trainer: Trainer, model: CausalLM, data: TextData) -> Mapping[str, Layer]:
    """The layers that the collection will track, none where there is no collection.

    Raises:
        InputError: The settings of two parts do not go together, or not with this model.
    """
    collector = find_callback(trainer, CurvatureCollector)
    edit = find_callback(trainer, EditCallback)
    study = find_callback(trainer, CrystallizationStudy)
    if isinstance(trainer.strategy, ShardedStrategy) and (study is not None or not model.frozen):
        raise InputError("trainer.strategy fsdp is for collections: train and crystallize with ddp")
    if study is not None:
        with suppress(RuntimeError):  # some experts do not run on the meta device; fit checks again
            study.check(trainer, model, data, _on_paper(model))
    if collector is None:
        if edit is not None:
            raise InputError("an edit needs a collection: leave model.training and crystallize out")
        return {}
    collector.check(trainer, model)
    module = _on_paper(model)
    targets = collector.targets(module)
    if edit is not None:
        check_untied(module, targets.values())
        chosen = narrow(list(targets), count_blocks(module), edit.config.blocks, edit.config.projections)
        edit.check(chosen, list(data.domains), collector)
    return targets


def _on_paper(model: CausalLM) -> "PreTrainedModel":
    return skeleton(model.config, model.trust_remote_code)


def check_model(model: CausalLM) -> None:
    """Raises ``InputError`` where the checkpoint's weights are not what its config says."""
    if model.source is not None:
        check_stored(model.source, model.config)


def check_reference(model: CausalLM, data: TextData) -> None:
    """Raises ``InputError`` where members cannot be compared with the reference model's losses."""
    name = model.measures.leaks.reference
    if name is None:
        return
    option = f"model.measures.leaks.reference {name}"
    if not data.sets.classes:
        raise InputError(f"{option}: there is nothing to compare; set data.members and data.nonmembers")
    config = load_config(name)
    check_stored(ModelSource.named(name), config)
    if tokenizer_fingerprint(load_tokenizer(name, own_tokenizer=data.own_tokenizer)) != data.tokenizer_fingerprint:
        raise InputError(f"{option}: its tokenizer differs from the model's, so their losses are of other tokens")
    most = most_positions(config.get_text_config())
    texts = [text for texts in data.sets.scored.values() for text in texts]
    longest = max((len(text.prefix) + len(text.suffix) for text in texts), default=0)
    if most is not None and longest > most:
        raise InputError(f"{option}: it takes at most {most} positions, and a text has {longest} tokens")


def check_bulk_share(trainer: Trainer, model: CausalLM, data: TextData) -> None:
    """Raises ``InputError`` where the bulk share of members cannot be measured."""
    folder = model.measures.leaks.factors
    if folder is None:
        return
    option = f"model.measures.leaks.factors {folder}"
    if not data.sets.classes:
        raise InputError(f"{option}: there is nothing to measure; set data.members and data.nonmembers")
    _check_factors(option, folder, trainer, model)


def _check_factors(option: str, folder: str, trainer: Trainer, model: CausalLM) -> None:
    """Raises ``InputError`` where the bulk share cannot be measured with these factors."""
    if isinstance(trainer.strategy, ShardedStrategy):
        raise InputError(f"{option}: the bulk share needs whole weights; leave trainer.strategy fsdp out")
    check_layers(_on_paper(model), load_factors(folder))


def announce(folder: Path, trainer: Trainer, model: CausalLM, data: TextData, n_layers: int) -> None:
    """Prints the steps of the run in order."""
    name = model.source or f"a new {model.config.model_type}"
    text = f"{counted(data.max_tokens, 'token') if data.max_tokens else 'all'} of {data.corpus.label}"
    study = find_callback(trainer, CrystallizationStudy)
    edit = find_callback(trainer, EditCallback)
    domains = "".join(f" and on {domain.label}" for domain in data.domains.values())
    steps = [f"collect the curvature of {counted(n_layers, 'layer')} of {name} on {text}{domains}"]
    if study is not None:
        steps = [f"collect the attention residuals of layers {list(study.config.layers)} of {name} on {text}"]
    if not model.frozen:
        steps = [f"train {name} on {text}"]
    if data.validation_names:
        steps.append(f"evaluate it on {', '.join(data.validation_names)}")
    if study is not None:
        steps.append("crystallize these layers in every mode and evaluate it again")
    if edit is not None:
        what = f"formula {edit.config.formula}, rho {edit.config.rho}"
        if data.domains:
            steps.append(f"edit it ({what}), evaluate it again, and take the edit back")
            what += f", protecting {', '.join(data.domains)} as well"
        steps.append(f"edit it ({what}), save it and evaluate it again")
    console.print(f"{folder}: " + "; ".join(f"{i}. {step}" for i, step in enumerate(steps, start=1)))


def inputs(model: CausalLM, data: TextData) -> list[Path]:
    """Paths that a run reads."""
    texts = (data.corpus, data.heldout, *data.domains.values())
    corpora = [corpus.source for corpus in texts if corpus is not None]
    own = [texts for name, texts in data.sets.classes.items() if name not in data.sets.borrowed]
    files = [file for memorized in (*data.sets.files.values(), *own) for file in memorized.files()]
    files += [resolve_path(questions.source) for questions in data.question_sets.values()]
    return [resolve_path(path) for path in (model.model_name, *corpora, *files) if path]


def check_place(folder: Path, source: ModelSource | None) -> None:
    """Raises ``InputError`` where a run would write into the folder of the model that it reads."""
    if source is not None and source.path.is_dir() and folder.resolve().is_relative_to(source.path.resolve()):
        name = "trainer.default_root_dir"
        raise InputError(f"{name} {folder}: the model's own folder; name another", name)


def check_search(trainer: Trainer, model: CausalLM, data: TextData) -> None:
    """Raises ``InputError`` where no row of text holds a window, factors are not the model's, or an earlier search is
    another; before work.
    """
    check_window(data.seq_len, sum(data.window))
    if data.mining.factors is not None:
        _check_factors(f"data.mining.factors {data.mining.factors}", data.mining.factors, trainer, model)
    data.check_before(model.measures.extraction)


def make_room_for_mining(folder: RunFolder, overwrite: bool, before: Path | None) -> None:
    """A finished search is replaced only if asked for; an unfinished one goes on.

    Args:
        before: Windows of an earlier search that are read.
    """
    folder.check(overwrite, [before], replaces=SEARCHED if overwrite else (MINED,))
    if overwrite:
        folder.replace(*SEARCHED)
    folder.claim()
