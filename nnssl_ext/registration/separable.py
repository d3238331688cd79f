"""Smoothing as one small matrix per axis: exact at borders, equal in mm on anisotropic grids, and fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Kernels = tuple[Float[Tensor, "_z _z"], Float[Tensor, "_y _y"], Float[Tensor, "_x _x"]]


def smoothing_kernels(
    shape: Sequence[int],
    passes: int,
    cell_mm: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    zero_border: bool = False,
    device: torch.device | None = None,
) -> Kernels:
    """`passes` running means of three cells along every axis, as matrices.

    The weights are 1/3 along the axis of the smallest cells; along others they are chosen for the same variance in mm.

    Args:
        shape: cells along z, y, x.
        cell_mm: size of a cell.
        zero_border: what lies outside counts as zeros (the convexAdam package), else it does not count.
    """
    kernels = []
    for length, size in zip(shape, cell_mm, strict=True):
        neighbour = (min(cell_mm) / size) ** 2 / 3
        once = torch.eye(length, dtype=torch.float64) * (1 - 2 * neighbour)
        side = torch.full((max(length - 1, 0),), neighbour, dtype=torch.float64)
        once += torch.diag(side, 1) + torch.diag(side, -1)
        if not zero_border:
            once /= once.sum(1, keepdim=True)
        kernels.append(torch.linalg.matrix_power(once, passes).float().to(device))
    return kernels[0], kernels[1], kernels[2]


def apply_kernels(volumes: Float[Tensor, "N Z Y X"], kernels: Kernels) -> Float[Tensor, "N z y x"]:
    """Every volume multiplied by ``(z, Z)``, ``(y, Y)`` and ``(x, X)`` matrices along its axes."""
    first, second, third = kernels
    along_yx = torch.matmul(second, volumes @ third.T)
    number, depth, height, width = along_yx.shape
    return torch.matmul(first, along_yx.reshape(number, depth, -1)).view(number, len(first), height, width)
