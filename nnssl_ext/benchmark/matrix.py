"""What is compared: arms, labelled cases, schedules, seeds, and the cells they span."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.checkpoints.source import checkpoint_file, on_hub
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, sha256_of
from nnssl_ext.plans import configuration_of
from nnssl_ext.trainers.finetuning.settings import BLOCK, FinetuneSettings
from nnssl_ext.trainers.finetuning.subset import training_subset

SCRATCH = "scratch"
RESULT = "result.json"
FAILURE = "failure.json"


@dataclass(frozen=True)
class Arm:
    """One row of the table: where the weights come from.

    Attributes:
        name: of the row, and of a folder.
        plans: nnU-Net plans whose network is trained.
        checkpoint: pretrained weights; None trains from scratch.
    """

    name: str
    plans: str
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Split:
    """Which cases may be learnt from, and which are judged by.

    Attributes:
        pool: labelled subsets are drawn from these.
        test: no training ever sees these.
        about: where the split comes from.
    """

    pool: tuple[str, ...]
    test: tuple[str, ...]
    about: str

    def __post_init__(self) -> None:
        if both := sorted({*self.pool} & {*self.test}):
            raise NnsslError(
                f"{len(both)} test cases are among the training cases: {', '.join(both)}",
                "correct splits_final.json, or choose test cases with --test",
            )
        if not self.test:
            raise NnsslError("there is no test case", "choose a fold with validation cases, or name some with --test")


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        arm: its name.
        train_cases: number of labelled cases.
        epochs: length of the schedule.
        seed: of the labelled subset, the initial weights and the batches.
        digest: of everything that its figures depend on.
    """

    arm: str
    train_cases: int
    epochs: int
    seed: int
    digest: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.train_cases} labelled, {self.epochs} epochs, seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Where everything about it is kept."""
        return output / "cells" / self.arm / f"cases_{self.train_cases}" / f"epochs_{self.epochs}" / f"seed_{self.seed}"

    def finished(self, output: Path) -> dict[str, Any] | None:
        """What an earlier run found for the same request; None while it is open."""
        try:
            found = read_json(self.folder(output) / RESULT)
        except NnsslError:
            return None
        return found if isinstance(found, dict) and found.get("digest") == self.digest else None

    def failure(self, output: Path) -> str | None:
        """Why the last attempt failed, if it did."""
        path = self.folder(output) / FAILURE
        return read_json(path)["why"] if path.is_file() else None


@dataclass(frozen=True)
class Benchmark:
    """A matrix on one dataset.

    Attributes:
        dataset: ``Dataset004_Hippocampus``.
        preprocessed: its folder of plans and preprocessed cases, made by stock commands.
        configuration: 3D configuration of all plans.
        arms: with a scratch arm for all plans in use.
        train_cases: numbers of labelled cases.
        epochs: lengths of the schedules.
        seeds: repetitions. The smaller labelled subsets of a seed lie within its larger ones, for all arms alike.
        settings: plans name -> fine-tuning settings of all its cells, but for what the matrix varies.
        workers: processes that augment. 0 makes batches repeatable, and the same for all arms.
        against: arms that all others are compared with, besides their own scratch arm.
    """

    dataset: str
    preprocessed: Path
    configuration: str
    split: Split
    arms: tuple[Arm, ...]
    train_cases: tuple[int, ...]
    epochs: tuple[int, ...]
    seeds: int
    settings: dict[str, FinetuneSettings]
    workers: int = 0
    against: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def control(self, arm: Arm) -> Arm | None:
        """The scratch arm with the same plans; None for a scratch arm."""
        if arm.checkpoint is None:
            return None
        return next(other for other in self.arms if other.plans == arm.plans and other.checkpoint is None)

    def cells(self) -> list[Cell]:
        """All cells, those that answer most first: every arm at the smallest budget, then the next."""
        return [
            Cell(arm.name, count, epochs, seed, digest_of(self.request(arm, count, epochs, seed)))
            for count in self.train_cases
            for epochs in self.epochs
            for seed in range(self.seeds)
            for arm in self.arms
        ]

    def request(self, arm: Arm, train_cases: int, epochs: int, seed: int) -> dict[str, Any]:
        """Everything that a cell's figures depend on, in JSON types.

        Raises:
            NnsslError: there are not so many training cases, or a file is missing.
        """
        settings = replace(self.settings[arm.plans], epochs=epochs, train_cases=None, subset_seed=seed, seed=seed)
        plans = read_json(self.preprocessed / f"{arm.plans}.json")
        plans["configurations"] = {self.configuration: configuration_of(plans, self.configuration)}
        train = sorted(training_subset(self.split.pool, train_cases, seed))
        asked = {
            "version": version("nnssl-ext"),
            "dataset": self.dataset,
            "configuration": self.configuration,
            "plans": {**plans, BLOCK: asdict(settings)},
            "checkpoint": sha256_of(arm.checkpoint) if arm.checkpoint else None,
            "train": train,
            "test": sorted(self.split.test),
            "labels": self._labels((*train, *self.split.test)),
            "workers": self.workers,
        }
        return json.loads(json.dumps(asked))

    def _labels(self, cases: Sequence[str]) -> str:
        """SHA-256 of what labels there are and of the cases' segmentations: corrected ones are another truth."""
        dataset = read_json(self.preprocessed / "dataset.json")
        files = [self.preprocessed / "gt_segmentations" / f"{case}{dataset['file_ending']}" for case in sorted(cases)]
        truth = [sha256_of(file) for file in files if file.is_file()]
        return digest_of({"labels": dataset["labels"], "order": dataset.get("regions_class_order"), "truth": truth})

    def job(self, cell: Cell, device: str | None) -> dict[str, Any]:
        """What `nnssl_ext.benchmark.cell` needs to work on a cell.

        Args:
            device: None: cuda where the cell is worked on, if there is one, else cpu.
        """
        arm = self.arm(cell.arm)
        return {
            "name": str(cell),
            "digest": cell.digest,
            "request": self.request(arm, cell.train_cases, cell.epochs, cell.seed),
            "checkpoint": str(arm.checkpoint.resolve()) if arm.checkpoint else None,
            "preprocessed": str(self.preprocessed.resolve()),
            "device": device,
        }


def parse_arms(texts: Sequence[str], plans: str) -> list[Arm]:
    """Arms from ``scratch``, ``NAME=CHECKPOINT`` or ``NAME=CHECKPOINT@PLANS``; a scratch arm is added for all plans in use.
    A checkpoint is whatever `checkpoint_file` takes; what follows a repository of the hub is its revision first.

    Args:
        plans: of arms that name none.

    Raises:
        NnsslError: a checkpoint without name, one that does not exist, or a name that is used twice or cannot be a folder's.
    """
    found: list[Arm] = []
    for text in texts:
        if text == SCRATCH:
            continue
        name, equals, rest = text.partition("=")
        if not equals:
            raise NnsslError(f"-m {text}", "write scratch, NAME=CHECKPOINT or NAME=CHECKPOINT@PLANS")
        whole = "@" not in rest or Path(rest).exists() or on_hub(rest)
        source, _, own = (rest, "", "") if whole else rest.rpartition("@")
        if name in {SCRATCH, *(arm.name for arm in found)}:
            raise NnsslError(f"two arms are called '{name}'", "give every checkpoint a name of its own")
        if not name or name.startswith((".", SCRATCH)) or set(name) & set('/\\:*?"<>|@'):
            raise NnsslError(f"'{name}' cannot be an arm's name", "use letters, digits, '-', '_' and '+'")
        found.append(Arm(name, own or plans, checkpoint_file(source)))
    used = dict.fromkeys([*([plans] if SCRATCH in texts or not found else []), *(arm.plans for arm in found)])
    return [*(Arm(SCRATCH if name == plans else f"{SCRATCH}@{name}", name) for name in used), *found]


def digest_of(request: dict[str, Any]) -> str:
    """SHA-256 of a request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
