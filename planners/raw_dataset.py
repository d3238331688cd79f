"""Checks on a raw nnU-Net data set before anything reads its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json
from nnssl_ext.paths import folder


def require_labels(raw: Path, dataset_id: int) -> dict[str, Any]:
    """``dataset.json`` of a data set whose training cases all have a label file.

    nnU-Net reads a label file for every case. `nnssl_convert foreground` writes label-free ones for image-only data.

    Raises:
        NnsslError: image-only, or labels missing for some cases; names the command that mends it.
    """
    description = raw / "dataset.json"
    dataset = dict(read_json(description)) if description.is_file() else {}
    images, missing = _cases_without_label(raw, dataset)
    if not images:
        raise NnsslError(f"{raw.name} has no training images in {raw / 'imagesTr'}", "check imagesTr and file_ending")
    if len(missing) == len(images) or "labels" not in dataset:
        raise NnsslError(
            f"{raw.name} is image-only, and nnU-Net reads a label file for every case",
            f"run: nnssl_convert foreground -d {dataset_id}",
        )
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise NnsslError(
            f"{raw.name}: {len(missing)} of {len(images)} training cases have no label file ({some})",
            f"add their labels or remove the cases; or remove labelsTr and run: nnssl_convert foreground -d {dataset_id}",
        )
    return dataset


def require_labels_of_command(words: Sequence[str]) -> None:
    """`require_labels` for the datasets that a stock planning command names by ``-d``, as typed.

    Raises:
        NnsslError: as `require_labels`.
    """
    if "-d" not in words:
        return
    for word in takewhile(str.isdigit, words[words.index("-d") + 1 :]):
        for raw in folder("nnUNet_raw").glob(f"Dataset{int(word):03d}_*"):
            require_labels(raw, int(word))


def _cases_without_label(raw: Path, dataset: dict[str, Any]) -> tuple[list[str], list[str]]:
    if "dataset" in dataset:  # nnU-Net's way of naming files that lie elsewhere
        labels = {
            case: raw / os.path.expandvars(files["label"]) if files.get("label") else None
            for case, files in dataset["dataset"].items()
        }
    else:
        ending = dataset.get("file_ending", ".nii.gz")
        names = sorted({p.name[: -len(ending) - 5] for p in (raw / "imagesTr").glob(f"*_[0-9][0-9][0-9][0-9]{ending}")})
        labels = {name: raw / "labelsTr" / f"{name}{ending}" for name in names}
    return list(labels), [case for case, label in labels.items() if label is None or not label.is_file()]
