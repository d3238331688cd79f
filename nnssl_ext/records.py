"""The five records that travel through a pretraining step.

Axes are ``z, y, x``. An affine is a 4x4 matrix acting on homogeneous ``(z, y, x, 1)`` voxel coordinates, where integer
coordinates are voxel centres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

Size = tuple[int, int, int]
"""Lengths in voxels (or tokens) along z, y, x."""


@dataclass(frozen=True)
class Case:
    """One preprocessed case, readable lazily.

    Attributes:
        identifier: nnU-Net's case name.
        folder: the preprocessed configuration folder that holds ``identifier.b2nd``.
        channels: number of image channels.
        shape: voxels along z, y, x.
        spacing: mm along z, y, x.
        modality: what dataset.json says it shows: its entry of ``case_modalities``, else the names of the channels; "" where
            there is no dataset.json.
    """

    identifier: str
    folder: Path
    channels: int
    shape: Size
    spacing: tuple[float, float, float]
    modality: str = ""

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"case {self.identifier}: {self.channels} channel(s), {size} voxels of {self.spacing} mm"


@dataclass(frozen=True)
class Region:
    """One contiguous read from one case.

    Attributes:
        voxels: ``(C, Z, Y, X)``.
        lower: case voxel of the region's first voxel; region -> case is this translation.
        case: where it came from.
        labels: ``(Z, Y, X)`` of the same voxels, 0 = background, where they were asked for.
    """

    voxels: Float[np.ndarray, "C Z Y X"]
    lower: Size
    case: Case
    labels: Int[np.ndarray, "Z Y X"] | None = None

    def __str__(self) -> str:
        size = "x".join(map(str, self.voxels.shape[1:]))
        return f"region {size} at {self.lower} of {self.case.identifier}"


@dataclass(frozen=True)
class View:
    """A batch of equally sized crops, one per case, that know where they lie.

    Attributes:
        voxels: ``(B, C, Z, Y, X)``; voxels outside the case are 0, as nnU-Net pads.
        affine: ``(B, 4, 4)``, view voxel -> case voxel.
        case_shape: ``(B, 3)`` voxels of each case.
        spacing: ``(B, 3)`` mm of each case's voxels.
        cases: ``B`` identifiers.
        mask: ``(B, z, y, x)`` on the mask's grid of cells, True where masked, or None. It stays on the CPU, where the
            number of visible tokens can be read without waiting for the device.
        applied: per sample, the augmentations that were applied and their strengths, and the draw's `facts`.
        labels: ``(B, Z, Y, X)`` of the nearest case voxels, 0 = background or outside; None unless the policy asks for
            them: only weakly supervised methods do.
        clean: ``(B, C, Z, Y, X)``, `voxels` before intensity augmentation, or None where the policy does not ask for it.
    """

    voxels: Float[Tensor, "B C Z Y X"]
    affine: Float[Tensor, "B 4 4"]
    case_shape: Int[Tensor, "B 3"]
    spacing: Float[Tensor, "B 3"]
    cases: tuple[str, ...]
    mask: Bool[Tensor, "B z y x"] | None = None
    applied: tuple[dict[str, float], ...] = ()
    labels: Int[Tensor, "B Z Y X"] | None = None
    clean: Float[Tensor, "B C Z Y X"] | None = None

    @property
    def size(self) -> Size:
        """Voxels along z, y, x."""
        z, y, x = self.voxels.shape[2:]
        return z, y, x

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        masked = "" if self.mask is None else f", {self.mask.float().mean():.0%} masked"
        return f"view of {len(self.cases)} case(s), {size} voxels{masked}"


@dataclass(frozen=True)
class Features:
    """What a backbone says about a batch.

    Attributes:
        levels: feature maps ``(B, C_l, Z_l, Y_l, X_l)``, finest first.
        strides: input voxels per feature voxel along z, y, x, one per level.
        summary: ``(B, C)``, one vector per crop.
    """

    levels: tuple[Float[Tensor, "B _C _Z _Y _X"], ...]
    strides: tuple[Size, ...]
    summary: Float[Tensor, "B S"]

    def __str__(self) -> str:
        maps = ", ".join(f"{m.shape[1]}ch@{s}" for m, s in zip(self.levels, self.strides, strict=True))
        return f"features [{maps}], summary {self.summary.shape[1]}"


@dataclass(frozen=True)
class Step:
    """The outcome of one pretraining step.

    Attributes:
        loss: scalar to minimise.
        terms: named, detached scalars that make up or explain the loss.
        watch: named, detached tensors for monitors. ``"features"`` ``(N, C)``: one vector per crop, from the backbone.
            ``"projector"``, ``"predictor"`` ``(N, D)``: outputs of such heads. ``"prototypes"`` ``(K,)``: mean teacher
            probability of each prototype. ``"tokens"`` ``(N, T, C)``: some crops' feature maps, place by place.
        parts: where several weighted terms add up to the loss, those terms, with gradient: their pull on the shared
            parameters is compared now and then.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Tensor] = field(default_factory=dict)
    watch: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{k} {float(v):.4g}" for k, v in {"loss": self.loss, **self.terms}.items())
