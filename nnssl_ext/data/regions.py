"""Reading a part of a preprocessed case: one partial decompression of the blosc2 chunks that the part touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nnssl_ext.data.cases import damaged, open_volume
from nnssl_ext.geometry.boxes import Box, clip
from nnssl_ext.records import Case, Region, Size


def read_region(case: Case, lower: Size, upper: Size, labels: bool = False) -> Region:
    """Voxels ``lower <= (z, y, x) < upper`` of a case, clipped to its volume, all channels, float32; with their labels if asked.

    Raises:
        NnsslError: the file is missing or damaged, naming it.
    """
    box = clip(Box(lower, upper), case.shape)
    voxels = _read(case, case.identifier, case.channels, box).astype(np.float32, copy=False)
    if not labels:
        return Region(voxels, box.lower, case)
    segmentation = _read(case, f"{case.identifier}_seg", 1, box)[0]
    return Region(voxels, box.lower, case, segmentation.clip(0).astype(np.int16))  # -1: outside nnU-Net's nonzero mask


def read_cubes(case: Case, corners: Sequence[Size], edge: int) -> list[Float[np.ndarray, "_z _y _x"]]:
    """Small cubes of the first channel from these voxels on, clipped to the case: a look at it that costs less than a region.

    Raises:
        NnsslError: the file is missing or damaged, naming it.
    """
    volume = _open(case, case.identifier, case.channels)
    boxes = (clip(Box((z, y, x), (z + edge, y + edge, x + edge)), case.shape) for z, y, x in corners)
    return [_cut(volume, case, case.identifier, box)[0].astype(np.float32, copy=False) for box in boxes]


def _read(case: Case, name: str, channels: int, box: Box) -> np.ndarray:
    return _cut(_open(case, name, channels), case, name, box)


def _open(case: Case, name: str, channels: int) -> Any:
    volume = open_volume(case.folder, name)
    if volume.shape != (channels, *case.shape):
        raise damaged(case.folder, name, ValueError(f"its shape changed to {volume.shape} during the run"))
    return volume


def _cut(volume: Any, case: Case, name: str, box: Box) -> np.ndarray:
    try:
        return np.asarray(volume[(slice(None), *map(slice, box.lower, box.upper))])
    except Exception as error:  # blosc2 raises bare RuntimeErrors
        raise damaged(case.folder, name, error) from error
