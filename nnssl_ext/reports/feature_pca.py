"""Feature maps as colours: their first three principal components as red, green and blue, as DINOv2 shows them
(Oquab et al., arXiv:2304.07193, Fig. 1). Tissue of one kind should have one colour wherever it lies; colours that only
follow the place in the crop, or one colour everywhere, show a spatial collapse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from nnssl_ext.contracts import Backbone
from nnssl_ext.records import Size, View

WINDOW = (0.02, 0.98)
"""Quantiles of a component shown as no and full colour."""


@torch.no_grad()
def pca_rgb(
    maps: Sequence[Float[Tensor, "_B C _z _y _x"]], sizes: Sequence[Size]
) -> tuple[UInt8[Tensor, "_B 3 _Z _Y _X"], ...]:
    """Colour volumes of feature maps, for `Method.pictures`: ``draw_planes`` shows uint8 volumes of three channels in
    colour (so annotate ``pictures`` with ``Shaped``, not ``Float``).

    One basis and one window serve all maps, so that a colour means the same in all of them.

    Args:
        maps: e.g. ``[features.levels[-1]]`` of one or several views, with equal channels.
        sizes: voxels z, y, x to which each map is enlarged (nearest neighbour), usually those of its view.
    """
    tables = [m.float().movedim(1, -1).flatten(0, -2) for m in maps]
    mean = torch.cat(tables).mean(dim=0)
    basis = _components(torch.cat(tables) - mean)
    scores = [(table - mean) @ basis for table in tables]
    # at most a million places decide on the window: quantile refuses more than 2 ** 24 values
    sample = torch.cat(scores)[:: max(1, sum(map(len, scores)) // 2**20)]
    low, high = sample.quantile(torch.tensor(WINDOW, device=sample.device), dim=0)
    width = (high - low).clamp(min=1e-6 * max(1.0, float(mean.norm())))  # constant features: black, not noise
    volumes = []
    for m, score, size in zip(maps, scores, sizes, strict=True):
        share = ((score - low) / width).clamp(0, 1)
        share = share.unflatten(0, (m.shape[0], *m.shape[2:])).movedim(-1, 1)
        volumes.append((255 * functional.interpolate(share, size=size, mode="nearest")).round().to(torch.uint8))
    return tuple(volumes)


@torch.no_grad()
def feature_pictures(
    backbone: Backbone, views: Sequence[View], level: int = -1
) -> dict[str, Shaped[Tensor, "_B _C _Z _Y _X"]]:
    """Views, each followed by one of its feature maps as colours that mean the same in all views."""
    maps = [backbone.forward_features(view.voxels).levels[level] for view in views]
    colours = pca_rgb(maps, [view.size for view in views])
    named = [
        ((f"crop {number}", view.voxels), (f"features {number}", colour))
        for number, (view, colour) in enumerate(zip(views, colours, strict=True), start=1)
    ]
    return dict(item for pair in named for item in pair)


def _components(centred: Float[Tensor, "N C"]) -> Float[Tensor, "C 3"]:
    """The first three principal directions, strongest first; zeros where there are fewer channels.

    Their signs are fixed by the largest loading, so that colours do not swap without reason.
    """
    _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    vectors = vectors[:, -3:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return functional.pad(vectors * largest.sign(), (0, 3 - vectors.shape[1]))
