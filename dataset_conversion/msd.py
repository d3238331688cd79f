"""Medical Segmentation Decathlon: a task folder with dataset.json, imagesTr and labelsTr (arXiv:1902.09063)."""

from __future__ import annotations

from pathlib import Path

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


def plan_msd(folder: Path, channels: tuple[str, ...] | None = None) -> tuple[str, PlannedDataset]:
    """The training cases of a task; several channels lie along the fourth axis of one file and are split.

    Cases listed in dataset.json that are not in the folder are a note, not a problem: cut-down copies are usual.

    Args:
        folder: e.g. ``Task04_Hippocampus``.
        channels: channel names, to overrule the task's own.

    Returns:
        The task's name, e.g. Hippocampus, and what to convert.

    Raises:
        NnsslError: no dataset.json, entries missing in it, or none of the listed cases there.
    """
    listing = folder / "dataset.json"
    content = read_json(listing)
    lacking = [key for key in ("modality", "labels", "training") if key not in content]
    if lacking:
        raise NnsslError(
            f"{listing} has no {', '.join(lacking)}: no Medical Segmentation Decathlon task",
            "give the task folder (Task04_Hippocampus, ...), or use nnssl_convert folder",
        )
    names = channels or tuple(_channel(content["modality"][k]) for k in sorted(content["modality"], key=int))
    labels: Labels = {name if int(value) else "background": int(value) for value, name in content["labels"].items()}
    cases, problems, absent = [], [], []
    for entry in content["training"]:
        image, label = folder / entry["image"], folder / entry["label"]
        if not image.is_file() and not label.is_file():
            absent.append(stem(image))
        elif not image.is_file() or not label.is_file():
            lost = label if image.is_file() else image
            problems.append(NnsslError(f"case {stem(image)}: {lost}: no such file", "restore it, or take the case out"))
        else:
            volumes = range(len(names)) if len(names) > 1 else [None]
            sources = tuple(ImageSource((image,), volume) for volume in volumes)
            cases.append(PlannedCase(identifier_of(stem(image)), sources, ImageSource((label,))))
    if not cases and not problems:
        raise NnsslError(
            f"none of the {len(absent)} cases of {listing} is there", "check the path, or download it again"
        )
    notes = (
        (f"{len(absent)} of {len(content['training'])} cases in dataset.json are not in the folder",) if absent else ()
    )
    keep = {key: str(content[key]) for key in ("description", "reference", "licence", "release") if key in content}
    name = identifier_of(content.get("name") or folder.name.partition("_")[2] or folder.name)
    return name, PlannedDataset(names, tuple(cases), labels, tuple(problems), notes, keep)


def _channel(modality: str) -> str:
    return CHANNEL_OF_MODALITY.get(modality.lower(), modality)
