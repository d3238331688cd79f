"""MIND-SSC: what a voxel's neighbourhood looks like compared with itself, alike in CT and MR.

Heinrich et al., "Towards realtime multimodal fusion for image-guided interventions using self-similarities", MICCAI 2013. Six
patches around a voxel give twelve pairs at right angles; each channel is ``exp(-distance / variance)`` of one pair. Order of
channels, borders and bounds are those of the convexAdam package, whose values are reproduced.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nnssl_ext.records import Size

CHANNELS = 12

BACK, FRONT = -1, 1
# One row per channel: the axis and side of each of the two patches that are compared.
PAIRS: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = (
    ((0, FRONT), (1, BACK)),
    ((1, FRONT), (0, BACK)),
    ((1, BACK), (0, BACK)),
    ((1, FRONT), (0, FRONT)),
    ((1, BACK), (2, BACK)),
    ((1, FRONT), (2, FRONT)),
    ((2, BACK), (0, BACK)),
    ((0, FRONT), (2, FRONT)),
    ((1, FRONT), (2, BACK)),
    ((2, FRONT), (1, BACK)),
    ((0, FRONT), (2, BACK)),
    ((2, FRONT), (0, BACK)),
)
VARIANCE_BOUNDS = (1e-3, 1e3)
"""Bounds of a voxel's variance, as multiples of the image's mean variance (convexAdam)."""


@torch.no_grad()
def mind(image: Float[Tensor, "Z Y X"], radius: int = 1, dilation: Size = (2, 2, 2)) -> Float[Tensor, "12 Z Y X"]:
    """The descriptor of every voxel; between 0 and 1, and 1 in every channel of a constant image.

    Args:
        image: any intensity scale, which does not matter.
        radius: of the cubic patches that are compared, in voxels. 1 was best on hippocampus (measured, 2 and 3 lose).
        dilation: distance of the patches from the voxel along z, y, x, in voxels.
    """
    distances = torch.empty((CHANNELS, *image.shape), dtype=image.dtype, device=image.device)
    reach = [length for axis in (2, 1, 0) for length in (dilation[axis], dilation[axis])]
    padded = functional.pad(image[None, None], reach, mode="replicate")[0, 0]
    around = {
        (axis, side): _shifted(padded, axis, side, dilation, image.shape) for axis in range(3) for side in (BACK, FRONT)
    }
    for channel, (one, other) in enumerate(PAIRS):
        distances[channel] = _box_mean((around[one] - around[other]).square(), radius)
    distances -= distances.amin(dim=0, keepdim=True)
    variance = distances.mean(dim=0)
    typical = float(variance.mean())
    low, high = (typical * bound for bound in VARIANCE_BOUNDS)
    smallest = torch.finfo(image.dtype).tiny  # constant images have no variance at all
    return distances.div_(variance.clamp(max(low, smallest), max(high, smallest))).neg_().exp_()


def isotropic_dilation(spacing: tuple[float, float, float], dilation: int = 2) -> Size:
    """Voxels along z, y, x that come closest to `dilation` voxels of the finest axis in mm, at least 1."""
    z, y, x = (max(1, round(dilation * min(spacing) / mm)) for mm in spacing)
    return z, y, x


def _shifted(
    padded: Float[Tensor, "z y x"], axis: int, side: int, dilation: Size, shape: torch.Size
) -> Float[Tensor, "Z Y X"]:
    """The image as seen from each voxel's neighbour on one side."""
    starts = list(dilation)
    starts[axis] += side * dilation[axis]
    return padded[tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))]


def _box_mean(volume: Float[Tensor, "Z Y X"], radius: int) -> Float[Tensor, "Z Y X"]:
    """Mean over a cube, the border repeated beyond the image."""
    padded = functional.pad(volume[None, None], (radius,) * 6, mode="replicate")
    return functional.avg_pool3d(padded, 2 * radius + 1, stride=1)[0, 0]
