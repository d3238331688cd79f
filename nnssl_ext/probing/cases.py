"""Which labelled cases teach and which are scored, and what their labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_ext.data.cases import list_cases
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.monitors.probe import LABEL_FREE, RENAME, is_labelled
from nnssl_ext.paths import dataset_id
from nnssl_ext.plans import configuration_of, preprocessed_folder, read_plans
from nnssl_ext.records import Case
from nnssl_ext.registration.encoder import Source

DEFAULT = 20
"""Cases on each side where nothing is asked for and there are as many; our choice."""
SPLITS = "splits_final.json"
SPACING_APART = 1.1
"""A spacing that differs by more than this factor along an axis deserves a note; our choice."""


@dataclass(frozen=True)
class Labels:
    """What is scored.

    Attributes:
        classes: number of label values, background included.
        scored: name -> label value, or values of a region.
        ignore: label of voxels that do not count, if there is one.
    """

    classes: int
    scored: dict[str, int | tuple[int, ...]]
    ignore: int | None


@dataclass(frozen=True)
class Split:
    """Case names, and where they come from in one sentence."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class ProbeData:
    """Preprocessed cases with labels.

    Attributes:
        dataset, plans_name, configuration: where they come from.
        train, test: cases that teach, and cases that are scored.
        about: of the split, one sentence.
        notes: what deserves attention, one sentence each.
    """

    dataset: str
    plans_name: str
    configuration: str
    labels: Labels
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    about: str
    notes: tuple[str, ...] = ()


def read_labels(dataset: str, plans: dict[str, Any]) -> Labels:
    """The labels of a data set, as nnU-Net evaluates them: foreground labels, or regions where there are some.

    Raises:
        NnsslError: no labels, or none beside the background.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    content = read_json(preprocessed_folder(dataset) / "dataset.json")
    if not is_labelled(content):
        told = ", ".join(map(str, content.get("labels", {}))) or "none"
        raise NnsslError(
            f"{dataset} has no labels to tell apart (dataset.json lists: {told}): {LABEL_FREE}",
            RENAME,
        )
    manager: Any = PlansManager(plans).get_label_manager(content)
    names = {_value(value): name for name, value in content["labels"].items()}
    scored = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    return Labels(
        classes=int(max(manager.all_labels)) + 1,
        scored={names[_value(value)]: _value(value) for value in scored},
        ignore=None if manager.ignore_label is None else int(manager.ignore_label),
    )


def open_data(
    source: Source,
    dataset: str,
    plans_name: str | None,
    configuration: str | None,
    train: int | None,
    test: int | None,
    seed: int,
    fold: int | None,
) -> ProbeData:
    """The cases of a data set that a checkpoint can be probed on.

    Args:
        dataset: ``DatasetXXX_Name``.
        plans_name, configuration: whose preprocessed cases; the checkpoint's own if None.
        train, test, seed, fold: see `split_cases`; the fold is looked up where the data set has ``splits_final.json``.

    Raises:
        NnsslError: no such plans, ones that feed a network otherwise than its training did, no labels, or too few cases.
    """
    ours = source.pretrained.kind != "nnssl"
    if plans_name is None and not ours:
        number = dataset_id(dataset)
        raise NnsslError(
            f"{source.pretrained.origin} was not trained with plans of {dataset}",
            f"name preprocessed plans with -p; to make some: nnssl_adapt CHECKPOINT -d {number}, then nnUNetv2_preprocess",
        )
    plans = read_plans(dataset, plans_name or source.plans["plans_name"])
    name = configuration or source.configuration
    found = configuration_of(plans, name)
    labels = read_labels(dataset, plans)
    notes = _fit(source, plans["plans_name"], name, found)
    base = preprocessed_folder(dataset)
    z, y, x = (float(mm) for mm in found["spacing"])
    folder = base / str(found["data_identifier"])
    cases = {case.identifier: case for case in list_cases(folder, (z, y, x))}
    split = split_cases(list(cases), train, test, seed, _fold(base / SPLITS, fold))
    return ProbeData(
        dataset,
        plans["plans_name"],
        name,
        labels,
        tuple(cases[each] for each in split.train),
        tuple(cases[each] for each in split.test),
        f"{dataset}: {split.about}",
        notes,
    )


def split_cases(
    names: Sequence[str],
    train: int | None,
    test: int | None,
    seed: int,
    fold: tuple[str, dict[str, list[str]]] | None = None,
) -> Split:
    """Draw cases that teach and cases that are scored; each sorted by name, none on both sides.

    For one seed, more cases on one side contain the fewer, and leave the other side as it is.

    Args:
        names: of all cases.
        train, test: how many; None: `DEFAULT`, or as many as there are.
        fold: what to call it, and its cases under ``train`` and ``val``; None: all cases are drawn from.

    Raises:
        NnsslError: not as many, fewer than one that teaches or two that are scored, a fold with a case on both sides, or a
            negative seed.
    """
    if seed < 0:
        raise NnsslError(f"--seed {seed}", "give at least 0")
    if fold is None:
        order = _shuffled(names, seed)
        test_count = min(DEFAULT, len(order) // 2) if test is None else test
        train_count = min(DEFAULT, len(order) - test_count) if train is None else train
        for_train, for_test = order[::-1], order
        enough = train_count + test_count <= len(order)
        whence = f"drawn with seed {seed} from {len(names)}"
    else:
        title, parts = fold
        if both := sorted(set(parts["train"]) & set(parts["val"])):
            raise NnsslError(f"{title} has cases on both sides: {', '.join(both)}", "mend it, or add --ignore_splits")
        for_train, for_test = (_shuffled(sorted(set(parts[side]) & set(names)), seed) for side in ("train", "val"))
        train_count = min(DEFAULT, len(for_train)) if train is None else train
        test_count = min(DEFAULT, len(for_test)) if test is None else test
        enough = train_count <= len(for_train) and test_count <= len(for_test)
        whence = f"drawn with seed {seed} from the {len(for_train)} and {len(for_test)} of {title}"
    if not enough or train_count < 1 or test_count < 2:
        there = f"{len(names)} cases" if fold is None else f"{len(for_train)} + {len(for_test)} cases of {fold[0]}"
        raise NnsslError(
            f"{train_count} case(s) to teach and {test_count} to score, of {there}",
            "at least one teaches and two are scored; change --train, --test or --fold, or preprocess more labelled cases",
        )
    return Split(
        tuple(sorted(for_train[:train_count])),
        tuple(sorted(for_test[:test_count])),
        f"{train_count} cases teach, {test_count} others are scored, {whence}",
    )


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    ordered = sorted(names)
    return [ordered[place] for place in np.random.default_rng(seed).permutation(len(ordered))]


def _fold(path: Path, number: int | None) -> tuple[str, dict[str, list[str]]] | None:
    """A fold of nnU-Net's cross-validation and what to call it."""
    if number is None:
        return None
    splits = read_json(path)
    if not isinstance(splits, list) or not all({"train", "val"} <= set(fold) for fold in splits):
        raise NnsslError(f"{path} holds no folds of train and val", "restore it, or add --ignore_splits")
    if not 0 <= number < len(splits):
        raise NnsslError(f"--fold {number}", f"{path} has folds 0 to {len(splits) - 1}")
    return f"fold {number} ({SPLITS})", splits[number]


def _fit(source: Source, plans_name: str, configuration: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Whether cases of these plans look to the network as its training did; what differs but can be lived with.

    Raises:
        NnsslError: a 2D configuration, or other normalisation.
    """
    origin = source.pretrained.origin
    if len(found["patch_size"]) != 3:
        raise NnsslError(f"configuration {configuration} of {plans_name} is 2D", "choose a 3D one with -c")
    theirs, wanted = found["normalization_schemes"], source.pretrained.normalization_schemes
    if set(theirs) != set(wanted):
        raise NnsslError(
            f"plans {plans_name} do not match {origin}: they normalise with {', '.join(theirs)}, its training did with "
            f"{', '.join(wanted)}",
            "frozen features of such images say nothing; nnssl_adapt writes plans that normalise alike, preprocess with those "
            "and name them with -p",
        )
    trained = configuration_of({"plans_name": "", **source.plans}, source.configuration)["spacing"]
    if any(max(a / b, b / a) > SPACING_APART for a, b in zip(trained, found["spacing"], strict=True)):
        sizes = ("x".join(f"{mm:.3g}" for mm in spacing) for spacing in (trained, found["spacing"]))
        return ("the network was trained at {} mm, these cases are at {} mm".format(*sizes),)
    return ()


def _value(value: Any) -> int | tuple[int, ...]:
    return tuple(int(each) for each in value) if isinstance(value, list | tuple) else int(value)
