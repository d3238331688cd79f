"""Few comparable channels out of many: a joint principal basis for a pair of feature maps, and a common scale for fusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnssl_ext.errors import NnsslError
from nnssl_ext.registration.extraction import FeatureMap

COMPONENTS = 12
"""Convention of DINO-Reg's successors: as many channels as MIND has."""
CHUNK = 65_536  # feature vectors per product, so that no second copy of a large map exists

Pair = tuple[FeatureMap, FeatureMap]


@torch.no_grad()
def joint_pca(
    fixed: FeatureMap,
    moving: FeatureMap,
    fixed_mask: Bool[Tensor, "Z Y X"],
    moving_mask: Bool[Tensor, "Z Y X"],
    components: int = COMPONENTS,
) -> Pair:
    """Both maps in one basis: the strongest principal directions of their foreground features together, centred.

    One scale for all channels: the components keep their own variances. Maps of no more than `components` channels are
    centred only. The signs of the directions are fixed by their largest loading, so results are reproducible.

    Args:
        fixed_mask, moving_mask: foreground of the two volumes, in voxels; where no feature lies in it, all count.
    """
    tables = [_foreground(fixed, fixed_mask), _foreground(moving, moving_mask)]
    count = sum(table.shape[1] for table in tables)
    mean = sum(table.sum(dim=1, dtype=torch.float64) for table in tables) / count
    assert isinstance(mean, Tensor)
    basis = None if len(mean) <= components else _directions(tables, mean, components)
    return _project(fixed, mean, basis), _project(moving, mean, basis)


def fuse(
    blocks: Sequence[tuple[Float[Tensor, "_C Z Y X"], Float[Tensor, "_C Z Y X"]]],
    weights: Sequence[float],
    fixed_mask: Bool[Tensor, "Z Y X"],
    moving_mask: Bool[Tensor, "Z Y X"],
) -> tuple[Float[Tensor, "D Z Y X"], Float[Tensor, "D Z Y X"]]:
    """Several descriptions of a pair as one. A block contributes to the channel mean of squared differences in proportion to
    its weight, whatever its scale and its number of channels.

    Args:
        blocks: features of the fixed and of the moving volume, per description.
        weights: one per block, not negative, not all 0.
        fixed_mask, moving_mask: foreground on which the scale is measured: unrelated places in it differ by 1 on average.

    Raises:
        NnsslError: weights that do not fit the blocks.
    """
    if len(weights) != len(blocks) or min(weights) < 0 or sum(weights) == 0:
        raise NnsslError(
            f"{len(blocks)} features with weights {tuple(weights)}", "give one weight per feature, at least one above 0"
        )
    if len(blocks) == 1:
        return blocks[0]
    channels = sum(len(fixed) for fixed, _ in blocks)
    fused: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (fixed, moving), weight in zip(blocks, weights, strict=True):
        if not weight:
            continue
        share = weight / sum(weights) * channels / len(fixed)
        factor = math.sqrt(share / max(unrelated_difference(fixed, moving, fixed_mask, moving_mask), 1e-12))
        fused[0].append(fixed * factor)
        fused[1].append(moving * factor)
    return torch.cat(fused[0]), torch.cat(fused[1])


def unrelated_difference(
    fixed: Float[Tensor, "C Z Y X"],
    moving: Float[Tensor, "C Z Y X"],
    fixed_mask: Bool[Tensor, "Z Y X"] | None,
    moving_mask: Bool[Tensor, "Z Y X"] | None,
) -> float:
    """Mean over channels of the squared difference between a random foreground place of one volume and one of the other."""
    apart = []
    for here, there in zip(fixed, moving, strict=True):  # channel by channel: picking voxels copies
        a = here if fixed_mask is None else here[fixed_mask]
        b = there if moving_mask is None else there[moving_mask]
        apart.append((a.mean() - b.mean()).square() + a.var(unbiased=False) + b.var(unbiased=False))
    return float(torch.stack(apart).mean())


def _foreground(features: FeatureMap, mask: Bool[Tensor, "Z Y X"]) -> Float[Tensor, "C N"]:
    chosen = features.pick(mask.to(features.values.device))
    return features.values[:, chosen] if chosen.any() else features.values.flatten(1)


def _directions(tables: Sequence[Tensor], mean: Float[Tensor, " C"], components: int) -> Float[Tensor, "C K"]:
    covariance = mean.new_zeros((len(mean), len(mean)))
    for table in tables:
        for start in range(0, table.shape[1], CHUNK):
            centred = table[:, start : start + CHUNK].double() - mean[:, None]
            covariance += centred @ centred.T
    _, vectors = torch.linalg.eigh(covariance)
    vectors = vectors[:, -components:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()


def _project(features: FeatureMap, mean: Float[Tensor, " C"], basis: Tensor | None) -> FeatureMap:
    values = features.values - mean.to(features.values.dtype)[:, None, None, None]
    if basis is not None:
        values = torch.einsum("ck,czyx->kzyx", basis.to(values.dtype), values)
    return replace(features, values=values)
