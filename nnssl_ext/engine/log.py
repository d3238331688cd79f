"""The training log: one CSV row per epoch, a curve picture, and optional trackers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write
from nnssl_ext.reports.curves import draw_progress

Row = Mapping[str, float | int]


class TrainingLog:
    """Rows of ``training_log.csv`` in a run's folder; rewritten whole, so a kill never leaves half a row.

    Args:
        output: the run's folder.
        epochs_done: rows to keep from an earlier session of this run.
        track: where else rows go.
    """

    def __init__(self, output: Path, epochs_done: int, track: Callable[[Row], None]) -> None:
        self.path = output / "training_log.csv"
        self.track = track
        self.rows: list[Row] = []
        if epochs_done and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["epoch"] < epochs_done]

    def add(self, row: Row) -> None:
        """Append one epoch's figures, rewrite the file and the curves."""
        self.rows.append(row)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        draw_progress(self.path, self.path.with_name("progress.png"))
        self.track(row)


def open_tracker(kind: str, output: Path, settings: dict[str, Any]) -> Callable[[Row], None]:
    """A function that sends rows to TensorBoard or W&B, or nowhere.

    Raises:
        NnsslError: the optional package is not installed.
    """
    if kind == "none":
        return lambda row: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(output / "tensorboard"))

            def to_tensorboard(row: Row) -> None:
                for key, value in row.items():
                    writer.add_scalar(key, value, int(row["step"]))
                writer.flush()

            return to_tensorboard
        import wandb

        run = wandb.init(dir=output, name=output.name, config=settings, resume="allow")
        return lambda row: run.log(row, step=int(row["step"]))
    except ImportError as error:
        raise NnsslError(f"--tracker {kind}: {error}", f'pip install "nnssl-ext[{kind}]"') from error
