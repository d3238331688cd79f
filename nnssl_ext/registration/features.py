"""What is compared: MIND, intensities, the features of any checkpoint, of the same network with random weights, or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from nnssl_ext.checkpoints.source import with_local_files
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import sha256_of
from nnssl_ext.records import Size
from nnssl_ext.registration.encoder import Encoder, load_encoder, random_encoder
from nnssl_ext.registration.extraction import LABELS, ExtractionSettings, FeatureMap, extract
from nnssl_ext.registration.frame import AS_LOADED, Turn
from nnssl_ext.registration.mind import isotropic_dilation, mind
from nnssl_ext.registration.projection import COMPONENTS, fuse, joint_pca

Spacing = tuple[float, float, float]
PERCENTILES = (1.0, 99.0)
MIND_RADIUS, MIND_DILATION = 1, 2
"""Voxels; ConvexAdam's for volumes of this kind, and the best on hippocampus (measured, larger radii lose)."""
RANDOM = "random:"


@runtime_checkable
class FeatureSource(Protocol):
    """One way to describe a scan.

    Attributes:
        name: as the user asked for it.
        about: one phrase for reports.
        spacing: mm along z, y, x at which scans must be described, or None for any.
        components: keep that many principal components of a pair, or None for all channels as they are.
        oriented: whether volumes must come in the order of axes in which scans are loaded, as in a network's training.
        notes: what deserves attention, one sentence each.
    """

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def spacing(self) -> Spacing | None: ...
    @property
    def components(self) -> int | None: ...
    @property
    def oriented(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def normalise(
        self, raw: Real[np.ndarray, "Z Y X"], foreground: Bool[np.ndarray, "Z Y X"]
    ) -> Float[np.ndarray, "Z Y X"]:
        """Intensities as `describe` wants them, on the scan's own grid."""
        ...

    def describe(self, volume: Float[Tensor, "Z Y X"], spacing: Spacing) -> FeatureMap:
        """Features of a normalised volume that was brought onto the common grid."""
        ...


@dataclass(frozen=True)
class Mind:
    """MIND-SSC. Its patches lie about 2 of the finest voxels from the voxel, in mm alike along all axes."""

    name: str = "mind"
    spacing: Spacing | None = None
    components: int | None = None
    oriented: bool = False
    notes: tuple[str, ...] = ()

    about: str = f"MIND-SSC, radius {MIND_RADIUS}, dilation {MIND_DILATION}"

    def normalise(
        self, raw: Real[np.ndarray, "Z Y X"], foreground: Bool[np.ndarray, "Z Y X"]
    ) -> Float[np.ndarray, "Z Y X"]:
        """The foreground's percentiles 1 and 99 as 0 and 1; MIND itself does not mind."""
        low, width = _window(raw, foreground)
        return ((raw - low) / width).astype(np.float32)

    def describe(self, volume: Float[Tensor, "Z Y X"], spacing: Spacing) -> FeatureMap:
        return FeatureMap(
            mind(volume, MIND_RADIUS, isotropic_dilation(spacing, MIND_DILATION)), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
        )


@dataclass(frozen=True)
class Intensity:
    """Intensities alone, for scans of one kind: the simplest control."""

    name: str = "intensity"
    about: str = "intensities between the foreground's percentiles 1 and 99"
    spacing: Spacing | None = None
    components: int | None = None
    oriented: bool = False
    notes: tuple[str, ...] = ()

    def normalise(
        self, raw: Real[np.ndarray, "Z Y X"], foreground: Bool[np.ndarray, "Z Y X"]
    ) -> Float[np.ndarray, "Z Y X"]:
        """The foreground's percentiles 1 and 99 as 0 and 1, clipped."""
        low, width = _window(raw, foreground)
        return ((raw - low) / width).clip(0, 1).astype(np.float32)

    def describe(self, volume: Float[Tensor, "Z Y X"], spacing: Spacing) -> FeatureMap:
        return FeatureMap(volume[None], (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Network:
    """Maps of a network.

    Attributes:
        encoder: the network and its preprocessing.
        extraction: level, resolution and tiling.
    """

    name: str
    encoder: Encoder
    extraction: ExtractionSettings = field(default_factory=ExtractionSettings)
    components: int | None = COMPONENTS
    oriented: bool = True

    @property
    def about(self) -> str:
        level = self.extraction.level or "finest coarse encoder level"
        return f"{self.encoder.weights}, {level}"

    @property
    def spacing(self) -> Spacing | None:
        return self.encoder.spacing

    @property
    def notes(self) -> tuple[str, ...]:
        return self.encoder.notes

    def normalise(
        self, raw: Real[np.ndarray, "Z Y X"], foreground: Bool[np.ndarray, "Z Y X"]
    ) -> Float[np.ndarray, "Z Y X"]:
        """As in the network's training; the foreground is not asked for."""
        return self.encoder.normalise(raw)

    def describe(self, volume: Float[Tensor, "Z Y X"], spacing: Spacing) -> FeatureMap:
        """Features on the scan's axes; `spacing` should be the encoder's."""
        axes = self.encoder.axes
        found = extract(self.encoder.backbone, volume.permute(axes)[None], self.extraction, self.encoder.patch_size)
        back = _size(int(place) for place in np.argsort(axes))
        return FeatureMap(
            found.values.permute(0, *(place + 1 for place in back)),
            (found.stride[back[0]], found.stride[back[1]], found.stride[back[2]]),
            (found.offset[back[0]], found.offset[back[1]], found.offset[back[2]]),
        )


def load_features(
    text: str, device: torch.device, extraction: ExtractionSettings | None = None, seed: int = 0
) -> tuple[FeatureSource, ...]:
    """The sources that a user names.

    Args:
        text: ``mind``, ``intensity``, a checkpoint (also ``hf:OWNER/NAME``), ``random:`` and a plans file or a checkpoint of
            ours, or several of these joined by ``+``. A network may be followed by ``@`` and a level of its own, as in
            ``last.pth@decoder0+mind``.
        extraction: how maps are read from networks.
        seed: of random weights.

    Raises:
        NnsslError: a name that is none of these, or a file that holds no network.
    """
    extraction = extraction or ExtractionSettings()
    text = with_local_files(text)
    return tuple(_source(name, device, extraction, seed) for name in parts_of(text))


def parts_of(text: str) -> list[str]:
    """The features that are joined in `text`, which names local files (see `with_local_files`). A + that is part of a file's
    path joins nothing."""
    pieces, parts = text.split("+"), []
    while pieces:
        joined = ["+".join(pieces[: n + 1]).strip() for n in range(len(pieces))]
        count = next((n for n in range(len(pieces), 1, -1) if file_of(joined[n - 1]).is_file()), 1)
        parts.append(joined[count - 1])
        pieces = pieces[count:]
    return parts


def split_level(part: str) -> tuple[str, str]:
    """One of `parts_of` without its level, and the level, "" if it has none. An @ that is part of a file's path begins none."""
    file, at, level = part.rpartition("@")
    if not at or set(level) & set("+/\\") or Path(part.removeprefix(RANDOM)).is_file():
        return part, ""
    return file, level


def file_of(part: str) -> Path:
    """The file that one of `parts_of` is read from, if there is such a file."""
    return Path(split_level(part)[0].removeprefix(RANDOM))


def files_of(text: str) -> list[Path]:
    """Checkpoints and plans that the features in `text` are read from."""
    return [path for path in map(file_of, parts_of(text)) if path.is_file()]


def digests_of(text: str) -> dict[str, str]:
    """SHA-256 of each of these files."""
    return {str(path): sha256_of(path) for path in files_of(text)}


def pair_features(
    sources: Sequence[FeatureSource],
    volumes: Sequence[tuple[Float[np.ndarray, "Z Y X"], Float[np.ndarray, "Z Y X"]]],
    spacing: Spacing,
    fixed_mask: Bool[Tensor, "Z Y X"],
    moving_mask: Bool[Tensor, "Z Y X"],
    weights: Sequence[float] | None = None,
    turn: Turn = AS_LOADED,
) -> tuple[Float[Tensor, "C Z Y X"], Float[Tensor, "C Z Y X"]]:
    """Features of both scans at every voxel of the common grid, ready for `solver.register_features`.

    Args:
        sources: how to describe the scans.
        volumes: per source, the fixed and the moving scan as its `normalise` returned them, brought onto the common grid.
        spacing: mm of the common grid.
        fixed_mask, moving_mask: foreground on the common grid, on the device where the work is to be done: what principal
            components and the scale of several sources are computed from.
        weights: of the sources; equal if None.
        turn: how the common grid's axes were made of those of loaded scans, for sources that are `oriented`.
    """
    blocks = []
    for source, pair in zip(sources, volumes, strict=True):
        turned = turn if source.oriented else AS_LOADED
        masks = [turned.back(mask) for mask in (fixed_mask, moving_mask)]
        sides = [turned.back(torch.from_numpy(volume).to(fixed_mask.device)) for volume in pair]
        maps = [source.describe(volume, turned.lengths_back(spacing)) for volume in sides]
        if source.components is not None:
            maps = list(joint_pca(maps[0], maps[1], masks[0], masks[1], source.components))
        z, y, x = masks[0].shape
        blocks.append((turned.there(maps[0].on_grid((z, y, x))), turned.there(maps[1].on_grid((z, y, x)))))
    return fuse(blocks, weights or [1.0] * len(blocks), fixed_mask, moving_mask)


def working_spacing(sources: Sequence[FeatureSource]) -> Spacing | None:
    """The spacing that all sources agree on, or None if any will do.

    Raises:
        NnsslError: networks that were trained at different spacings.
    """
    wanted = {source.spacing: source.name for source in sources if source.spacing is not None}
    if len(wanted) > 1:
        told = ", ".join(f"{name}: {spacing}" for spacing, name in wanted.items())
        raise NnsslError(f"the networks were trained at different spacings ({told})", "fuse networks of one spacing")
    return next(iter(wanted), None)


def _source(name: str, device: torch.device, extraction: ExtractionSettings, seed: int) -> FeatureSource:
    if name == "mind":
        return Mind()
    if name == "intensity":
        return Intensity()
    file, level = split_level(name)
    if level:
        extraction = replace(extraction, level=level)
    components = None if extraction.level == LABELS else COMPONENTS
    if file.startswith(RANDOM):
        return Network(name, random_encoder(Path(file.removeprefix(RANDOM)), device, seed), extraction, components)
    if not Path(file).is_file():
        raise NnsslError(
            f"no feature '{name}', and no checkpoint of that name",
            "give mind, intensity, a checkpoint, random:PLANS.json, or several joined by +",
        )
    encoder = load_encoder(Path(file), device)
    if extraction.level == LABELS:
        encoder.require_labels()
    elif extraction.level.startswith("decoder"):
        encoder.require_decoder()
    return Network(name, encoder, extraction, components)


def _window(raw: Real[np.ndarray, "Z Y X"], foreground: Bool[np.ndarray, "Z Y X"]) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(raw[foreground], PERCENTILES))
    if high <= low:
        low, high = float(raw.min()), float(raw.max())
    return low, high - low if high > low else 1.0


def _size(lengths: Iterable[int]) -> Size:
    z, y, x = lengths
    return z, y, x
