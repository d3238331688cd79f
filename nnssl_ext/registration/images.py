"""Scans of any format, spacing and orientation, and the common grid on which a pair is compared.

World coordinates are ITK's: LPS, mm, in the order x, y, z. Arrays are z, y, x.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, Shaped
from scipy import ndimage

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.data.scans import label_values, on_grid_of, read_scan, voxels
from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size

ORIENTATION = "RAS"
"""Axes of every scan are brought into this order, by flips and swaps alone: NIfTI's own, that of the Decathlon's files."""

BORDER = 64
"""Voxels that a scan's border is repeated for at most, linearly between slices; beyond them the nearest voxel is repeated."""

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an image lie.

    Attributes:
        size: voxels along z, y, x.
        spacing: mm along z, y, x.
        origin: world position x, y, z of the first voxel's centre, in mm.
        direction: the 9 direction cosines as ITK gives them.
    """

    size: Size
    spacing: Spacing
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} voxels of {'x'.join(f'{s:.4g}' for s in self.spacing)} mm"

    def image(self, array: Shaped[np.ndarray, ...]) -> sitk.Image:
        """An image with this grid from ``(Z, Y, X)`` voxels, or from ``(Z, Y, X, 3)`` vectors in world order."""
        made = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
        made.SetSpacing(self.spacing[::-1])
        made.SetOrigin(self.origin)
        made.SetDirection(self.direction)
        return made

    def to_world(self, vectors: Float[np.ndarray, "3 Z Y X"]) -> Float[np.ndarray, "Z Y X 3"]:
        """Displacements in voxels, components z, y, x, as mm in world order."""
        scaled = np.asarray(self.spacing)[:, None, None, None] * vectors
        return np.einsum("ij,jzyx->zyxi", np.reshape(self.direction, (3, 3)), scaled[::-1])


def grid_of(image: sitk.Image) -> Grid:
    """The grid of an image."""
    x, y, z = image.GetSize()
    sx, sy, sz = image.GetSpacing()
    return Grid((z, y, x), (sz, sy, sx), image.GetOrigin(), image.GetDirection())


@dataclass(frozen=True)
class Scan:
    """One scan as it takes part in a registration; all images share one grid in the order `ORIENTATION`.

    Attributes:
        path: its file.
        image: voxels.
        file_grid: the grid as it is in the file.
        mask: where to look, given by the user, or None for everywhere.
        labels: a segmentation, or None.
    """

    path: Path
    image: sitk.Image
    file_grid: Grid
    mask: sitk.Image | None = None
    labels: sitk.Image | None = None

    @property
    def grid(self) -> Grid:
        """The grid of the voxels in memory."""
        return grid_of(self.image)

    @property
    def voxels(self) -> Shaped[np.ndarray, "Z Y X"]:
        """The voxels; a view."""
        return sitk.GetArrayViewFromImage(self.image)

    def foreground(self) -> Bool[np.ndarray, "Z Y X"]:
        """The given mask, else what the intensities show to be the patient."""
        if self.mask is not None:
            return sitk.GetArrayViewFromImage(self.mask) > 0
        return foreground_mask(self.voxels)

    def __str__(self) -> str:
        return f"{self.path}: {self.grid}"


def load_scan(path: Path, mask: Path | None = None, labels: Path | None = None) -> Scan:
    """Read a scan with what belongs to it. NIfTI, NRRD, MHA and whatever else SimpleITK reads as one 3D file.

    Raises:
        NnsslError: a file that is missing, unreadable, 2D or 4D; NaN or constant voxels; mask or labels on another grid,
            an empty mask, labels that are not integers. The message names the file.
    """
    image = read_scan(path)
    voxels(image, path)
    found = {}
    for role, file in (("mask", mask), ("labels", labels)):
        if file is None:
            continue
        beside, _ = on_grid_of(read_scan(file), file, image, path)
        values = label_values(beside, file)
        if role == "mask" and not any(values):
            raise NnsslError(f"{file}: the mask is empty, so {path} has no foreground", "draw it, or leave it out")
        found[role] = sitk.DICOMOrient(beside, ORIENTATION)
    return Scan(path, sitk.DICOMOrient(image, ORIENTATION), grid_of(image), **found)


def place(
    image: sitk.Image, grid: Grid, transform: sitk.Transform | None = None, labels: bool = False
) -> Shaped[np.ndarray, "Z Y X *vector"]:
    """The image (of numbers or vectors) seen at every voxel of `grid`: linear, or with `labels` nearest neighbour; its border repeated beyond it.

    Args:
        transform: world point of `grid` -> world point of the image; None for identity.
    """
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(reference(grid))
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if labels else sitk.sitkLinear)
    resampler.UseNearestNeighborExtrapolatorOn()
    return sitk.GetArrayFromImage(resampler.Execute(image if labels else _bordered(image, grid, transform)))


def _bordered(image: sitk.Image, grid: Grid, transform: sitk.Transform) -> sitk.Image:
    """The image with its border repeated as far as the grid's corners reach, `BORDER` voxels at most.

    ITK's extrapolator would take the nearest voxel along all three axes, also along those that are inside: a scan of thick slices
    would go on in steps.
    """
    beyond = _beyond(grid_of(image), grid, transform)
    lower, upper = np.ceil(beyond[:, ::-1]).clip(0, BORDER).astype(int).tolist()
    return sitk.ZeroFluxNeumannPad(image, lower, upper)


def view_field(image: sitk.Image, grid: Grid, transform: sitk.Transform | None = None) -> Bool[np.ndarray, "Z Y X"]:
    """Which voxels of `grid` lie inside the image."""
    inside = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    inside.CopyInformation(image)
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    seen = sitk.Resample(inside, reference(grid), transform, sitk.sitkNearestNeighbor, 0)
    return sitk.GetArrayFromImage(seen) > 0


def finest_cubes(scan: Scan) -> Spacing:
    """Cubes as fine as the scan's finest axis."""
    edge = min(scan.grid.spacing)
    return edge, edge, edge


def common_grid(fixed: Scan, moving: Scan, initial: sitk.Transform, spacing: Spacing, margin: float) -> Grid:
    """The grid for comparing a pair: the fixed scan's axes, its box, and as much of the moving scan as lies at most
    `margin` beyond it, because displacements may point there.

    Args:
        initial: world point of the fixed scan -> world point of the moving scan.
        spacing: mm along z, y, x.
        margin: mm.

    Raises:
        NnsslError: the scans share not one voxel.
    """
    own = fixed.grid
    mm = np.array(spacing, float)
    length = np.array(own.size) * own.spacing
    inner = np.ceil(length / mm - 1e-3).astype(int)  # a hair beyond a whole number is rounding in the header
    rims = np.stack([np.ceil(margin / mm).astype(int)] * 2)  # at both ends
    if initial.IsLinear():  # no further than the moving scan reaches: what a grid takes is bounded, whatever the margin
        beyond = _beyond(_subgrid(own, mm, 0 * inner, inner), moving.grid, initial.GetInverse())
        rims = np.minimum(rims, np.ceil(beyond).clip(0).astype(int) + 1)
    low, high = rims
    around = _subgrid(own, mm, -low, low + inner + high)
    inside, seen = view_field(fixed.image, around), view_field(moving.image, around, initial)
    if not (inside & seen).any():
        raise NnsslError(
            f"{moving.path} and {fixed.path} do not meet: their fields of view share no voxel",
            "let the start be found (--init centre, rigid or affine), or correct the headers",
        )
    (box,) = ndimage.find_objects(seen.view(np.uint8))
    lower = np.minimum([part.start for part in box], low)
    upper = np.maximum([part.stop for part in box], low + inner)
    return _subgrid(own, mm, lower - low, upper - lower)


def _beyond(grid: Grid, other: Grid, transform: sitk.Transform) -> Float[np.ndarray, "2 3"]:
    """How many voxels of `grid` a box reaches beyond its first and its last voxel along z, y, x; negative where it does not."""
    last = [length - 1 for length in other.size[::-1]]
    corners = itertools.product(*((-0.5, n + 0.5) for n in last))
    points = [reference(other).TransformContinuousIndexToPhysicalPoint(corner) for corner in corners]
    seen = [reference(grid).TransformPhysicalPointToContinuousIndex(transform.TransformPoint(p)) for p in points]
    places = np.array(seen)[:, ::-1]
    return np.stack((-places.min(axis=0), places.max(axis=0) - np.array(grid.size) + 1))


def _subgrid(grid: Grid, spacing: np.ndarray, lower: np.ndarray, size: np.ndarray) -> Grid:
    """Voxels of another spacing whose voxel (0, 0, 0) begins at the first face of `grid`: `size` of them from `lower` on."""
    first = (lower + 0.5) * spacing - 0.5 * np.asarray(grid.spacing)  # mm from the first centre to the new first centre
    origin = np.asarray(grid.origin) + np.reshape(grid.direction, (3, 3)) @ first[::-1]
    nz, ny, nx = (int(n) for n in size)
    sz, sy, sx = (float(s) for s in spacing)
    ox, oy, oz = (float(o) for o in origin)
    return Grid((nz, ny, nx), (sz, sy, sx), (ox, oy, oz), grid.direction)


def reference(grid: Grid) -> sitk.Image:
    """The smallest image that tells SimpleITK about a grid; its voxels are of no interest."""
    image = sitk.Image(grid.size[::-1], sitk.sitkUInt8)
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image
