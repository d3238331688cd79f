"""The whole benchmark: development cells, the choice they lead to, test cells, and what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.benchmark.cells import Cell, run_cell
from nnssl_ext.registration.benchmark.methods import Method, load
from nnssl_ext.registration.benchmark.pairs import LabelledPair, Split
from nnssl_ext.registration.benchmark.selection import Curve, best
from nnssl_ext.registration.pipeline import PairSettings

Say = Callable[[str], None]
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What is to be compared.

    Attributes:
        variants: method name -> label -> settings to try on development pairs.
        sdlogj: mean std of the log Jacobian determinant, in the fixed scan's foreground, that every method is regularised to.
        output: folder of all files.
    """

    split: Split
    methods: tuple[Method, ...]
    variants: dict[str, dict[str, PairSettings]]
    sdlogj: float
    output: Path
    device: torch.device


@dataclass(frozen=True)
class Choice:
    """Settings of one method.

    Attributes:
        variant: label.
        strength: of regularisation; None where there is none to choose.
        curves: label -> figures on development pairs; empty where nothing was chosen.
        notes: what deserves attention.
    """

    variant: str
    strength: float | None
    curves: dict[str, Curve] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def development_cells(plan: Benchmark, method: Method) -> list[Cell]:
    """What is computed to choose a method's settings: nothing if there is no choice."""
    variants = plan.variants[method.name]
    if not method.strengths and len(variants) == 1:
        return []
    return _cells(method, "development", variants, plan.split.development, method.strengths or (None,))


def test_cells(plan: Benchmark, method: Method, choice: Choice) -> list[Cell]:
    """What is computed to report a method."""
    chosen = {choice.variant: plan.variants[method.name][choice.variant]}
    return _cells(method, "test", chosen, plan.split.test, (choice.strength,))


def execute(plan: Benchmark, cells: Sequence[Cell], say: Say) -> tuple[dict[Cell, Results], dict[Cell, str]]:
    """Results of cells, found or computed, and what went wrong with the others."""
    results: dict[Cell, Results] = {}
    failures: dict[Cell, str] = {}
    loaded: tuple[Any, Any] = (None, None)
    for number, cell in enumerate(cells, start=1):
        done = cell.finished(plan.output)
        started = time.perf_counter()
        try:
            if done is None:
                key = (cell.method, cell.settings.features, cell.seed)
                if loaded[0] != key:
                    loaded = (key, load(cell.method, cell.settings, cell.seed, plan.device))
                done = run_cell(cell, loaded[1], plan.output, plan.device)
                say(f"{number}/{len(cells)} {cell}: {time.perf_counter() - started:.1f} s")
            results[cell] = done["results"]
        except Exception as error:  # noqa: BLE001 the others must go on, whatever it was
            failures[cell] = str(error) if isinstance(error, NnsslError) else f"{type(error).__name__}: {error}"
            say(f"{number}/{len(cells)} {cell}: FAILED: {failures[cell]}")
    return results, failures


def choose(plan: Benchmark, method: Method, results: dict[Cell, Results]) -> Choice:
    """Settings from development cells: per variant the regularisation that reaches the smoothness, then the variant with the
    highest Dice (else the smallest landmark error) there. Pairs that any variant failed on do not count.

    Raises:
        NnsslError: no pair on which every variant succeeded.
    """
    variants = list(plan.variants[method.name])
    if not results and not development_cells(plan, method):
        return Choice(variants[0], None)
    wanted = {(variant, seed) for variant in variants for seed in method.seeds}
    by_pair: dict[str, dict[tuple[str, int], Results]] = {}
    for cell, found in results.items():
        by_pair.setdefault(cell.pair.name, {})[cell.variant, cell.seed] = found
    complete = [found for found in by_pair.values() if found.keys() == wanted]
    if not complete:
        raise NnsslError(f"{method.name} failed on every development pair", "see the messages above")
    curves = {}
    for variant in variants:
        tables = [found[variant, seed] for found in complete for seed in method.seeds]
        columns = list(zip(*tables, strict=True))
        sdlogj = tuple(fmean(_sdlogj(entry) for entry in column) for column in columns)
        score = tuple(fmean(_score(entry) for entry in column) for column in columns)
        curves[variant] = Curve(method.strengths or (1.0,), sdlogj, score)
    if not method.strengths:
        return Choice(max(variants, key=lambda variant: curves[variant].score[0]), None, curves)
    place, strength = best(list(curves.values()), plan.sdlogj)
    chosen = curves[variants[place]]
    notes = (
        ()
        if chosen.reaches(plan.sdlogj)
        else (
            f"SDlogJ {plan.sdlogj:g} lies outside of what was tried, {min(chosen.sdlogj):.3f} to {max(chosen.sdlogj):.3f}",
        )
    )
    return Choice(variants[place], strength, curves, notes)


def by_pair(method: Method, results: dict[Cell, Results]) -> dict[str, dict[str, float]]:
    """Pair -> figures on test pairs, mean over seeds; pairs that a seed failed on are left out.

    Figures: ``dice`` and ``dice_<label>``, ``hd95_mm``, ``tre_mm`` (as far as there are labels and landmarks), ``sdlogj``,
    ``sdlogj_l2r`` (whole grid), ``fold_percent`` (foreground), ``fold_percent_grid``, ``cpu_seconds``, ``seconds``,
    ``peak_memory_gib``.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for cell, (result,) in results.items():
        found.setdefault(cell.pair.name, []).append(_flat(result))
    return {
        pair: {name: fmean(each[name] for each in seeds) for name in seeds[0]}
        for pair, seeds in found.items()
        if len(seeds) == len(method.seeds)
    }


def outlook(plan: Benchmark, method: Method, say: Say) -> tuple[int, float]:
    """How many of a method's cells are open, and the seconds they will take, judged by one that is finished or, where none is,
    computed for this purpose and kept.

    Raises:
        NnsslError: the first cell failed.
    """
    development = development_cells(plan, method)
    unknown = Choice(next(iter(plan.variants[method.name])), None)
    cells = development or test_cells(plan, method, unknown)
    example = next((cell for cell in cells if cell.finished(plan.output)), cells[0])
    results, failures = execute(plan, [example], say)
    if failures:
        raise NnsslError(f"{example}: {failures[example]}", "mend or leave out the method or the pair")
    waiting = [cell for cell in development if cell.finished(plan.output) is None]
    if development and not waiting:
        found, _ = execute(plan, development, say)
        tests = test_cells(plan, method, choose(plan, method, found))
    else:
        tests = test_cells(plan, method, unknown)
    waiting += [cell for cell in tests if cell.finished(plan.output) is None]
    ready = fmean(entry["seconds"]["prepare"] for entry in results[example])
    each = fmean(entry["seconds"]["solve"] for entry in results[example])
    return len(waiting), sum((ready + len(cell.strengths) * each for cell in waiting), 0.0)


def _cells(
    method: Method,
    part: Literal["development", "test"],
    variants: dict[str, PairSettings],
    pairs: Iterable[LabelledPair],
    strengths: tuple[float | None, ...],
) -> list[Cell]:
    digest = method.digest()
    return [
        Cell(method, part, label, settings, seed, pair, strengths, digest)
        for label, settings in variants.items()
        for seed in method.seeds
        for pair in pairs
    ]


def _sdlogj(entry: dict[str, Any]) -> float:
    return entry["smoothness_foreground"]["sdlogj"]


def _score(entry: dict[str, Any]) -> float:
    if "labels_after" in entry:
        return entry["labels_after"]["dice"]["mean"] or 0.0
    return -entry["tre_mm"]


def _flat(entry: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float | None] = {}
    if "labels_after" in entry:
        overlap = entry["labels_after"]["dice"]
        flat |= {"dice": overlap["mean"]} | {f"dice_{label}": value for label, value in overlap["per_label"].items()}
        flat |= {"hd95_mm": entry["labels_after"]["hd95_mm"]["mean"]}
    if "tre_mm" in entry:
        flat["tre_mm"] = entry["tre_mm"]
    foreground, grid = entry["smoothness_foreground"], entry["smoothness_grid"]
    flat |= {
        "sdlogj": foreground["sdlogj"],
        "sdlogj_l2r": grid["sdlogj_l2r"],
        "fold_percent": foreground["fold_percent"],
        "fold_percent_grid": grid["fold_percent"],
        "cpu_seconds": entry["cpu_seconds"],
        "seconds": sum(entry["seconds"].values()),
        "peak_memory_gib": entry["peak_memory_gib"],
    }
    return {name: float("nan") if value is None else value for name, value in flat.items()}
