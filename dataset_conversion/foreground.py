"""Image-only raw datasets: label-free foreground masks as labelsTr, in place, so that every stock command passes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnssl_ext.dataset_conversion.cases import (
    FOREGROUND_LABELS,
    ImageSource,
    PlannedCase,
    PlannedDataset,
    image_ending,
    visible_files,
)
from nnssl_ext.dataset_conversion.one_case import Places
from nnssl_ext.dataset_conversion.raw_dataset import Converted, check_all, told_together
from nnssl_ext.dataset_conversion.whole_folder import whole_folder
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json

ASIDE = "imagesBad"


def add_foreground(
    dataset: Path,
    *,
    channels: Sequence[str] = (),
    dry_run: bool = False,
    limit: int | None = None,
    skip_bad: bool = False,
    processes: int = 1,
) -> Converted:
    """Write ``labelsTr`` for an image-only raw dataset and correct its dataset.json. The images stay as they are.

    Args:
        dataset: a ``DatasetXXX_Name`` folder with imagesTr.
        channels: channel names, needed if there is no dataset.json that has them.
        dry_run: check all images, write nothing.
        limit: check the first cases only; for dry runs.
        skip_bad: move the images of bad cases to ``imagesBad`` and go on with the rest.
        processes: spawned worker processes; 1 works in this one.

    Raises:
        NnsslError: there are labels already, no images, wrong channels, or bad images (all of them, one message).
    """
    if limit is not None and not dry_run:
        raise NnsslError("masks for some of the cases make no complete dataset", "use --limit with --dry-run only")
    labels = dataset / "labelsTr"
    if labels.is_dir() and any(labels.iterdir()):
        raise NnsslError(
            f"{labels} has labels already", "remove the folder if foreground masks should take their place"
        )
    description, planned = _planned(dataset, channels)
    if dry_run:
        return check_all(replace(planned, cases=planned.cases[:limit]), Places(), processes)
    if labels.is_dir():
        labels.rmdir()
    with whole_folder(labels) as building:
        converted = check_all(planned, Places(labels=building, ending=description["file_ending"]), processes)
        bad = {case.identifier for case in converted.cases if case.problem}
        if converted.problems and not (skip_bad and len(bad) < len(converted.cases)):
            raise told_together(converted.problems)
        for case in planned.cases:
            if case.identifier in bad:
                _set_aside(dataset, case)
        # Before the folder appears: with these labels but no labelsTr the dataset is as unlabelled as it was.
        write_json(dataset / "dataset.json", description | {"numTraining": len(converted.cases) - len(bad)})
    return converted


def _planned(dataset: Path, channels: Sequence[str]) -> tuple[dict[str, Any], PlannedDataset]:
    files, problems = visible_files(dataset / "imagesTr")
    images = [path for path in files if image_ending(path) and path.parent == dataset / "imagesTr"]
    if problems:
        raise problems[0]
    if not images:
        raise NnsslError(
            f"no images in {dataset / 'imagesTr'}", "an image-only dataset has imagesTr/CASE_0000.nii.gz, ..."
        )
    listing = dataset / "dataset.json"
    found: dict[str, Any] = read_json(listing) if listing.exists() else {}
    if "dataset" in found:
        raise NnsslError(f"{listing} lists files outside imagesTr", "convert them with nnssl_convert folder")
    ending = str(found.get("file_ending") or image_ending(images[0]))
    names = {str(c): name for c, name in enumerate(channels)} or found.get("channel_names")
    if not names:
        raise NnsslError(f"{listing} does not tell the channels", "name them: --channels CT, --channels MRI, ...")
    groups: dict[str, dict[int, Path]] = {}
    for path in images:
        match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        if match is None:
            raise NnsslError(f"{path} is not named CASE_0000{ending}", "rename it, or use nnssl_convert folder")
        groups.setdefault(match[1], {})[int(match[2])] = path
    cases, problems = [], []
    for name, by_channel in groups.items():
        if sorted(by_channel) == list(range(len(names))):
            cases.append(PlannedCase(name, tuple(ImageSource((by_channel[c],)) for c in range(len(names)))))
        else:
            told = (
                f"case {name}: channels {sorted(by_channel)} in {dataset / 'imagesTr'}, dataset.json names {len(names)}"
            )
            problems.append(NnsslError(told, "add the missing files, or correct channel_names"))
    if problems:
        raise told_together(problems)
    kept = found | {"channel_names": names, "labels": FOREGROUND_LABELS, "file_ending": ending}
    return kept, PlannedDataset(tuple(names.values()), tuple(cases), FOREGROUND_LABELS)


def _set_aside(dataset: Path, case: PlannedCase) -> None:
    (dataset / ASIDE).mkdir(exist_ok=True)
    for channel in case.channels:
        channel.path.rename(dataset / ASIDE / channel.path.name)
