"""``benchmark.json``: what has been asked of a benchmark's folder, so that a report needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.benchmark.matrix import Arm, Benchmark, Cell
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

RECORD = "benchmark.json"
OWN = {RECORD, "checkpoints"}
"""What a benchmark that was stopped at its very start leaves."""


def claim(benchmark: Benchmark, output: Path) -> None:
    """Make sure that a folder is new, empty, or this benchmark's.

    Raises:
        NnsslError: it holds something else, or a benchmark of other test cases.
    """
    record = output / RECORD
    if record.exists():
        before = read_json(record)
        if (before["dataset"], before["split"]["test"]) != (benchmark.dataset, list(benchmark.split.test)):
            raise NnsslError(
                f"{output} holds a benchmark of {before['dataset']} with other test cases",
                "choose a new folder with -o",
            )
    elif output.exists() and any(path.name not in OWN for path in output.iterdir()):
        raise NnsslError(f"{output} holds something else than a benchmark", "choose a new folder with -o")


def save(benchmark: Benchmark, cells: Sequence[Cell], output: Path, about: dict[str, Any]) -> None:
    """Write ``benchmark.json``: the matrix and its cells, so that a report needs nothing else. Cells that earlier commands finished
    in this folder stay in it, as long as the matrix would make them alike.

    Args:
        about: arm name -> what the page tells about it, in JSON types.

    Raises:
        NnsslError: the folder cannot be claimed or written.
    """
    claim(benchmark, output)
    before = read_json(output / RECORD) if (output / RECORD).is_file() else None
    whole = _joined(benchmark, before) if before else benchmark
    kept = [cell for cell in whole.cells() if cell not in cells and cell.finished(output)]
    content = {
        "version": version("nnssl-ext"),
        **asdict(whole),
        "about": {**(before["about"] if before else {}), **about},
        "labels": _label_names(read_json(benchmark.preprocessed / "dataset.json")),
        "cells": [asdict(cell) for cell in (*cells, *kept)],
    }
    write_json(output / RECORD, json.loads(json.dumps(content, default=str)))


def load(output: Path) -> tuple[dict[str, Any], list[Cell]]:
    """What `save` wrote, and its cells.

    Raises:
        NnsslError: there is no benchmark.
    """
    if not (output / RECORD).is_file():
        raise NnsslError(f"{output} holds no benchmark ({RECORD})", "give the -o of nnssl_benchmark segmentation")
    content = read_json(output / RECORD)
    return content, [Cell(**cell) for cell in content["cells"]]


def _joined(benchmark: Benchmark, before: dict[str, Any]) -> Benchmark:
    """The smallest matrix with both in it, an arm of both as it is today; the benchmark alone if other things differ too."""
    given = version("nnssl-ext"), benchmark.configuration, benchmark.workers, list(benchmark.split.pool)
    if given != (before["version"], before["configuration"], before["workers"], before["split"]["pool"]):
        return benchmark
    arms = {
        arm["name"]: Arm(arm["name"], arm["plans"], Path(arm["checkpoint"]) if arm["checkpoint"] else None)
        for arm in before["arms"]
    }
    arms |= {arm.name: arm for arm in benchmark.arms}
    settings = {
        plans: FinetuneSettings(**{**values, "betas": tuple(values["betas"])})
        for plans, values in before["settings"].items()
    }
    files = [arm.checkpoint for arm in arms.values() if arm.checkpoint]
    files += [benchmark.preprocessed / f"{plans}.json" for plans in settings]
    controlled = {arm.plans for arm in arms.values() if not arm.checkpoint} == {arm.plans for arm in arms.values()}
    alike = all(settings.get(plans, values) == values for plans, values in benchmark.settings.items())
    if not (controlled and alike and all(path.is_file() for path in files)):
        return benchmark
    return replace(
        benchmark,
        arms=tuple(arms.values()),
        train_cases=tuple(sorted({*before["train_cases"], *benchmark.train_cases})),
        epochs=tuple(sorted({*before["epochs"], *benchmark.epochs})),
        seeds=max(before["seeds"], benchmark.seeds),
        settings={**settings, **benchmark.settings},
    )


def _label_names(dataset: dict[str, Any]) -> dict[str, str]:
    """Label or region, as nnU-Net's summaries call it, -> name."""
    labels = dataset["labels"].items()
    return {str(tuple(value) if isinstance(value, list) else value): name for name, value in labels}
