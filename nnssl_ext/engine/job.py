"""What a run is made of, where it lives, and whether it may continue."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnssl_ext.contracts import PretrainPlan
from nnssl_ext.engine.log import WANDB_ID
from nnssl_ext.engine.settings import RunSettings
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.monitors.probe import LABEL_FREE, is_labelled
from nnssl_ext.paths import folder
from nnssl_ext.plans import configuration_of, preprocessed_folder, pretrain_plan, read_plans
from nnssl_ext.records import Case

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"

FREE_TO_CHANGE = {
    "device",
    "precision",
    "workers",
    "compile",
    "picture_epochs",
    "probe_epochs",
    "registration_pairs",
    "registration_cases",
    "tracker",
    "max_skipped",
}
"""Run settings that may differ when a run continues: they change no batch and no schedule."""


@dataclass(frozen=True)
class Job:
    """One pretraining run: method, data, settings and folder.

    Attributes:
        method: name of the method class.
        settings: the method's settings; a type of them that leaves some to others settles these by its ``settled()``, here and not
            before, because flags change the others.
        run: how it is carried out.
        dataset: ``DatasetXXX_Name``.
        plans: the plans as read.
        plan: what the method may know of them.
        cases: the cases to learn from, sorted by identifier.
        output: the run's folder.
    """

    method: str
    settings: Any
    run: RunSettings
    dataset: str
    plans: dict[str, Any]
    plan: PretrainPlan
    cases: tuple[Case, ...]
    output: Path

    def __post_init__(self) -> None:
        if hasattr(self.settings, "settled"):
            object.__setattr__(self, "settings", self.settings.settled())
        for name in ("epochs", "iterations"):
            if getattr(self.settings, name) < 1:
                raise NnsslError(f"--{name} {getattr(self.settings, name)}", "give at least 1")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.settings.epochs * self.settings.iterations)

    def about(self, world_size: int) -> str:
        """One line; ``world_size`` as in `prepare`."""
        return (
            f"{self.method} on {self.plan.preset}, {len(self.cases)} cases of {self.dataset}, "
            f"batch {self.run.batch_size} x {world_size}, {self.total_steps} steps -> {self.output}"
        )

    def as_json(self) -> dict[str, Any]:
        """The settings file of the run, without what only launching tells, see `prepare`."""
        return {
            "method": self.method,
            "dataset": self.dataset,
            "plans_name": self.plan.plans_name,
            "configuration": self.plan.configuration,
            "settings": asdict(self.settings),
            "run": asdict(self.run),
            "cases": [case.identifier for case in self.cases],
            "nnssl_ext": version("nnssl-ext"),
        }


def plan_of(dataset: str, plans_name: str, configuration: str) -> tuple[dict[str, Any], PretrainPlan]:
    """The plans of a dataset, and what a method may know of one configuration.

    Raises:
        NnsslError: unknown dataset, plans or configuration.
    """
    plans = read_plans(dataset, plans_name)
    channels = len(configuration_of(plans, configuration)["normalization_schemes"])
    return plans, pretrain_plan(plans, configuration, channels)


def data_folder(dataset: str, plans: dict[str, Any], configuration: str) -> Path:
    """Where the preprocessed cases of a configuration lie."""
    return preprocessed_folder(dataset) / str(configuration_of(plans, configuration)["data_identifier"])


def run_folder(dataset: str, method: str, plan: PretrainPlan, name: str | None = None) -> Path:
    """``nnssl_results/DatasetXXX_Name/Method__Plans__configuration``, and ``__name`` where a run has one of its own.

    Raises:
        NnsslError: a name that cannot be part of a folder name.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise NnsslError(f"--name '{name}' cannot be part of a folder name", "use letters, digits, '.', '_' and '-'")
    suffix = "" if name is None else f"__{name}"
    return folder("nnssl_results") / dataset / f"{method}__{plan.plans_name}__{plan.configuration}{suffix}"


def prepare(job: Job, resume: bool, world_size: int) -> bool:
    """Make the run's folder ready; write plans and settings.

    Args:
        job: what to do.
        resume: continue an earlier run of the same settings if there is one.
        world_size: processes on all nodes. They decide which cases a step sees and its learning rate, and torchrun and SLURM
            start another number than ``job.run.processes``.

    Returns:
        Whether a checkpoint to continue from exists.

    Raises:
        NnsslError: labels to learn from that the dataset does not have; the folder holds a run and ``resume`` is off, or a
            finished one that cannot be continued; or settings or plans differ from the run's, naming each.
    """
    dataset_json = preprocessed_folder(job.dataset) / "dataset.json"
    if labels := getattr(job.settings, "labels", ()):
        _refuse_unknown_labels(labels, read_json(dataset_json), job.dataset)
    settings = {**job.as_json(), "world_size": world_size}
    latest, final = job.output / LATEST, job.output / FINAL
    if latest.exists() and not resume:
        raise NnsslError(f"{job.output} already holds a run", "add --c to continue it, or --name for another run")
    if final.exists() and not latest.exists():
        raise NnsslError(f"{job.output} already holds a finished run", "use its checkpoint, or --name for another run")
    if latest.exists():
        before = {"world_size": world_size, **read_json(job.output / "settings.json")}  # settings files of old lack it
        before["plans"] = _read_of_plans(job, job.output / "plans.json")
        _refuse_changes(before, {**settings, "plans": _read_of_plans(job)}, job.output)
    elif job.output.exists():
        for stale in ("training_log.csv", "progress.png", "diagnosis.txt", "report.html", WANDB_ID):
            (job.output / stale).unlink(missing_ok=True)
    write_json(job.output / "settings.json", settings)
    write_json(job.output / "plans.json", job.plans)
    if dataset_json.exists():
        shutil.copyfile(dataset_json, job.output / "dataset.json")
    return latest.exists()


def _refuse_unknown_labels(labels: tuple[int, ...], content: dict[str, Any], dataset: str) -> None:
    if not is_labelled(content):
        raise NnsslError(
            f"{dataset} has no labels to learn from: {LABEL_FREE}",
            "leave --labels out",
        )
    known: dict[int, list[str]] = {}
    for name, values in content["labels"].items():
        if name not in ("background", "ignore"):
            for value in values if isinstance(values, list) else [values]:  # several make up a region
                known.setdefault(int(value), []).append(name)
    if unknown := [label for label in labels if label not in known]:
        told = ", ".join(f"{value} {'/'.join(names)}" for value, names in sorted(known.items()))
        raise NnsslError(f"--labels: unknown label {', '.join(map(str, unknown))} in {dataset}", f"known: {told}")


def _read_of_plans(job: Job, file: Path | None = None) -> dict[str, Any]:
    """What pretraining reads of the job's plans, or of this file."""
    plans = job.plans if file is None else read_json(file)
    found = configuration_of(plans, job.plan.configuration)
    data = ("data_identifier", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm", "architecture")
    sizes = ("global_crop", "local_crop", "token_size")
    return {
        **{name: found.get(name) for name in data},
        **{name: found.get("nnssl", {}).get(name) for name in sizes},
        "intensities": plans.get("foreground_intensity_properties_per_channel"),
    }


def _refuse_changes(before: dict[str, Any], after: dict[str, Any], output: Path) -> None:
    old, now = _flat(before), _flat(after)
    changed = [
        f"{key}: was {old.get(key)}, now {now.get(key)}"
        for key in sorted(now.keys() | old.keys())
        if old.get(key) != now.get(key) and key != "nnssl_ext" and key.removeprefix("run.") not in FREE_TO_CHANGE
    ]
    if changed:
        raise NnsslError(
            f"cannot continue {output}: its settings differ ({'; '.join(changed)})",
            "repeat the original settings, or start another run with --name",
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: list(tree) if isinstance(tree, tuple) else tree}
