"""What teaches the heads: some voxels of the training cases, drawn by class, with their features and what each counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.monitors.probe import class_weights
from nnssl_ext.probing.settings import ProbeSettings
from nnssl_ext.records import Region
from nnssl_ext.registration.extraction import FeatureMap

COARSE = 64
"""Voxels per cell from which on a map is transformed as a whole: 64 channels of it take no more than the volume."""

Transform = Callable[[Float[Tensor, "*N _C"]], Float[Tensor, "*N _D"]]
"""An affine function of single feature vectors, so that it may stand before or after an interpolation."""


@runtime_checkable
class Level(Protocol):
    """Features that are looked up at voxels: a `FeatureMap`, or what makes them when asked."""

    def at(self, points: Int[Tensor, "N 3"], mode: Literal["linear", "nearest"] = "linear") -> Float[Tensor, "N C"]:
        """The features at some voxels z, y, x of the volume."""
        ...


Pyramid = Sequence[Level]
Describe = Callable[[Float[Tensor, "C Z Y X"]], Pyramid]
"""The features of one volume, finest level first."""


@dataclass(frozen=True)
class Transformed:
    """A level whose features are transformed voxel by voxel, when they are asked for."""

    level: Level
    transform: Transform

    def at(self, points: Int[Tensor, "N 3"], mode: Literal["linear", "nearest"] = "linear") -> Float[Tensor, "N D"]:
        """The transformed features at some voxels."""
        return self.transform(self.level.at(points, mode))


def transformed(level: Level, transform: Transform) -> Level:
    """A level after an affine transform: where a map's cells hold `COARSE` voxels or more that is done here, once per cell,
    otherwise once per voxel that is asked for, so that no second map as fine as the volume is held.
    """
    if isinstance(level, FeatureMap) and math.prod(level.stride) >= COARSE:
        return replace(level, values=transform(level.values.movedim(0, -1)).movedim(-1, 0).contiguous())
    return Transformed(level, transform)


@dataclass(frozen=True)
class Table:
    """Taught voxels.

    Attributes:
        rows: per level, ``(N, C_l)`` standardised features.
        labels: ``(N,)``.
        population: ``(K,)`` voxels per class in all training cases.
        mean, std: per level, ``(C_l,)`` of the features before they were standardised.
    """

    rows: tuple[Float[Tensor, "N _C"], ...]
    labels: Int[Tensor, " N"]
    population: Int[Tensor, " K"]
    mean: tuple[Float[Tensor, " _C"], ...]
    std: tuple[Float[Tensor, " _C"], ...]

    @property
    def importance(self) -> Float[Tensor, " K"]:
        """What a voxel of each class counts in a loss or vote: as if drawn evenly, and then as in the online probe."""
        return class_weights(self.labels, self.population)

    @property
    def represents(self) -> Float[Tensor, " K"]:
        """How many voxels of the cases one of each class stands for; 0 for a class that does not occur."""
        drawn = self.labels.bincount(minlength=len(self.population))
        return torch.where(drawn > 0, self.population / drawn.clamp(min=1), 0.0)

    def standardise(self, pyramid: Pyramid) -> list[Level]:
        """A volume's features on the scale of the rows."""
        return [
            transformed(level, partial(_scaled, mean=mean, std=std))
            for level, mean, std in zip(pyramid, self.mean, self.std, strict=True)
        ]

    def part(self, count: int, seed: int) -> Table:
        """Some of the voxels."""
        if count >= len(self.labels):
            return self
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(self.labels))[:count]).to(
            self.labels.device
        )
        return replace(self, rows=tuple(row[chosen] for row in self.rows), labels=self.labels[chosen])


def build_table(
    regions: Iterable[Region],
    count: int,
    classes: int,
    ignore: int | None,
    describe: Describe,
    settings: ProbeSettings,
    seed: int,
    device: torch.device,
) -> Table:
    """Draw voxels of whole labelled cases and look up their features.

    Args:
        regions: the training cases, each read when its turn comes.
        count: how many there are.
        classes: label values, background included.
        ignore: label of voxels that do not count.
        seed: of the draw, which does not depend on the features.

    Raises:
        NnsslError: the cases hold one class only, or a label that is not listed.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[Tensor]] = []
    labels: list[np.ndarray] = []
    population = np.zeros(classes, np.int64)
    for region in regions:
        assert region.labels is not None
        points, values = draw_voxels(region.labels, max(classes, settings.voxels // count), ignore, rng)
        counts = np.bincount(region.labels[region.labels != ignore].ravel(), minlength=classes)
        if len(counts) > classes:
            raise NnsslError(
                f"case {region.case.identifier} has label {len(counts) - 1}, which dataset.json does not list",
                "correct the labels or dataset.json, and preprocess again",
            )
        population += counts
        places = torch.from_numpy(points).to(device)
        pyramid = describe(torch.from_numpy(region.voxels).to(device))
        rows.append([level.at(places, settings.interpolation) for level in pyramid])
        labels.append(values)
    if (population > 0).sum() < 2:
        raise NnsslError(
            f"the {count} training case(s) hold only label {int(population.argmax())}",
            "nothing can be told apart; raise --train or choose another --seed",
        )
    levels = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    mean, std = tuple(row.mean(dim=0) for row in levels), tuple(row.std(dim=0).clamp(min=1e-6) for row in levels)
    return Table(
        rows=tuple(_scaled(row, m, s) for row, m, s in zip(levels, mean, std, strict=True)),
        labels=torch.from_numpy(np.concatenate(labels)).to(device),
        population=torch.from_numpy(population).to(device),
        mean=mean,
        std=std,
    )


def draw_voxels(
    labels: Int[np.ndarray, "Z Y X"], count: int, ignore: int | None, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "N 3"], Int[np.ndarray, " N"]]:
    """Voxels z, y, x of one case and their labels: half of them background, the others shared evenly by the classes that occur;
    fewer where a class has fewer voxels.
    """
    present = [int(value) for value in np.unique(labels) if value != ignore]
    foreground = [value for value in present if value > 0]
    points = []
    for value in present:
        wanted = count // 2 if value == 0 else -(-count // (2 * len(foreground)))
        places = np.flatnonzero(labels == value)
        points.append(places[rng.permutation(len(places))[:wanted]])
    chosen = np.unravel_index(np.concatenate(points) if points else np.zeros(0, np.int64), labels.shape)
    return np.stack(chosen, axis=1), labels[chosen].astype(np.int64)


def _scaled(row: Float[Tensor, "*N C"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]) -> Float[Tensor, "*N C"]:
    return (row - mean) / std
