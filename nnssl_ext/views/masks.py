"""Masks on a grid of cells: tokens for token backbones, small cubes of voxels for convolutional ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size

ATTEMPTS = 10
"""Blocks tried in a row before a mask is completed with single cells; as in DINOv2."""


@dataclass(frozen=True)
class MaskSettings:
    """How much of a view to hide, and in what pieces.

    Attributes:
        cell: voxels per cell of the mask grid; the token size for token backbones. Must divide the view.
        ratio: share of cells to hide; every view hides exactly ``int(ratio * cells)``. 0.75: He et al. 2022, Fig. 5.
        block: voxels hidden together, a multiple of `cell`; None hides single cells. nnssl's convolutional MAE hides
            blocks of 16 x 16 x 16.
    """

    cell: Size
    ratio: float = 0.75
    block: Size | None = None


@dataclass(frozen=True)
class TokenMaskSettings:
    """Masks of varied extent on some of a case's views, as iBOT and DINOv2 hide tokens from the student.

    Attributes:
        cell: voxels per cell of the mask grid; the token size for token backbones. Must divide the view.
        share: share of the global views that are masked, the others keep an empty mask. 0.5: iBOT, DINOv2, 3DINO.
        ratio: range of the hidden share of a masked view. 0.1-0.5: iBOT, DINOv2.
        shape: "block" hides boxes (BEiT, iBOT, DINOv2), "random" single cells (3DINO).
        aspect: range of the ratio between any two edges of a block. 0.3-1/0.3: BEiT.
        min_cells: a block has at least so many cells before it is cut to what is new. 4: DINOv2 (16 in BEiT).
    """

    cell: Size
    share: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    shape: Literal["block", "random"] = "block"
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    min_cells: int = 4

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not (0 < low <= high < 1 and 0 <= self.share <= 1 and 0 < self.aspect[0] <= self.aspect[1]):
            raise NnsslError(f"mask settings out of range: {self}", "0 < ratio < 1, 0 <= share <= 1, 0 < aspect")


def common_cell(size: Size, block: Size) -> Size:
    """The largest cell of which both the view and the block are multiples."""
    z, y, x = map(math.gcd, size, block)
    return z, y, x


def mask_grid(size: Size, cell: Size) -> Size:
    """Cells of a view along z, y, x.

    Raises:
        NnsslError: the cell does not divide the view.
    """
    if any(length % part for length, part in zip(size, cell, strict=True)):
        raise NnsslError(f"mask cells of {cell} voxels do not divide a view of {size}", "choose a divisible crop size")
    z, y, x = (length // part for length, part in zip(size, cell, strict=True))
    return z, y, x


def draw_mask(size: Size, settings: MaskSettings, rng: np.random.Generator) -> Bool[np.ndarray, "z y x"]:
    """A mask with exactly ``int(ratio * cells)`` hidden cells, True where hidden.

    Whole blocks are hidden one after the other in random order until the count is reached; where it is not a whole
    number of blocks, or blocks are cut off by the border, only the last block is hidden in part (at random).

    Raises:
        NnsslError: the ratio hides nothing or everything, the cell does not divide the view, or the block not the cell.
    """
    grid = mask_grid(size, settings.cell)
    cells = math.prod(grid)
    hidden = int(settings.ratio * cells)
    if not 0 < hidden < cells:
        fix = "choose a ratio between 0 and 1, smaller blocks or a larger crop"
        raise NnsslError(f"mask ratio {settings.ratio} hides {hidden} of the {cells} cells of a {size} view", fix)
    order = rng.random(grid)
    if settings.block is not None:
        span = mask_grid(settings.block, settings.cell)
        block_of = [np.arange(length) // part for length, part in zip(grid, span, strict=True)]
        ranks = rng.permutation(math.prod(int(index[-1]) + 1 for index in block_of))
        order += ranks.reshape([int(index[-1]) + 1 for index in block_of])[np.ix_(*block_of)]
    mask = np.zeros(cells, bool)
    mask[np.argpartition(order.ravel(), hidden)[:hidden]] = True
    return mask.reshape(grid)


def draw_token_masks(
    size: Size, views: int, settings: TokenMaskSettings, rng: np.random.Generator, quantile: float
) -> list[Bool[np.ndarray, "z y x"]]:
    """One mask per view: ``share * views`` of them, random which, hide part of the view; the others are empty.

    Args:
        quantile: this case's stratum of the step (`nnssl_ext.contracts.ViewPolicy.draw`); the hidden shares of the
            step's masked views thereby spread evenly over the range, and their total varies little between steps.

    Raises:
        NnsslError: the cell does not divide the view.
    """
    grid = mask_grid(size, settings.cell)
    masked = int(settings.share * views + rng.random())
    low, high = settings.ratio
    masks = [np.zeros(grid, bool) for _ in range(views)]
    for stratum, view in enumerate(rng.permutation(views)[:masked].tolist()):
        ratio = low + (high - low) * (quantile + stratum) / masked
        masks[view] = hide_cells(grid, max(1, int(ratio * math.prod(grid))), settings, rng)
    return masks


def hide_cells(
    grid: Size, count: int, settings: TokenMaskSettings, rng: np.random.Generator
) -> Bool[np.ndarray, "z y x"]:
    """A mask with exactly `count` hidden cells.

    Blocks of random volume, edges and place are added as long as they hide no more new cells than are still to hide;
    cells hidden before count once. What ten draws in a row cannot add is filled with single random cells.
    """
    mask = np.zeros(grid, bool)
    left, failures = count, 0
    while settings.shape == "block" and left >= settings.min_cells and failures < ATTEMPTS:
        edges = _draw_edges(grid, left, settings, rng)
        corner = rng.integers(0, np.asarray(grid) - edges + 1)
        block = mask[tuple(slice(a, a + e) for a, e in zip(corner.tolist(), edges.tolist(), strict=True))]
        new = block.size - int(block.sum())
        failures += 1
        if 0 < new <= left:
            block[:] = True
            left, failures = left - new, 0
    visible = np.flatnonzero(~mask)
    mask.ravel()[rng.choice(visible, left, replace=False)] = True
    return mask


def _draw_edges(grid: Size, cells: int, settings: TokenMaskSettings, rng: np.random.Generator) -> Int[np.ndarray, " 3"]:
    """Edges of a block of ``min_cells`` to `cells` cells (before rounding), each pair of them within the aspect.

    Where the grid is too thin for an edge, the others grow, so that the volume is kept, also in a grid of one plane.
    """
    left = rng.uniform(settings.min_cells, cells)
    low, high = settings.aspect
    stretch = np.exp(rng.uniform(math.log(low) / 2, math.log(high) / 2, 3))
    edges, free = np.empty(3), [*np.argsort(grid)]
    while free:
        axis = free[0]
        edge = stretch[axis] * (left / stretch[free].prod()) ** (1 / len(free))
        edges[axis] = min(max(edge, 1), grid[axis])
        left /= edges[free.pop(0)]
    return np.rint(edges).astype(int)
