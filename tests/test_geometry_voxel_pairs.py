"""Pairs of voxels that show one point: where they lie, how they are chosen."""

import numpy as np
import pytest
import torch
from scipy import stats

from nnssl_ext.geometry.affines import quarter_turns, view_to_case
from nnssl_ext.geometry.matching import covisible
from nnssl_ext.geometry.voxel_pairs import VoxelPairs, sample_pairs
from nnssl_ext.records import View

SIZE, SHAPE = (8, 9, 10), (20, 30, 40)
SPATIAL = {
    "crop": {},
    "flips": {"flips": (True, False, True)},
    "turns": {"quarters": quarter_turns((0, 1, 0))},
    "rotation": {"degrees": (20, -15, 30)},
    "zoom": {"zoom": (1.3, 0.8, 1.1)},
    "all": {"flips": (True, True, False), "degrees": (10, 25, -5), "zoom": (0.8, 1.2, 1.2), "spacing": (3, 1, 1)},
}


def view(lower=(4, 5, 6), size=SIZE, batch: int = 1, shape=SHAPE, **change) -> View:
    matrix = view_to_case(size, np.array(lower) + (np.array(size) - 1) / 2, **change)
    return View(
        voxels=torch.zeros(batch, 1, *size),
        affine=torch.from_numpy(matrix).float().repeat(batch, 1, 1),
        case_shape=torch.tensor([shape] * batch),
        spacing=torch.ones(batch, 3),
        cases=tuple("abcdefgh"[:batch]),
    )


def everywhere(of: View) -> torch.Tensor:
    return torch.ones(len(of.cases), *of.voxels.shape[2:], dtype=torch.bool)


def in_case(of: View, voxels: torch.Tensor) -> torch.Tensor:
    """Case coordinates of voxels of the first sample, in float64."""
    affine = of.affine[0].double()
    return voxels.double() @ affine[:3, :3].T + affine[:3, 3]


def found(pairs: VoxelPairs) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.first[0, pairs.valid[0]], pairs.second[0, pairs.valid[0]]


@pytest.mark.parametrize("first", SPATIAL)
@pytest.mark.parametrize("second", SPATIAL)
@pytest.mark.parametrize("cell", [(1, 1, 1), (4, 3, 2)])
def test_both_voxels_show_the_same_point_of_the_case(first, second, cell):
    a, b = view(**SPATIAL[first]), view((6, 3, 7), **SPATIAL[second])
    here, there = found(sample_pairs(a, b, everywhere(a), 200, cell, [0]))
    assert len(here) > 5
    assert (in_case(a, here) - in_case(b, there)).abs().max() < 1e-3
    assert ((there > -1e-2) & (there < torch.tensor(SIZE) - 1 + 1e-2)).all()


def test_plain_crops_match_voxel_by_voxel():
    a, b = view((4, 5, 6)), view((6, 3, 7))
    pairs = sample_pairs(a, b, everywhere(a), 10_000, (1, 1, 1), [0])
    here, _ = found(pairs)
    assert len(here) == 6 * 7 * 9 == int(covisible(a, b).sum())  # all of the overlap, each voxel once
    assert len(here.unique(dim=0)) == len(here)
    assert torch.equal(pairs.second_voxel[0, pairs.valid[0]], here - torch.tensor([2, -2, 1]))


def test_at_most_as_many_as_asked_for_from_the_eligible_and_all_if_there_are_fewer():
    a, b = view((4, 5, 6), batch=2), view((6, 3, 7), batch=2)
    eligible = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
    eligible[1, :, :, 2:] = False
    pairs = sample_pairs(a, b, eligible, 50, (1, 1, 1), [0, 1])
    wanted = (eligible & covisible(a, b)[:, 0]).sum((1, 2, 3))
    assert pairs.valid.sum(1).tolist() == [50, int(wanted[1])] and wanted[0] > 50 > wanted[1]
    for row in range(2):
        z, y, x = pairs.first[row, pairs.valid[row]].T
        assert eligible[row, z, y, x].all()


def test_every_eligible_pair_is_equally_likely():
    a, b = view((4, 5, 6), (3, 4, 5), batch=1), view((5, 5, 6), (3, 4, 5))
    counts = torch.zeros(3, 4, 5)
    for seed in range(600):
        z, y, x = found(sample_pairs(a, b, everywhere(a), 10, (1, 1, 1), [seed]))[0].T
        counts[z, y, x] += 1
    assert not counts[0].any()  # the second crop begins one plane later
    assert stats.chisquare(counts[1:].flatten()).pvalue > 1e-3


@pytest.mark.parametrize("second", SPATIAL)
@pytest.mark.parametrize("cell", [(1, 1, 1), (4, 4, 4), (1, 3, 2)])
def test_no_two_pairs_share_a_cell_in_either_view(second, cell):
    a, b = view(), view((6, 3, 7), **SPATIAL[second])
    pairs = sample_pairs(a, b, everywhere(a), 10_000, cell, [0])
    for voxels in (pairs.first[0, pairs.valid[0]], pairs.second_voxel[0, pairs.valid[0]]):
        cells = voxels // torch.tensor(cell)
        assert len(cells.unique(dim=0)) == len(cells) > 0


def test_one_voxel_of_every_token_where_views_lie_on_one_grid():
    a, b = view((4, 4, 4), (8, 8, 8)), view((8, 4, 4), (8, 8, 8))
    here, _ = found(sample_pairs(a, b, everywhere(a), 10_000, (4, 4, 4), [3]))
    assert sorted((here // 4).tolist()) == [[1, y, x] for y in (0, 1) for x in (0, 1)]


def test_the_choice_follows_the_seed_and_not_the_batch():
    a, b = view(batch=3), view((6, 3, 7), batch=3)
    together = sample_pairs(a, b, everywhere(a), 20, (1, 1, 1), [5, 6, 7])
    alone = sample_pairs(view(), view((6, 3, 7)), everywhere(view()), 20, (1, 1, 1), [6])
    assert torch.equal(together.first[1], alone.first[0])
    assert not torch.equal(together.first[0], together.first[1])


def test_views_without_a_common_point_give_no_valid_pair():
    a, b = view((0, 0, 0)), view((12, 20, 30))
    pairs = sample_pairs(a, b, everywhere(a), 7, (1, 1, 1), [0])
    assert pairs.first.shape == (1, 7, 3) and not pairs.valid.any()
    for voxels in (pairs.first, pairs.second_voxel):  # they are looked up all the same
        assert ((voxels >= 0) & (voxels < torch.tensor(SIZE))).all()
    outside = view((-8, 0, 0))
    assert not sample_pairs(outside, outside, everywhere(a), 7, (1, 1, 1), [0]).valid.any()  # padding
