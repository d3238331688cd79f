"""What a probe found, in JSON types: a row per kind of features and head, paired comparisons, verdicts, and leaks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float

from nnssl_ext.probing.arms import INTENSITY, PRETRAINED, RANDOM, Arm
from nnssl_ext.probing.cases import ProbeData
from nnssl_ext.probing.run import HEADS, QUERIES, Result, query_stride
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.registration.encoder import Source
from nnssl_ext.reports.statistics import compare, finite, spread

FOREGROUND = "foreground mean"
"""Name of the mean over classes, which stands first."""
FIGURES = {"dice": True, "hd95_mm": False}
"""What is measured, and whether more is better."""

Figures = dict[str, dict[str, Float[np.ndarray, " cases"]]]
"""Figure -> class, or `FOREGROUND` -> one value per test case."""


@dataclass(frozen=True)
class Row:
    """One kind of features and one head; figures are averaged over repetitions."""

    features: str
    head: str
    figures: Figures


def rows_of(arm: Arm, results: Sequence[Result], data: ProbeData) -> list[Row]:
    """The rows of one kind of features, from its repetitions."""
    return [Row(arm.name, head, _figures([result.scores[head] for result in results], data)) for head in HEADS]


def summarise(
    source: Source,
    data: ProbeData,
    settings: ProbeSettings,
    seed: int,
    arms: Sequence[Arm],
    rows: Sequence[Row],
    population: Sequence[int],
    channels: dict[str, int],
    fingerprint: str,
    notes: Sequence[str],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the page and the terminal tell.

    Args:
        population: voxels per class in the cases that teach.
        channels: features per voxel, per kind of features.
        fingerprint: of the network that was probed, before and after.
        notes: what deserves attention beside what is found here.
    """
    leaks = leaks_of(source, data)
    comparisons = [
        comparison
        for head in HEADS
        for other in (RANDOM, INTENSITY)
        for comparison in _compared(_row(rows, PRETRAINED, head), _row(rows, other, head))
    ]
    return {
        "version": version("nnssl-ext"),
        "checkpoint": {
            "file": source.pretrained.origin,
            "kind": source.pretrained.kind,
            "method": source.pretrained.method,
            "about": str(source.pretrained),
            "progress": source.pretrained.about.get("progress", {}),
            "data": source.pretrained.about.get("data", {}),
            "weights_and_buffers_sha256": fingerprint,
        },
        "dataset": data.dataset,
        "plans": data.plans_name,
        "configuration": data.configuration,
        "about": data.about,
        "train": [case.identifier for case in data.train],
        "test": [case.identifier for case in data.test],
        "seed": seed,
        "settings": asdict(settings),
        "classes": {
            name: value if isinstance(value, int) else list(value) for name, value in data.labels.scored.items()
        },
        "features": {arm.name: {"about": arm.about, "channels": channels[arm.name]} for arm in arms},
        "rows": [_row_json(row, data) for row in rows],
        "comparisons": comparisons,
        "verdicts": [_verdict(comparisons, head) for head in HEADS],
        "leaks": leaks,
        "notes": [*_data_notes(data, population), *notes],
        "citations": source.pretrained.citations,
        "machine": machine,
    }


def leaks_of(source: Source, data: ProbeData) -> list[str]:
    """Scored cases that the pretraining saw, by name; and what is not recorded of it. Empty where all is known and none was."""
    known = source.learned_from
    tested = [case.identifier for case in data.test]
    seen = sorted(set(tested) & known.seen)
    told = []
    if seen:
        labels = "with their labels" if known.seen_with_labels & {*seen} else "without labels"
        told.append(
            f"{len(seen)} of {len(tested)} scored cases, by name, were in the pretraining ({labels}): {', '.join(seen)}"
        )
    told += [f"{each}: scored cases may have been among them" for each in known.unrecorded]
    return told


def _figures(repetitions: Sequence[dict[str, Any]], data: ProbeData) -> Figures:
    found: Figures = {}
    for figure in FIGURES:
        values = np.array(
            [
                [[scores[case.identifier][name][figure] for case in data.test] for name in data.labels.scored]
                for scores in repetitions
            ]
        )  # (repetitions, classes, cases)
        mean = _nanmean(values, 0)
        found[figure] = {FOREGROUND: _nanmean(mean, 0), **dict(zip(data.labels.scored, mean, strict=True))}
    return found


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class that no repetition or no case has stays NaN
        return np.nanmean(values, axis=axis)


def _row(rows: Sequence[Row], features: str, head: str) -> Row:
    return next(row for row in rows if (row.features, row.head) == (features, head))


def _row_json(row: Row, data: ProbeData) -> dict[str, Any]:
    names = [case.identifier for case in data.test]
    return {
        "features": row.features,
        "head": row.head,
        **{figure: {name: spread(values) for name, values in row.figures[figure].items()} for figure in FIGURES},
        "cases": {
            case: {
                figure: {name: finite(values[place]) for name, values in row.figures[figure].items()}
                for figure in FIGURES
            }
            for place, case in enumerate(names)
        },
    }


def _compared(first: Row, second: Row) -> list[dict[str, Any]]:
    found = []
    for figure, higher in FIGURES.items():
        for name, values in first.figures[figure].items():
            result = compare(values, second.figures[figure][name], higher)
            found.append(
                {
                    "head": first.head,
                    "first": first.features,
                    "second": second.features,
                    "figure": figure,
                    "class": name,
                    "n": result.n,
                    **{key: finite(getattr(result, key)) for key in ("difference", "low", "high", "p")},
                    "shown": result.shown,
                    "verdict": result.verdict(),
                }
            )
    return found


def _verdict(comparisons: Sequence[dict[str, Any]], head: str) -> str:
    """Whether the features are better than those of the same network with random weights, and than intensities."""
    random, intensity = (
        next(
            each
            for each in comparisons
            if (each["head"], each["second"], each["figure"], each["class"]) == (head, other, "dice", FOREGROUND)
        )
        for other in (RANDOM, INTENSITY)
    )
    words = {1: "pretraining helps", 0: "it is not shown that pretraining helps", -1: "pretraining hurts"}
    return (
        f"{head}: {words[random['shown']]} (Dice against random weights: {random['verdict']}; "
        f"against intensities: {intensity['verdict']})"
    )


def _data_notes(data: ProbeData, population: Sequence[int]) -> list[str]:
    notes = list(data.notes)
    for name, value in data.labels.scored.items():
        if not sum(population[each] for each in ((value,) if isinstance(value, int) else value)):
            notes.append(f"no case that teaches has '{name}', so it cannot be found")
    stride = max(query_stride(case.shape) for case in data.test)
    if stride > 1:
        notes.append(
            f"kNN was asked at every voxel of a grid of at most {QUERIES} per case (up to every {stride}th along an axis), "
            "and its answers spread over the voxels between"
        )
    return notes
