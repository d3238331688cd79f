"""Affines between voxel grids: 4x4 float64 matrices acting on ``(z, y, x, 1)``, integers being voxel centres."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nnssl_ext.geometry.boxes import Box
from nnssl_ext.records import Size

Affine = Float[np.ndarray, "4 4"]
Vector = Sequence[float | int] | np.ndarray
"""One value per axis z, y, x."""


def affine(linear: Float[np.ndarray, "3 3"], offset: Vector) -> Affine:
    """The map ``v -> linear @ v + offset``."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = offset
    return matrix


def rotation(degrees: Vector) -> Float[np.ndarray, "3 3"]:
    """Rotation about the x axis, then y, then z, by angles given in z, y, x order."""
    turns = []
    for axis, angle in enumerate(np.deg2rad(degrees)):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


def quarter_turns(counts: Sequence[int] | np.ndarray) -> Float[np.ndarray, "3 3"]:
    """`rotation` by these multiples of 90 degrees about z, y, x: exactly a permutation of axes with signs."""
    return np.rint(rotation(90.0 * np.asarray(counts)))


def view_to_case(
    size: Size,
    centre: Vector,
    *,
    flips: Sequence[bool] | np.ndarray = (False, False, False),
    quarters: Float[np.ndarray, "3 3"] | None = None,
    degrees: Vector = (0.0, 0.0, 0.0),
    zoom: Vector = (1.0, 1.0, 1.0),
    spacing: Vector = (1.0, 1.0, 1.0),
) -> Affine:
    """A view around a point of the case: flipped, turned, zoomed and rotated about the view's centre, in this order.

    Args:
        size: voxels of the view.
        centre: case voxel (not necessarily whole) of the view's centre.
        flips: axes of the view that run backwards.
        quarters: a turn by right angles, see `quarter_turns`; between axes of equal length it leaves the box as it is.
        degrees: angles about z, y, x.
        zoom: case voxels per view voxel along the turned view's axes; above 1 shows more of the case, smaller.
        spacing: mm of the case's voxels; angles are true in mm.

    Returns:
        View voxel -> case voxel; exactly integer for an integer crop that is neither rotated nor zoomed.
    """
    mm = np.asarray(spacing, float)
    turn = rotation(degrees) * mm / mm[:, None] if np.any(degrees) else np.eye(3)
    linear = (turn * np.asarray(zoom, float)) @ (np.eye(3) if quarters is None else quarters)
    linear *= np.where(flips, -1.0, 1.0)
    middle = (np.asarray(size, float) - 1) / 2
    return affine(linear, np.asarray(centre, float) - linear @ middle)


def bounding_box(view_affine: Affine, size: Size) -> Box:
    """The case voxels that linear interpolation at every voxel of a view needs."""
    corners = np.array(list(itertools.product(*((0, length - 1) for length in size))), float)
    reached = corners @ view_affine[:3, :3].T + view_affine[:3, 3]
    # A coordinate that is whole but for rounding needs no neighbour: integer crops then read not one voxel too many.
    near, far = np.floor(reached.min(0) + 1e-6).astype(int), np.ceil(reached.max(0) - 1e-6).astype(int) + 1
    return Box(_size(near), _size(far))


def is_integer(view_affine: Affine) -> bool:
    """True for crops, flips and quarter turns: every view voxel is a case voxel, so no interpolation is needed."""
    steps = np.abs(np.rint(view_affine[:3, :3]))
    whole = np.abs(view_affine - np.rint(view_affine)).max() < 1e-6
    return bool(whole and (steps.sum(0) == 1).all() and (steps.sum(1) == 1).all())


def _size(values: np.ndarray) -> Size:
    z, y, x = values.tolist()
    return z, y, x
