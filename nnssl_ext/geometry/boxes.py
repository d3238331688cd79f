"""Axis-aligned boxes of voxels, half-open: `lower` is inside, `upper` is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nnssl_ext.records import Size


@dataclass(frozen=True)
class Box:
    """Voxels ``lower <= (z, y, x) < upper``; empty where an upper bound does not exceed the lower one."""

    lower: Size
    upper: Size

    @property
    def shape(self) -> Size:
        z, y, x = (max(0, b - a) for a, b in zip(self.lower, self.upper, strict=True))
        return z, y, x

    @property
    def volume(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)


def intersection(a: Box, b: Box) -> Box:
    """The voxels in both boxes; empty (volume 0) where they only touch or lie apart."""
    return Box(_each(max, a.lower, b.lower), _each(min, a.upper, b.upper))


def hull(a: Box, b: Box) -> Box:
    """The smallest box that holds both."""
    return Box(_each(min, a.lower, b.lower), _each(max, a.upper, b.upper))


def iou(a: Box, b: Box) -> float:
    """Intersection over union in voxels, in [0, 1]; 0 for two empty boxes."""
    shared = intersection(a, b).volume
    union = a.volume + b.volume - shared
    return shared / union if union else 0.0


def clip(box: Box, shape: Size) -> Box:
    """The part of `box` inside a volume, and at least one voxel of the volume even if the box lies outside."""
    lower = _each(lambda bound, length: min(max(bound, 0), length - 1), box.lower, shape)
    upper = _each(min, box.upper, shape)
    return Box(lower, _each(lambda below, above: max(below + 1, above), lower, upper))


def _each(function: Callable[[int, int], int], a: Size, b: Size) -> Size:
    z, y, x = (int(function(i, j)) for i, j in zip(a, b, strict=True))
    return z, y, x
