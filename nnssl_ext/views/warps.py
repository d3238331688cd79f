"""Smooth random displacement fields that never fold: cubic B-splines on a control grid (free-form deformations, Rueckert et
al., IEEE TMI 1999)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.records import Size

INJECTIVE = 1 / 2.48
"""Distances between control points by which all of them may move, along every axis, without a fold (Choi & Lee 2000, Theorem 1
in 3D)."""


@dataclass(frozen=True)
class WarpSettings:
    """How strongly a view is deformed.

    Attributes:
        control: range of the distance between control points, in voxels of the finest axis and the same in mm along others;
            drawn log-uniformly.
        strength: range of the largest control displacement, as a share of what is certain not to fold.
    """

    control: tuple[float, float] = (8.0, 32.0)
    strength: tuple[float, float] = (0.3, 1.0)


def draw_warp(settings: WarpSettings, rng: np.random.Generator) -> dict[str, float]:
    """The facts that a warp follows from."""
    return {
        "warp_control": float(np.exp(rng.uniform(*np.log(settings.control)))),
        "warp_strength": float(rng.uniform(*settings.strength)),
        "warp_seed": float(rng.integers(2**31)),
    }


def smooth_displacement(
    size: Size, control: Sequence[float], strength: float, seed: int, device: torch.device | None = None
) -> Float[Tensor, "3 Z Y X"]:
    """A field in voxels, whose control points move by independent uniform distances of at most ``strength * INJECTIVE *
    control`` along each axis.

    Args:
        control: voxels between control points along z, y, x.
        strength: in [0, 1].
        seed: decides the field; it is the same on all devices.
    """
    weights = [_spline_weights(length, step) for length, step in zip(size, control, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    points = 2 * torch.rand(3, *(row.shape[1] for row in weights), generator=generator) - 1
    points *= strength * INJECTIVE * torch.tensor(control).view(3, 1, 1, 1)
    z, y, x = (row.to(device, non_blocking=True) for row in weights)
    return torch.einsum("cijk,zi,yj,xk->czyx", points.to(device, non_blocking=True), z, y, x)


def _spline_weights(length: int, step: float) -> Float[Tensor, "N K"]:
    """Cubic B-spline weights of control points, one step apart and from one step before the axis on, at every voxel."""
    count = math.ceil((length - 1) / step) + 3
    away = (torch.arange(length)[:, None] / step - torch.arange(-1, count - 1)).abs()
    near = 2 / 3 - away**2 + away**3 / 2
    far = (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, near, far)
