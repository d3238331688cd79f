"""A registered pair at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nnssl_ext.files import atomic_write
from nnssl_ext.reports.feature_pca import pca_rgb
from nnssl_ext.reports.pictures import CELL, DPI, middle, pixel_aspect, row_heights, window

SQUARES = 8  # of the checkerboard along the longer edge of a plane
LINES = 24  # of the deformed grid along the longer edge
TITLES = ("before", "after", "displacement", "fixed features", "moving features, warped")


def draw_overview(
    png: Path,
    fixed: Float[np.ndarray, "Z Y X"],
    before: Float[np.ndarray, "Z Y X"],
    after: Float[np.ndarray, "Z Y X"],
    displacement_mm: Float[np.ndarray, "3 Z Y X"],
    features: tuple[Float[Tensor, "C Z Y X"], Float[Tensor, "C Z Y X"]],
    spacing: tuple[float, float, float],
) -> None:
    """Three planes through the middle: checkerboards of the fixed scan and the moving one before and after warping, the length
    of the displacement in mm under the grid that it deforms, and the features of both scans as colours.

    Args:
        fixed, before, after: intensities on one grid; each scan has a window of its own, for pairs of CT and MR.
        displacement_mm: components z, y, x.
        features: of the fixed scan and, warped, of the moving one; shown as colours by their principal components.
        spacing: mm along z, y, x.

    Raises:
        NnsslError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    heights = row_heights(fixed.shape, spacing)
    figure = Figure(figsize=(CELL * len(TITLES), sum(heights) + 0.4), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(3, len(TITLES), squeeze=False, gridspec_kw={"height_ratios": heights})
    scaled = [_scaled(volume, window(whole)) for volume, whole in ((fixed, fixed), (before, before), (after, before))]
    length = np.linalg.norm(displacement_mm, axis=0)
    colours = [volume[0].numpy() for volume in pca_rgb([maps[None] for maps in features], [fixed.shape] * 2)]
    longest = max(float(np.percentile(length, 99.5)), 1e-3)
    for plane in range(3):
        rows, columns = (axis for axis in range(3) if axis != plane)
        look: dict[str, Any] = {
            "origin": "lower",  # scans are in RAS order: anterior and superior are up
            "aspect": pixel_aspect(plane, spacing),
            "interpolation": "nearest",
        }
        target, *others = (middle(volume, plane) for volume in scaled)
        for column, other in enumerate(others):
            board = _checkerboard(target.shape, (spacing[rows], spacing[columns]))
            grid[plane, column].imshow(np.where(board, target, other), cmap="gray", vmin=0, vmax=1, **look)
        shown = grid[plane, 2].imshow(middle(length, plane), cmap="viridis", vmin=0, vmax=longest, **look)
        _draw_grid(grid[plane, 2], *(middle(displacement_mm[axis], plane) / spacing[axis] for axis in (rows, columns)))
        for column, volume in enumerate(colours, start=3):
            grid[plane, column].imshow(middle(np.moveaxis(volume, 0, -1), plane), **look)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], TITLES, strict=True):
        axes.set_title(title, fontsize="medium")
    figure.colorbar(shown, ax=grid[2, 2], location="bottom", label="mm", shrink=0.8)
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png")


def _scaled(volume: Float[np.ndarray, "Z Y X"], bounds: tuple[float, float]) -> Float[np.ndarray, "Z Y X"]:
    low, high = bounds
    return ((volume - low) / (high - low)).clip(0, 1)


def _checkerboard(shape: tuple[int, ...], spacing: tuple[float, float]) -> np.ndarray:
    """Squares that are squares in mm."""
    edge = max(n * mm for n, mm in zip(shape, spacing, strict=True)) / SQUARES
    rows, columns = (np.floor(np.arange(n) * mm / edge).astype(int) for n, mm in zip(shape, spacing, strict=True))
    return (rows[:, None] + columns) % 2 == 0


def _draw_grid(axes: Any, down: Float[np.ndarray, "H W"], right: Float[np.ndarray, "H W"]) -> None:
    """Lines of voxels where the displacement, in voxels, takes them."""
    rows, columns = np.meshgrid(*(np.arange(n) for n in down.shape), indexing="ij")
    rows, columns = rows + down, columns + right
    step = max(2, max(down.shape) // LINES)
    axes.autoscale(False)
    for line in range(0, down.shape[0], step):
        axes.plot(columns[line], rows[line], color="white", linewidth=0.4)
    for line in range(0, down.shape[1], step):
        axes.plot(columns[:, line], rows[:, line], color="white", linewidth=0.4)
