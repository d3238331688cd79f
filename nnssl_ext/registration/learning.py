"""What features are trained with: pairs of maps with the displacement between them, known or found, and losses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnssl_ext.objectives.correspondence import displacement_error, overlap_loss, place_contrast
from nnssl_ext.records import Size
from nnssl_ext.registration.convex import REFERENCE_CHANNELS, coupled_convex
from nnssl_ext.registration.pooling import cells_to_voxels, pool, voxels_per_cell
from nnssl_ext.registration.projection import fuse
from nnssl_ext.registration.solver import MIND_DIFFERENCE, SolverSettings, register_features
from nnssl_ext.registration.warp import warp

NEIGHBOURS = 1.5
"""Cells of a map within which places are no negatives of each other: their features come from the same voxels."""

LAYER_COUPLINGS = (0.003, 0.03, 0.3)
"""CoRe's passes (arXiv:2603.23694). At its temperature a coupling of 1, the solver's last, would leave no gradient: a cell
would follow its neighbours by e^20 to 1 whatever its own costs."""

Map = Float[Tensor, "_C z y x"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class MapPair:
    """Feature maps of two scans on grids of equal shape, and where places of the fixed one lie in the moving one.

    Attributes:
        fixed, moving: ``(C, z, y, x)``.
        target: ``(3, z, y, x)`` displacement in cells of the maps.
        valid: ``(z, y, x)`` where it can be trusted.
        distinct: ``(z, y, x)`` places that differ from what is around them; a part of the valid ones.
        spacing: mm of a cell, z, y, x.
        seed: decides at which places the maps are compared.
        labels: ``(K, z, y, x)`` shares of labels in the two scans, or None.
    """

    fixed: Map
    moving: Map
    target: Float[Tensor, "3 z y x"]
    valid: Bool[Tensor, "z y x"]
    distinct: Bool[Tensor, "z y x"]
    spacing: Triple
    seed: int = 0
    labels: tuple[Map, Map] | None = None


@dataclass(frozen=True)
class LayerSettings:
    """The coupled convex layer that features are trained through.

    Attributes:
        cell: edge of its cells in voxels of the image, the same in mm along all axes; 4 is the solver's.
        search: cells to either side; costs grow with its third power. CoRe: 2 cells of 8 voxels.
        temperature: of the soft choice; 20 in CoRe (arXiv:2603.23694).
    """

    cell: float = 4.0
    search: int = 3
    temperature: float = 20.0


def comparable(pair: MapPair) -> MapPair:
    """The pair centred, and scaled as `solver.register_features` scales features: unrelated places differ by
    `MIND_DIFFERENCE`. Gradients see the scale, so that a loss cannot be lowered by it."""
    seen = pair.valid.flatten()
    count = seen.sum().clamp(min=1)
    tables = [(side.flatten(1), (side.flatten(1) * seen).sum(1) / count) for side in (pair.fixed, pair.moving)]
    spread = sum(
        (((values - mean[:, None]) * seen).square().sum(1) / count for values, mean in tables), torch.zeros(())
    )
    apart = spread + (tables[0][1] - tables[1][1]).square()
    scale = (MIND_DIFFERENCE / (REFERENCE_CHANNELS * apart.mean()).clamp(min=1e-12)).sqrt()
    middle = ((tables[0][1] + tables[1][1]) / 2)[:, None, None, None]
    return replace(pair, fixed=(pair.fixed - middle) * scale, moving=(pair.moving - middle) * scale)


def layer_displacement(
    pair: MapPair, voxel_mm: float, settings: LayerSettings
) -> tuple[Float[Tensor, "3 _z _y _x"], Float[Tensor, "3 _z _y _x"], Float[Tensor, "_z _y _x"], Size]:
    """What the layer finds on a `comparable` pair, and what it should find, in its cells.

    Args:
        voxel_mm: edge of an image voxel (geometric mean).

    Returns:
        Found and true displacement; how much each cell counts, 0 where the truth is out of reach; the map's cells per cell.
    """
    pooling = voxels_per_cell(_shape(pair.fixed), pair.spacing, settings.cell * voxel_mm)
    fixed, moving = (pool(side, pooling)[0] for side in (pair.fixed, pair.moving))
    true, weight = pool(pair.target, pooling, pair.valid)
    assert weight is not None
    true = true / true.new_tensor(pooling).view(3, 1, 1, 1)
    z, y, x = (min(settings.search, length - 1) for length in fixed.shape[1:])
    cell_mm = [factor * size for factor, size in zip(pooling, pair.spacing, strict=True)]
    found = coupled_convex(
        fixed,
        moving,
        (z, y, x),
        fixed_weight=weight,
        cell_mm=cell_mm,
        couplings=LAYER_COUPLINGS,
        temperature=settings.temperature,
    )
    reach = true.new_tensor((z, y, x)).view(3, 1, 1, 1)
    return found, true, weight * (true.abs() <= reach).all(dim=0), pooling


def layer_losses(pair: MapPair, voxel_mm: float, settings: LayerSettings) -> dict[str, Float[Tensor, ""]]:
    """``error``: how far the layer's field is from the target, in mm. ``overlap``, of a pair with labels: `overlap_loss` of the
    fixed ones and the moving ones warped by the layer's field."""
    found, true, weight, pooling = layer_displacement(pair, voxel_mm, settings)
    mm = found.new_tensor([factor * size for factor, size in zip(pooling, pair.spacing, strict=True)]).view(3, 1, 1, 1)
    losses = {"error": displacement_error(found * mm, true * mm, weight)}
    if pair.labels is not None:
        field = cells_to_voxels(found, pooling, _shape(pair.fixed))
        losses["overlap"] = overlap_loss(pair.labels[0], warp(pair.labels[1], field), pair.valid.float())
    return losses


def contrast(pair: MapPair, places: int, temperature: float) -> Float[Tensor, ""]:
    """`place_contrast` of a `comparable` pair at places drawn from its distinct cells.

    Args:
        places: how many; fewer where there are not that many.
        temperature: in units of the channel mean of squared differences.
    """
    z, y, x = pair.distinct.shape
    generator = torch.Generator().manual_seed(pair.seed)
    # Four candidates per place: the first distinct ones of them are taken.
    drawn = torch.randperm(z * y * x, generator=generator)[: 4 * places].to(pair.distinct.device)
    there = pair.distinct.flatten()[drawn]
    chosen = drawn[(~there).to(torch.uint8).argsort(stable=True)[:places]]
    starts = torch.stack((chosen // (y * x), chosen // x % y, chosen % x), dim=1).float()
    ends = starts + pair.target.flatten(1)[:, chosen].T
    queries = pair.fixed.flatten(1)[:, chosen].T
    valid = pair.distinct.flatten()[chosen]
    return place_contrast(queries, values_at(pair.moving, ends), ends, valid, temperature, NEIGHBOURS)


def values_at(volume: Map, places: Float[Tensor, "N 3"]) -> Float[Tensor, "N C"]:
    """Linear interpolation at places given in cells of the map; the outermost ones are repeated."""
    lengths = places.new_tensor(volume.shape[1:])
    grid = ((2 * places + 1) / lengths - 1).flip(-1).to(volume.dtype)
    sampled = F.grid_sample(volume[None], grid[None, :, None, None], padding_mode="border", align_corners=False)
    return sampled[0, :, :, 0, 0].T


def find_correspondence(
    guides: Sequence[tuple[Map, Map]],
    weights: Sequence[float],
    seen: tuple[Bool[Tensor, "z y x"], Bool[Tensor, "z y x"]],
    spacing: Triple,
    settings: SolverSettings,
) -> tuple[Float[Tensor, "3 z y x"], Float[Tensor, "3 z y x"]]:
    """Displacements, in cells and without gradient, between two scans and back, from registering several descriptions of them
    together.

    Args:
        guides: per description, the fixed and the moving map.
        weights: of the descriptions, see `fuse`.
        seen: cells of both maps that show something.
    """
    clean = [
        (torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in guides
    ]  # a step with NaN is skipped later, by its loss
    fixed, moving = fuse(clean, weights, *seen)
    with torch.enable_grad():  # for the solver's own optimisation
        field = register_features(fixed, moving, spacing, settings, *seen)
    return field.displacement_voxels, field.inverse().displacement_voxels


def textured(image: Float[Tensor, "C Z Y X"]) -> Bool[Tensor, "Z Y X"]:
    """Voxels around which the image varies: the standard deviation over 5 voxels along each axis (3 or 1 where there are fewer
    than 5) exceeds 0.05 of that of the whole image (our choice). Not air, not padding."""
    window = [max(n for n in (1, 3, 5) if n <= length) for length in image.shape[1:]]
    half = [n // 2 for n in window]
    mean, square = (F.avg_pool3d(v[None], window, 1, half, count_include_pad=False)[0] for v in (image, image.square()))
    whole = image.flatten(1).var(1)[:, None, None, None]
    return ((square - mean.square()) > 0.05**2 * whole).any(dim=0)


def _shape(volume: Tensor) -> Size:
    return cast(Size, tuple(volume.shape[1:]))
