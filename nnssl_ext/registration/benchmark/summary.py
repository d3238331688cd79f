"""What the test pairs say: a row per method, comparisons pair by pair, and whether a network has learnt anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from nnssl_ext.registration.benchmark.matrix import Benchmark, Choice
from nnssl_ext.registration.benchmark.methods import Method, pretrained_on
from nnssl_ext.registration.benchmark.pairs import cases_of
from nnssl_ext.reports.statistics import compare, finite, spread

FIGURES = {"dice": True, "hd95_mm": False, "tre_mm": False}
"""What is compared, and whether more is better."""
ROUGHER = 1.1
"""A method whose fields have more than this times the SDlogJ of another's is not at matched smoothness (our choice)."""
MEDIAN = ("cpu_seconds", "seconds")  # a busy machine has outliers

Table = dict[str, dict[str, float]]  # pair -> figures


def summarise(
    plan: Benchmark,
    choices: dict[str, Choice],
    tables: dict[str, Table],
    against: Sequence[str],
    failures: dict[str, str],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The benchmark's result in JSON types.

    Args:
        choices, tables: per method; methods that nothing could be chosen for are missing.
        against: methods that all others are compared with, besides their own control.
        failures: cell -> what went wrong.
    """
    present = [method for method in plan.methods if tables.get(method.name)]
    comparisons = [
        comparison
        for method in present
        for other in dict.fromkeys([*against, method.control])
        if other and other != method.name and tables.get(other)
        for comparison in _compared(method.name, other, tables)
    ]
    return {
        "version": version("nnssl-ext"),
        "about": plan.split.about,
        "matched_sdlogj": plan.sdlogj,
        "pairs": {
            part: {pair.name: pair.as_json() for pair in pairs}
            for part, pairs in (("development", plan.split.development), ("test", plan.split.test))
        },
        "methods": [_row(plan, method, choices[method.name], tables[method.name]) for method in present],
        "comparisons": comparisons,
        "verdicts": [_learnt(method, comparisons) for method in present if method.control],
        "warnings": leaks(plan),
        "failures": failures,
        "machine": machine,
    }


def leaks(plan: Benchmark) -> list[str]:
    """Test cases that the networks' training saw, as far as the settings files of their runs tell."""
    tested = cases_of(plan.split.test)
    found = []
    for method in plan.methods:
        for run in pretrained_on(method):
            if seen := sorted(tested & run.seen):
                found.append(
                    f"{method.name}: {len(seen)} of {len(tested)} test cases, by name, were in its training on {run.dataset}: "
                    f"{', '.join(seen)}"
                )
    return found


def _row(plan: Benchmark, method: Method, choice: Choice, table: Table) -> dict[str, Any]:
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    columns = {name: np.array([figures.get(name, np.nan) for figures in table.values()]) for name in names}
    return {
        "name": method.name,
        "features": method.features,
        "seeds": list(method.seeds),
        "control": method.control or None,
        "settings": asdict(plan.variants[method.name][choice.variant]),
        "variant": choice.variant,
        "strength": choice.strength,
        "notes": list(choice.notes),
        "development": {label: asdict(curve) for label, curve in choice.curves.items()},
        "test": {name: spread(values, "median" if name in MEDIAN else "mean") for name, values in columns.items()},
        "test_pairs": {pair: {name: finite(value) for name, value in each.items()} for pair, each in table.items()},
    }


def _compared(first: str, second: str, tables: dict[str, Table]) -> list[dict[str, Any]]:
    shared = [pair for pair in tables[first] if pair in tables[second]]
    rough = [float(np.mean([tables[name][pair]["sdlogj"] for pair in shared])) for name in (first, second)]
    found = []
    for figure, higher in FIGURES.items():
        columns = [[tables[name][pair].get(figure, float("nan")) for pair in shared] for name in (first, second)]
        if not any(np.isfinite(column).any() for column in columns):
            continue
        result = compare(columns[0], columns[1], higher)
        rougher = rough[0] > ROUGHER * rough[1]
        numbers = {
            name: value if np.isfinite(value) else None
            for name, value in asdict(result).items()
            if name != "higher_is_better"
        }
        found.append(
            {
                "first": first,
                "second": second,
                "figure": figure,
                **numbers,
                "shown": result.shown,
                "sdlogj": rough,
                "rougher": rougher,
                "verdict": result.verdict() + (", but with rougher fields" if rougher else ""),
            }
        )
    return found


def _learnt(method: Method, comparisons: Sequence[dict[str, Any]]) -> str:
    """Whether the features are better than those of the same network with random weights."""
    for comparison in comparisons:
        if (comparison["first"], comparison["second"]) == (method.name, method.control):
            word = {1: "training helps", 0: "it is not shown that training helps", -1: "training hurts"}[
                comparison["shown"]
            ]
            if comparison["shown"] == 1 and comparison["rougher"]:
                word = "training helps, but with rougher fields"
            return f"{method.name}: {word} ({comparison['figure']} against random weights: {comparison['verdict']})"
    return f"{method.name}: its control has no figures"
