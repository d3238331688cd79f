"""The four folders, from nnU-Net's environment variables and one of ours; they complain only when used."""

from __future__ import annotations

import os
from pathlib import Path

from nnssl_ext.errors import NnsslError, unknown_name

VARIABLES = {
    "nnUNet_raw": "raw datasets (Dataset004_Hippocampus/imagesTr, ...)",
    "nnUNet_preprocessed": "plans and preprocessed cases",
    "nnUNet_results": "fine-tuned models",
    "nnssl_results": "pretraining runs",
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
        raise unknown_name(f"dataset (in {base})", str(dataset), names)
    return found[0]
