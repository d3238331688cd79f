"""Random voxels of a view together with the places of another view that show the same points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl_ext.geometry.matching import matched_voxels
from nnssl_ext.records import Size, View

LARGEST = 2**62
"""Keys are random integers below this: two equal ones among the voxels of a view do not occur."""


@dataclass(frozen=True)
class VoxelPairs:
    """K pairs per sample, all samples with equally many, so that no shape depends on what the images show.

    Attributes:
        first: voxel of the first view.
        second: where the second view shows the same point: in its voxels, whole where both views are plain crops.
        valid: False for what fills up where a sample has fewer pairs: voxels inside the views like all others.
    """

    first: Int[Tensor, "B K 3"]
    second: Float[Tensor, "B K 3"]
    valid: Bool[Tensor, "B K"]

    @property
    def second_voxel(self) -> Int[Tensor, "B K 3"]:
        """The voxel of the second view in which that place lies."""
        return nearest_voxel(self.second)


def nearest_voxel(places: Float[Tensor, "*n 3"]) -> Int[Tensor, "*n 3"]:
    """Voxels with these places inside; places that are whole but for rounding stay what they are."""
    return (places + 0.5).floor().long()


def sample_pairs(
    first: View,
    second: View,
    eligible: Bool[Tensor, "B Z Y X"],
    count: int,
    cell: Size,
    seeds: Sequence[int],
) -> VoxelPairs:
    """At most `count` pairs per sample, without replacement, all eligible pairs equally likely where cells are single voxels.

    In no view do two pairs share a cell of the feature map that they are looked up in: else two negatives would be one and the
    same vector. Where a view is turned or zoomed this also holds for cells of one voxel.

    Args:
        eligible: voxels of the first view to choose from, besides that the second must show them.
        cell: voxels per cell of the finest feature map.
        seeds: decide the choice of each sample, whatever the batch (on the same kind of device).
    """
    places, seen = matched_voxels(first, second)
    size, other = first.voxels.shape[2:], second.voxels.shape[2:]
    here = torch.cartesian_prod(*(torch.arange(length, device=places.device) for length in size))
    there = nearest_voxel(places).flatten(1, 3).clamp_(min=0)
    last = torch.tensor(other) - 1
    there = torch.minimum(there, last.to(places.device, non_blocking=True))
    keys = _random_keys(len(places), len(here), seeds, places.device)
    keys = torch.where((seen & eligible).flatten(1), keys, -1)
    if cell != (1, 1, 1):
        keys = _one_per_cell(keys, _cell_numbers(here, size, cell).expand(len(keys), -1))
    keys = _one_per_cell(keys, _cell_numbers(there, other, cell))
    chosen, number = keys.topk(min(count, keys.shape[1]), dim=1)
    valid = chosen >= 0
    second_places = places.flatten(1, 3).gather(1, number[..., None].expand(-1, -1, 3))
    return VoxelPairs(here[number], torch.where(valid[..., None], second_places, 0), valid)


def _random_keys(samples: int, voxels: int, seeds: Sequence[int], device: torch.device) -> Int[Tensor, "B V"]:
    keys = torch.empty(samples, voxels, dtype=torch.int64, device=device)
    generator = torch.Generator(device)
    for row, seed in zip(keys, seeds, strict=True):
        row.random_(0, LARGEST, generator=generator.manual_seed(seed))
    return keys


def _cell_numbers(voxels: Int[Tensor, "*n 3"], size: Sequence[int], cell: Size) -> Int[Tensor, "*n"]:
    """The C-ordered number of the cell that holds each voxel of a view of this size; cells at its ends may be cut off."""
    _, y, x = (-(-length // step) for length, step in zip(size, cell, strict=True))
    iz, iy, ix = (voxels[..., axis] // step for axis, step in enumerate(cell))
    return (iz * y + iy) * x + ix


def _one_per_cell(keys: Int[Tensor, "B V"], cells: Int[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """The largest key of every cell; -1 for all others."""
    largest = torch.full_like(keys, -1).scatter_reduce(1, cells, keys, "amax")
    return torch.where(keys == largest.gather(1, cells), keys, -1)
