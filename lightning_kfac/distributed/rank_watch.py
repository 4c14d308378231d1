"""RankWatch: when one process of a distributed run dies, the others say which, and stop."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

SECONDS_BETWEEN_BEATS = 1.0
# A process of another machine that was not heard of for so long is taken for dead.
SECONDS_TO_SILENCE = 40.0
ENDED = "ended"
BATCHES_TO_ASK = 8


class RankWatch(Callback):
    """Every rank tells the others, in a store beside the collectives, that it is alive, or how it ended.

    Without it the others wait in a collective until its timeout, half an hour by default, or end in a message
    about a closed connection. It also sees to it that SIGTERM ends all ranks between the same two batches: Lightning
    would communicate inside the signal's handler, wherever the rank happens to be.

    Example:
        >>> RankWatch().rank
        0
    """

    def __init__(self):
        self.rank, self.size = 0, 1
        self._store: dist.TCPStore | None = None
        self._over = threading.Event()
        self._asked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        if self._store is not None:  # another evaluation of the same run
            self._over = threading.Event()
            self._store.set(f"beat/{self.rank}", "0")
            trainer.strategy.barrier("rank watch")
            threading.Thread(target=self._watch, args=[self._over], daemon=True, name="rank-watch").start()
            return
        self.rank, self.size = trainer.global_rank, trainer.world_size
        host = trainer.strategy.cluster_environment.main_address
        if not self.rank:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = trainer.strategy.broadcast(self._store and self._store.port)
        if self.rank:
            self._store = dist.TCPStore(host, port, is_master=False)
        self._store.set(f"who/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self._store.set(f"beat/{self.rank}", "0")
        trainer.strategy.barrier("rank watch")
        trainer._signal_connector._sigterm_notifier_fn = lambda *_: setattr(self, "_asked", True)
        threading.Thread(target=self._watch, args=[self._over], daemon=True, name="rank-watch").start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        asked = batch_idx % BATCHES_TO_ASK == 0 or trainer.num_training_batches < 8 * BATCHES_TO_ASK
        if self._store is not None and asked and self._agreed(trainer):
            trainer._signal_connector.received_sigterm = True  # Lightning stops when the batch is done

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._agreed(trainer):
            raise SIGTERMException

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self._agreed(trainer):
            raise SIGTERMException

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to end, the same on all."""
        if self._store is None:
            return trainer.received_sigterm
        return trainer.strategy.reduce_boolean_decision(self._asked, all=False)

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
            what = (str(exception).strip() or type(exception).__name__).splitlines()[0]
            self._store.set(f"beat/{self.rank}", f"{ENDED} {what}")
            if not self.rank:  # the store ends with this process
                time.sleep(2 * SECONDS_BETWEEN_BEATS)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._store is not None:
            self._over.set()
            with suppress(Exception):
                self._store.set(f"beat/{self.rank}", ENDED)

    def _watch(self, over: threading.Event) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        heard = {rank: ("", time.monotonic()) for rank in others}
        who = {rank: self._store.get(f"who/{rank}").decode().split() for rank in others}
        beat = 0
        while not over.wait(SECONDS_BETWEEN_BEATS):
            beat += 1
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                for other in others:
                    self._look_at(other, *who[other], heard)
            except dist.DistError:  # rank 0 keeps the store
                if not over.wait(SECONDS_BETWEEN_BEATS):
                    _stop(f"{_name(0, *who[0])} is gone: killed, or out of memory")

    def _look_at(self, other: int, host: str, process: str, heard: dict[int, tuple[str, float]]) -> None:
        said, name = self._store.get(f"beat/{other}").decode(), _name(other, host, process)
        if said.startswith(ENDED):
            if what := said.removeprefix(ENDED).strip():
                _stop(f"{name} stopped: {what}")
            return
        before, when = heard[other]
        if said != before:
            heard[other] = said, time.monotonic()
        elif host == socket.gethostname() and _is_gone(int(process)):
            _stop(f"{name} is gone: killed, or out of memory")
        elif time.monotonic() - when > SECONDS_TO_SILENCE:
            _stop(f"{name} has not been heard of for {SECONDS_TO_SILENCE:.0f} seconds")


def _name(rank: int, host: str, process: str) -> str:
    return f"rank {rank} (process {process} on {host})"


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
    print(f"error: {why}; what was done is kept, the same command goes on from there", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
