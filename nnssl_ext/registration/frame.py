"""The frame that a pair is worked on in: the fixed scan's own axes, in an order and direction that its voxels decide.

Nothing in it depends on which way a file's axes run or how headers are turned, so neither do results: a solver that treats ends of
an axis differently, and sums that are taken in another order, would show such things, at worst by millimetres. What networks see
is turned back to the order in which scans are loaded, the patient's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from nnssl_ext.registration.images import Grid, Scan
from nnssl_ext.registration.solver import Field

DIRECTION_DIGITS, LENGTH_DIGITS, ORIGIN_VOXELS = 6, 7, 1e-4
"""To which headers are rounded in the frame: decimals of direction cosines, significant digits of spacings, and multiples of the
smallest spacing for origins. Turning a header leaves 1e-16 of its numbers in float64 files; NIfTI's float32 ones 1e-7, and 3e-5 mm
some hundred mm away."""

Triple = tuple[float, float, float]
Matrix = Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Turn:
    """How axes z, y, x as scans are loaded become those of the frame.

    Attributes:
        order: for each axis of the frame, the loaded one that it is.
        reversed: axes of the frame that run the other way.
    """

    order: tuple[int, int, int]
    reversed: tuple[int, ...]

    def there(self, maps: Shaped[Tensor, "*c Z Y X"]) -> Shaped[Tensor, "*c z y x"]:
        """Voxels in the loaded order as voxels of the frame."""
        extra = maps.ndim - 3
        ordered = maps.permute(*range(extra), *(extra + axis for axis in self.order))
        return _flipped(ordered, [extra + axis for axis in self.reversed]).contiguous()

    def back(self, maps: Shaped[Tensor, "*c z y x"]) -> Shaped[Tensor, "*c Z Y X"]:
        """The opposite of `there`."""
        extra = maps.ndim - 3
        straight = _flipped(maps, [extra + axis for axis in self.reversed])
        return straight.permute(*range(extra), *(extra + self.order.index(axis) for axis in range(3))).contiguous()

    def lengths_there(self, lengths: Triple) -> Triple:
        """Lengths along the loaded axes in the frame's order."""
        z, y, x = (lengths[axis] for axis in self.order)
        return z, y, x

    def lengths_back(self, lengths: Triple) -> Triple:
        """The opposite of `lengths_there`."""
        z, y, x = (lengths[self.order.index(axis)] for axis in range(3))
        return z, y, x

    def field_back(self, displacement: Float[Tensor, "3 z y x"]) -> Float[Tensor, "3 Z Y X"]:
        """Displacements, in voxels of the frame, in those of the loaded order."""
        places = [self.order.index(axis) for axis in range(3)]
        return self.back(torch.stack([-displacement[i] if i in self.reversed else displacement[i] for i in places]))


AS_LOADED = Turn((0, 1, 2), ())


@dataclass(frozen=True)
class Frame:
    """A right- or left-handed frame in mm, its axes x, y, z those of the fixed scan's voxels after `turn`.

    Attributes:
        turn: of the fixed scan's axes.
        axes: rows are the frame's x, y, z in world directions, orthonormal even where a file's are not.
        origin: the world point at its origin, the centre of the fixed scan's first voxel.
    """

    turn: Turn
    axes: Matrix
    origin: Float[np.ndarray, " 3"]

    def scan(self, scan: Scan) -> Scan:
        """A scan as the frame sees it, without labels: its axes in the order nearest to the frame's, its header in the frame."""
        image = self._image(scan.image)
        return replace(scan, image=image, mask=None if scan.mask is None else self._image(scan.mask), labels=None)

    def inward(self, transform: sitk.Transform) -> sitk.Transform:
        """A transform between world points as one between points of the frame."""
        return _between(transform, self.axes.T, self.origin)

    def outward(self, transform: sitk.Transform) -> sitk.Transform:
        """A transform between points of the frame as one between world points."""
        return _between(transform, self.axes, -self.axes @ self.origin)

    def grid_back(self, grid: Grid) -> Grid:
        """A grid of the frame in the world, its axes in the loaded order."""
        turned = [axis in self.turn.reversed for axis in range(3)]
        ends = [(length - 1) * mm * back for length, mm, back in zip(grid.size, grid.spacing, turned, strict=True)]
        local = np.reshape(grid.direction, (3, 3))
        ox, oy, oz = (self.axes.T @ (grid.origin + local @ ends[::-1]) + self.origin).tolist()
        rows = [
            -row if back else row for row, back in zip((self.axes.T @ local).T[::-1], turned, strict=True)
        ]  # z, y, x
        direction = np.stack([rows[self.turn.order.index(axis)] for axis in (2, 1, 0)], axis=1)
        nz, ny, nx = (grid.size[self.turn.order.index(axis)] for axis in range(3))
        return Grid((nz, ny, nx), self.turn.lengths_back(grid.spacing), (ox, oy, oz), tuple(direction.ravel().tolist()))

    def field_back(self, field: Field) -> Field:
        """A deformation on a grid of the frame, on that of `grid_back`."""
        velocity = field.velocity_voxels
        return replace(
            field,
            displacement_voxels=self.turn.field_back(field.displacement_voxels),
            spacing=self.turn.lengths_back(field.spacing),
            velocity_voxels=None if velocity is None else self.turn.field_back(velocity),
        )

    def _image(self, image: sitk.Image) -> sitk.Image:
        return _reframed(_nearest(image, self.axes), self.axes, self.origin)


def _flipped(maps: Tensor, axes: list[int]) -> Tensor:
    return maps.flip(axes) if axes else maps


def frame_of(fixed: Scan) -> Frame:
    """The frame of a fixed scan: its axes by length in mm, then by how far its intensities lie off the middle; each begins at the
    end where they are lower. Slices of another thickness make no difference."""
    voxels, size = fixed.voxels, fixed.grid.size
    lengths = _rounded(np.multiply(size, fixed.grid.spacing))
    moments = []
    for axis, length in enumerate(size):
        profile = voxels.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)
        moments.append(float(profile @ (np.arange(length) - (length - 1) / 2)) * lengths[axis] / length)
    first, second, third = sorted(range(3), key=lambda axis: (lengths[axis], abs(moments[axis])))
    order = (first, second, third)
    turn = Turn(order, tuple(place for place, axis in enumerate(order) if moments[axis] < 0))
    loaded = np.reshape(fixed.grid.direction, (3, 3)).T[::-1]  # rows: world directions of z, y, x
    rows = [-loaded[axis] if place in turn.reversed else loaded[axis] for place, axis in enumerate(order)]
    ends = {axis: size[axis] - 1 if place in turn.reversed else 0 for place, axis in enumerate(order)}
    first_voxel = fixed.image.TransformIndexToPhysicalPoint([ends[axis] for axis in (2, 1, 0)])
    left, _, right = np.linalg.svd(np.stack(rows[::-1]))
    return Frame(turn, left @ right, np.array(first_voxel))


def _nearest(image: sitk.Image, axes: Matrix) -> sitk.Image:
    """The image with its axes in the order and direction nearest to these, by swaps and flips alone."""
    seen = np.round(axes @ np.reshape(image.GetDirection(), (3, 3)), DIRECTION_DIGITS)
    order = max(itertools.permutations(range(3)), key=lambda order: sum(abs(seen[i, order[i]]) for i in range(3)))
    backwards = [bool(seen[i, order[i]] < 0) for i in range(3)]
    return sitk.Flip(sitk.PermuteAxes(image, order), backwards, False)


def _reframed(image: sitk.Image, axes: Matrix, origin: Float[np.ndarray, " 3"]) -> sitk.Image:
    """The image with its header in the frame."""
    direction = np.round(axes @ np.reshape(image.GetDirection(), (3, 3)), DIRECTION_DIGITS)
    spacing = _rounded(image.GetSpacing())
    step = ORIGIN_VOXELS * min(spacing)
    made = sitk.Image(image)
    made.SetDirection(direction.ravel().tolist())
    made.SetSpacing(spacing)
    made.SetOrigin((np.round(axes @ (np.array(image.GetOrigin()) - origin) / step) * step).tolist())
    return made


def _rounded(lengths: Sequence[float] | np.ndarray) -> list[float]:
    return [float(f"{mm:.{LENGTH_DIGITS}g}") for mm in lengths]


def _between(transform: sitk.Transform, matrix: Matrix, offset: Float[np.ndarray, " 3"]) -> sitk.Transform:
    """A transform as seen from coordinates ``p`` whose points are ``matrix @ p + offset``; simplified where it is linear."""
    there, back = sitk.AffineTransform(3), sitk.AffineTransform(3)
    there.SetMatrix(matrix.ravel().tolist())
    there.SetTranslation(offset.tolist())
    back.SetMatrix(matrix.T.ravel().tolist())
    back.SetTranslation((-matrix.T @ offset).tolist())
    whole = sitk.CompositeTransform([back, transform, there])
    if not transform.IsLinear():
        return whole
    shift, *ends = (np.array(whole.TransformPoint(point)) for point in np.eye(4)[:, :3][[3, 0, 1, 2]].tolist())
    linear = np.stack([end - shift for end in ends], axis=1)
    if not np.allclose(linear, np.eye(3), atol=1e-9):
        found = sitk.AffineTransform(3)
        found.SetMatrix(linear.ravel().tolist())
        found.SetTranslation(shift.tolist())
        return found
    if not np.allclose(shift, 0, atol=1e-9):
        return sitk.TranslationTransform(3, shift.tolist())
    return sitk.Transform(3, sitk.sitkIdentity)
