"""The demo's data: phantoms on request, and cases held out from everything but the final test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json


def hold_out(dataset: Path, count: int) -> list[str]:
    """Move `count` random cases of a raw dataset from ``imagesTr`` and ``labelsTr`` to ``imagesTs`` and ``labelsTs``.

    The choice depends on the names alone; calling it again changes nothing, and finishes what was interrupted.

    Args:
        dataset: ``.../DatasetXXX_Name``.
        count: how many.

    Returns:
        Their names, sorted.

    Raises:
        NnsslError: fewer than 5 cases, the least nnU-Net's 5 folds take, would remain.
    """
    description = read_json(dataset / "dataset.json")
    ending = description["file_ending"]
    names = sorted(
        p.name.removesuffix(ending) for part in ("labelsTr", "labelsTs") for p in dataset.glob(f"{part}/*{ending}")
    )
    if len(names) - count < 5:
        raise NnsslError(
            f"{dataset.name} has {len(names)} cases: {count} held-out ones leave fewer than 5 to learn from",
            "use a task with more cases",
        )
    chosen = sorted(names[i] for i in np.random.default_rng(0).permutation(len(names))[:count])
    for part in ("images", "labels"):
        (dataset / f"{part}Ts").mkdir(exist_ok=True)
    for name in chosen:  # the label last: while it is in labelsTr, the case is not yet moved
        for image in dataset.glob(f"imagesTr/{name}_[0-9][0-9][0-9][0-9]{ending}"):
            image.rename(dataset / "imagesTs" / image.name)
        label = dataset / "labelsTr" / f"{name}{ending}"
        if label.exists():
            label.rename(dataset / "labelsTs" / label.name)
    write_json(dataset / "dataset.json", {**description, "numTraining": len(names) - count})
    return chosen
