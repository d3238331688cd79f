"""Reading a part of a preprocessed case: one partial decompression of the blosc2 chunks that the part touches."""

from __future__ import annotations

import numpy as np

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


def read_cubes(case: Case, corners: Sequence[Size], edge: int) -> Float[np.ndarray, "N E E E"]:
    """Small cubes of the first channel that begin at these voxels: a look at a case that costs less than a region.

    Raises:
        NnsslError: the file is missing or damaged, naming it; a cube reaches beyond the case.
    """
    return np.stack([_read(case, case.identifier, case.channels, _cube(corner, edge))[0] for corner in corners])


def _cube(corner: Size, edge: int) -> Box:
    z, y, x = corner
    return Box(corner, (z + edge, y + edge, x + edge))


def _read(case: Case, name: str, channels: int, box: Box) -> np.ndarray:
    volume = open_volume(case.folder, name)
    if volume.shape != (channels, *case.shape):
        raise damaged(case.folder, name, ValueError(f"its shape changed to {volume.shape} during the run"))
    try:
        return np.asarray(volume[(slice(None), *map(slice, box.lower, box.upper))])
    except Exception as error:  # blosc2 raises bare RuntimeErrors
        raise damaged(case.folder, name, error) from error
