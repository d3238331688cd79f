"""Names and numbers of raw datasets."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl_ext.errors import NnsslError
from nnssl_ext.paths import VARIABLES, folder


def new_dataset(number: int, name: str) -> Path:
    """The raw dataset folder that id and name ask for, which is not there yet.

    nnU-Net looks an id up in all of its folders together and refuses two names for one id, so all are looked at here.

    Raises:
        NnsslError: an id or name nnU-Net would not take, or an id that is taken.
    """
    if not 0 < number < 1000:
        raise NnsslError(f"dataset id {number} is not between 1 and 999", "choose another -d")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise NnsslError(f"dataset name '{name}' holds other than letters, digits, - and _", "choose another --name")
    target = folder("nnUNet_raw") / f"Dataset{number:03d}_{name}"
    places = [Path(os.environ[v]) for v in VARIABLES if os.environ.get(v)]
    taken = [
        p for place in places for p in place.glob(f"Dataset{number:03d}_*") if p.name != target.name or p == target
    ]
    if taken:
        used = {int(p.name[7:10]) for place in places for p in place.glob("Dataset[0-9][0-9][0-9]_*")}
        free = next(n for n in (*range(number, 1000), *range(1, number)) if n not in used)
        raise NnsslError(
            f"dataset id {number} is taken: {taken[0]}", f"choose another, e.g. -d {free}, or remove that folder"
        )
    return target
