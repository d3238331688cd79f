"""Displacement fields on voxel grids: warp, compose, invert, exponentiate, resize.

A field ``d`` has components z, y, x along its channel axis, in voxels (or cells) of its own grid; ``warped(x) =
moving(x + d(x))``. Voxel ``i`` has its centre at ``i`` and its faces at ``i - 1/2`` and ``i + 1/2``, so an axis of ``n``
voxels is ``n`` long: `torch.nn.functional.grid_sample` without corner alignment, displacements divided by ``n / 2``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.records import Size

Displacement = Float[Tensor, "*b 3 Z Y X"]
Interpolation = Literal["bilinear", "nearest"]
Padding = Literal["border", "zeros"]


def sampling_grid(displacement: Displacement, size: Size | None = None) -> Float[Tensor, "*b Z Y X 3"]:
    """The grid that `grid_sample` (``align_corners=False``) needs to look up ``x + d(x)``: x first, faces at -1 and 1.

    Args:
        displacement: in voxels.
        size: voxels of the volume to be sampled, if its grid is longer or shorter than that of the field.
    """
    shape = displacement.shape[-3:]
    size = size or (shape[0], shape[1], shape[2])
    moved = []
    for axis, length in enumerate(size):
        voxels = torch.arange(shape[axis], dtype=displacement.dtype, device=displacement.device)
        place = displacement.select(-4, axis) + voxels.view([-1 if axis == other else 1 for other in range(3)])
        moved.append((2 * place + 1) / length - 1)
    return torch.stack(moved[::-1], dim=-1)


def warp(
    volume: Float[Tensor, "*b C z y x"],
    displacement: Displacement,
    mode: Interpolation = "bilinear",
    padding: Padding = "border",
) -> Float[Tensor, "*b C Z Y X"]:
    """``volume(x + d(x))`` at every voxel of the field, linearly interpolated (``"nearest"`` for labels).

    Args:
        volume: on the grid that the displacements, in voxels, point into; same origin and voxel size as the field's grid.
        padding: what lies outside of the volume: its outermost voxels, or zeros.
    """
    size = (volume.shape[-3], volume.shape[-2], volume.shape[-1])
    grid = sampling_grid(displacement, size)
    if volume.ndim == 4:
        return warp(volume[None], displacement[None], mode, padding)[0]
    return F.grid_sample(volume, grid.to(volume.dtype), mode=mode, padding_mode=padding, align_corners=False)


def compose(first: Displacement, second: Displacement) -> Displacement:
    """The field that warps as `first` and then, on the result, `second` would: ``second(x) + first(x + second(x))``."""
    return second + warp(first, second)


@torch.no_grad()
def invert(displacement: Displacement, iterations: int = 30) -> Displacement:
    """The field ``v`` with ``v(x) = -d(x + v(x))``, by fixed-point iteration (Chen et al., Med Phys 2008, 35:81-88).

    It converges where the field changes by less than one voxel per voxel; where `displacement` folds there is no inverse.
    """
    inverse = -displacement
    for _ in range(iterations):
        inverse = -warp(displacement, inverse)
    return inverse


def exponential(velocity: Displacement, squarings: int = 6) -> Displacement:
    """The flow at time 1 of a stationary velocity field, by scaling and squaring (Arsigny et al., MICCAI 2006).

    Args:
        velocity: in voxels per unit of time.
        squarings: the first step is ``velocity / 2**squarings``.
    """
    field = velocity / 2**squarings
    for _ in range(squarings):
        field = compose(field, field)
    return field


@torch.no_grad()
def logarithm(displacement: Displacement, iterations: int = 8) -> Displacement:
    """A stationary velocity whose `exponential` is close to the field: the residual is added back `iterations` times."""
    velocity = displacement
    for _ in range(iterations):
        velocity = velocity + displacement - exponential(velocity)
    return velocity


def cells_to_voxels(field_cells: Float[Tensor, "3 z y x"], pooling: Size, shape: Size) -> Float[Tensor, "3 Z Y X"]:
    """A field on a pooled grid, in its cells, as a field in voxels of the grid of `shape`; linear between cell centres."""
    padded = [cells * factor for cells, factor in zip(field_cells.shape[1:], pooling, strict=True)]
    voxels = F.interpolate(_scaled(field_cells, pooling)[None], size=padded, mode="trilinear", align_corners=False)[0]
    return voxels[:, : shape[0], : shape[1], : shape[2]].contiguous()


def voxels_to_cells(displacement_voxels: Float[Tensor, "3 Z Y X"], pooling: Size) -> Float[Tensor, "3 z y x"]:
    """A field as seen from the centres of pooled cells (the last one may be cut by the border), in cells."""
    padded = pad_to_multiple(displacement_voxels, pooling)
    size = [length // factor for length, factor in zip(padded.shape[1:], pooling, strict=True)]
    cells = F.interpolate(padded[None], size=size, mode="trilinear", align_corners=False)[0]
    return _scaled(cells, tuple(1 / factor for factor in pooling))


def pad_to_multiple(volume: Float[Tensor, "C Z Y X"], pooling: Size) -> Float[Tensor, "C z y x"]:
    """The volume with its outermost voxels repeated at the far ends until `pooling` divides every axis."""
    missing = [-length % factor for length, factor in zip(volume.shape[1:], pooling, strict=True)]
    if not any(missing):
        return volume
    return F.pad(volume[None], (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")[0]


def _scaled(field: Float[Tensor, "3 Z Y X"], factors: tuple[float, ...]) -> Float[Tensor, "3 Z Y X"]:
    return field * torch.tensor(factors, dtype=field.dtype, device=field.device).view(3, 1, 1, 1)
