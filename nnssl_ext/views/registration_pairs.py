"""A case twice: as it is, and moved, deformed and re-contrasted, with the field between them known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.geometry.affines import view_to_case
from nnssl_ext.geometry.matching import matched_coordinates
from nnssl_ext.records import Case, Size, View
from nnssl_ext.views.policies import IntensitySettings, SpatialSettings, draw_centre, draw_intensity, draw_pose
from nnssl_ext.views.recipes import REGISTRATION_INTENSITY, REGISTRATION_SPATIAL
from nnssl_ext.views.warps import WarpSettings, draw_warp, smooth_displacement


@dataclass(frozen=True)
class RegistrationPairs:
    """Two views per case: the fixed one, to be deformed, and the moving one, a plain crop at a random place.

    Attributes:
        size: voxels along z, y, x of both.
        spatial: how the fixed view is turned and zoomed against the moving one, about the same centre.
        shift: by up to which share of `size` its centre is moved away.
        warp: how the fixed view is deformed beyond that, by whoever calls `known_displacement`.
        intensity: augmentation of the fixed view only, so that a trained pair always has a side as it is met later.
        labels: whether views bring their labels.
    """

    size: Size
    spatial: SpatialSettings = REGISTRATION_SPATIAL
    shift: float = 0.05
    warp: WarpSettings = field(default_factory=WarpSettings)
    intensity: IntensitySettings = REGISTRATION_INTENSITY
    labels: bool = False

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        centre = draw_centre(case.shape, self.size, np.ones(3), rng)
        pose = draw_pose(case, self.size, self.spatial, rng)
        away = centre + rng.uniform(-self.shift, self.shift, 3) * self.size
        facts = draw_warp(self.warp, rng)
        return (
            ViewDraw(self.size, pose.affine(case, self.size, away), draw_intensity(self.intensity, rng), facts=facts),
            ViewDraw(self.size, view_to_case(self.size, centre), {}),
        )


def drawn_warp(view: View) -> Float[Tensor, "B 3 Z Y X"]:
    """The deformations that were drawn for a view, in its voxels."""
    fields = []
    for spacing, facts in zip(view.spacing.tolist(), view.applied, strict=True):
        control = [facts["warp_control"] * min(spacing) / mm for mm in spacing]
        seed = int(facts["warp_seed"])
        fields.append(smooth_displacement(view.size, control, facts["warp_strength"], seed, view.voxels.device))
    return torch.stack(fields)


def known_displacement(
    fixed: View, moving: View, warp: Float[Tensor, "B 3 Z Y X"]
) -> tuple[Float[Tensor, "B 3 Z Y X"], Bool[Tensor, "B Z Y X"]]:
    """From every voxel ``x`` of the deformed fixed view, which shows there what `fixed` shows at ``x + warp(x)``, to the
    same point in `moving`: a displacement in voxels.

    Returns:
        The displacement; and True where its end lies in `moving` and in the case, and what was deformed came from `fixed`.
    """
    between = torch.linalg.solve_ex(moving.affine.double(), fixed.affine.double())[0][:, :3, :3].to(warp.dtype)
    places = matched_coordinates(fixed, moving).movedim(-1, 1) + torch.einsum("bij,bjzyx->bizyx", between, warp)
    here = _voxels(fixed)
    in_case = places + moving.affine[:, :3, 3].view(-1, 3, 1, 1, 1)  # the moving view is a plain crop
    inside = _within(places, moving.size) & _within(here + warp, fixed.size)
    return places - here, inside & _within(in_case, moving.case_shape)


def to_the_middle_of(view: View, one: int, other: int) -> Float[Tensor, 3]:
    """The constant displacement, in voxels, from the plain crop of one case to that of another that brings the middles of the
    two cases together."""
    start, end = (view.affine[row, :3, 3] - (view.case_shape[row] - 1) / 2 for row in (one, other))
    return start - end


def _voxels(view: View) -> Float[Tensor, "1 3 Z Y X"]:
    axes = [torch.arange(length, device=view.voxels.device, dtype=torch.float32) for length in view.size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _within(places: Float[Tensor, "B 3 Z Y X"], shape: Size | Tensor) -> Bool[Tensor, "B Z Y X"]:
    last = torch.as_tensor(shape).to(places.device, non_blocking=True).expand(len(places), 3).view(-1, 3, 1, 1, 1) - 1
    return ((places >= -0.5) & (places <= last + 0.5)).all(dim=1)
