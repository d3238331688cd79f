"""The four folders, from nnU-Net's environment variables and one of ours; they complain only when used."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl_ext.errors import NnsslError, unknown_name

VARIABLES = {
    "nnUNet_raw": "raw datasets (Dataset004_Hippocampus/imagesTr, ...)",
    "nnUNet_preprocessed": "plans and preprocessed cases",
    "nnUNet_results": "fine-tuned models",
    "nnssl_results": "pretraining runs",
}

_CREATE = {
    "nnUNet_raw": "to create it: nnssl_convert -h",
    "nnUNet_preprocessed": "to create it from raw data: nnUNetv2_plan_and_preprocess -d {} -pl PLANNER -c 3d_fullres   "
    "(nnssl_plan -h lists our planners)",
}


def folder(variable: str) -> Path:
    """The folder a variable of `VARIABLES` names.

    Raises:
        NnsslError: the variable is not set; the message holds the line that sets it.
    """
    value = os.environ.get(variable)
    if not value:
        raise NnsslError(
            f"environment variable {variable} is not set ({VARIABLES[variable]})",
            f"export {variable}=/path/to/{variable}   (nnssl_doctor lists all of them)",
        )
    return Path(value)


def dataset_name(dataset: str | int, root: str = "nnUNet_preprocessed") -> str:
    """The folder name `DatasetXXX_Name` for an id or a name, looked up below the variable `root`.

    Raises:
        NnsslError: no or several datasets match.
    """
    base = folder(root)
    names = sorted(p.name for p in base.glob("Dataset*") if p.is_dir())
    if str(dataset).isdigit():
        found = [n for n in names if n.startswith(f"Dataset{int(dataset):03d}_")]
    else:
        found = [n for n in names if n == dataset]
    if len(found) > 1:
        raise NnsslError(
            f"dataset id {dataset} is used twice in {base}: {', '.join(found)}", "rename or remove one of them"
        )
    if not found:
        error = unknown_name(f"dataset (in {base})", str(dataset), names)
        raise NnsslError(error.what, f"{error.fix}; {_CREATE[root].format(dataset_id(dataset))}")
    return found[0]


def dataset_id(dataset: str | int) -> str:
    """What ``-d`` of stock commands takes, which is no name: the id in `DatasetXXX_Name`; anything else as it is."""
    found = re.match(r"Dataset(\d+)_", str(dataset))
    return str(int(found[1])) if found else str(dataset)
