"""The course of one collection: its texts and passes, what they find, and what is written of it."""

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning import Trainer

from lightning_kfac.callbacks.collection.collected import Collected
from lightning_kfac.callbacks.collection.passes import Pass, all_passes
from lightning_kfac.callbacks.collection.provenance import domain_metadata
from lightning_kfac.callbacks.collection.state_writer import StateWriter
from lightning_kfac.callbacks.collection.task import TextsInTurn, name_in_turn
from lightning_kfac.callbacks.collection.watch import SnapshotWatch
from lightning_kfac.callbacks.typed import data_module
from lightning_kfac.collection.session import CollectionSession
from lightning_kfac.collection.sums import MomentSums
from lightning_kfac.console import say
from lightning_kfac.data.names import CORPUS
from lightning_kfac.distributed.ranks import current_ranks
from lightning_kfac.errors import InputError
from lightning_kfac.factors.bases import FOLDER as BASES
from lightning_kfac.factors.folder import METADATA
from lightning_kfac.models.layer import Layer


class Course:
    """One collection, from the first text to the last.

    Args:
        trainer: Of the fit.
        session: Collects.
        metadata: What the factors say of where they come from.
        moments: Kind of moments to measure after the factors, if any.
        watch: Looks on at every doubling of the tokens, if anybody does.
        save_minutes: Between two states.

    Attributes:
        collected: What was found so far.
        writer: Writes the states from which an interrupted collection goes on.
        texts: Those to be read: ``corpus`` and names of domains.
        passes: All of them, once the plan is known.
        batch_tokens: Tokens of a full batch of one rank.
        identity: What must be the same in a run that goes on with this one, as it was when the run began.
    """

    def __init__(
        self,
        trainer: Trainer,
        session: CollectionSession,
        metadata: dict[str, Any],
        moments: str | None,
        watch: SnapshotWatch | None,
        save_minutes: float,
    ):
        self.root = Path(trainer.default_root_dir)
        self.session = session
        self.metadata = metadata
        self.moments = moments
        self.watch = watch
        if watch is not None:
            watch.snapshots.device = trainer.strategy.root_device
        self.identity: dict[str, Any] = {}
        self.collected = Collected(self.root, writes=trainer.is_global_zero)
        self.writer = StateWriter(self.root, save_minutes)
        self.domains: Mapping[str, Any] = getattr(data_module(trainer), "domains", {})
        self.texts: list[str] = []
        self.passes: list[Pass] = []
        self.batch_tokens = 0

    @property
    def running(self) -> bool:
        """Whether a pass has begun and not ended."""
        return self.session.running

    @property
    def _kind(self) -> str:
        if self.moments is None:
            raise RuntimeError("a pass for moments, which were not asked for")
        return self.moments

    def choose_texts(self, trainer: Trainer, reuse: bool) -> None:
        """What is to be read: the corpus, where its factors are not there already, and the domains.

        Args:
            reuse: Take factors of an earlier run of the same settings.

        Raises:
            InputError: There is nothing to do.
        """
        if reuse:
            self._reuse()
            trainer.strategy.barrier()  # rank 0 puts the folder aside next
        self.texts = [*([] if self.collected.factors else [CORPUS]), *self.domains]
        if not self.texts and not self.moments:
            raise InputError(
                f"{self.collected.folder(CORPUS)} holds these factors already, and there is nothing else to collect: "
                "edit with them, or leave collect.reuse out"
            )
        _turn_to(trainer, [*self.texts, CORPUS][0])

    def _reuse(self) -> None:
        folder = self.collected.folder(CORPUS)
        found = self.collected.reuse(self.metadata, list(self.session.layers))
        current_ranks().agree(found is not None, f"{folder}: whether its factors fit")
        if found is not None:
            self.metadata["n_tokens"] = found["n_tokens"]
            say(f"{folder}: these factors are there already, they are not collected again")

    def make_plan(self, trainer: Trainer, shape: tuple[int, int]) -> None:
        """Plans by the shape of the first batch.

        Raises:
            InputError: Nothing fits into the memory, or what is watched takes several passes.
        """
        # Ranks may see different free memory and other shapes, and must do the same all the same.
        self.session.make_plan(shape, trainer.strategy.broadcast)
        plan = self.session.plan
        self.batch_tokens = trainer.strategy.broadcast(shape[0] * shape[1])
        self.collected.owners = plan.owners
        self.passes = all_passes(plan.passes, self.texts, self.domains, self.moments is not None)
        if self.watch is not None and len(self.passes) > 1:
            raise InputError("watch_rho needs one pass: choose fewer layers, no domain and no moments, or leave it out")

    def open(self, number: int) -> None:
        """Begins a pass."""
        work = self.passes[number]
        if not work.moments:
            self.session.open(work.layers)
            return
        factors = self.collected.factors
        bases = self.collected.bases
        first = self.session.layers[work.layers[0]]
        bases.prepare(factors, work.layers, current_ranks(), device=first.device)

        def sums(layer: Layer) -> MomentSums:
            return MomentSums(layer, *bases.of(factors, layer.name, layer.device), self._kind)

        self.session.open(work.layers, sums)

    def finish(self, trainer: Trainer, number: int) -> None:
        """Ends a pass and writes what it has found; turns to the text of the next one."""
        work = self.passes[number]
        self.session.check_finite("the last batch")
        results = self.session.close(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        self.collected.add(work, results)
        if self.collected.count(work) == len(self.session.layers):
            self._save(trainer, work)
        else:
            self.collected.save_part(work, self.writer.part(number))
        if number + 1 < len(self.passes):
            _turn_to(trainer, self.passes[number + 1].text)

    def _save(self, trainer: Trainer, work: Pass) -> None:
        """Writes what all passes over one text have given."""
        if work.moments:
            self.collected.save_moments(work.text, self._kind)
            return
        n_tokens = self.session.n_tokens
        general = work.text == CORPUS
        if general:
            self.metadata["n_tokens"] = n_tokens
        _tell_of_rank(work.text, n_tokens, self.session.layers)
        own = {} if general else domain_metadata(data_module(trainer), work.text)
        self.collected.save_factors(work.text, self.metadata | own | {"n_tokens": n_tokens})
        if general:
            self.share_bases(trainer)
        if trainer.logger is not None:
            name = "n_tokens" if general else f"n_tokens_{work.text}"
            trainer.logger.log_metrics({f"collect/{name}": n_tokens}, trainer.global_step)

    def share_bases(self, trainer: Trainer) -> None:
        """Every rank that sees the folder of the factors keeps eigenbases there, for all to read."""
        trainer.strategy.barrier("factors")
        folder = self.collected.folder(CORPUS)
        if (folder / METADATA).is_file():
            self.collected.bases.folder = folder / BASES

    def watched_enough(self, trainer: Trainer) -> bool:
        """After a batch: whether the watch has seen enough; all ranks say the same."""
        if self.watch is None:
            return False
        tokens = self.batch_tokens * trainer.world_size
        draws = self.session.objective.mc_samples
        enough = self.watch.look(trainer, self.session.capture, draws, tokens, self.metadata)
        return trainer.strategy.broadcast(enough)  # solvers differ in the last bit


def _turn_to(trainer: Trainer, text: str) -> None:
    """Has the next training loader give the rows of the corpus, or of a domain by its name."""
    data = data_module(trainer)
    if isinstance(data, TextsInTurn):
        data.text_in_turn = name_in_turn(text)


def _tell_of_rank(text: str, n_tokens: int, layers: Mapping[str, Layer]) -> None:
    """Says where a factor is the sum of fewer outer products than it has rows: some directions are in none of them."""
    name, widest = max(((name, max(layer.shape)) for name, layer in layers.items()), key=itemgetter(1))
    if n_tokens < widest:
        say(
            f"{text}: {n_tokens:,} tokens are fewer than the {widest:,} dimensions of {name}: its factors have no full "
            "rank, and what lies outside the text's span counts as nothing; raise data.max_tokens"
        )
