"""Between voxels and the coarser cells that the solver works on: whole voxels per cell, near-equal in mm along all axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.records import Size
from nnssl_ext.registration.separable import apply_kernels, smoothing_kernels

Mask = Bool[Tensor, "Z Y X"]
Cells = Float[Tensor, "3 z y x"]
Voxels = Float[Tensor, "3 Z Y X"]


def geometric_mean(edges: Sequence[float]) -> float:
    """The edge of the cube of the same volume."""
    return float((edges[0] * edges[1] * edges[2]) ** (1 / 3))


def voxels_per_cell(shape: Size, spacing: Sequence[float], cell_mm: float) -> Size:
    """The whole numbers of voxels that come nearest to a cell edge, leaving every axis at least two cells if it can."""
    z, y, x = (max(min(round(cell_mm / size), length // 2), 1) for size, length in zip(spacing, shape, strict=True))
    return z, y, x


def pool(
    features: Float[Tensor, "C Z Y X"], pooling: Size, mask: Mask | None = None, *, compatible: bool = False
) -> tuple[Float[Tensor, "C z y x"], Float[Tensor, "z y x"] | None]:
    """Means over cells, and the share of each cell that counts (None: all of every cell does).

    Args:
        mask: voxels that are False enter no mean. A cell without others takes the mean of its neighbours, so that nothing
            hidden enters what is interpolated between it and them.
        compatible: drop the remainder of an axis, as the convexAdam package does, instead of completing the last cell.
    """
    remainder = any(length % factor for length, factor in zip(features.shape[1:], pooling, strict=True))
    if compatible or (mask is None and not remainder):
        return F.avg_pool3d(features[None], pooling)[0], None
    counts = torch.ones_like(features[:1]) if mask is None else mask[None].to(features.dtype)
    padding = _missing(features, pooling)
    weight = F.avg_pool3d(F.pad(counts, padding), pooling)
    # channel by channel: maps of whole scans are large, and copies of them would be too
    sums = [F.avg_pool3d(F.pad(channel[None] * counts, padding), pooling) for channel in features]
    means = torch.cat(sums) / weight.clamp(min=1e-6)
    seen = (weight > 0).to(features.dtype)
    kernels = smoothing_kernels(weight.shape[1:], 1, device=weight.device)
    around = apply_kernels(means * seen, kernels) / apply_kernels(seen, kernels).clamp(min=1e-6)
    return torch.where(weight > 0, means, around), weight[0]


def cells_to_voxels(field_cells: Cells, pooling: Size, shape: Size, *, compatible: bool = False) -> Voxels:
    """A field on a pooled grid, in its cells, as a field in voxels of the grid of `shape`; linear between cell centres.

    With `compatible`, cells are stretched over the whole axis even where a remainder was dropped.
    """
    lengths = [cells * factor for cells, factor in zip(field_cells.shape[1:], pooling, strict=True)]
    size = list(shape) if compatible else lengths
    scaled = field_cells * _per_axis(field_cells, pooling)
    voxels = F.interpolate(scaled[None], size=size, mode="trilinear", align_corners=False)[0]
    return voxels[:, : shape[0], : shape[1], : shape[2]].contiguous()


def voxels_to_cells(displacement_voxels: Voxels, pooling: Size, *, compatible: bool = False) -> Cells:
    """A field as seen from the centres of pooled cells, in cells. `compatible`: see `cells_to_voxels`."""
    if not compatible:
        displacement_voxels = F.pad(
            displacement_voxels[None], _missing(displacement_voxels, pooling), mode="replicate"
        )[0]
    size = [length // factor for length, factor in zip(displacement_voxels.shape[1:], pooling, strict=True)]
    cells = F.interpolate(displacement_voxels[None], size=size, mode="trilinear", align_corners=False)[0]
    return cells / _per_axis(cells, pooling)


def _missing(volume: Float[Tensor, "C Z Y X"], pooling: Size) -> tuple[int, ...]:
    """The padding at far ends, x first, after which `pooling` divides every axis."""
    z, y, x = (-length % factor for length, factor in zip(volume.shape[1:], pooling, strict=True))
    return (0, x, 0, y, 0, z)


def _per_axis(field: Float[Tensor, "3 _z _y _x"], factors: Size) -> Float[Tensor, "3 1 1 1"]:
    return torch.tensor(factors, dtype=field.dtype, device=field.device).view(3, 1, 1, 1)
