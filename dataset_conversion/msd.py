"""Medical Segmentation Decathlon: a task folder with dataset.json, imagesTr and labelsTr (arXiv:1902.09063)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nnssl_ext.dataset_conversion.cases import (
    CHANNEL_OF_MODALITY,
    ImageSource,
    Labels,
    PlannedCase,
    PlannedDataset,
    identifier_of,
    stem,
)
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json

Entry = TypeVar("Entry")
FORMS = {
    "modality": '{"0": "MRI", ...}',
    "labels": '{"0": "background", "1": "liver", ...}',
    "training": '[{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}, ...]',
}
"""Entries of dataset.json, and what they look like."""


def plan_msd(folder: Path, channels: tuple[str, ...] | None = None) -> tuple[str, PlannedDataset]:
    """The training cases of a task; several channels lie along the fourth axis of one file and are split.

    Cases listed in dataset.json that are not in the folder are a note, not a problem: cut-down copies are usual.

    Args:
        folder: e.g. ``Task04_Hippocampus``.
        channels: channel names, to overrule the task's own.

    Returns:
        The task's name, e.g. Hippocampus, and what to convert.

    Raises:
        NnsslError: no dataset.json, entries missing in it or of another form, or none of the listed cases there.
    """
    listing = folder / "dataset.json"
    content = read_json(listing)
    lacking = [key for key in FORMS if not isinstance(content, dict) or key not in content]
    if lacking:
        raise NnsslError(
            f"{listing} has no {', '.join(lacking)}: no Medical Segmentation Decathlon task",
            "give the task folder (Task04_Hippocampus, ...), or use nnssl_convert folder",
        )
    names = channels or _entry(listing, content, "modality", _channels)
    labels = _entry(listing, content, "labels", _labels)
    listed = _entry(
        listing, content, "training", lambda pairs: [(folder / p["image"], folder / p["label"]) for p in pairs]
    )
    cases, problems, absent = [], [], []
    for image, label in listed:
        if not os.path.lexists(image) and not os.path.lexists(label):  # a link that leads nowhere is a bad file
            absent.append(stem(image))
        elif not image.is_file() or not label.is_file():
            lost = label if image.is_file() else image
            problems.append(NnsslError(f"case {stem(image)}: {lost}: no such file", "restore it, or take the case out"))
        else:
            volumes = range(len(names)) if len(names) > 1 else [None]
            sources = tuple(ImageSource((image,), volume, names) for volume in volumes)
            case = stem(image)
            cases.append(PlannedCase(identifier_of(case, image), sources, ImageSource((label,)), name=case))
    if not cases and not problems:
        raise NnsslError(
            f"none of the {len(absent)} cases of {listing} is there", "check the path, or download it again"
        )
    notes = (f"{len(absent)} of {len(listed)} cases in dataset.json are not in the folder",) if absent else ()
    keep = {key: str(content[key]) for key in ("description", "reference", "licence", "release") if key in content}
    place = folder.resolve().name  # "." has no name
    name = identifier_of(str(content.get("name") or place.partition("_")[2] or place), folder)
    return name, PlannedDataset(names, tuple(cases), labels, tuple(problems), notes, keep)


def _entry(listing: Path, content: dict[str, Any], key: str, read: Callable[[Any], Entry]) -> Entry:
    try:
        return read(content[key])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NnsslError(
            f"{listing}: '{key}' does not look like {FORMS[key]}", "correct it, or use nnssl_convert folder"
        ) from error


def _channels(modality: dict[str, str]) -> tuple[str, ...]:
    return tuple(CHANNEL_OF_MODALITY.get(modality[k].lower(), modality[k]) for k in sorted(modality, key=int))


def _labels(names: dict[str, str]) -> Labels:
    return {name if int(value) else "background": int(value) for value, name in names.items()}
