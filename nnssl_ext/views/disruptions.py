"""Low-level disruptions of a crop (arXiv:2307.16896): noise, loss of resolution, hidden channels; the same for a sample whatever
batch it is in."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.contracts import ViewDraw
from nnssl_ext.records import Case, Size
from nnssl_ext.views.augment import noise
from nnssl_ext.views.filters import SPATIAL, Seeds, Voxels
from nnssl_ext.views.policies import SingleView, SpatialSettings


@dataclass(frozen=True)
class SeededView:
    """A clean crop per case, with seeds of what is to be done to it (facts ``noise_seed`` and ``channels_seed``), and a number
    that is the same for cases of one modality and no others (fact ``modality``).

    Attributes:
        size: voxels along z, y, x.
        spatial: flips, rotation and zoom.
    """

    size: Size
    spatial: SpatialSettings = field(default_factory=SpatialSettings)

    def draw(self, case: Case, rng: np.random.Generator, quantile: float) -> tuple[ViewDraw, ...]:
        (draw,) = SingleView(self.size, spatial=self.spatial).draw(case, rng, quantile)
        seeds = {name: float(rng.integers(2**31)) for name in ("noise_seed", "channels_seed")}
        return (replace(draw, facts={**seeds, "modality": float(zlib.crc32(case.modality.encode()))}),)


def add_noise(voxels: Voxels, std: Float[Tensor, " C"], seeds: Seeds) -> Voxels:
    """A copy with Gaussian noise of these standard deviations, one per channel."""
    drawn = noise(torch.zeros_like(voxels), torch.ones(len(voxels)), seeds)
    return voxels + drawn * std.to(voxels.device, non_blocking=True).view(-1, 1, 1, 1)


def lower_resolution(voxels: Voxels, factors: Size) -> Voxels:
    """Nearest-neighbour sampling, every so many voxels along z, y, x, and back: blocks show their first voxel. Blocks at the far
    ends may be cut off."""
    for axis, factor in zip(SPATIAL, factors, strict=True):
        places = torch.arange(voxels.shape[axis], device=voxels.device)
        voxels = voxels.index_select(axis, places // factor * factor)
    return voxels


def draw_hidden(channels: int, share: float, seeds: Seeds) -> Bool[Tensor, "B C"]:
    """True at ``floor(share * channels)`` random channels of each sample."""
    drawn = [torch.randperm(channels, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn) < int(share * channels)
