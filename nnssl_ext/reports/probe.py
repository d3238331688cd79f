"""A probe of frozen features as one HTML page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from nnssl_ext.reports.page import Cell, Code, Picture, Section, Table, write_page
from nnssl_ext.reports.pictures import draw_planes, outline_colour

NONE = "-"
DIGITS = {"dice": 3, "hd95_mm": 1}
HEADINGS = {"dice": "Dice", "hd95_mm": "HD95 mm"}
COLOURS = ("C0", "C7", "C1")
EXPLAINED = (
    "Dice is volumetric, by nnU-Net's evaluation, per case on the preprocessed grid; background does not count. HD95: 95th "
    "percentile of the distances between both surfaces, in mm; the diagonal of the volume where only one of truth and answer has "
    "the class. Mean ± standard deviation over the scored cases; n differs where neither truth nor answer has a class. "
    "Foreground mean: over classes, per case."
)
PROTOCOL = (
    "The network is frozen and in evaluation mode; its weights and buffers were bit by bit the same before and after. linear: one "
    "1x1x1 convolution per level, added up from coarse to fine (vox2vec's), at the optimum of a regularised logistic regression. "
    "non-linear: the same with a residual 1x1x1 block after every addition, trained with cross-entropy and soft Dice. kNN: "
    "classes of the nearest taught voxels by cosine (20 neighbours, temperature 0.07). All three are taught by the same voxels of "
    "the same cases for every kind of features."
)
PAIRED = (
    "Differences are paired by case, first minus second; bootstrap interval of the mean, 95 %; p: Wilcoxon signed-rank test. A "
    "difference counts as shown if its interval excludes zero and there are at least six cases. Nothing is corrected for the "
    "number of comparisons."
)


def write_probe_page(
    content: dict[str, Any],
    path: Path,
    image: Float[np.ndarray, "C Z Y X"],
    truth: Integer[np.ndarray, "Z Y X"],
    answers: Mapping[tuple[str, str], Integer[np.ndarray, "Z Y X"]],
    spacing: Sequence[float],
) -> None:
    """Write the page.

    Args:
        content: from `nnssl_ext.probing.evaluation.evaluate`.
        image, truth: the first scored case.
        answers: (features, head) -> its labels.
        spacing: mm along z, y, x of that case.

    Raises:
        NnsslError: it cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        dots, planes = Path(folder) / "dots.png", Path(folder) / "planes.png"
        _draw_dots(content, dots)
        pretrained = content["rows"][0]["features"]
        shown = {f"{features}, {head}": labels for (features, head), labels in answers.items() if head == "linear"}
        shown |= {
            f"{features}, {head}": labels for (features, head), labels in answers.items() if features == pretrained
        }
        outlines = {"reference": truth, **shown}
        draw_planes({name: image[:1] for name in outlines}, planes, spacing, outlines)
        sections = [
            Section("What it says", _said(content)),
            Section(
                "Scored cases",
                [
                    *(_table(content, figure) for figure in HEADINGS),
                    EXPLAINED,
                    Picture(dots, "mean Dice of the foreground classes: a dot per scored case; triangle: mean"),
                ],
            ),
            Section("Paired comparisons", [*(_comparisons(content, figure) for figure in HEADINGS), PAIRED]),
            Section(
                "One case", [_colours(content), Picture(planes, f"{content['test'][0]}, planes through the middle")]
            ),
            Section("Cases", [f"{content['about']}.", *_cases(content)]),
            Section(
                "How it was done",
                [
                    PROTOCOL,
                    *(
                        f"{name}: {each['about']}; {each['channels']} channels."
                        for name, each in content["features"].items()
                    ),
                    *(
                        Code(json.dumps(content[name], indent=2), summary=name)
                        for name in ("settings", "checkpoint", "train", "machine", "citations")
                    ),
                ],
            ),
        ]
        write_page(path, f"Frozen features of {content['checkpoint']['method']} on {content['dataset']}", sections)


def _said(content: dict[str, Any]) -> list[str | Table]:
    data, progress = content["checkpoint"]["data"], content["checkpoint"]["progress"]
    about = content["checkpoint"]["about"]
    if progress.get("total"):
        about += f", step {progress.get('step')} of {progress['total']}"
    if data.get("dataset"):
        about += f", trained on {data.get('cases', '?')} cases of {data['dataset']}"
    leaks = content["leaks"] or ["none of the scored cases was in the pretraining, by name"]
    warned = [f"Leak check: {text}." for text in leaks]
    return [f"{about}.", *content["verdicts"], *warned, *(f"Note: {text}." for text in content["notes"])]


def _table(content: dict[str, Any], figure: str) -> Table:
    classes = _classes(content)
    rows = [
        [row["features"], row["head"], *(_spread(row[figure][name], DIGITS[figure]) for name in classes)]
        for row in _by_head(content)
    ]
    return Table(["features", "head", *classes], rows, HEADINGS[figure])


def _comparisons(content: dict[str, Any], figure: str) -> Table:
    rows = [
        (
            each["head"],
            f"{each['first']} against {each['second']}",
            each["class"],
            _signed(each["difference"], figure),
            f"{_signed(each['low'], figure)} to {_signed(each['high'], figure)}",
            f"{each['p']:.2g}",
            each["n"],
            each["verdict"].split(":")[0],
        )
        for each in content["comparisons"]
        if each["figure"] == figure
    ]
    return Table(("head", "features", "class", "difference", "95 %", "p", "n", "verdict"), rows, HEADINGS[figure])


def _cases(content: dict[str, Any]) -> list[Table]:
    rows, mean = _by_head(content), _classes(content)[0]
    header = ["case", *(f"{row['features']}, {row['head']}" for row in rows)]
    table = [[case, *(_number(row["cases"][case]["dice"][mean], 3) for row in rows)] for case in content["test"]]
    return [Table(header, table, "mean Dice of the foreground classes in every scored case")]


def _colours(content: dict[str, Any]) -> str:
    plain = {name: value for name, value in content["classes"].items() if isinstance(value, int)}
    return "Outlines: " + ", ".join(f"{name} {outline_colour(value)}" for name, value in plain.items()) + "."


def _draw_dots(content: dict[str, Any], png: Path) -> None:
    from matplotlib.figure import Figure

    rows, mean = _by_head(content), _classes(content)[0]
    columns = [[value for each in row["cases"].values() if (value := each["dice"][mean]) is not None] for row in rows]
    figure = Figure(figsize=(9, 0.8 + 0.35 * len(rows)), dpi=100, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.boxplot(columns, orientation="horizontal", widths=0.6, showmeans=True, showfliers=False)
    for place, (row, column) in enumerate(zip(rows, columns, strict=True), start=1):
        colour = COLOURS[list(content["features"]).index(row["features"]) % len(COLOURS)]
        axes.plot(column, np.full(len(column), place), ".", color=colour, alpha=0.5)
    axes.set_yticks(range(1, len(rows) + 1), [f"{row['head']}, {row['features']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("Dice")
    figure.savefig(png)


def _by_head(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with those of one head beside each other."""
    heads = list(dict.fromkeys(row["head"] for row in content["rows"]))
    return sorted(content["rows"], key=lambda row: heads.index(row["head"]))


def _classes(content: dict[str, Any]) -> list[str]:
    """The mean over classes, and the classes."""
    return list(content["rows"][0]["dice"])


def _spread(spread: dict[str, Any], digits: int) -> Cell:
    if not spread["n"]:
        return NONE
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd} (n {spread['n']})"


def _number(value: float | None, digits: int) -> Cell:
    return NONE if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, figure: str) -> str:
    return NONE if value is None else f"{value:+.{DIGITS[figure] + 1}f}"
