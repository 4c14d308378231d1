"""Pictures, texts and tables through every Lightning logger that takes them; the others get the figures alone.

TensorBoard takes them as figures and Markdown, Weights & Biases (``WandbLogger``) as images and tables.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from lightning_kfac.console import visible
from lightning_kfac.metrics.registry import LABELS
from lightning_kfac.reporting.escape import as_markdown
from lightning_kfac.reporting.labels import stage_label

PLACE = "comparison"
Records = Mapping[str, Mapping[str, Any]]


class Board:
    """Shows things in the loggers of a trainer.

    Args:
        loggers: ``trainer.loggers``.

    Attributes:
        takes_pictures: Whether any of them does.
    """

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = loggers
        self.takes_pictures = any(isinstance(one, TensorBoardLogger) or _rich(one) for one in loggers)

    def figure(self, tag: str, drawn: Figure) -> None:
        """A figure under a name such as ``comparison/metrics``."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(tag, drawn)
            elif (rich := _rich(logger)) is not None:
                rich.log_image(key=tag, images=[_image(drawn)])

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """A text in Markdown."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(tag, markdown, step)
            elif (rich := _rich(logger)) is not None:
                rich.log_text(key=tag, columns=["text"], data=[[markdown]])

    def table(self, tag: str, table: Table, legend: Sequence[str] = ()) -> None:
        """A table as in the terminal, with what its words mean."""
        header = [str(column.header).replace("\n", " ") for column in table.columns]
        rows = [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(tag, _markdown(header, rows, legend))
            elif (rich := _rich(logger)) is not None:
                rich.log_table(key=tag, columns=header, data=rows)

    def hyperparameters(self, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """What a run was, and what came of it, for comparisons of runs."""
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(dict(settings), dict(figures))
            else:
                logger.log_hyperparams(dict(settings))
            logger.save()

    def compared(self, settings: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, float]]) -> None:
        """In TensorBoard a run for each evaluated model, by its name, which the page "HParams" shows side by side.

        Args:
            settings, figures: By the name of the model.
        """
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, found in figures.items():
                    with SummaryWriter(str(Path(logger.log_dir) / visible(name).replace("/", "_"))) as writer:
                        writer.add_hparams(dict(settings[name]), dict(found), run_name=".", global_step=0)

    def before_and_after(self, records: Records) -> None:
        """Every figure as a line from the unedited model (step 0) to the edited ones, with the ends of its interval.

        In TensorBoard's page "custom scalars" each has a chart of its own, by set, with the interval as a band.

        Args:
            records: Stage to record: figures, and ``intervals`` by the name of the figure.
        """
        keys = _keys(records)
        for step, record in enumerate(records.values()):
            figures = _series(record, keys)
            for logger in self.loggers:
                logger.log_metrics(figures, step)
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger) and keys:
                logger.experiment.add_custom_scalars(_layout(keys, records))
            logger.save()


def _rich(logger: Logger) -> Any:
    """The logger, if it has the functions of Lightning's ``WandbLogger``; else None."""
    return logger if all(hasattr(logger, name) for name in ("log_image", "log_text", "log_table")) else None


def _image(drawn: Figure) -> Image.Image:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], legend: Sequence[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell if cell == "---" else as_markdown(cell.strip()) for cell in line] for line in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return "\n\n".join([table, *(as_markdown(line) for line in legend)])


def _keys(records: Records) -> list[str]:
    """Figures that every stage has: those of the table of before and after, and AUCs of members."""
    first, *others = records.values()
    return [
        key for key in first if _is_compared(key) and all(record.get(key) is not None for record in (first, *others))
    ]


def _is_compared(key: str) -> bool:
    label = LABELS.get(key.rpartition("/")[2])
    return label is not None and (not label.aside or key.endswith(".auc"))


def _series(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, float]:
    """Each figure, and the ends of its interval where it has one."""
    found = {}
    for key in keys:
        value = float(record[key])
        low, high = (record.get("intervals") or {}).get(key) or (None, None)
        found[f"{PLACE}/{key}"] = value
        found[f"{PLACE}/{key}/low"] = value if low is None else float(low)
        found[f"{PLACE}/{key}/high"] = value if high is None else float(high)
    return found


def _layout(keys: Sequence[str], records: Records) -> dict[str, dict[str, list[Any]]]:
    """A chart a figure, a category a set."""
    steps = ", ".join(f"{step}: {stage_label(stage)}" for step, stage in enumerate(records))
    layout: dict[str, dict[str, list[Any]]] = {}
    for key in reversed(keys):  # TensorBoard shows the last one first
        prefix, _, name = key.rpartition("/")
        tags = [f"{PLACE}/{key}{end}" for end in ("", "/low", "/high")]
        charts = layout.setdefault(f"{prefix or 'before and after'} ({steps})", {})
        charts[LABELS[name].title] = ["Margin", tags]
    return layout
