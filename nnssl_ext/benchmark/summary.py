"""What the finished cells say: a row per arm and budget, comparisons pair by pair, curves, and where to look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nnssl_ext.benchmark.matrix import Cell
from nnssl_ext.reports.statistics import compare_runs, finite

Results = Mapping[Cell, dict[str, Any]]
Budget = tuple[int, int]
"""Labelled cases and epochs."""
BUSY = 1.5
"""Load per core above which seconds say little (our choice)."""
Curve = Sequence[tuple[int | float, float]]
"""Work done (iterations or seconds) and Dice, work ascending."""


def summarise(record: dict[str, Any], cells: Sequence[Cell], output: Path) -> dict[str, Any]:
    """The benchmark's result in JSON types, also of one that is still running.

    Args:
        record: from `record.load`, with its cells.
        output: the benchmark's folder.
    """
    results = {cell: found for cell in cells if (found := cell.finished(output))}
    labels = list(next(iter(_final(next(iter(results.values()))).values()))) if results else []
    rows = [
        _row(record, name, budget, results, labels)
        for budget in _budgets(record)
        for name in [arm["name"] for arm in record["arms"]]
    ]
    comparisons = [
        compared
        for budget in _budgets(record)
        for first, second in _pairs(record)
        if (compared := _compared(record, first, second, budget, results))
    ]
    failures = {str(cell): why for cell in cells if cell not in results and (why := cell.failure(output))}
    one = next(iter(results.values()), None)
    return {
        "version": record["version"],
        "dataset": record["dataset"],
        "configuration": record["configuration"],
        "split": record["split"],
        "cells": {"all": len(cells), "done": len(results)},
        "arms": [_told(arm, record["about"]) for arm in record["arms"]],
        "labels": {label: record["labels"].get(label, label) for label in labels},
        "rows": [row for row in rows if row["seeds"]],
        "comparisons": comparisons,
        "verdicts": [f"{each['title']}: {each['verdict']}" for each in comparisons],
        "warnings": _warnings(record, results),
        "failures": failures,
        "settings": record["settings"],
        "workers": record["workers"],
        "seconds": sum(found["seconds"] for found in results.values()),
        "machines": _distinct(found["machine"] for found in results.values()),
        "versions": _distinct(found["versions"] for found in results.values()),
        "command": one["command"] if one else None,
    }


def reach(curve: Curve, level: float) -> int | float | None:
    """The work at which a curve first is at or above `level`, interpolated between its points; None if it never is.

    What the curve does before its first point is not known, so a level below that point is reached there at the latest.
    """
    before: tuple[int | float, float] | None = None
    for work, dice in curve:
        if dice >= level:
            if before is None:
                return work
            return before[0] + (level - before[1]) / (dice - before[1]) * (work - before[0])
        before = (work, dice)
    return None


def scores(
    results: Results, arm: str, budget: Budget, seeds: Sequence[int], point: int = -1
) -> Float[np.ndarray, "seeds cases"]:
    """Dice of every case, mean over labels, at a point of the curve; NaN where no label is in truth or prediction."""
    table = []
    for seed in seeds:
        (found,) = (result for cell, result in results.items() if _is(cell, arm, budget, seed))
        cases = found["curve"][point]["dice"]
        table.append([_mean(cases[case].values()) for case in sorted(cases)])
    return np.array(table, dtype=np.float64)


def _row(record: dict[str, Any], arm: str, budget: Budget, results: Results, labels: Sequence[str]) -> dict[str, Any]:
    seeds = _seeds(results, arm, budget)
    row: dict[str, Any] = {"arm": arm, "train_cases": budget[0], "epochs": budget[1], "seeds": seeds}
    row["iterations"] = _iterations(record, arm, budget)
    if not seeds:
        return row
    table = scores(results, arm, budget, seeds)
    per_seed = np.array([_mean(row) for row in table])
    mine = [result for cell, result in results.items() if _is(cell, arm, budget)]
    return row | {
        "dice": finite(per_seed.mean()),
        "dice_per_seed": [finite(value) for value in per_seed],
        "sd_of_seeds": float(per_seed.std(ddof=1)) if len(seeds) > 1 else None,
        "dice_per_label": {
            label: finite(_mean(case[label] for result in mine for case in _final(result).values())) for label in labels
        },
        "training_seconds": float(np.mean([result["curve"][-1]["training_seconds"] for result in mine])),
        "curve": _curve(results, arm, budget, seeds),
        "cases": {case: finite(value) for case, value in zip(sorted(_final(mine[0])), table.mean(axis=0), strict=True)},
    }


def _curve(results: Results, arm: str, budget: Budget, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Mean Dice, iterations and training seconds at every evaluation."""
    mine = [result for cell, result in results.items() if _is(cell, arm, budget) and cell.seed in seeds]
    return [
        {
            "iterations": mine[0]["curve"][point]["iterations"],
            "training_seconds": float(np.mean([result["curve"][point]["training_seconds"] for result in mine])),
            "dice": _mean(scores(results, arm, budget, seeds, point).ravel()),
        }
        for point in range(len(mine[0]["curve"]))
    ]


def _compared(
    record: dict[str, Any], first: str, second: str, budget: Budget, results: Results
) -> dict[str, Any] | None:
    """Two arms on the seeds that both have."""
    seeds = [seed for seed in _seeds(results, first, budget) if seed in _seeds(results, second, budget)]
    if not seeds:
        return None
    tables = scores(results, first, budget, seeds), scores(results, second, budget, seeds)
    found = compare_runs(tables[0], tables[1])
    control = not next(arm for arm in record["arms"] if arm["name"] == second)["checkpoint"]
    words = ("pretraining helps", "pretraining hurts") if control else (f"better than {second}", f"worse than {second}")
    iterations = _iterations(record, first, budget)
    gains = np.mean(tables[0] - tables[1], axis=0)
    cases = sorted(_final(next(r for cell, r in results.items() if _is(cell, first, budget))))
    ranked = [cases[i] for i in np.argsort(gains) if np.isfinite(gains[i])]
    curves = {name: _curve(results, name, budget, seeds) for name in (first, second)}
    return {
        "first": first,
        "second": second,
        "train_cases": budget[0],
        "epochs": budget[1],
        "iterations": iterations,
        "title": f"{first} against {second}, {budget[0]} labelled, {iterations} iterations",
        "difference": finite(found.cases.difference),
        "low": finite(found.cases.low),
        "high": finite(found.cases.high),
        "low_with_seeds": finite(found.low),
        "high_with_seeds": finite(found.high),
        "p": found.cases.p,
        "n_cases": found.cases.n,
        "left_out": [case for case, gain in zip(cases, gains, strict=True) if not np.isfinite(gain)],
        "seeds": seeds,
        "per_seed": list(found.per_seed),
        "shown": found.shown,
        "verdict": found.verdict(*words),
        "first_reaches_second": _reached(curves[first], curves[second]),
        "second_reaches_first": _reached(curves[second], curves[first]),
        "worst_case": ranked[0] if ranked else None,
        "best_case": ranked[-1] if ranked else None,
    }


def _reached(curve: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, int | float | None]:
    """When `curve` reaches the Dice at which `other` ends."""
    level = other[-1]["dice"]
    return {"dice": level} | {
        work: reach([(point[work], point["dice"]) for point in curve], level)
        for work in ("iterations", "training_seconds")
    }


def _told(arm: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """An arm without the path of its checkpoint: reports are shared."""
    file = Path(arm["checkpoint"]).name if arm["checkpoint"] else None
    return {**arm, "checkpoint": file, **about.get(arm["name"], {})}


def _warnings(record: dict[str, Any], results: Results) -> list[str]:
    """Test cases that a checkpoint knows, or may know, and seconds that do not compare."""
    found = []
    for arm in record["arms"]:
        if not arm["checkpoint"]:
            continue
        known = record["about"].get(arm["name"], {}).get("pretrained_on")
        if known is None:
            found.append(f"{arm['name']}: which cases it was pretrained on is unknown; test cases may be among them")
        elif seen := known["test_cases"]:
            found.append(
                f"{arm['name']}: {len(seen)} of {len(record['split']['test'])} test cases, by name, were in its pretraining "
                f"on {known['dataset']}: {', '.join(seen)}"
            )
    if len(_distinct({"device": r["machine"]["device"], "gpu": r["machine"].get("gpu")} for r in results.values())) > 1:
        found.append("cells ran on different devices: compare iterations, not seconds")
    loads = [
        result["machine"].get("load_average", 0) / result["machine"].get("cores", 1) for result in results.values()
    ]
    if max(loads, default=0) > BUSY:
        found.append(f"the machine was busy (load of up to {max(loads):.1f} per core): compare iterations, not seconds")
    return found


def _pairs(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Every pretrained arm with the scratch arm of its plans, and every arm with those that were named."""
    scratch = {arm["plans"]: arm["name"] for arm in record["arms"] if not arm["checkpoint"]}
    pairs = [(arm["name"], scratch[arm["plans"]]) for arm in record["arms"] if arm["checkpoint"]]
    named = [(arm["name"], other) for other in record["against"] for arm in record["arms"] if arm["name"] != other]
    return list(dict.fromkeys(pairs + named))


def _budgets(record: dict[str, Any]) -> list[Budget]:
    return [(count, epochs) for count in record["train_cases"] for epochs in record["epochs"]]


def _iterations(record: dict[str, Any], arm: str, budget: Budget) -> int:
    plans = next(each["plans"] for each in record["arms"] if each["name"] == arm)
    return int(record["settings"][plans]["iterations_per_epoch"]) * budget[1]


def _seeds(results: Results, arm: str, budget: Budget) -> list[int]:
    return sorted(cell.seed for cell in results if _is(cell, arm, budget))


def _is(cell: Cell, arm: str, budget: Budget, seed: int | None = None) -> bool:
    return (cell.arm, cell.train_cases, cell.epochs) == (arm, *budget) and seed in (None, cell.seed)


def _final(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    return result["curve"][-1]["dice"]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _distinct(values: Any) -> list[dict[str, Any]]:
    """Different entries, but for how busy the machine was."""
    found: list[dict[str, Any]] = []
    for value in values:
        kept = {key: each for key, each in value.items() if key != "load_average"}
        if kept not in found:
            found.append(kept)
    return found
