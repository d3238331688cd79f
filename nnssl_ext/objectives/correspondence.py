"""Losses between places that should correspond."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def place_contrast(
    queries: Float[Tensor, "N C"],
    keys: Float[Tensor, "N C"],
    ends: Float[Tensor, "N 3"],
    valid: Bool[Tensor, " N"],
    temperature: float,
    exclusion: float = 0.0,
) -> Float[Tensor, ""]:
    """InfoNCE (van den Oord et al., arXiv:1807.03748) over places of one pair of scans: query ``n`` should be nearer to key
    ``n`` than to the keys of all other places.

    Similarity is the negative squared distance, mean over channels, over `temperature`: registration too compares features by
    squared differences, so that nothing but the maps themselves, no head, is trained.

    Args:
        queries, keys: features at corresponding places.
        ends: where the keys lie, in cells of their map.
        valid: places that count, as queries and as keys.
        exclusion: keys nearer than so many cells to the right one, along every axis, are no negatives.

    Returns:
        Mean over valid queries, ``ln(number of valid keys)`` for features that are all equal; 0 without a valid place.
    """
    channels = queries.shape[1]
    squares = queries.square().sum(1)[:, None] + keys.square().sum(1)
    logits = (2 * queries @ keys.T - squares) / (channels * temperature)
    itself = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    near = torch.cdist(ends, ends, p=torch.inf) < exclusion
    logits = logits.masked_fill((near | ~valid) & ~itself, -torch.inf)
    losses = F.cross_entropy(logits, torch.arange(len(queries), device=queries.device), reduction="none")
    return torch.where(valid, losses, 0).sum() / valid.sum().clamp(min=1)


def displacement_error(
    found: Float[Tensor, "3 Z Y X"], true: Float[Tensor, "3 Z Y X"], weight: Float[Tensor, "Z Y X"]
) -> Float[Tensor, ""]:
    """Mean Euclidean distance between two fields, weighted; 0 where nothing has weight. Smooth at 0 (Charbonnier, 1e-3)."""
    distance = ((found - true).square().sum(0) + 1e-6).sqrt()
    return (distance * weight).sum() / weight.sum().clamp(min=1e-6)


def overlap_loss(
    fixed: Float[Tensor, "K Z Y X"], warped: Float[Tensor, "K Z Y X"], weight: Float[Tensor, "Z Y X"]
) -> Float[Tensor, ""]:
    """One minus the mean soft Dice over the labels that `fixed` or `warped` holds; 0 where they hold none.

    Args:
        fixed, warped: shares of voxels that belong to each label, without background.
        weight: how much each voxel counts.
    """
    both = 2 * (fixed * warped * weight).flatten(1).sum(1)
    total = ((fixed + warped) * weight).flatten(1).sum(1)
    there = total > 0
    return torch.where(there, 1 - both / total.clamp(min=1e-6), 0).sum() / there.sum().clamp(min=1)
