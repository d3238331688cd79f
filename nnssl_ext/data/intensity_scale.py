"""What is black, white and body in a preprocessed case: from the plans for CT, from a look at the case for anything else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from nnssl_ext.contracts import HounsfieldScale
from nnssl_ext.data.foreground import PADDING_SHARE, air_threshold
from nnssl_ext.data.regions import read_cubes
from nnssl_ext.records import Case, Size

CUBES, EDGE = 256, 3
"""Cubes that a case is looked at through, and their edge in voxels: as many as tell 5 % of air, as large as average noise, as
`nnssl_ext.data.foreground` does (our choice). Measured: 25 ms of CPU time per case of 64 to 154 voxels per axis, once per process."""


@dataclass(frozen=True)
class ScaleSettings:
    """What counts as black, white and body. CT by Hounsfield units, which the plans' mean and standard deviation restate for
    normalised images; other scans by the case's own intensities.

    Attributes:
        window_hu: black and white of a CT. vox2vec: -1350 and 1000, of which the augmentations' strengths in HU are shares; with
            another window they grow or shrink with it.
        body_hu: a CT's body is brighter. vox2vec: -500.
        percentiles: black and white of other scans; 1 and 99.99 in arXiv:2401.06473.
        body_share: body is what is brighter than this share of the way from black to white. None: than air, as planning finds
            it; all of the case, if it holds no air.
    """

    window_hu: tuple[float, float] = (-1350.0, 1000.0)
    body_hu: float = -500.0
    percentiles: tuple[float, float] = (1.0, 99.99)
    body_share: float | None = None


@dataclass(frozen=True)
class IntensityScale:
    """Of one case's first channel, in normalised intensities.

    Attributes:
        black, white: ends of the window.
        body: body is brighter than this; minus infinity where all of the case is.
        hounsfield: whether black and white are Hounsfield units restated.
    """

    black: float
    white: float
    body: float
    hounsfield: bool


def intensity_scale(case: Case, settings: ScaleSettings, hounsfield: HounsfieldScale | None) -> IntensityScale:
    """The scale of a case; the file of a CT is not read.

    Args:
        hounsfield: how the plans normalise Hounsfield units, None for anything but CT.

    Raises:
        NnsslError: the file is missing or damaged, naming it.
    """
    if hounsfield is None:
        return _as_seen(case, settings)
    black, white = map(hounsfield.normalised, settings.window_hu)
    # Where the plans clip above the threshold, what is clipped there is dark too.
    return IntensityScale(black, white, hounsfield.normalised(max(settings.body_hu, hounsfield.lower)), True)


@lru_cache(maxsize=2**17)
def _as_seen(case: Case, settings: ScaleSettings) -> IntensityScale:
    cubes = read_cubes(case, _corners(case.shape), EDGE)
    black, white = np.percentile(np.concatenate([cube.ravel() for cube in cubes]), settings.percentiles).tolist()
    if settings.body_share is not None:
        body = black + settings.body_share * (white - black)
    else:
        body = _end_of_air(np.array([cube.mean() for cube in cubes], np.float32))
    return IntensityScale(black, white, body, False)


def _corners(shape: Size) -> list[Size]:
    """The same for every case of this shape, so that its scale does not depend on which process asks."""
    last = np.maximum(np.asarray(shape) - EDGE, 0)
    drawn = np.random.default_rng(0).integers(0, last + 1, (CUBES, 3))
    return [(z, y, x) for z, y, x in drawn.tolist()]


def _end_of_air(means: Float[np.ndarray, " N"]) -> float:
    """Where padding and air end, minus infinity if there is neither."""
    lowest = means == means.min()
    if lowest.all():
        return -math.inf
    padding = lowest.mean() >= PADDING_SHARE
    threshold = air_threshold(means[~lowest] if padding else means)
    if threshold is None:
        return float(means.min()) if padding else -math.inf
    return threshold
