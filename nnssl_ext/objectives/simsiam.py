"""SimSiam's loss (Chen & He, arXiv:2011.10566, Eqs. 1 to 4), on vectors and on matched places of two maps.

With projections z, predictions p and the stop-gradient sg, ``L = D(p1, sg z2) / 2 + D(p2, sg z1) / 2``, where D is the
negative cosine similarity. No negatives, no moving average, no temperature; -1 is perfect agreement, and also collapse.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Vectors = Float[Tensor, "N D"]
Map = Float[Tensor, "B D z y x"]
Places = Float[Tensor, "B z y x 3"]
Valid = Bool[Tensor, "B z y x"]


def negative_cosine(prediction: Float[Tensor, "*n D"], target: Float[Tensor, "*n D"]) -> Float[Tensor, "*n"]:
    """D of each pair of vectors, in [-1, 1], in float32; no gradient reaches `target`."""
    return -F.cosine_similarity(prediction.float(), target.detach().float(), dim=-1)


def simsiam_loss(p1: Vectors, z1: Vectors, p2: Vectors, z2: Vectors) -> Float[Tensor, ""]:
    """The symmetric loss, averaged over N pairs."""
    return (negative_cosine(p1, z2).mean() + negative_cosine(p2, z1).mean()) / 2


def dense_simsiam_loss(
    p1: Map, z1: Map, p2: Map, z2: Map, at2: Places, valid1: Valid, at1: Places, valid2: Valid
) -> Float[Tensor, ""]:
    """The same loss between places that show the same point of the case, where both views show it.

    The mean over a pair's places comes first, then the mean over pairs, so that data-parallel gradients equal those of one
    large batch whatever the overlaps. A pair without a common place contributes 0.

    Args:
        p1, z1, p2, z2: maps of predictions and projections of the two views.
        at2: the place ``(z, y, x)`` in `z2` (linearly interpolated) that shows what each place of view 1 shows.
        valid1: True where view 2 does show it.
        at1, valid2: the same from view 2 to view 1.
    """
    first = _mean_over_places(negative_cosine(p1.movedim(1, -1), look_up(z2, at2)), valid1)
    second = _mean_over_places(negative_cosine(p2.movedim(1, -1), look_up(z1, at1)), valid2)
    return (first + second) / 2


@torch.no_grad()
def look_up(features: Map, places: Float[Tensor, "B Z Y X 3"]) -> Float[Tensor, "B Z Y X D"]:
    """Linear interpolation of a map at places ``(z, y, x)`` in cells; a target, so without gradient."""
    lengths = torch.tensor(features.shape[2:], dtype=places.dtype).to(places.device, non_blocking=True)
    grid = ((2 * places + 1) / lengths - 1).flip(-1)  # grid_sample: x first, -1 and 1 at the outer faces
    found = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return found.movedim(1, -1)


def _mean_over_places(values: Float[Tensor, "B z y x"], valid: Valid) -> Float[Tensor, ""]:
    weight = valid.to(values.dtype)
    return ((values * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1)).mean()
