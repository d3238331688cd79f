"""Cutting views from a batch of regions, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.data.loader import RegionBatch
from nnssl_ext.geometry.affines import affine, is_integer
from nnssl_ext.geometry.matching import coordinates
from nnssl_ext.records import Size, View
from nnssl_ext.views.augment import augment

SLAB = 2**19
"""Voxels resampled at a time: their coordinates (6 MB) stay in cache and need no memory of three times the views."""


def cut_views(batch: RegionBatch, device: torch.device) -> tuple[View, ...]:
    """The views that the batch's draws describe, cut and augmented on `device`, masks attached.

    Flip, rotation, zoom and crop are one linear resampling; plain crops and flips are copied without interpolation.
    """
    regions = batch.voxels.to(device, non_blocking=True)
    lower = batch.lower.numpy()
    case_shape, spacing = batch.case_shape.to(device), batch.spacing.to(device)
    views = []
    for draws in zip(*batch.draws, strict=True):  # one tuple per view, one draw per sample
        affines = np.stack([draw.affine for draw in draws])
        voxels = resample(regions, affines, lower, draws[0].size)
        views.append(
            View(
                voxels=augment(voxels, [draw.intensity for draw in draws]),
                affine=torch.from_numpy(affines).float().to(device),
                case_shape=case_shape,
                spacing=spacing,
                cases=batch.cases,
                mask=_masks(draws),
                applied=tuple({**draw.facts, **draw.intensity} for draw in draws),
            )
        )
    return tuple(views)


def resample(
    regions: Float[Tensor, "B C z y x"],
    affines: Float[np.ndarray, "B 4 4"],
    lower: Int[np.ndarray, "B 3"],
    size: Size,
) -> Float[Tensor, "B C Z Y X"]:
    """Linear resampling of regions that begin at case voxel `lower`, by affines view voxel -> case voxel; 0 outside."""
    affines = affines.copy()
    affines[:, :3, 3] -= lower
    views = regions.new_empty(*regions.shape[:2], *size)
    crops = [row for row, matrix in enumerate(affines) if is_integer(matrix)]
    others = [row for row in range(len(affines)) if row not in crops]
    for row in crops:
        _copy_crop(regions[row], np.rint(affines[row]).astype(int), views[row])
    if others:
        sources = regions if len(others) == len(affines) else regions[others]
        for first, grid in _sampling_grids(affines[others], size, sources):
            slab = F.grid_sample(sources, grid, align_corners=False)
            views[others, :, first : first + grid.shape[1]] = slab
    return views


def _copy_crop(
    region: Float[Tensor, "C z y x"], matrix: Int[np.ndarray, "4 4"], view: Float[Tensor, "C Z Y X"]
) -> None:
    """Fill a view whose affine only shifts, flips and exchanges axes."""
    view = view.permute(0, *(1 + np.abs(matrix[:3, :3]).argmax(1)))  # its axes in the region's order
    source, target, flipped = [slice(None)], [slice(None)], []
    for axis, (length, available) in enumerate(zip(view.shape[1:], region.shape[1:], strict=True)):
        start = matrix[axis, 3]
        if matrix[axis, :3].sum() < 0:
            start -= length - 1
            flipped.append(axis + 1)
        begin, end = (min(max(edge, 0), available) for edge in (start, start + length))
        source.append(slice(begin, end))
        target.append(slice(begin - start, end - start))
    view.zero_()
    view[tuple(target)] = region[tuple(source)]
    if flipped:
        view.copy_(view.flip(flipped))


def _sampling_grids(
    affines: Float[np.ndarray, "B 4 4"], size: Size, regions: Float[Tensor, "B C z y x"]
) -> Iterator[tuple[int, Float[Tensor, "B Z Y X 3"]]]:
    """First plane and `grid_sample` coordinates of successive slabs of the views.

    `grid_sample` wants x, y, z order, and -1 and 1 at the outer faces of the outermost voxels.
    """
    lengths = np.asarray(regions.shape[2:], float)
    normalise = affine(np.diag(2 / lengths), 1 / lengths - 1)
    planes = max(1, SLAB // (len(affines) * size[1] * size[2]))
    for first in range(0, size[0], planes):
        shift = affine(np.eye(3), (first, 0, 0))
        matrices = (normalise @ affines @ shift)[:, [2, 1, 0, 3]]
        depth = min(planes, size[0] - first)
        yield first, coordinates(torch.from_numpy(matrices).float().to(regions.device), (depth, size[1], size[2]))


def _masks(draws: tuple[ViewDraw, ...]) -> Tensor | None:
    masks = [draw.mask for draw in draws if draw.mask is not None]
    return torch.from_numpy(np.stack(masks)) if masks else None
