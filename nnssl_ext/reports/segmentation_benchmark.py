"""The label-efficiency benchmark as one HTML page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_ext.reports.page import NONE, Cell, Code, Picture, Section, Table, signed, write_page

FAIR = (
    "Every cell is a stock nnUNetv2_train run of nnsslFinetuneTrainer. Arms with the same plans differ in the initial weights and "
    "in the learning rates that the settings name for pretrained weights and for scratch; labelled cases, iterations and, unless "
    "processes augment, batches are the same. Predictions and Dice are nnU-Net's own, of the last weights, on the test cases. "
    "The smaller labelled subsets of a seed lie within its larger ones."
)
ROWS = "Dice: mean over labels, cases and seeds; ± standard deviation between seeds. Seconds: of training alone, mean over seeds."
UNITS = (
    "Paired differences in Dice per case, mean over labels. Two intervals of 95 %. Cases: bootstrap of the mean, seeds averaged, "
    "resampling cases; it speaks about these trained networks and other cases. Cases and seeds: Student's interval of two-way "
    "random effects; it also allows for other labelled subsets and initial weights, so it is wide with few seeds. A difference "
    "counts as shown if both exclude zero and there are at least six cases; with one seed the first decides, about those single "
    "runs. p: Wilcoxon signed-rank test over cases, seeds averaged. Nothing is corrected for the number of comparisons."
)
REACHED = (
    "Iterations and training seconds at which the mean curve of one arm first reaches the Dice at which the other ends, "
    "interpolated between evaluations. Learning rates decay towards the end of every schedule, so a curve within a long schedule "
    "is not the end of a short one."
)


def write_segmentation_page(content: dict[str, Any], cases: Sequence[Picture | str], path: Path) -> None:
    """Write the page.

    Args:
        content: from `nnssl_ext.benchmark.summary.summarise`.
        cases: best and worst cases.

    Raises:
        NnsslError: it cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        drawn = _draw(content, Path(scratch)) if content["rows"] else []
        sections = [
            Section("What it says", _said(content)),
            Section("Dice", [FAIR, _rows(content), ROWS, *drawn[:1]]),
            Section("Paired comparisons", [_comparisons(content), UNITS, *_left_out(content)]),
            Section("On the way", [*drawn[1:], _reached(content), REACHED]),
            Section("Best and worst cases", [*cases]),
            Section("Arms and cases", [_arms(content), *_split(content)]),
            Section(
                "Everything else",
                [
                    Code(json.dumps(content["machines"], indent=2), summary="machines"),
                    Code(json.dumps(content["versions"], indent=2), summary="versions"),
                    Code(json.dumps(content["settings"], indent=2), summary="fine-tuning settings, by plans"),
                    Code(content["command"] or "", summary="the stock command of one cell"),
                ],
            ),
        ]
        write_page(path, f"Does pretraining help? {content['dataset']}", sections)


def _said(content: dict[str, Any]) -> list[str | Table]:
    done = content["cells"]
    said: list[str | Table] = [f"{done['done']} of {done['all']} cells are done."]
    said += content["verdicts"] or ["No pretrained arm and its scratch arm have a cell in common yet."]
    said += [f"Note: {text}" for text in content["warnings"]]
    if content["failures"]:
        said.append(Table(("failed", "why"), list(content["failures"].items()), "tried again by the next run"))
    return said


def _rows(content: dict[str, Any]) -> Table:
    labels = content["labels"] if 1 < len(content["labels"]) <= 6 else {}
    header = ["labelled", "iterations", "arm", "seeds", "Dice", *labels.values(), "seconds"]
    rows: list[list[Cell]] = [
        [
            row["train_cases"],
            row["iterations"],
            row["arm"],
            len(row["seeds"]),
            _number(row["dice"]) + ("" if row["sd_of_seeds"] is None else f" ± {row['sd_of_seeds']:.3f}"),
            *(_number(row["dice_per_label"][label]) for label in labels),
            f"{row['training_seconds']:.0f}",
        ]
        for row in content["rows"]
    ]
    return Table(header, rows)


def _comparisons(content: dict[str, Any]) -> Table:
    header = (
        "arm",
        "against",
        "labelled",
        "iterations",
        "difference",
        "cases",
        "cases and seeds",
        "p",
        "n",
        "per seed",
        "",
    )
    rows = [
        (
            each["first"],
            each["second"],
            each["train_cases"],
            each["iterations"],
            signed(each["difference"]),
            f"{signed(each['low'])} to {signed(each['high'])}",
            f"{signed(each['low_with_seeds'])} to {signed(each['high_with_seeds'])}",
            f"{each['p']:.2g}",
            f"{each['n_cases']} x {len(each['seeds'])}",
            ", ".join(signed(value) for value in each["per_seed"]),
            each["verdict"].split(":")[0],
        )
        for each in content["comparisons"]
    ]
    return Table(header, rows)


def _left_out(content: dict[str, Any]) -> list[str]:
    return [
        f"{each['title']}: {len(each['left_out'])} cases left out, for which some run has no label in truth and prediction."
        for each in content["comparisons"]
        if each["left_out"]
    ]


def _reached(content: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for each in content["comparisons"]:
        for arm, other, found in (
            (each["first"], each["second"], each["first_reaches_second"]),
            (each["second"], each["first"], each["second_reaches_first"]),
        ):
            work = [found["iterations"], found["training_seconds"]]
            shown = [NONE if value is None else f"{value:.0f}" for value in work]
            rows.append([each["train_cases"], each["iterations"], arm, other, _number(found["dice"]), *shown])
    return Table(("labelled", "schedule", "arm", "reaches the end of", "Dice", "iterations", "seconds"), rows)


def _arms(content: dict[str, Any]) -> Table:
    rows = []
    for arm in content["arms"]:
        known = arm.get("pretrained_on")
        cases = f"{known['cases']} cases of {known['dataset']}" if known else "unknown"
        file = arm["checkpoint"] or NONE
        what = arm.get("about", "from scratch")
        rows.append((arm["name"], arm["plans"], file, what, cases if arm["checkpoint"] else NONE))
    return Table(("arm", "plans", "checkpoint", "what it is", "pretrained on"), rows)


def _split(content: dict[str, Any]) -> list[str | Code]:
    split = content["split"]
    return [
        f"{len(split['test'])} test cases and {len(split['pool'])} to draw labelled ones from: {split['about']}.",
        Code("\n".join(split["test"]), summary="test cases"),
    ]


def _draw(content: dict[str, Any], folder: Path) -> list[Picture]:
    """Dice by labelled cases, and curves by iterations and by seconds."""
    from matplotlib.figure import Figure

    arms = [arm["name"] for arm in content["arms"]]
    colours = {name: f"C{number % 10}" for number, name in enumerate(arms)}
    epochs, counts = (sorted({row[key] for row in content["rows"]}) for key in ("epochs", "train_cases"))

    by_labels = Figure(figsize=(4.5 * len(epochs) + 1, 3.6), dpi=100, layout="constrained")
    panels: Any = by_labels.subplots(1, len(epochs), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, epochs, strict=True):
        for name in arms:
            mine = [row for row in content["rows"] if (row["arm"], row["epochs"]) == (name, length)]
            spread = [row["sd_of_seeds"] or 0 for row in mine]
            x, y = [row["train_cases"] for row in mine], [_plotted(row["dice"]) for row in mine]
            axes.errorbar(x, y, spread, fmt="o-", capsize=3, color=colours[name], label=name)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_title(f"{length} epochs", fontsize="medium")
        axes.set_xlabel("labelled cases")
    panels[0].set_ylabel("Dice")
    panels[-1].legend(fontsize="small")
    by_labels.savefig(folder / "labels.png")
    pictures = [Picture(folder / "labels.png", "Dice by labelled cases; bars: standard deviation between seeds")]

    for work, title in (("iterations", "iterations"), ("training_seconds", "training seconds")):
        figure = Figure(figsize=(4.5 * len(epochs) + 1, 3.0 * len(counts)), dpi=100, layout="constrained")
        grid: Any = figure.subplots(len(counts), len(epochs), squeeze=False)
        for row in content["rows"]:
            axes = grid[counts.index(row["train_cases"]), epochs.index(row["epochs"])]
            x = [point[work] for point in row["curve"]]
            axes.plot(
                x,
                [_plotted(point["dice"]) for point in row["curve"]],
                "o-",
                markersize=4,
                color=colours[row["arm"]],
                label=row["arm"],
            )
            axes.set_title(f"{row['train_cases']} labelled, {row['epochs']} epochs", fontsize="medium")
            axes.set_xlabel(title)
            axes.set_ylabel("Dice")
        grid[0, 0].legend(fontsize="small")
        figure.savefig(folder / f"{work}.png")
        pictures.append(Picture(folder / f"{work}.png", f"Dice on the test cases against {title}, mean over seeds"))
    return pictures


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _plotted(value: float | None) -> float:
    return float("nan") if value is None else value
