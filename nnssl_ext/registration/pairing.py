"""Pairs to learn from in a batch: every case with its own deformed view, and every two cases with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.geometry.matching import inside_case
from nnssl_ext.records import Size, View
from nnssl_ext.registration.learning import Map, MapPair, Triple, textured
from nnssl_ext.registration.mind import isotropic_dilation, mind
from nnssl_ext.registration.warp import compose, warp
from nnssl_ext.views.registration_pairs import known_displacement, to_the_middle_of

LEAST_OVERLAP = 0.1
"""Share of a crop in which both cases must show something for them to be registered; our choice."""

Guides = list[tuple[Map, Map]]
Find = Callable[[Guides, tuple[Bool[Tensor, "z y x"], Bool[Tensor, "z y x"]], Triple], tuple[Tensor, Tensor]]
"""From descriptions of two cases, features first, the cells that show something, and their mm, to the fields between the cases
and back."""


@dataclass(frozen=True)
class Crops:
    """A batch of cases on the grid of their feature maps: the moving view, and where the deformed fixed view came from.

    Attributes:
        fixed, moving: feature maps of the two views.
        known: displacement in cells from the fixed view to the moving one.
        inside: cells of the fixed view where it ends inside of the moving view and of the case.
        seen: cells of the moving view that show the case.
        distinct: cells of the moving view that differ from what is around them.
        guide: MIND of the moving view.
        labels: shares of the labels in the fixed and in the moving view, or None.
        spacing: mm of a cell.
        stride: voxels per cell.
        view: the moving view.
        seeds: decide the places of each case.
    """

    fixed: Float[Tensor, "B C z y x"]
    moving: Float[Tensor, "B C z y x"]
    known: Float[Tensor, "B 3 z y x"]
    inside: Bool[Tensor, "B z y x"]
    seen: Bool[Tensor, "B z y x"]
    distinct: Bool[Tensor, "B z y x"]
    guide: Float[Tensor, "B 12 z y x"]
    labels: tuple[Float[Tensor, "B K z y x"], Float[Tensor, "B K z y x"]] | None
    spacing: Triple
    stride: Size
    view: View
    seeds: tuple[int, ...]

    def same(self) -> list[MapPair]:
        """Every case with itself."""
        nowhere = torch.zeros_like(self.known[0])
        return [self._pair(number, number, nowhere, nowhere) for number in range(len(self.fixed))]

    def different(self, find: Find) -> list[MapPair]:
        """The first case with the second, the third with the fourth and so on, once from either side, where their crops show
        the same parts when the middles of the cases lie on each other."""
        pairs = []
        for number in range(0, len(self.fixed) - 1, 2):
            pairs += self._meet(number, number + 1, find)
        return pairs

    def _meet(self, one: int, other: int, find: Find) -> list[MapPair]:
        offset = to_the_middle_of(self.view, one, other) / self.moving.new_tensor(self.stride)
        forth = offset.view(3, 1, 1, 1).expand_as(self.known[one])
        seen = self.seen[one], _at(self.seen[other], forth)
        if (seen[0] & seen[1]).float().mean() < LEAST_OVERLAP:
            return []
        described = [self.moving.detach(), self.guide, *([] if self.labels is None else [self.labels[1]])]
        there, back = find([(maps[one], warp(maps[other], forth)) for maps in described], seen, self.spacing)
        return [self._pair(one, other, there, forth), self._pair(other, one, warp(back, -forth), -forth)]

    def _pair(
        self, one: int, other: int, between: Float[Tensor, "3 z y x"], offset: Float[Tensor, "3 z y x"]
    ) -> MapPair:
        """The fixed view of one case and the moving view of another, brought to it by `offset`, through the moving view of the
        first, from where `between` leads on."""
        known = self.known[one]

        def reached(mask: Bool[Tensor, "B z y x"]) -> Bool[Tensor, "z y x"]:
            """Cells of the fixed view that show what the mask holds in both moving views."""
            return self.inside[one] & _at(mask[one] & _at(_at(mask[other], offset), between), known)

        labels = None
        if self.labels is not None:
            labels = self.labels[0][one], warp(self.labels[1][other], offset)
        return MapPair(
            fixed=self.fixed[one],
            moving=warp(self.moving[other], offset),
            target=compose(between, known),
            valid=reached(self.seen),
            distinct=reached(self.seen & self.distinct),
            spacing=self.spacing,
            seed=self.seeds[one],
            labels=labels,
        )


def pair_crops(
    fixed: View,
    moving: View,
    deformation: Float[Tensor, "B 3 Z Y X"],
    maps: tuple[Float[Tensor, "B _C _z _y _x"], Float[Tensor, "B _C _z _y _x"]],
    stride: Size,
    labels: tuple[int, ...] = (),
) -> Crops:
    """What a `RegistrationPairs` batch says, on the grid of the feature maps.

    Args:
        fixed, moving: the two views; the fixed one was deformed by `deformation` before it was encoded.
        maps: of both.
        stride: voxels per cell of the maps.
        labels: those to make use of.
    """
    known, inside = known_displacement(fixed, moving, deformation)
    z, y, x = moving.spacing[0].tolist()
    image = moving.voxels.float()
    guide = torch.stack([mind(volume.mean(0), dilation=isotropic_dilation((z, y, x))) for volume in image])
    steps = known.new_tensor(stride).view(3, 1, 1, 1)
    known = _cells(known, stride) / steps
    shares = None
    if labels:
        assert moving.labels is not None
        there = _cells(torch.stack([moving.labels == label for label in labels], dim=1).float(), stride)
        shares = torch.stack([warp(*each) for each in zip(there, known, strict=True)]), there
    return Crops(
        fixed=maps[0],
        moving=maps[1],
        known=known,
        inside=_cells(inside[:, None].float(), stride)[:, 0] > 0.99,
        seen=_cells(inside_case(moving).float(), stride)[:, 0] > 0.99,
        distinct=_cells(torch.stack([textured(volume) for volume in image])[:, None].float(), stride)[:, 0] > 0,
        guide=_cells(guide, stride),
        labels=shares,
        spacing=(z * stride[0], y * stride[1], x * stride[2]),
        stride=stride,
        view=moving,
        seeds=tuple(int(facts["warp_seed"]) for facts in fixed.applied),
    )


def _cells(volumes: Float[Tensor, "B _C _Z _Y _X"], stride: Size) -> Float[Tensor, "B _C _z _y _x"]:
    return volumes if stride == (1, 1, 1) else F.avg_pool3d(volumes, stride)


def _at(mask: Bool[Tensor, "z y x"], displacement: Float[Tensor, "3 z y x"]) -> Bool[Tensor, "z y x"]:
    return warp(mask[None].float(), displacement, "nearest", "zeros")[0] > 0.5
