"""Fewer warnings of other libraries, and none that acts on the terminal."""

import logging
import os
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import TextIO

from typing_extensions import override

from lightning_kfac.console import visible
from lightning_kfac.storage.files import trouble_of


def quiet() -> None:
    """Silences what Lightning tells on every start and what does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*custom batch sampler .*",
        ".*overridden `on_before_batch_transfer`.*",
        ".*sync_dist=True.*",
        ".*returned a view tensor.*",  # of a sharded GPT-2, on which nothing is done in place
    ):
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _of_threads
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of the parser's use by Lightning
    logging.setLogRecordFactory(_VisibleRecord)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_exception


class _VisibleRecord(logging.LogRecord):
    """What any library logs, names of files and settings among it, as text that acts on nothing."""

    @override
    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """The same for warnings."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    print(visible(text, keep="\n\t"), end="", file=file or sys.stderr)


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The same for what nobody expected."""
    print(visible("".join(traceback.format_exception(kind, error, trace)), keep="\n\t"), end="", file=sys.stderr)


def _of_threads(failed: threading.ExceptHookArgs) -> None:
    """A full disk under TensorBoard's thread is raised again where it is flushed, and ends in one line there."""
    if failed.exc_value is None or trouble_of(failed.exc_value) is None:
        threading.__excepthook__(failed)


def without_loading_bar() -> None:
    """No progress bar while transformers reads weights."""
    import transformers  # only by commands that read weights

    transformers.utils.logging.disable_progress_bar()
