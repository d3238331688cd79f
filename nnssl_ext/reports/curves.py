"""The training log as one picture."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write
from nnssl_ext.monitors.diagnosis import Finding

# matplotlib is used through Figure objects only: no global state, no display, safe beside a notebook's own figures.

COUNTERS = ("epoch", "step")
REGISTERED = ("registration_dice", "registration_dice_random", "registration_sdlogj", "registration_sdlogj_random")
SPARSE = ("probe_dice", "knn_dice", "probe_dice_random", "knn_dice_random", *REGISTERED)
"""Not asked every epoch; elsewhere a gap in a curve means that a figure was missing or diverged."""
RUNNING = {"lr": "learning rate", "grad_norm": "gradient norm", "cases_per_s": "cases per second"}
GROUPS = {
    "teacher outputs, entropy / ln K": (
        "teacher_entropy",
        "prototypes_entropy",
        "patch_entropy",
        "patch_prototypes_entropy",
        "dino_of_ln_k",
    ),
    "prototypes used (share)": ("prototypes_used", "patch_prototypes_used"),
    "collapse coefficient": ("projector_collapse", "predictor_collapse"),
    "effective rank of heads": ("projector_rank", "predictor_rank"),
    "places within a crop": ("token_similarity", "token_variance_share"),
    "Dice of frozen features": ("probe_dice", "probe_dice_random", "knn_dice", "knn_dice_random"),
    "Dice of registered pairs": REGISTERED[:2],
    "smoothness of registrations, SDlogJ": REGISTERED[2:],
    "IoU of pairs": ("iou", "iou_fallback"),
}
"""Figures that are read together."""
FAMILIES = {"grad_share_": "gradient shares", "grad_cosine_": "gradient cosines"}
ALONE = ("kl", "momentum", "teacher_temperature", "teacher_distance")
"""Logged beside the terms of the loss, but no terms."""
REFERENCE = "_random"
"""Figures whose names end so are lines to compare with."""
COLOURS = {"alarm": "#b00020", "warning": "#8a5a00"}
COLUMNS = 3
PANEL = (4.2, 2.8)  # inches
LINE = 0.17  # inches
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


def draw_progress(log: Path, png: Path, findings: Sequence[Finding] = ()) -> None:
    """Draw ``training_log.csv`` (one row per epoch) as panels: the loss with its terms, learning rate, gradient norm,
    cases per second, `GROUPS`, and one panel for each further figure. Columns that are missing or never hold a number
    are left out.

    Terms of the loss are the columns before ``lr``, as the engine writes them; later ones come from monitors.

    Args:
        log: the CSV file.
        png: written atomically.
        findings: told above the panels.

    Raises:
        NnsslError: the log is unreadable or empty, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    columns = {name: values for name, values in read_log(log).items() if np.isfinite(values).any()}
    panels = _panels(columns)
    epochs = columns.get("epoch", np.arange(len(next(iter(columns.values()), ()))))
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), dpi=DPI, layout="constrained")
    _tell(figure, findings)
    for place, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for name in names:
            known = np.isfinite(columns[name]) if name in SPARSE else np.full(len(epochs), True)
            axes.plot(
                epochs[known],
                columns[name][known],
                linestyle="--" if name.endswith(REFERENCE) else "-",
                marker="o" if known.sum() < 30 and not name.endswith(REFERENCE) else "",
                markersize=3,
                label=name,
            )
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
    grouped = {name: title for title, members in GROUPS.items() for name in members}
    grouped |= {name: title for name in names for start, title in FAMILIES.items() if name.startswith(start)}
    grouped |= {name: title for name, title in RUNNING.items()} | {name: name for name in ALONE}
    first_running = min((names.index(name) for name in RUNNING if name in names), default=len(names))
    terms = [name for name in names[:first_running] if name not in grouped]
    panels = {"loss": terms} if terms else {}
    panels |= {title: [name] for name, title in RUNNING.items() if name in names}
    for name in names:
        if name not in terms and name not in RUNNING:
            panels.setdefault(grouped.get(name, name), []).append(name)
    return panels


def _tell(figure: Any, findings: Sequence[Finding]) -> None:
    """Write findings above the panels and make room for them."""
    width, height = figure.get_size_inches()
    told = [(finding, textwrap.wrap(str(finding), 150)) for finding in findings]
    room = LINE * sum(len(lines) for _, lines in told)
    figure.set_size_inches(width, height + room)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + room)))
    top = height + room - 0.05
    for finding, lines in told:
        text, colour = "\n".join(lines), COLOURS[finding.severity]
        figure.text(0.01, top / (height + room), text, va="top", fontsize=8, color=colour, parse_math=False)
        top -= LINE * len(lines)


def _spans_a_decade(curves: list[Float[np.ndarray, " rows"]]) -> bool:
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    return bool(finite.min() > 0 and finite.max() > 10 * finite.min())


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")
