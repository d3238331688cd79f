"""Masks on a grid of cells: tokens for token backbones, small cubes of voxels for convolutional ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from nnssl_ext.errors import NnsslError
from nnssl_ext.records import Size


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
