"""Pairs of crops of one case whose intersection over union lies in an interval.

From an AGH thesis of 2023 (code: dittohed/exploring-ssl-for-ct): the overlap of the two views decides how well SimSiam
pretrains; best between 0.3 and 0.6. Its sampler: draw a first crop; draw up to `r1` second crops until the IoU
fits; else draw a new first crop, up to `r2` times; else take the last pair (a fallback).

In 3D few second crops fit by chance (4 % for [0.3, 0.6], 0.3 % for [0.6, 1]), so that fallbacks become common. The exact
sampler draws from the very distribution of the accepted pairs without trying: it counts, for a first crop, the second
crops that fit (share p of all), keeps the first crop with probability 1 - (1 - p)^r1, and picks among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Case, Size
from nnssl_ext.views.policies import IntensitySettings, Range, SpatialSettings, draw_intensity, draw_pose

Corner = Int[np.ndarray, " 3"]
"""First case voxel of a crop along z, y, x."""


@dataclass(frozen=True)
class IoUPairs:
    """Two crops per pair, with their IoU in an interval; views in the order first, second, first, second, ...

    The crops lie inside the case on each axis where they fit, else around its middle on that axis, padded with zeros. The
    IoU is that of the crops as drawn, recorded as ``applied["iou"]``; flips and quarter turns keep it, rotation and zoom
    then act about the crops' centres. ``applied["iou_fallback"]`` is 1 for a pair that missed the interval, else 0.

    Attributes:
        size: voxels along z, y, x.
        iou: smallest and largest IoU, both allowed.
        mode: "exact", or "rejection": the published algorithm with its fallbacks.
        restrict: draw second crops only where they touch the first, where the interval excludes 0 (published code); else
            anywhere in the case (published text).
        r1, r2: tries, see the module's head. 30 and 4: the thesis.
        pairs: per case; more suit batch statistics when few cases fit in memory.
        spatial, intensity: drawn for each crop by itself.
    """

    size: Size
    iou: Range = (0.3, 0.6)
    mode: Literal["exact", "rejection"] = "exact"
    restrict: bool = True
    r1: int = 30
    r2: int = 4
    pairs: int = 1
    spatial: SpatialSettings = field(default_factory=SpatialSettings)
    intensity: IntensitySettings | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.iou[0] <= self.iou[1] <= 1:
            raise NnsslError(f"IoU interval {self.iou}", "give a smallest and a largest IoU between 0 and 1")

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        problem = PairProblem(case.shape, self.size, self.iou, self.restrict)
        if not problem.solvable:
            low, high = reachable_iou(case.shape, self.size)
            raise NnsslError(
                f"case {case.identifier} of {case.shape} voxels has no two crops of {self.size} voxels with an IoU in "
                f"[{self.iou[0]}, {self.iou[1]}]; it reaches {low:.3f} to {high:.3f}",
                "choose an interval within reach, smaller crops, or leave this case out",
            )
        views = []
        for _ in range(self.pairs):
            if self.mode == "exact":
                first, second = draw_exact(problem, self.r1, rng)
                fallback = False
            else:
                first, second, fallback = draw_by_rejection(problem, self.r1, self.r2, rng)
            facts = {"iou": problem.iou_of(first, second), "iou_fallback": float(fallback)}
            for corner in (first, second):
                pose = draw_pose(case, self.size, self.spatial, rng)
                affine = pose.affine(case, self.size, corner + (np.asarray(self.size) - 1) / 2)
                intensity = {} if self.intensity is None else draw_intensity(self.intensity, rng)
                views.append(ViewDraw(self.size, affine, intensity, facts=facts))
        return tuple(views)


def reachable_iou(shape: Size, size: Size) -> tuple[float, float]:
    """The smallest and largest IoU of two crops of this size in a case of this shape, both in voxels."""
    room = np.maximum(np.asarray(shape) - size, 0)
    shared = np.maximum(np.asarray(size) - room, 0).prod()
    return float(shared / (2 * math.prod(size) - shared)), 1.0


@dataclass(frozen=True)
class PairProblem:
    """Which pairs of crops of a case are wanted.

    Attributes:
        shape, size: voxels of the case and of the crops.
        iou: the wanted interval.
        restrict: second crops must touch the first, unless the interval includes 0.
    """

    shape: Size
    size: Size
    iou: Range
    restrict: bool = True

    @property
    def solvable(self) -> bool:
        """True if some pair has an IoU in the interval."""
        return _solvable(self)

    @property
    def shared(self) -> tuple[int, int]:
        """Fewest and most voxels that a wanted pair has in common: IoU = k / (2V - k) for crops of V voxels."""
        volume = math.prod(self.size)
        low, high = (2 * volume * bound / (1 + bound) for bound in self.iou)
        return math.ceil(low - 1e-6), math.floor(high + 1e-6)  # a bound met exactly counts in spite of rounding

    @property
    def ends(self) -> tuple[Corner, Corner]:
        """First and last corner of crops inside the case; equal on axes where they do not fit, around the middle."""
        room = np.asarray(self.shape) - self.size
        return np.where(room < 0, room // 2, 0), np.where(room < 0, room // 2, room)

    def second_ends(self, first: Corner) -> tuple[Corner, Corner]:
        """The same of second crops, for this first crop."""
        low, high = self.ends
        if not self.restrict or self.iou[0] == 0:
            return low, high
        return np.maximum(low, first - self.size), np.minimum(high, first + self.size)

    def voxels_shared(self, first: Corner, second: Int[np.ndarray, "*n 3"]) -> Int[np.ndarray, "*n"]:
        """Voxels that crops at these corners have in common."""
        return np.maximum(np.asarray(self.size) - np.abs(second - first), 0).prod(-1)

    def iou_of(self, first: Corner, second: Corner) -> float:
        """Intersection over union of two crops."""
        shared = int(self.voxels_shared(first, second[None])[0])
        return shared / (2 * math.prod(self.size) - shared)


def draw_by_rejection(problem: PairProblem, r1: int, r2: int, rng: np.random.Generator) -> tuple[Corner, Corner, bool]:
    """Corners of a pair by the thesis's algorithm, and whether it is a fallback outside the interval."""
    fewest, most = problem.shared
    low, high = problem.ends
    for _ in range(r2):
        first = rng.integers(low, high + 1)
        tried = rng.integers(*_inclusive(problem.second_ends(first)), size=(r1, 3))
        shared = problem.voxels_shared(first, tried)
        fitting = np.flatnonzero((shared >= fewest) & (shared <= most))
        if len(fitting):
            return first, tried[fitting[0]], False
    return first, tried[-1], True


def draw_exact(problem: PairProblem, r1: int, rng: np.random.Generator) -> tuple[Corner, Corner]:
    """Corners of a pair, distributed as the pairs that the thesis's algorithm accepts; `problem` must be solvable."""
    low, high = problem.ends
    while True:
        first = rng.integers(low, high + 1)
        partners = Partners(problem, first)
        if rng.random() < 1 - (1 - partners.share) ** r1:
            return first, partners.draw(rng)


class Partners:
    """All second crops that a first crop may be paired with, counted without listing them.

    Along each axis the second crops that share k voxels with the first are counted, k = 0 ... length. Two crops share the
    product of three such k, so for every pair of k along z and y the k along x that fit form an interval.
    """

    def __init__(self, problem: PairProblem, first: Corner) -> None:
        self.low, high = problem.second_ends(first)
        self.shared = [
            np.maximum(length - np.abs(np.arange(low, high + 1) - corner), 0)
            for length, low, high, corner in zip(problem.size, self.low, high, first, strict=True)
        ]
        z, y, x = (np.bincount(k, minlength=length + 1) for k, length in zip(self.shared, problem.size, strict=True))
        self.least, self.most = _fitting_along_x(problem.size, problem.shared)
        fewer = np.concatenate([[0], np.cumsum(x)])  # fewer[k]: places along x that share fewer than k voxels
        self.counts = np.multiply.outer(z, y) * (fewer[self.most + 1] - fewer[self.least])

    @property
    def share(self) -> float:
        """Share of the second crops that fit."""
        return float(self.counts.sum()) / math.prod(map(len, self.shared))

    def draw(self, rng: np.random.Generator) -> Corner:
        """One of the fitting second crops, all equally likely."""
        cumulative = np.cumsum(self.counts)
        cell = int(np.searchsorted(cumulative, rng.integers(cumulative[-1]), side="right"))
        z, y = np.unravel_index(cell, self.counts.shape)
        along_z, along_y, along_x = self.shared
        fitting = (along_z == z, along_y == y, (along_x >= self.least[z, y]) & (along_x <= self.most[z, y]))
        return self.low + [rng.choice(np.flatnonzero(places)) for places in fitting]


Lengths = Int[np.ndarray, "z y"]


@lru_cache(maxsize=16)
def _fitting_along_x(size: Size, shared: tuple[int, int]) -> tuple[Lengths, Lengths]:
    """The fewest and most voxels that must be shared along x, given those along z and y; most = fewest - 1 for none."""
    fewest, most = shared
    z, y, x = size
    plane = np.multiply.outer(np.arange(z + 1), np.arange(y + 1))
    apart = plane == 0
    plane[apart] = 1
    least = np.where(apart, 0, -(-fewest // plane))
    largest = np.where(apart, x if fewest <= 0 else -1, np.minimum(most // plane, x))
    return np.minimum(least, largest + 1), largest


@lru_cache(maxsize=4096)
def _solvable(problem: PairProblem) -> bool:
    # A crop in the corner has partners at every distance that any crop has.
    return Partners(problem, problem.ends[0]).share > 0


def _inclusive(ends: tuple[Corner, Corner]) -> tuple[Corner, Corner]:
    return ends[0], ends[1] + 1
