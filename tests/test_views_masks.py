"""Masks hide exactly what they should, everywhere equally often."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnssl_ext.errors import NnsslError
from nnssl_ext.views.masks import MaskSettings, common_cell, draw_mask

lengths = st.tuples(*[st.integers(1, 6)] * 3)


@given(lengths, st.floats(0.05, 0.95), st.integers(0, 99), st.tuples(*[st.integers(1, 3)] * 3))
def test_exactly_the_ratio_is_hidden(grid, ratio, seed, blocks):
    cell = (2, 4, 3)
    size = tuple(g * c for g, c in zip(grid, cell, strict=True))
    hidden = int(ratio * math.prod(grid))
    for block in (None, tuple(b * c for b, c in zip(blocks, cell, strict=True))):
        if not 0 < hidden < math.prod(grid):
            with pytest.raises(NnsslError, match="mask ratio"):
                draw_mask(size, MaskSettings(cell, ratio, block), np.random.default_rng(seed))
            continue
        mask = draw_mask(size, MaskSettings(cell, ratio, block), np.random.default_rng(seed))
        assert mask.shape == grid and mask.sum() == hidden


@pytest.mark.parametrize("block", [None, (16, 16, 16)])
def test_every_cell_is_hidden_equally_often(block):
    rng = np.random.default_rng(0)
    draws = 2000
    counts = sum(draw_mask((32, 48, 32), MaskSettings((8, 8, 8), 0.75, block), rng).astype(int) for _ in range(draws))
    # binomial standard deviation 19; 5 of them over 96 cells
    np.testing.assert_allclose(counts, 0.75 * draws, atol=5 * math.sqrt(draws * 0.75 * 0.25))


def test_blocks_are_hidden_whole_where_the_count_allows():
    mask = draw_mask((160, 160, 160), MaskSettings((8, 8, 8), 0.75, (16, 16, 16)), np.random.default_rng(1))
    blocks = mask.reshape(10, 2, 10, 2, 10, 2).sum((1, 3, 5))
    assert set(blocks.ravel()) == {0, 8} and (blocks == 8).sum() == 750


def test_at_most_one_block_is_hidden_in_part():
    mask = draw_mask((40, 56, 40), MaskSettings((8, 8, 8), 0.6, (16, 16, 16)), np.random.default_rng(1))
    partly = 0
    for z in range(0, 5, 2):
        for y in range(0, 7, 2):
            for x in range(0, 5, 2):
                block = mask[z : z + 2, y : y + 2, x : x + 2]
                partly += 0 < block.sum() < block.size
    assert mask.sum() == int(0.6 * 175) and partly <= 1


def test_single_cells_are_independent_of_their_neighbours():
    rng = np.random.default_rng(0)
    masks = np.stack([draw_mask((80, 80, 80), MaskSettings((8, 8, 8), 0.5), rng) for _ in range(50)])
    assert np.mean(masks[:, 1:] == masks[:, :-1]) == pytest.approx(0.5, abs=0.01)


def test_a_seed_gives_one_mask_and_seeds_differ():
    first, again, other = (draw_mask((32,) * 3, MaskSettings((8,) * 3), np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_cells_must_divide_view_and_block():
    with pytest.raises(NnsslError, match="do not divide"):
        draw_mask((30, 32, 32), MaskSettings((8, 8, 8)), np.random.default_rng(0))
    with pytest.raises(NnsslError, match="do not divide"):
        draw_mask((32, 32, 32), MaskSettings((8, 8, 8), block=(12, 16, 16)), np.random.default_rng(0))


def test_common_cell():
    assert common_cell((160, 40, 13), (16, 16, 16)) == (16, 8, 1)
