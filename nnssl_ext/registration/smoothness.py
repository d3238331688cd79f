"""How smooth a displacement field is: Jacobian determinant, folds, spread of its logarithm; and the λ for a wanted spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.registration.separable import apply_kernels, smoothing_kernels
from nnssl_ext.registration.warp import exponential

MARGIN = 2
"""Voxels left out at every face: where fields are extrapolated, and where differences would be one-sided."""


@dataclass(frozen=True)
class Smoothness:
    """Regularity of one field.

    Attributes:
        sdlogj: standard deviation of log det over the voxels with det > 0, the figure that settings are matched in.
        sdlogj_l2r: the Learn2Reg challenge's definition: of log(det + 3), clipped from below at 1e-9. Three to four times
            smaller; never compare it with `sdlogj`.
        fold_percent: voxels with det <= 0.
    """

    sdlogj: float
    sdlogj_l2r: float
    fold_percent: float

    def __str__(self) -> str:
        return f"SDlogJ {self.sdlogj:.3f} (Learn2Reg {self.sdlogj_l2r:.3f}), folds {self.fold_percent:.3f} %"


@torch.no_grad()
def jacobian_determinant(
    displacement_voxels: Float[Tensor, "3 Z Y X"], margin: int = MARGIN
) -> Float[Tensor, "_z _y _x"]:
    """Determinant of the Jacobian of ``x + d(x)`` by central differences, without `margin` >= 1 voxels at every face.

    It is the same in voxels and in mm: spacings cancel. Empty where the grid is not longer than two margins.
    """
    length = [max(size - 2 * margin, 0) for size in displacement_voxels.shape[1:]]

    def shifted(axis: int, by: int) -> Tensor:
        part = displacement_voxels
        for other in range(3):
            part = part.narrow(other + 1, margin + (by if other == axis else 0) if length[other] else 0, length[other])
        return part

    # rows[a][c]: how component c changes along axis a
    rows = [(shifted(axis, 1) - shifted(axis, -1)) / 2 for axis in range(3)]
    for axis in range(3):
        rows[axis][axis] += 1
    a, b, c = rows
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


@torch.no_grad()
def smoothness(
    displacement_voxels: Float[Tensor, "3 Z Y X"], mask: Bool[Tensor, "Z Y X"] | None = None, margin: int = MARGIN
) -> Smoothness:
    """`Smoothness` over the grid without its margin, or over the part of it where the mask is True.

    All figures are 0 where no voxel remains.
    """
    determinant = jacobian_determinant(displacement_voxels, margin)
    if mask is None:
        values = determinant.flatten()
    else:
        z, y, x = (slice(margin, -margin) for _ in range(3))
        values = determinant[mask[z, y, x]]
    if not len(values):
        return Smoothness(0.0, 0.0, 0.0)
    positive = values[values > 0]
    return Smoothness(
        sdlogj=float(positive.log().std(unbiased=False)) if len(positive) else 0.0,
        sdlogj_l2r=float((values + 3).clamp(min=1e-9).log().std(unbiased=False)),
        fold_percent=100 * float((values <= 0).float().mean()),
    )


@torch.no_grad()
def without_folds(velocity_voxels: Float[Tensor, "3 Z Y X"]) -> Float[Tensor, "3 Z Y X"]:
    """The velocity, smoothed around places where its flow, or the opposite flow, folds on the voxel grid, until none is left.

    The flow of a smooth velocity never folds; its linear interpolation can, where the velocity is steep. Every round smooths
    a neighbourhood that is two voxels wider, so the end is reached.
    """
    kernels = smoothing_kernels(velocity_voxels.shape[1:], 2, device=velocity_voxels.device)
    reach = 2
    while (folds := _folds(velocity_voxels) | _folds(-velocity_voxels)).any():
        around = F.pad(folds[None].float(), (1,) * 6)
        for _ in range(reach):
            around = (apply_kernels(around, kernels) > 0).float()
        share = apply_kernels(around, kernels)
        velocity_voxels = velocity_voxels + share * (apply_kernels(velocity_voxels, kernels) - velocity_voxels)
        reach += 1
    return velocity_voxels


def _folds(velocity_voxels: Float[Tensor, "3 Z Y X"]) -> Bool[Tensor, "_z _y _x"]:
    return jacobian_determinant(exponential(velocity_voxels), margin=1) <= 0


def match_smoothness(
    sdlogj_of: Callable[[float], float], target: float, start: float = 1.25, tolerance: float = 0.03, tries: int = 8
) -> float:
    """The regularisation λ at which a registration reaches a wanted SDlogJ.

    Secant steps on log λ against log SDlogJ, which is close to a straight line: on hippocampus pairs with MIND, λ from 0.3
    to 3 gives slopes between -0.53 and -0.58, so two or three registrations are enough. Where SDlogJ jumps, a step that would
    leave the interval known to hold the answer halves it instead.

    Args:
        sdlogj_of: registers with this λ (one pair, or the mean over many) and returns the SDlogJ.
        target: the wanted SDlogJ, above 0.
        start: the first λ.
        tolerance: relative difference from `target` that ends the search.
        tries: registrations at most.

    Returns:
        The λ that came nearest.
    """
    slope = -0.55
    seen: list[tuple[float, float]] = []  # log λ, log SDlogJ - log target
    log_lambda = math.log(start)
    for _ in range(tries):
        reached = sdlogj_of(math.exp(log_lambda))
        seen.append((log_lambda, math.log(max(reached, 1e-6) / target)))
        if abs(seen[-1][1]) < tolerance:
            break
        if len(seen) > 1 and seen[-1][0] != seen[-2][0]:
            slope = (seen[-1][1] - seen[-2][1]) / (seen[-1][0] - seen[-2][0])
            slope = min(max(slope, -2.0), -0.2)  # noise must not turn the step round or make it endless
        log_lambda = seen[-1][0] - min(max(seen[-1][1] / slope, -3.0), 3.0)  # at most 20-fold at a time
        too_rough = max((entry[0] for entry in seen if entry[1] > 0), default=-math.inf)
        too_smooth = min((entry[0] for entry in seen if entry[1] < 0), default=math.inf)
        if -math.inf < too_rough < too_smooth < math.inf and not too_rough < log_lambda < too_smooth:
            log_lambda = (too_rough + too_smooth) / 2
    return math.exp(min(seen, key=lambda entry: abs(entry[1]))[0])
