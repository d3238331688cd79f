"""The training log: one CSV row per epoch, what it shows (curves, findings), and optional trackers."""

from __future__ import annotations

import csv
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write
from nnssl_ext.monitors.diagnosis import Finding, diagnose
from nnssl_ext.monitors.rules import RULES
from nnssl_ext.reports.curves import draw_progress

Row = Mapping[str, float | int]

HEALTHY = "no finding"
WANDB_ID = "wandb_id.txt"
"""Names the run at W&B, so that ``--c`` continues it there too."""


class TrainingLog:
    """Rows of ``training_log.csv`` in a run's folder; rewritten whole, so a kill never leaves half a row. Beside it
    ``progress.png`` and ``diagnosis.txt`` say what the rows show.

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
                rows = [{k: _number(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["epoch"] < epochs_done]
        self.findings: list[Finding] = diagnose(self.rows, RULES)

    def add(self, row: Row) -> list[str]:
        """Append one epoch's figures, rewrite the files.

        Returns:
            What began and what ceased to be found with this row.
        """
        self.rows.append(row)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        before, self.findings = self.findings, diagnose(self.rows, RULES)
        with atomic_write(self.path.with_name("diagnosis.txt")) as temporary:
            temporary.write_text("\n".join(map(str, self.findings)) + "\n" if self.findings else f"{HEALTHY}\n")
        draw_progress(self.path, self.path.with_name("progress.png"), self.findings)
        self.track(row)
        old, new = ({finding.rule for finding in findings} for findings in (before, self.findings))
        return [
            *(str(finding) for finding in self.findings if finding.rule not in old),
            *(f"no longer: {finding.rule}" for finding in before if finding.rule not in new),
        ]


def _number(text: str) -> float | int:
    """As it was before it was written: counts are whole numbers, and stay so when a run goes on."""
    return int(text) if text.isdigit() else float(text)


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

        named = output / WANDB_ID
        if not named.is_file():
            named.write_text(uuid.uuid4().hex)
        run = wandb.init(dir=output, name=output.name, id=named.read_text(), config=settings, resume="allow")
        return lambda row: run.log(row, step=int(row["step"]))
    except ImportError as error:
        raise NnsslError(f"--tracker {kind}: {error}", f'pip install "nnssl-ext[{kind}]"') from error
