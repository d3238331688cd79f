"""nnssl's ``pretrain_data.json``: one collection of single-channel images by dataset, subject and session."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_ext.dataset_conversion.cases import (
    CHANNEL_OF_MODALITY,
    FOREGROUND_LABELS,
    MR,
    ImageSource,
    PlannedCase,
    PlannedDataset,
    identifier_of,
    image_ending,
    subject_of,
)
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json

LISTING = "pretrain_data.json"
RAW = "nnssl_raw"


def plan_collection(
    listing: Path, *, modalities: Sequence[str] = (), channels: Sequence[str] = ()
) -> tuple[str, PlannedDataset]:
    """Every image of a collection as an unlabelled single-channel case, named as nnssl names it.

    Args:
        listing: ``pretrain_data.json`` or the folder that holds it.
        modalities: which images, e.g. T1w; all by default.
        channels: the channel's name, to overrule what the modality tells.

    Returns:
        The collection's name and what to convert.

    Raises:
        NnsslError: no such schema, an unset variable in a path, no images, or CT mixed with others.
    """
    listing = listing / LISTING if listing.is_dir() else listing
    content = read_json(listing)
    cases, kinds = [], set()
    try:
        name = str(content["collection_name"])
        for keys, image in _images(content):
            if modalities and image["modality"] not in modalities:
                continue
            path = _resolved(image["image_path"], listing)
            told = "__".join((name, *keys, _without_ending(image["name"])))
            sources = (ImageSource((path,)),)
            cases.append(PlannedCase(identifier_of(told, path), sources, modality=str(image["modality"]), name=told))
            kinds.add(CHANNEL_OF_MODALITY.get(str(image["modality"]).lower(), MR))
    except (KeyError, TypeError, AttributeError) as error:
        raise NnsslError(
            f"{listing} is no nnssl collection: {error!r} is missing or of another type", "check the file"
        ) from error
    if not cases:
        raise NnsslError(f"no images in {listing}", "check --modalities")
    if len(kinds) > 1 and not channels:
        raise NnsslError(
            f"{listing} mixes modalities: {' and '.join(sorted(kinds))}", "convert them one by one with --modalities"
        )
    return name, PlannedDataset(tuple(channels or kinds), tuple(cases), FOREGROUND_LABELS)


def export_collection(dataset: Path, *, subject_pattern: str = ".+") -> dict[str, Any]:
    """The collection of a raw dataset, for nnssl: every channel of every training case is one image.

    Paths below ``$nnssl_raw`` are written relative to that variable, as nnssl does.

    Args:
        dataset: a ``DatasetXXX_Name`` folder.
        subject_pattern: regular expression whose match in a case's name is its subject.

    Raises:
        NnsslError: no dataset.json or no images, a file named otherwise than nnU-Net wants, a pattern that
            matches nothing.
    """
    description = read_json(dataset / "dataset.json")
    ending, channels = description["file_ending"], description["channel_names"]
    subjects: dict[str, Any] = {}
    for path in sorted((dataset / "imagesTr").glob(f"[!.]*{ending}")):  # macOS leaves ._x.nii.gz
        match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        if match is None or str(int(match[2])) not in channels:
            raise NnsslError(
                f"{path} is no CASE_0000{ending} of a channel in dataset.json ({', '.join(channels)})",
                "rename it, or move it out of imagesTr",
            )
        case, channel = match.groups()
        subject = subject_of(case, subject_pattern)
        entry = subjects.setdefault(subject, {"subject_id": subject, "subject_info": None, "sessions": {}})
        session = entry["sessions"].setdefault(case, {"session_id": case, "session_info": None, "images": []})
        session["images"].append(
            {
                "name": path.name,
                "modality": channels[str(int(channel))],
                "image_path": _relative(path),
                "image_info": {},
                "associated_masks": None,
            }
        )
    if not subjects:
        raise NnsslError(f"no images in {dataset / 'imagesTr'}", "convert a dataset first")
    number, _, name = dataset.name.removeprefix("Dataset").partition("_")
    inner = {"dataset_index": number, "name": name, "dataset_info": None, "subjects": subjects}
    return {"collection_index": int(number), "collection_name": dataset.name, "datasets": {number: inner}}


def _images(content: dict[str, Any]) -> list[tuple[tuple[str, str, str], dict[str, Any]]]:
    return [
        ((str(dataset["dataset_index"]), str(subject_id), str(session_id)), image)
        for dataset in content["datasets"].values()
        for subject_id, subject in dataset["subjects"].items()
        for session_id, session in subject["sessions"].items()
        for image in session["images"]
    ]


def _without_ending(name: str) -> str:
    ending = image_ending(Path(name))
    return name.removesuffix(ending) if ending else name


def _resolved(path: str, listing: Path) -> Path:
    variable = path.split("/")[0]
    if not variable.startswith("$"):
        return Path(path)
    if variable[1:] not in os.environ:
        raise NnsslError(
            f"environment variable {variable[1:]} is not set ({listing} has paths below it)",
            f"export {variable[1:]}=/path/to/{variable[1:]}",
        )
    return Path(os.environ[variable[1:]]) / path.partition("/")[2]


def _relative(path: Path) -> str:
    base = os.environ.get(RAW)
    if base and path.absolute().is_relative_to(Path(base).absolute()):
        return f"${RAW}/{path.absolute().relative_to(Path(base).absolute())}"
    return str(path.absolute())
