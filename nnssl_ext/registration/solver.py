"""From two feature maps to a displacement field: pooling, coupled convex search, instance optimisation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size
from nnssl_ext.registration.adam import optimise
from nnssl_ext.registration.convex import (
    COUPLINGS,
    PACKAGE_COUPLINGS,
    REFERENCE_CHANNELS,
    consistent,
    coupled_convex,
)
from nnssl_ext.registration.pooling import (
    Mask,
    cells_to_voxels,
    geometric_mean,
    pool,
    voxels_per_cell,
    voxels_to_cells,
)
from nnssl_ext.registration.projection import unrelated_difference
from nnssl_ext.registration.smoothness import match_smoothness, smoothness, without_folds
from nnssl_ext.registration.warp import exponential, invert, logarithm

Spacing = tuple[float, float, float]
Pooled = tuple[Float[Tensor, "C z y x"], Float[Tensor, "z y x"] | None]
"""Features of cells, and how much each counts."""
LARGE: Size = (2**30, 2**30, 2**30)  # stands for a grid that is not known yet: no axis too short for its cells


SDLOGJ = 0.24
"""Smoothness at which methods are compared: that of MIND with convexAdam's λ of 1.25 on hippocampus pairs."""


@dataclass(frozen=True)
class SolverSettings:
    """How two feature maps are registered. Lengths are in mm.

    Attributes:
        search_mm: largest displacement that the coarse search tries, along each axis; None: 4 coarse cells.
        coarse_mm: cell edge of the coarse search; axes are pooled by the whole number of voxels that comes nearest. None:
            4 voxels (the geometric mean of the spacings).
        fine_mm: cell edge of the instance optimisation; None: 2 voxels.
        regularisation: λ, the weight of the squared derivatives of the displacement (mm per mm). 1.25 is convexAdam's.
        sdlogj: the smoothness to reach, as std of the log Jacobian determinant in the fixed scan's foreground; λ is then
            searched for, starting at `regularisation`. None: λ as given.
        iterations, learning_rate: of Adam; the rate is in smallest edges of the fine cells. 0 iterations: coarse search only.
        inverse_consistent: search in both directions and reconcile them.
        diffeomorphic: the field is the exponential of a velocity, and free of folds.
        rescale: scale the features so that two unrelated places differ as much as they do with MIND, so that `regularisation`
            and the couplings mean the same for all features.
        memory_gib: what the cost volume may take.
        compatible: the conventions of the convexAdam package (see `convexadam`).
    """

    search_mm: float | None = None
    coarse_mm: float | None = None
    fine_mm: float | None = None
    regularisation: float = 1.25
    sdlogj: float | None = None
    iterations: int = 80
    learning_rate: float = 1.0
    inverse_consistent: bool = True
    diffeomorphic: bool = False
    rescale: bool = True
    memory_gib: float = 1.0
    compatible: bool = False

    def __post_init__(self) -> None:
        for name in ("search_mm", "coarse_mm", "fine_mm", "sdlogj"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise NnsslError(f"--solver.{name} {value:g}", "give a number above 0, or leave it out")
        for name in ("regularisation", "iterations", "learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise NnsslError(f"--solver.{name} {getattr(self, name):g}", "give 0 or more")
        if self.sdlogj is not None and not self.iterations:
            raise NnsslError(
                f"--solver.iterations 0 with --solver.sdlogj {self.sdlogj:g}",
                "the coarse search alone is as smooth as it is: leave one of them out",
            )
        if self.sdlogj is not None and not self.regularisation:
            raise NnsslError(
                f"--solver.regularisation 0 with --solver.sdlogj {self.sdlogj:g}",
                "the search for the wanted smoothness must start above 0; leave --solver.regularisation out",
            )

    def coarse_pooling(self, spacing: Spacing, shape: Size = LARGE) -> Size:
        """Voxels per cell of the coarse search on a grid."""
        return voxels_per_cell(shape, spacing, self.coarse_mm or 4 * geometric_mean(spacing))

    def reach_mm(self, spacing: Spacing, shape: Size = LARGE) -> float:
        """How far the coarse search looks along each axis of a grid, but for rounding to cells."""
        pooling = self.coarse_pooling(spacing, shape)
        return self.search_mm or 4 * geometric_mean([n * mm for n, mm in zip(pooling, spacing, strict=True)])

    @classmethod
    def convexadam(cls, grid_sp: int = 6, disp_hw: int = 4, grid_sp_adam: int = 2, **changes: Any) -> SolverSettings:
        """What the package `convexAdam` 0.2.0 does, its defects included, on voxels of 1 mm; a means of comparison.

        It counts zeros outside of the image, looks n / (n - 1) times as far as a displacement says, drops what remains of an axis
        that the pooling does not divide, and follows the derivative of linear interpolation, which jumps at every cell.
        """
        return cls(
            search_mm=float(grid_sp * disp_hw),
            coarse_mm=float(grid_sp),
            fine_mm=float(grid_sp_adam),
            rescale=False,
            compatible=True,
            **changes,
        )


@dataclass(frozen=True)
class Field:
    """A displacement field on the fixed grid, and how it came about.

    Attributes:
        displacement_voxels: ``(3, Z, Y, X)``, components z, y, x; ``warped(x) = moving(x + d(x))``.
        spacing: mm per voxel, z, y, x.
        velocity_voxels: of a diffeomorphic field, whose exponential it is.
        regularisation: the λ that was used; 0 for the coarse search alone.
        seconds: per stage.
    """

    displacement_voxels: Float[Tensor, "3 Z Y X"]
    spacing: Spacing
    velocity_voxels: Float[Tensor, "3 Z Y X"] | None = None
    regularisation: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def displacement_mm(self) -> Float[Tensor, "3 Z Y X"]:
        return self.displacement_voxels * self.displacement_voxels.new_tensor(self.spacing).view(3, 1, 1, 1)

    def inverse(self) -> Field:
        """From moving to fixed: the opposite flow of a diffeomorphic field, else by fixed-point iteration.

        Where a field folds there is no inverse, and what is returned there is not one.
        """
        if self.velocity_voxels is None:
            return dataclasses.replace(self, displacement_voxels=invert(self.displacement_voxels))
        backward = -self.velocity_voxels
        return dataclasses.replace(self, displacement_voxels=exponential(backward), velocity_voxels=backward)

    def __str__(self) -> str:
        longest = float(self.displacement_mm.norm(dim=0).max())
        return f"Field {tuple(self.displacement_voxels.shape[1:])} at {self.spacing} mm, up to {longest:.1f} mm"


def register_features(
    fixed: Float[Tensor, "_ _ _ _"],
    moving: Float[Tensor, "_ _ _ _"],
    spacing: Spacing,
    settings: SolverSettings = SolverSettings(),
    fixed_mask: Bool[Tensor, "_ _ _"] | None = None,
    moving_mask: Bool[Tensor, "_ _ _"] | None = None,
    foreground: Bool[Tensor, "_ _ _"] | None = None,
) -> Field:
    """The displacement field that makes the moving features look like the fixed ones.

    Args:
        fixed, moving: features ``(C, Z, Y, X)`` of two images on one grid.
        spacing: mm per voxel.
        fixed_mask, moving_mask: ``(Z, Y, X)``; only what is True counts.
        foreground: ``(Z, Y, X)``; where `SolverSettings.sdlogj` is measured. None: everywhere.

    Raises:
        NnsslError: maps of different shapes, values that are not finite, or an empty mask.
    """
    _check(fixed, moving, fixed_mask, moving_mask)
    fixed, moving = fixed.float(), moving.float()
    shape: Size = (fixed.shape[1], fixed.shape[2], fixed.shape[3])
    scale = _unit_scale(fixed, moving, fixed_mask, moving_mask) if settings.rescale else 1.0

    def pooled(pooling: Size) -> list[Pooled]:
        sides = []
        for maps, mask in ((fixed, fixed_mask), (moving, moving_mask)):
            cells, weight = pool(maps, pooling, mask, compatible=settings.compatible)
            sides.append((cells * scale, weight))  # scaling voxels would be another copy of maps that may be large
        return sides

    started = time.perf_counter()
    coarse = _coarse(pooled, shape, spacing, settings)
    seconds = {"coarse": time.perf_counter() - started}
    if not settings.iterations:
        found = _field(logarithm(coarse) if settings.diffeomorphic else coarse, spacing, settings.diffeomorphic)
        return dataclasses.replace(found, seconds=seconds)
    started = time.perf_counter()
    pooling = voxels_per_cell(shape, spacing, settings.fine_mm or 2 * geometric_mean(spacing))
    (fixed_cells, fixed_weight), (moving_cells, moving_weight) = pooled(pooling)
    start = voxels_to_cells(coarse, pooling, compatible=settings.compatible)

    def refine(regularisation: float) -> Field:
        cells = optimise(
            fixed_cells,
            moving_cells,
            start,
            regularisation,
            iterations=settings.iterations,
            learning_rate=settings.learning_rate,
            cell_mm=[factor * size for factor, size in zip(pooling, spacing, strict=True)],
            fixed_weight=fixed_weight,
            moving_weight=moving_weight,
            diffeomorphic=settings.diffeomorphic,
            compatible=settings.compatible,
        )
        voxels = cells_to_voxels(cells, pooling, shape, compatible=settings.compatible)
        return _field(voxels, spacing, settings.diffeomorphic, regularisation)

    chosen = settings.regularisation
    if settings.sdlogj is not None:
        chosen = match_smoothness(
            lambda value: smoothness(refine(value).displacement_voxels, foreground).sdlogj, settings.sdlogj, chosen
        )
    result = refine(chosen)
    return dataclasses.replace(result, seconds=seconds | {"fine": time.perf_counter() - started})


def _field(voxels: Tensor, spacing: Spacing, diffeomorphic: bool, regularisation: float = 0.0) -> Field:
    if not diffeomorphic:
        return Field(voxels, spacing, regularisation=regularisation)
    velocity = without_folds(voxels)
    return Field(exponential(velocity), spacing, velocity, regularisation)


def _coarse(
    pooled: Callable[[Size], list[Pooled]], shape: Size, spacing: Spacing, settings: SolverSettings
) -> Float[Tensor, "3 Z Y X"]:
    pooling = settings.coarse_pooling(spacing, shape)
    (fixed_cells, fixed_weight), (moving_cells, moving_weight) = pooled(pooling)
    cell_mm = [factor * size for factor, size in zip(pooling, spacing, strict=True)]
    search = settings.reach_mm(spacing, shape)
    z, y, x = (
        min(round(search / size), length - 1) for size, length in zip(cell_mm, fixed_cells.shape[1:], strict=True)
    )

    def search_in(a: Tensor, b: Tensor, a_weight: Tensor | None, b_weight: Tensor | None) -> Tensor:
        return coupled_convex(
            a,
            b,
            (z, y, x),
            fixed_weight=a_weight,
            moving_weight=b_weight,
            cell_mm=cell_mm,
            couplings=PACKAGE_COUPLINGS if settings.compatible else COUPLINGS,
            compatible=settings.compatible,
            memory_bytes=int(settings.memory_gib * 2**30),
        )

    cells = search_in(fixed_cells, moving_cells, fixed_weight, moving_weight)
    if settings.inverse_consistent:
        opposite = search_in(moving_cells, fixed_cells, moving_weight, fixed_weight)
        cells, _ = consistent(cells, opposite, compatible=settings.compatible)
    return cells_to_voxels(cells, pooling, shape, compatible=settings.compatible)


MIND_DIFFERENCE = 2.5
"""Twelve times the mean squared difference of MIND (radius 1, dilation 2) between unrelated places of two images: 2.48, with
a standard deviation of 0.06, over eight hippocampus pairs (measured)."""


def _unit_scale(fixed: Tensor, moving: Tensor, fixed_mask: Mask | None, moving_mask: Mask | None) -> float:
    """The factor that gives unrelated places of the two maps `MIND_DIFFERENCE`; 1 for constant maps."""
    difference = REFERENCE_CHANNELS * unrelated_difference(fixed, moving, fixed_mask, moving_mask)
    return math.sqrt(MIND_DIFFERENCE / difference) if difference > 1e-12 else 1.0


def _check(fixed: Tensor, moving: Tensor, fixed_mask: Tensor | None, moving_mask: Tensor | None) -> None:
    if fixed.shape != moving.shape:
        raise NnsslError(
            f"features to register have shapes {tuple(fixed.shape)} and {tuple(moving.shape)}",
            "bring both images onto one grid, with the same features",
        )
    for name, features in (("fixed", fixed), ("moving", moving)):
        if not torch.stack([torch.isfinite(channel).all() for channel in features]).all():  # one wait for the device
            raise NnsslError(f"the {name} features hold values that are not finite", "check the image for NaN or Inf")
    for name, mask in (("fixed", fixed_mask), ("moving", moving_mask)):
        if mask is None:
            continue
        if mask.shape != fixed.shape[1:]:
            raise NnsslError(
                f"the {name} mask has shape {tuple(mask.shape)}, the features {tuple(fixed.shape[1:])}",
                "bring the mask onto the grid of the images",
            )
        if not mask.any():
            raise NnsslError(f"the {name} mask is empty", "give a mask with foreground, or none")
