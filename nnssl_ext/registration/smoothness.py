"""How smooth a displacement field is: Jacobian determinant, folds, spread of its logarithm; and the λ for a wanted spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.registration.separable import apply_kernels, smoothing_kernels
from nnssl_ext.registration.warp import exponential

MARGIN = 2
"""Voxels left out at every face: where fields are extrapolated, and where differences would be one-sided. Fewer along an axis
of which nothing would be left."""


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
    """Determinant of the Jacobian of ``x + d(x)`` by central differences (one-sided at a face that no margin leaves out),
    in the `_inner` part of the grid.

    It is the same in voxels and in mm: spacings cancel.
    """
    inner = (slice(None), *_inner(displacement_voxels.shape[1:], margin))
    # rows[a][c]: how component c changes along axis a
    rows = []
    for axis, length in enumerate(displacement_voxels.shape[1:]):
        if length > 1:
            rows.append(torch.gradient(displacement_voxels, dim=axis + 1)[0][inner])
        else:  # one slice: nothing changes
            rows.append(torch.zeros_like(displacement_voxels[inner]))
        rows[axis][axis] += 1
    a, b, c = rows
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def _inner(shape: Sequence[int], margin: int) -> tuple[slice, ...]:
    """All but `margin` voxels at every face, or as many as leave at least one or two."""
    margins = [min(margin, (length - 1) // 2) for length in shape]
    return tuple(slice(left_out, length - left_out) for left_out, length in zip(margins, shape, strict=True))


@torch.no_grad()
def smoothness(
    displacement_voxels: Float[Tensor, "3 Z Y X"], mask: Bool[Tensor, "Z Y X"] | None = None, margin: int = MARGIN
) -> Smoothness:
    """`Smoothness` over the grid without its margin, or over the part of it where the mask is True.

    All figures are 0 where the mask leaves none.
    """
    determinant = jacobian_determinant(displacement_voxels, margin)
    values = determinant.flatten() if mask is None else determinant[mask[_inner(mask.shape, margin)]]
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
        around = folds[None].float()
        for _ in range(reach):
            around = (apply_kernels(around, kernels) > 0).float()
        share = apply_kernels(around, kernels)
        velocity_voxels = velocity_voxels + share * (apply_kernels(velocity_voxels, kernels) - velocity_voxels)
        reach += 1
    return velocity_voxels


def _folds(velocity_voxels: Float[Tensor, "3 Z Y X"]) -> Bool[Tensor, "Z Y X"]:
    folds = torch.zeros(velocity_voxels.shape[1:], dtype=torch.bool, device=velocity_voxels.device)
    folds[_inner(folds.shape, 1)] = jacobian_determinant(exponential(velocity_voxels), margin=1) <= 0
    return folds


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
