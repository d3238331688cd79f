"""Reading a part of a preprocessed case: one partial decompression of the blosc2 chunks that the part touches."""

from __future__ import annotations

import numpy as np

from nnssl_ext.data.cases import damaged, open_volume
from nnssl_ext.geometry.boxes import Box, clip
from nnssl_ext.records import Case, Region, Size


def read_region(case: Case, lower: Size, upper: Size) -> Region:
    """Voxels ``lower <= (z, y, x) < upper`` of a case, clipped to its volume, all channels, float32.

    Raises:
        NnsslError: the file is missing or damaged, naming it.
    """
    box = clip(Box(lower, upper), case.shape)
    volume = open_volume(case.folder, case.identifier)
    if volume.shape != (case.channels, *case.shape):
        raise damaged(case.folder, case.identifier, ValueError(f"its shape changed to {volume.shape} during the run"))
    try:
        voxels = volume[(slice(None), *map(slice, box.lower, box.upper))]
    except Exception as error:  # blosc2 raises bare RuntimeErrors
        raise damaged(case.folder, case.identifier, error) from error
    return Region(np.asarray(voxels, np.float32), box.lower, case)
