"""The training log as one picture."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write

# matplotlib is used through Figure objects only: no global state, no display, safe beside a notebook's own figures.

COUNTERS = ("epoch", "step")
RUNNING = {"lr": "learning rate", "grad_norm": "gradient norm", "cases_per_s": "cases per second"}
COLUMNS = 3
PANEL = (4.2, 2.8)  # inches
DPI = 100

Log = dict[str, Float[np.ndarray, " rows"]]


def read_log(path: Path) -> Log:
    """The columns of a training log in the order of the file; cells without a number become NaN.

    Raises:
        NnsslError: the file cannot be read or holds no row.
    """
    try:
        with open(path, newline="") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise NnsslError(f"cannot read the training log {path}: {error}", "check the path") from error
    if not rows:
        raise NnsslError(f"the training log {path} holds no row", "let the run finish one epoch")
    return {name: np.array([_number(row[name]) for row in rows]) for name in rows[0] if name}


def draw_progress(log: Path, png: Path) -> None:
    """Draw ``training_log.csv`` (one row per epoch) as panels: the loss with its terms, learning rate, gradient norm,
    cases per second, and one panel for each further figure. Columns that are missing or never hold a number are
    left out.

    Terms of the loss are the columns before ``lr``, as the engine writes them; later ones come from monitors.

    Args:
        log: the CSV file.
        png: written atomically.

    Raises:
        NnsslError: the log is unreadable or empty, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    columns = {name: values for name, values in read_log(log).items() if np.isfinite(values).any()}
    panels = _panels(columns)
    epochs = columns.get("epoch", np.arange(len(next(iter(columns.values()), ()))))
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), dpi=DPI, layout="constrained")
    for place, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for name in names:
            axes.plot(epochs, columns[name], marker="o" if len(epochs) < 30 else "", markersize=3, label=name)
        if _spans_a_decade([columns[name] for name in names]):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        if len(names) > 1:
            axes.legend(fontsize="small")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch", fontsize="small")
        axes.grid(alpha=0.3)
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png")


def _panels(columns: Log) -> dict[str, list[str]]:
    """Panel title -> names of the columns drawn in it."""
    names = [name for name in columns if name not in COUNTERS]
    first_running = min((names.index(name) for name in RUNNING if name in names), default=len(names))
    panels = {"loss": names[:first_running]} if first_running else {}
    panels |= {title: [name] for name, title in RUNNING.items() if name in names}
    return panels | {name: [name] for name in names[first_running:] if name not in RUNNING}


def _spans_a_decade(curves: list[Float[np.ndarray, " rows"]]) -> bool:
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    return bool(finite.min() > 0 and finite.max() > 10 * finite.min())


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")
