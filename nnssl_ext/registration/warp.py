"""Displacement fields on voxel grids: warp, compose, invert, exponentiate.

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
