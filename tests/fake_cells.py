"""Cells without training: results with known Dice, and a benchmark of them that can be killed.

``python fake_cells.py OUT`` runs the matrix in OUT/benchmark.json with slow fake cells, two at a time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from nnssl_ext.benchmark.execution import execute
from nnssl_ext.benchmark.matrix import RESULT, Cell
from nnssl_ext.benchmark.record import load
from nnssl_ext.benchmark.report import write_report
from nnssl_ext.files import write_json

CASES = [f"case_{number:02d}" for number in range(8)]
TEST = ["case_05", "case_06", "case_07"]


def dice_of(cell: Cell) -> np.ndarray:
    """Known figures of two labels in eight made-up test cases; the pretrained arm gains 0.1, 0.08 and 0.06 by seed."""
    rng = np.random.default_rng([cell.seed, cell.train_cases])
    base = 0.4 + 0.05 * cell.train_cases + rng.uniform(0, 0.1, (8, 2))
    noise = np.random.default_rng([cell.seed, len(cell.arm)]).normal(0, 0.01, (8, 2))
    return base + noise + (0 if cell.arm.startswith("scratch") else 0.1 - 0.02 * cell.seed)


def result_of(cell: Cell) -> dict:
    """What a cell's process would have left: evaluations after half of the epochs and at the end."""
    final = dice_of(cell)
    points = [(max(cell.epochs // 2, 1), final - 0.2), (cell.epochs, final)]
    return {
        "digest": cell.digest,
        "curve": [
            {
                "iterations": 10 * epoch,
                "training_seconds": 5.0 * epoch,
                "dice": {case: {"1": float(a), "2": float(b)} for case, (a, b) in zip(CASES, values, strict=True)},
            }
            for epoch, values in points
        ],
        "changed_tensors": {},
        "command": "nnUNetv2_train ...",
        "seconds": 5.0 * cell.epochs + 20,
        "machine": {"device": "cpu", "cores": 2, "load_average": time.time() % 1},
        "versions": {"nnssl-ext": "0"},
        "request": {},
    }


def finish(cell: Cell, output: Path) -> None:
    """Leave the result."""
    write_json(cell.folder(output) / RESULT, result_of(cell))


def main(output: Path) -> None:
    """Run all open cells and write the report."""

    def slowly(cell: Cell, slot: int) -> None:
        time.sleep(0.05)
        half = cell.folder(output) / "work"  # what a stopped training leaves behind
        half.mkdir(parents=True, exist_ok=True)
        (half / "checkpoint").write_text("half")
        time.sleep(0.05)
        finish(cell, output)

    _, cells = load(output)
    execute(cells, output, slowly, 2, lambda line: print(line, flush=True))
    write_report(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
