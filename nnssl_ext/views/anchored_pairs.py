"""Pairs of crops around a common point of the body, and where the body is in them.

vox2vec (arXiv:2307.14725): draw a voxel of the body; each crop of a pair is an independent, uniformly random box around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnssl_ext.contracts import HounsfieldScale, ViewDraw
from nnssl_ext.data.intensity_scale import IntensityScale, ScaleSettings, intensity_scale
from nnssl_ext.data.regions import read_cubes
from nnssl_ext.geometry.affines import Affine, view_to_case
from nnssl_ext.geometry.matching import inside_case
from nnssl_ext.records import Case, Size, View
from nnssl_ext.views.policies import SpatialSettings, draw_pose
from nnssl_ext.views.recipes import STILL

TRIES, AT_ONCE = 32, 4
"""Voxels tried before an anchor outside the body is taken, which is recorded, and how many are read at a time: of a case of which
a tenth is body, one in 30 anchors lies outside (our choice)."""


@runtime_checkable
class IntensityRecipe(Protocol):
    """Draws intensity augmentations whose strengths follow the scale of the case."""

    def draw(self, scale: IntensityScale, rng: np.random.Generator) -> dict[str, float]:
        """Augmentation -> strength, as `nnssl_ext.views.augment.augment` takes it."""
        ...


@dataclass(frozen=True)
class AnchoredPairs:
    """Two crops per pair, both with the pair's anchor inside; views in the order first, second, first, second, ...

    Crops lie inside the case on each axis where they fit, else around its middle on that axis, padded with zeros. Flips and
    quarter turns keep a crop's box; rotation and zoom then act about the anchor, so that it stays inside, and may reach beyond
    the case. Facts of both views: the anchor's case voxel ``anchor_z``, ``anchor_y``, ``anchor_x``; ``anchor_found``, 0 where it
    is not in the body after all; ``body``, the intensity above which voxels are body; ``voxel_seed``, for who samples voxels.

    Attributes:
        size: voxels along z, y, x.
        recipe: intensity augmentations of each crop.
        scale, hounsfield: what is body, see `nnssl_ext.data.intensity_scale.intensity_scale`.
        pairs: per case, each around an anchor of its own. vox2vec: 10.
        spatial: drawn for each crop by itself; vox2vec and arXiv:2401.06473 neither flip, rotate nor zoom.
    """

    size: Size
    recipe: IntensityRecipe
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    hounsfield: HounsfieldScale | None = None
    pairs: int = 10
    spatial: SpatialSettings = STILL

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        scale = intensity_scale(case, self.scale, self.hounsfield)
        views = []
        for _ in range(self.pairs):
            anchor, found = draw_anchor(case, scale.body, rng)
            facts = dict(zip(("anchor_z", "anchor_y", "anchor_x"), map(float, anchor), strict=True))
            facts |= {"anchor_found": float(found), "body": scale.body, "voxel_seed": float(rng.integers(2**31))}
            for _ in range(2):
                affine = self._around(anchor, case, rng)
                views.append(ViewDraw(self.size, affine, self.recipe.draw(scale, rng), facts=facts, clean=True))
        return tuple(views)

    def _around(self, anchor: Int[np.ndarray, " 3"], case: Case, rng: np.random.Generator) -> Affine:
        size, room = np.asarray(self.size), np.asarray(case.shape) - self.size
        lowest = np.where(room < 0, room // 2, np.maximum(anchor - size + 1, 0))
        highest = np.where(room < 0, room // 2, np.minimum(anchor, room))
        centre = rng.integers(lowest, highest + 1) + (size - 1) / 2
        pose = draw_pose(case, self.size, self.spatial, rng)
        box = view_to_case(self.size, centre, flips=pose.flips, quarters=pose.quarters)
        here = np.linalg.solve(box, np.append(anchor, 1.0))  # the anchor's place in the view
        affine = pose.affine(case, self.size, centre)
        affine[:3, 3] += anchor - (affine @ here)[:3]
        return affine


def draw_anchor(case: Case, body: float, rng: np.random.Generator) -> tuple[Int[np.ndarray, " 3"], bool]:
    """A voxel of the case, uniform over those brighter than `body`, and whether it is one: the last one tried need not be."""
    if body == -np.inf:
        return rng.integers(0, case.shape), True
    for _ in range(TRIES // AT_ONCE):
        tried = rng.integers(0, case.shape, (AT_ONCE, 3))
        voxels = read_cubes(case, [(z, y, x) for z, y, x in tried.tolist()], 1)
        for place, voxel in zip(tried, voxels, strict=True):
            if voxel.item() > body:
                return place, True
    return tried[-1], False


def body_mask(view: View) -> Bool[Tensor, "B Z Y X"]:
    """Where a view of `AnchoredPairs` shows body: what is brighter in the first channel, before any augmentation, than the
    case's ``body``; and what lies between such voxels along two axes or three (lungs, bowel). Never padding.

    vox2vec fills the whole volume from a corner instead; where a view cuts through a lung, more of it is left out here.
    """
    assert view.clean is not None, "AnchoredPairs keeps clean voxels"
    thresholds = torch.tensor([facts["body"] for facts in view.applied]).to(view.clean.device, non_blocking=True)
    bright = view.clean[:, 0] > thresholds.view(-1, 1, 1, 1)
    return (bright | _enclosed(bright)) & inside_case(view)[:, 0]


def _enclosed(bright: Bool[Tensor, "B Z Y X"]) -> Bool[Tensor, "B Z Y X"]:
    """True between two bright voxels along at least two axes."""
    ways = torch.zeros_like(bright, dtype=torch.uint8)
    for axis in (1, 2, 3):
        passed = bright.cumsum(axis, dtype=torch.int32)
        ways += (passed > 0) & (passed < passed.narrow(axis, -1, 1))
    return ways > 1


def joined(views: Sequence[View]) -> View:
    """Equally sized views as one batch: all samples of the first, then all of the second, and so on."""
    first = views[0]
    return View(
        voxels=torch.cat([view.voxels for view in views]),
        affine=torch.cat([view.affine for view in views]),
        case_shape=torch.cat([view.case_shape for view in views]),
        spacing=torch.cat([view.spacing for view in views]),
        cases=sum((view.cases for view in views), ()),
        applied=sum((view.applied for view in views), ()),
        clean=None if first.clean is None else torch.cat([_clean(view) for view in views]),
    )


def _clean(view: View) -> Float[Tensor, "B C Z Y X"]:
    assert view.clean is not None
    return view.clean
