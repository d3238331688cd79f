"""Cutting views from a batch of regions, on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

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
GPU_SLAB = 2**24
"""The same on a GPU (200 MB), which wants few launches rather than a warm cache."""


def cut_views(batch: RegionBatch, device: torch.device) -> tuple[View, ...]:
    """The views that the batch's draws describe, cut and augmented on `device`, masks attached.

    Flip, turn, rotation, zoom and crop are one linear resampling, shared by all views of one size; plain crops are copied
    without interpolation.
    """
    regions = batch.voxels.to(device, non_blocking=True)
    labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)[:, None].float()
    lower = batch.lower.numpy()
    case_shape, spacing = (each.to(device, non_blocking=True) for each in (batch.case_shape, batch.spacing))
    by_view = list(zip(*batch.draws, strict=True))  # per view, one draw per sample
    views: dict[int, View] = {}
    for size in dict.fromkeys(draws[0].size for draws in by_view):
        numbers = [number for number, draws in enumerate(by_view) if draws[0].size == size]
        affines = np.stack([[draw.affine for draw in by_view[number]] for number in numbers])
        voxels = resample(regions, affines, lower, size)
        clean = [cut.clone() if by_view[number][0].clean else None for number, cut in zip(numbers, voxels, strict=True)]
        voxels = augment(voxels.flatten(0, 1), [draw.intensity for number in numbers for draw in by_view[number]])
        cut_labels: Sequence[Tensor | None] = [None] * len(numbers)
        if labels is not None:
            cut_labels = list(resample(labels, affines, lower, size, mode="nearest")[:, :, 0].to(torch.int16))
        for number, cut, clean_cut, labels_cut, matrices in zip(
            numbers,
            voxels.unflatten(0, affines.shape[:2]),
            clean,
            cut_labels,
            torch.from_numpy(affines).float().to(device, non_blocking=True),
            strict=True,
        ):
            draws = by_view[number]
            views[number] = View(
                voxels=cut,
                affine=matrices,
                case_shape=case_shape,
                spacing=spacing,
                cases=batch.cases,
                mask=_masks(draws),
                applied=tuple({**draw.facts, **draw.intensity} for draw in draws),
                labels=labels_cut,
                clean=clean_cut,
            )
    return tuple(views[number] for number in range(len(by_view)))


def resample(
    regions: Float[Tensor, "B C z y x"],
    affines: Float[np.ndarray, "V B 4 4"],
    lower: Int[np.ndarray, "B 3"],
    size: Size,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "V B C Z Y X"]:
    """Resampling of regions that begin at case voxel `lower`, by affines view voxel -> case voxel; 0 outside.

    A sample is interpolated, all its views in one go, unless all of them are plain crops.
    """
    affines = affines.copy()
    affines[..., :3, 3] -= lower
    views = regions.new_empty(len(affines), *regions.shape[:2], *size)
    crops = [row for row in range(len(regions)) if all(map(is_integer, affines[:, row]))]
    others = [row for row in range(len(regions)) if row not in crops]
    for row in crops:
        for matrix, view in zip(affines[:, row], views[:, row], strict=True):
            _copy_crop(regions[row], np.rint(matrix).astype(int), view)
    if others:
        index = torch.tensor(others).to(regions.device, non_blocking=True)  # a list as index would wait for the device
        sources = regions if len(others) == len(regions) else regions.index_select(0, index)
        for first, grid in _sampling_grids(affines[:, others], size, sources):
            # One sample's views one behind the other, as planes of one grid: its region then needs no copies.
            slab = F.grid_sample(sources, grid.flatten(1, 2), mode=mode, align_corners=False)
            slab = slab.unflatten(2, grid.shape[1:3]).movedim(2, 0)
            views[:, :, :, first : first + grid.shape[2]].index_copy_(1, index, slab)
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
    affines: Float[np.ndarray, "V B 4 4"], size: Size, regions: Float[Tensor, "B C z y x"]
) -> Iterator[tuple[int, Float[Tensor, "B V Z Y X 3"]]]:
    """First plane and `grid_sample` coordinates of successive slabs of the views.

    `grid_sample` wants x, y, z order, and -1 and 1 at the outer faces of the outermost voxels.
    """
    lengths = np.asarray(regions.shape[2:], float)
    normalise = affine(np.diag(2 / lengths), 1 / lengths - 1)
    count = affines.shape[0] * affines.shape[1]
    voxels = SLAB if regions.device.type == "cpu" else GPU_SLAB
    planes = max(1, voxels // (count * size[1] * size[2]))
    by_sample = affines.swapaxes(0, 1)
    for first in range(0, size[0], planes):
        shift = affine(np.eye(3), (first, 0, 0))
        matrices = (normalise @ by_sample @ shift)[..., [2, 1, 0, 3], :]
        grid = coordinates(
            torch.from_numpy(matrices.reshape(count, 4, 4)).float().to(regions.device),
            (min(planes, size[0] - first), size[1], size[2]),
        )
        yield first, grid.unflatten(0, by_sample.shape[:2])


def _masks(draws: tuple[ViewDraw, ...]) -> Tensor | None:
    masks = [draw.mask for draw in draws if draw.mask is not None]
    return torch.from_numpy(np.stack(masks)) if masks else None
