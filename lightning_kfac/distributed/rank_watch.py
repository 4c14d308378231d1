"""RankWatch: when one process of a distributed run dies, the others say which, and stop."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_kfac.console import say_error
from lightning_kfac.errors import first_line

SECONDS_BETWEEN_BEATS = 1.0
# A process of another machine that was not heard of for so long is taken for dead.
SECONDS_TO_SILENCE = 40.0
ENDED = "ended"
BATCHES_TO_ASK = 8


class _Process(NamedTuple):
    """Where a rank runs."""

    host: str
    number: int


class RankWatch(Callback):
    """Every rank tells the others, in a store beside the collectives, that it is alive, or how it ended.

    Without it the others wait in a collective until its timeout, half an hour by default, or end in a message
    about a closed connection. It also sees to it that SIGTERM ends all ranks between the same two batches: Lightning
    would communicate inside the signal's handler, wherever the rank happens to be.

    Example:
        >>> RankWatch().rank
        0
    """

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self._store: dist.TCPStore | None = None
        self._over = threading.Event()
        self._asked = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        store = self._store
        if store is None:
            self.rank = trainer.global_rank
            self.size = trainer.world_size
            self._store = store = _open_store(trainer.strategy, self.rank)
            store.set(f"who/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
            # Lightning registers this method as the handler later, and offers no other way to give it one.
            trainer._signal_connector._sigterm_notifier_fn = self._note_sigterm  # type: ignore[assignment, method-assign]
        else:  # another evaluation of the same run
            self._over = threading.Event()
        store.set(f"beat/{self.rank}", "0")
        trainer.strategy.barrier("rank watch")
        threading.Thread(target=self._watch, args=[store, self._over], daemon=True, name="rank-watch").start()

    def _note_sigterm(self, signum: int, frame: FrameType) -> None:
        self._asked = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        asked = batch_idx % BATCHES_TO_ASK == 0 or trainer.num_training_batches < 8 * BATCHES_TO_ASK
        if self._store is not None and asked and self._agreed(trainer):
            trainer._signal_connector.received_sigterm = True  # Lightning stops when the batch is done

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._agreed(trainer):
            raise SIGTERMException

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._agreed(trainer):
            raise SIGTERMException

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to end, the same on all."""
        if self._store is None:
            return trainer.received_sigterm
        return trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is None:
            return
        if isinstance(exception, SIGTERMException):  # all ranks end
            self._over.set()
            with suppress(Exception):
                self._store.set(f"beat/{self.rank}", ENDED)
            return
        if _is_broken_connection(exception):
            # Another rank's death broke a collective off: the watch is about to notice, and ends this process.
            self._over.wait(SECONDS_TO_SILENCE + 2 * SECONDS_BETWEEN_BEATS)
        self._over.set()
        with suppress(Exception):
            self._store.set(f"beat/{self.rank}", f"{ENDED} {first_line(exception)}")
            if not self.rank:  # the store ends with this process
                time.sleep(2 * SECONDS_BETWEEN_BEATS)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._store is not None:
            self._over.set()
            with suppress(Exception):
                self._store.set(f"beat/{self.rank}", ENDED)

    def _watch(self, store: dist.TCPStore, over: threading.Event) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        heard = {rank: ("", time.monotonic()) for rank in others}
        who = {rank: _process(store.get(f"who/{rank}").decode()) for rank in others}
        beat = 0
        while not over.wait(SECONDS_BETWEEN_BEATS):
            beat += 1
            try:
                store.set(f"beat/{self.rank}", str(beat))
                for other in others:
                    said = store.get(f"beat/{other}").decode()
                    heard[other] = _judge(_name(other, who[other]), who[other], said, *heard[other])
            except dist.DistError:  # rank 0 keeps the store
                if not over.wait(SECONDS_BETWEEN_BEATS):
                    _stop(f"{_name(0, who[0])} is gone: killed, or out of memory")


def _open_store(strategy: Strategy, rank: int) -> dist.TCPStore:
    """The store that rank 0 keeps and all ranks reach; all of them must call it."""
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    if environment is None:
        raise RuntimeError("several ranks, but nothing says where the first one is")
    host = environment.main_address
    own = None if rank else dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = strategy.broadcast(0 if own is None else own.port)
    return dist.TCPStore(host, port, is_master=False) if own is None else own


def _judge(name: str, process: _Process, said: str, before: str, when: float) -> tuple[str, float]:
    """What another rank says now and since when; ends this process where it has failed or is gone."""
    if said.startswith(ENDED):
        if what := said.removeprefix(ENDED).strip():
            _stop(f"{name} stopped: {what}")
    elif said != before:
        return said, time.monotonic()
    elif process.host == socket.gethostname() and _is_gone(process.number):
        _stop(f"{name} is gone: killed, or out of memory")
    elif time.monotonic() - when > SECONDS_TO_SILENCE:
        _stop(f"{name} has not been heard of for {SECONDS_TO_SILENCE:.0f} seconds")
    return before, when


def _process(text: str) -> _Process:
    host, number = text.split()
    return _Process(host, int(number))


def _name(rank: int, process: _Process) -> str:
    return f"rank {rank} (process {process.number} on {process.host})"


def _is_broken_connection(error: BaseException) -> bool:
    words = "onnection", "gloo", "NCCL", "Broken pipe"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _is_gone(process: int) -> bool:
    """Whether a process of this machine has ended, be it that its parent does not know yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return Path("/proc/self/stat").exists()


def _stop(why: str) -> None:
    say_error(f"error: {why}; what was done is kept, the same command goes on from there")
    sys.stdout.flush()
    os._exit(1)
