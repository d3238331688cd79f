"""Volumes as pictures: three orthogonal planes, in true proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Shaped

from nnssl_ext.errors import NnsslError
from nnssl_ext.files import atomic_write

WINDOW = (0.5, 99.5)
"""Percentiles of the first volume shown as black and white; the other volumes share its window, so they compare."""
COLOURS = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
CELL = 2.6  # inches of the longest side of a plane
DPI = 100


def draw_planes(
    volumes: Mapping[str, Shaped[np.ndarray, "_C _Z _Y _X"]],
    png: Path,
    spacing: Sequence[float],
    labels: Mapping[str, Integer[np.ndarray, "_Z _Y _X"]] | None = None,
    centre: Sequence[int] | None = None,
) -> None:
    """Draw three orthogonal planes of each volume, through `centre` or the middle; one column per volume, a row per plane and
    channel. Superior is up if z grows towards it, as in nnU-Net's arrays.

    Args:
        volumes: name -> ``(C, Z, Y, X)``; sizes may differ. The first one sets the intensity window of each channel.
            A volume of three channels in uint8 is drawn as red, green and blue.
        png: written atomically.
        spacing: mm along z, y, x.
        labels: name of a volume -> ``(Z, Y, X)`` label map whose outlines are drawn over it.
        centre: voxel z, y, x that lies in all three planes.

    Raises:
        NnsslError: no volumes, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    if not volumes:
        raise NnsslError(f"no volumes to draw in {png}", "pass at least one named (C, Z, Y, X) volume")
    labels = labels or {}
    first = next(iter(volumes.values()))
    channels = max(1 if _is_rgb(volume) else volume.shape[0] for volume in volumes.values())
    windows = [window(first[min(c, first.shape[0] - 1)]) for c in range(channels)]
    heights = row_heights(first.shape[1:], spacing)
    figure = Figure(figsize=(CELL * len(volumes), sum(heights) * channels + 0.3), dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(
        3 * channels, len(volumes), squeeze=False, gridspec_kw={"height_ratios": heights * channels}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (name, volume) in enumerate(volumes.items()):
        grid[0, column].set_title(name, fontsize="medium", parse_math=False)
        pages = [np.moveaxis(volume, 0, -1)] if _is_rgb(volume) else list(volume)
        for row in range(3 * len(pages)):
            channel, plane = divmod(row, 3)
            axes = grid[row, column]
            low, high = windows[channel]
            origin = "upper" if plane == 0 else "lower"
            aspect = pixel_aspect(plane, spacing)
            image = _plane(pages[channel], plane, centre)
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin=origin, aspect=aspect, interpolation="nearest")
            axes.autoscale(False)  # outlines must not widen the view
            if name in labels:
                _outline(axes, _plane(labels[name], plane, centre))
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png")


def outline_colour(label: int) -> str:
    """The colour in which `draw_planes` outlines a label, 1 or higher."""
    return COLOURS[(label - 1) % len(COLOURS)]


def _is_rgb(volume: Shaped[np.ndarray, "_C _Z _Y _X"]) -> bool:
    return volume.dtype == np.uint8 and volume.shape[0] == 3


def middle(volume: np.ndarray, plane: int) -> np.ndarray:
    """The plane through the middle voxel, perpendicular to axis `plane`."""
    return volume.take(volume.shape[plane] // 2, axis=plane)


def _plane(volume: np.ndarray, plane: int, centre: Sequence[int] | None) -> np.ndarray:
    return middle(volume, plane) if centre is None else volume.take(centre[plane], axis=plane)


def pixel_aspect(plane: int, spacing: Sequence[float]) -> float:
    """Height of a pixel over its width, in mm."""
    vertical, horizontal = (axis for axis in range(3) if axis != plane)
    return float(spacing[vertical]) / float(spacing[horizontal])


def row_heights(shape: Sequence[int], spacing: Sequence[float]) -> list[float]:
    """Inches per plane such that each plane fits `CELL` in width, and is at most twice as high."""
    z, y, x = (float(n) * float(s) for n, s in zip(shape, spacing, strict=True))
    return [CELL * min(2.0, max(0.2, height / width)) for height, width in ((y, x), (z, x), (z, y))]


def window(volume: Float[np.ndarray, "Z Y X"]) -> tuple[float, float]:
    """The values to show as black and white, never equal."""
    finite = volume[np.isfinite(volume)]
    low, high = np.percentile(finite, WINDOW) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _outline(axes: Any, labels: Integer[np.ndarray, "H W"]) -> None:
    """Outlines of every label present, coloured by label value."""
    for label in np.unique(labels[labels > 0]):
        inside = np.pad(labels == label, 1).astype(float)  # padded, so that outlines close at the border
        rows, columns = (np.arange(n) - 1 for n in inside.shape)
        axes.contour(columns, rows, inside, levels=[0.5], colors=f"tab:{outline_colour(int(label))}", linewidths=1)
