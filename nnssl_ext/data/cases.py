"""Finding preprocessed cases."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
from tqdm import tqdm

from nnssl_ext.errors import NnsslError, unknown_name
from nnssl_ext.files import read_json
from nnssl_ext.records import Case


def list_cases(folder: Path, spacing: tuple[float, float, float], only: Sequence[str] | None = None) -> list[Case]:
    """The cases of a preprocessed configuration folder, sorted by name. Reads file headers only.

    Args:
        folder: e.g. ``nnUNet_preprocessed/Dataset004_Hippocampus/nnsslPrimusTinyPlans_3d_fullres``.
        spacing: mm along z, y, x of the configuration, as its plans state it (all its cases are resampled to it).
        only: keep these case names.

    Raises:
        NnsslError: the folder is missing, empty or of an old format, a name in `only` is unknown, a file is damaged.
    """
    if not folder.is_dir():
        raise NnsslError(f"no preprocessed data: {folder} does not exist", preprocess_command(folder))
    names = sorted(p.name[:-5] for p in folder.glob("*.b2nd") if not p.name.endswith("_seg.b2nd"))
    if not names and any(folder.glob("*.np[yz]")):
        raise NnsslError(f"{folder} holds .npz/.npy files of an old nnU-Net", preprocess_command(folder))
    if not names:
        raise NnsslError(f"{folder} holds no preprocessed case (.b2nd)", preprocess_command(folder))
    if only is not None:
        known = set(names)
        for name in only:
            if name not in known:
                raise unknown_name(f"case (in {folder})", name, names)
        names = sorted(set(only))
        if not names:
            raise NnsslError("the selection of cases is empty", "name at least one case, one per line, or select none")
    progress = tqdm(names, desc="reading case headers", unit="case", delay=2, leave=False)
    by_case, of_all = _modalities(folder.parent / "dataset.json")
    return [_case(folder, name, spacing, by_case.get(name, of_all)) for name in progress]


def open_volume(folder: Path, identifier: str) -> Any:
    """The case's image as a lazily read blosc2 array ``(C, Z, Y, X)``.

    Raises:
        NnsslError: the file is missing or damaged.
    """
    path = folder / f"{identifier}.b2nd"
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}  # blosc2 cannot map files on Windows
    try:
        volume = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)
        if not isinstance(volume, blosc2.NDArray) or volume.ndim != 4:
            raise ValueError("not an image of shape (C, Z, Y, X)")
    except Exception as error:  # blosc2 raises bare RuntimeErrors, ValueErrors and others
        raise damaged(folder, identifier, error) from error
    return volume


def damaged(folder: Path, identifier: str, error: Exception) -> NnsslError:
    """The complaint about an unreadable preprocessed case."""
    path = folder / f"{identifier}.b2nd"
    return NnsslError(
        f"case {identifier}: cannot read {path}: {error}", f"if it is damaged, {preprocess_command(folder)}"
    )


def preprocess_command(folder: Path) -> str:
    """What to run to (re-)create this configuration folder."""
    dataset = re.match(r"Dataset0*(\d+)_", folder.parent.name)
    plans = re.match(r"(.+)_(3d_\w+|2d)$", folder.name)
    number = dataset[1] if dataset else "DATASET"
    name, configuration = plans.groups() if plans else ("PLANS", "CONFIGURATION")
    return f"run: nnUNetv2_preprocess -d {number} -plans_name {name} -c {configuration}"


def _case(folder: Path, identifier: str, spacing: tuple[float, float, float], modality: str) -> Case:
    channels, z, y, x = open_volume(folder, identifier).shape
    return Case(identifier, folder, int(channels), (int(z), int(y), int(x)), spacing, modality)


def _modalities(dataset_json: Path) -> tuple[dict[str, str], str]:
    """The modalities of single cases, and what the others show: the names of the dataset's channels."""
    content = read_json(dataset_json) if dataset_json.is_file() else {}
    return content.get("case_modalities", {}), "+".join(content.get("channel_names", {}).values())
