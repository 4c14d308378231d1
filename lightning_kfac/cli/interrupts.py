"""Ctrl-C: the first one ends a run where its state is saved, as SIGTERM does; the second one at once."""

import os
import signal
import threading
from types import FrameType, TracebackType

from typing_extensions import Self

from lightning_kfac.console import say_error


class Interrupts:
    """Listens while a command runs.

    Attributes:
        seen: Somebody has pressed Ctrl-C.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> Self:
        self._listens = threading.current_thread() is threading.main_thread()  # Python lets no other thread
        if self._listens:
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        again = self.seen
        self.seen = True
        if again or not callable(signal.getsignal(signal.SIGTERM)):  # nothing has begun that could be saved
            raise KeyboardInterrupt
        say_error("stopping as soon as the state can be saved; Ctrl-C again stops at once")
        os.kill(os.getpid(), signal.SIGTERM)
