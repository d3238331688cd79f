"""The registration benchmark as one HTML page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.reports.page import NONE, Cell, Code, Picture, Section, Table, signed, write_page

HEADINGS = {
    "dice": "Dice",
    "hd95_mm": "HD95 mm",
    "tre_mm": "TRE mm",
    "sdlogj": "SDlogJ",
    "sdlogj_l2r": "SDlogJ L2R",
    "fold_percent": "fold %",
    "fold_percent_grid": "fold % grid",
    "cpu_seconds": "CPU s",
    "seconds": "s",
    "peak_memory_gib": "peak GiB",
}
EXPLAINED = (
    "Means over the test pairs, ± their standard deviation; seconds are medians. SDlogJ: standard deviation of the log Jacobian "
    "determinant over voxels where it is positive, in the fixed scan's foreground; SDlogJ L2R: of log(det + 3), on the whole grid, "
    "as Learn2Reg has it. Fold: voxels whose determinant is not positive. CPU s: of one registration, features included. "
    "Peak GiB: on CUDA of the device, else what the process grew by."
)
DEPENDENT = (
    "Intervals: bootstrap of the mean paired difference, 95 %; p: Wilcoxon signed-rank test. Consecutive pairs share a case, so "
    "they are not quite independent, and nothing is corrected for the number of comparisons. A difference counts as shown if "
    "its interval excludes zero and there are at least six pairs."
)
MATCHED = (
    "Every method's regularisation is the one at which its mean SDlogJ on the development pairs is {target:g}; other settings "
    "are those with the highest Dice (else the smallest landmark error) there. No test pair takes part in any choice."
)


def write_benchmark_page(content: dict[str, Any], path: Path) -> None:
    """Write the page.

    Args:
        content: from `nnssl_ext.registration.benchmark.summary.summarise`.

    Raises:
        NnsslError: it cannot be written.
    """
    methods = content["methods"]
    with tempfile.TemporaryDirectory() as folder:
        pictures = [Picture(png, caption) for png, caption in _pictures(content, Path(folder))]
        sections = [
            Section("What it says", _said(content)),
            Section("Test pairs", [_test_table(methods), EXPLAINED, *pictures[1:]]),
            Section("Paired comparisons", [_comparison_table(content["comparisons"]), DEPENDENT]),
            Section(
                "Settings, chosen on development pairs",
                [MATCHED.format(target=content["matched_sdlogj"]), _choice_table(methods), *pictures[:1]],
            ),
            Section("Pairs", [content["about"], _pairs_table(methods)]),
            Section(
                "Everything else",
                [
                    Code(json.dumps(content["machine"], indent=2), summary="machine and versions"),
                    Code(
                        json.dumps({each["name"]: each["settings"] for each in methods}, indent=2), summary="settings"
                    ),
                    Code(json.dumps(content["pairs"], indent=2), summary="files"),
                ],
            ),
        ]
        write_page(path, f"Registration: {content['about'].split(':')[0]}", sections)


def _said(content: dict[str, Any]) -> list[str | Table]:
    said: list[str | Table] = [*content["verdicts"]]
    said += [f"Note: {text}" for text in content["warnings"]]
    said += [f"Note: {each['name']}: {note}" for each in content["methods"] for note in each["notes"]]
    if content["failures"]:
        said.append(Table(("failed", "why"), list(content["failures"].items()), "tried again by the next run"))
    return said or ["No network takes part, so there is nothing to say on training."]


def _test_table(methods: Sequence[dict[str, Any]]) -> Table:
    known = [name for name in HEADINGS if any(name in each["test"] for each in methods)]
    labels = list(dict.fromkeys(name for each in methods for name in each["test"] if name.startswith("dice_")))
    if len(labels) <= 6:
        known[1:1] = labels
    header = ["method", "n", *(HEADINGS.get(name) or f"Dice {name.removeprefix('dice_')}" for name in known)]
    rows = [
        [each["name"], len(each["test_pairs"]), *(_shown(each["test"].get(name)) for name in known)] for each in methods
    ]
    return Table(header, rows)


def _shown(spread: dict[str, Any] | None) -> Cell:
    if spread is None or not spread["n"]:
        return NONE
    if "median" in spread:
        return round(spread["median"], 2)
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.3f}"
    return f"{spread['mean']:.3f}{sd}"


def _comparison_table(comparisons: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            each["first"],
            each["second"],
            HEADINGS[each["figure"]],
            signed(each["difference"]),
            f"{signed(each['low'])} to {signed(each['high'])}",
            f"{each['p']:.2g}",
            each["n"],
            " / ".join(f"{value:.3f}" for value in each["sdlogj"]),
            each["verdict"].split(":")[0] + (", but with rougher fields" if each["rougher"] else ""),
        )
        for each in comparisons
    ]
    return Table(("method", "against", "figure", "difference", "95 %", "p", "n", "SDlogJ of both", "verdict"), rows)


def _choice_table(methods: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for each in methods:
        for label, curve in each["development"].items():
            at = [f"{x:.3g}: {s:.3f}, {score:.3f}" for x, s, score in zip(*curve.values(), strict=True)]
            rows.append((each["name"], label, "chosen" if label == each["variant"] else "", "; ".join(at)))
        strength = NONE if each["strength"] is None else f"{each['strength']:.3g}"
        rows.append((each["name"], each["variant"], f"regularisation {strength}", each["features"]))
    return Table(("method", "settings", "", "regularisation: SDlogJ, score"), rows)


def _pairs_table(methods: Sequence[dict[str, Any]]) -> Table:
    figure = "dice" if any("dice" in each["test"] for each in methods) else "tre_mm"
    pairs = list(dict.fromkeys(pair for each in methods for pair in each["test_pairs"]))
    rows = []
    for pair in pairs:
        values = [each["test_pairs"].get(pair, {}).get(figure) for each in methods]
        rows.append([pair, *(NONE if value is None else f"{value:.3f}" for value in values)])
    return Table(["pair", *(each["name"] for each in methods)], rows, f"{HEADINGS[figure]} of every test pair")


def _pictures(content: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Score against smoothness on development pairs, and the figures of all test pairs."""
    from matplotlib.figure import Figure

    methods = content["methods"]
    figure_name = "dice" if any("dice" in each["test"] for each in methods) else "tre_mm"
    curves = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes: Any = curves.add_subplot()
    for number, each in enumerate(methods):
        curve = each["development"].get(each["variant"])
        if curve and any(curve["sdlogj"]):
            axes.plot(curve["sdlogj"], curve["score"], "o-", markersize=3, color=f"C{number % 10}", label=each["name"])
    axes.axvline(content["matched_sdlogj"], color="grey", linestyle=":")
    axes.set_xlabel("SDlogJ (rougher to the right)")
    axes.set_ylabel("Dice" if figure_name == "dice" else "-TRE, mm")
    if axes.lines[1:]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    spread = Figure(figsize=(9, 0.8 + 0.35 * len(methods)), dpi=100, layout="constrained")
    axes = spread.add_subplot()
    values = [
        [pair[figure_name] for pair in each["test_pairs"].values() if pair.get(figure_name) is not None]
        for each in methods
    ]
    axes.boxplot(values, orientation="horizontal", widths=0.6, showmeans=True)
    for place, column in enumerate(values, start=1):
        axes.plot(column, np.full(len(column), place), ".", color="C0", alpha=0.4)
    axes.set_yticks(range(1, len(methods) + 1), [each["name"] for each in methods])
    axes.invert_yaxis()
    axes.set_xlabel(HEADINGS[figure_name])
    curves.savefig(folder / "curves.png")
    spread.savefig(folder / "pairs.png")
    return [
        (
            folder / "curves.png",
            "development pairs: score at each regularisation tried; dotted: where methods are compared",
        ),
        (folder / "pairs.png", "test pairs: one dot each; triangle: mean"),
    ]
