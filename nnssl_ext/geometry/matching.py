"""Where the voxels of a view lie in its case and in other views; everything follows from the affines."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl_ext.records import Size, View

TOLERANCE = 1e-3
"""Voxels by which a coordinate may miss a border through rounding in float32."""


def coordinates(affine: Float[Tensor, "B 4 4"], size: Size) -> Float[Tensor, "B Z Y X 3"]:
    """Where `affine` sends every voxel ``(z, y, x)`` of a grid of this size."""
    columns = affine[:, None, None, :3]
    z, y, x = (torch.arange(length, dtype=affine.dtype, device=affine.device) for length in size)
    plane = columns[..., 1] * y.view(-1, 1, 1) + (columns[..., 2] * x.view(-1, 1) + columns[..., 3])
    step = columns[..., 0].expand_as(plane)
    # Flattened planes: an innermost axis of three coordinates would keep the CPU from vectorising.
    points = torch.addcmul(plane.flatten(1)[:, None], z.view(-1, 1), step.flatten(1)[:, None])
    return points.view(-1, *size, 3)


def case_coordinates(view: View) -> Float[Tensor, "B Z Y X 3"]:
    """The case voxel (not necessarily whole) under every voxel of the view."""
    return coordinates(view.affine, view.size)


def inside_case(view: View) -> Bool[Tensor, "B 1 Z Y X"]:
    """True where a voxel of the view shows the case and not the padding around it."""
    return _within(case_coordinates(view), view.case_shape)[:, None]


def matched_coordinates(view: View, other: View) -> Float[Tensor, "B Z Y X 3"]:
    """The voxel of `other` (not necessarily whole, possibly outside it) that shows the same point as each of `view`.

    Raises:
        ValueError: the two views are not of the same cases.
    """
    if view.cases != other.cases:
        raise ValueError(f"views of different cases have no common voxels: {view.cases} and {other.cases}")
    between, _ = torch.linalg.solve_ex(other.affine.double(), view.affine.double())  # does not wait for the device
    return coordinates(between.to(view.affine.dtype), view.size)


def matched_voxels(view: View, other: View) -> tuple[Float[Tensor, "B Z Y X 3"], Bool[Tensor, "B Z Y X"]]:
    """`matched_coordinates`, and True where that place lies in `other` and the point in the case."""
    places = matched_coordinates(view, other)
    size = torch.tensor(other.size).to(view.affine.device, non_blocking=True)
    return places, _within(places, size.expand(len(view.cases), 3)) & inside_case(view)[:, 0]


def covisible(view: View, other: View) -> Bool[Tensor, "B 1 Z Y X"]:
    """True at voxels of `view` that show a point of the case which `other` shows too."""
    return matched_voxels(view, other)[1][:, None]


def matched_cells(view: View, other: View, stride: Size) -> tuple[Float[Tensor, "B z y x 3"], Bool[Tensor, "B z y x"]]:
    """`matched_coordinates` and `covisible` on feature maps of both views, at the centres of cells of `stride` voxels.

    Returns:
        For each cell of `view` the place in `other`'s map, in cells, that shows the same point; and True where that place
        lies between centres of cells of `other`, and the cell's centre in the case.

    Raises:
        ValueError: the two views are not of the same cases.
    """
    if view.cases != other.cases:
        raise ValueError(f"views of different cases have no common voxels: {view.cases} and {other.cases}")
    cell = torch.diag(torch.tensor([*stride, 1], dtype=torch.float64))
    cell[:3, 3] = (cell.diagonal()[:3] - 1) / 2
    cell = cell.to(view.affine.device, non_blocking=True)
    in_case = view.affine.double() @ cell
    between, _ = torch.linalg.solve_ex(other.affine.double() @ cell, in_case)  # does not wait for the device
    z, y, x = (length // step for length, step in zip(view.size, stride, strict=True))
    places = coordinates(between.to(view.affine.dtype), (z, y, x))
    cells = [length // step for length, step in zip(other.size, stride, strict=True)]
    shape = torch.tensor(cells).to(view.affine.device, non_blocking=True).expand(len(view.cases), 3)
    centres = coordinates(in_case.to(view.affine.dtype), (z, y, x))
    return places, _within(places, shape) & _within(centres, view.case_shape)


def _within(points: Float[Tensor, "B Z Y X 3"], shape: Int[Tensor, "B 3"]) -> Bool[Tensor, "B Z Y X"]:
    last = shape[:, None, None, None] - 1
    return ((points >= -TOLERANCE) & (points <= last + TOLERANCE)).all(-1)
