"""Jacobians: affine fields by their matrix, both spreads by hand, folds by construction; λ for a wanted spread."""

import math

import numpy as np
import pytest
import torch

from nnssl_ext.registration.smoothness import jacobian_determinant, match_smoothness, smoothness, without_folds
from nnssl_ext.registration.warp import exponential

SHAPE = (10, 12, 11)


def positions(shape=SHAPE):
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


def test_affine_fields_have_the_determinant_of_their_matrix():
    rng = np.random.default_rng(0)
    for _ in range(5):
        matrix = torch.tensor(np.eye(3) + 0.3 * rng.standard_normal((3, 3)), dtype=torch.float32)
        field = torch.einsum("ij,j...->i...", matrix - torch.eye(3), positions())
        determinant = jacobian_determinant(field)
        assert determinant.shape == (6, 8, 7)
        torch.testing.assert_close(determinant, torch.linalg.det(matrix).expand(6, 8, 7), atol=1e-4, rtol=1e-4)


def stretched(determinants):
    """A field along z whose Jacobian determinant, by central differences, is this at voxels 2, 3, ..."""
    field = torch.zeros(3, len(determinants) + 4, 6, 6)
    for voxel, determinant in enumerate(determinants, start=2):
        field[0, voxel + 1] = field[0, voxel - 1] + 2 * (determinant - 1)
    return field


def test_both_spreads_and_folds_by_hand():
    determinants = [0.5, 2.0, -1.0, 1.0]
    found = smoothness(stretched(determinants))
    positive = np.log([0.5, 2.0, 1.0])
    assert found.sdlogj == pytest.approx(positive.std(), rel=1e-5)
    assert found.sdlogj_l2r == pytest.approx(np.log(np.add(determinants, 3)).std(), rel=1e-5)
    assert found.fold_percent == 25


def test_a_determinant_of_zero_is_a_fold():
    assert smoothness(stretched([0.0, 1.0, 1.0, 1.0])).fold_percent == 25


def test_only_the_mask_counts():
    field = stretched([0.5, 2.0, -1.0, 1.0])
    mask = torch.zeros(field.shape[1:], dtype=torch.bool)
    mask[2:4] = True
    found = smoothness(field, mask)
    assert found.sdlogj == pytest.approx(math.log(2), rel=1e-5)
    assert found.fold_percent == 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_of_thin_fields_the_middle_remains(depth):
    """The second axis is stretched by 2 in the mask's first row, and folded in the other."""
    field = torch.zeros(3, depth, 9, 9)
    field[1] = torch.tensor([0.0, 1, 2, 3, 4, 5, 2, -1, -4]).view(
        1, 9, 1
    )  # central differences: 1 up to 4, then -1 at 5, -3
    mask = torch.zeros(depth, 9, 9, dtype=torch.bool)
    mask[:, 3], mask[:, 6] = True, True
    found = smoothness(field, mask)
    assert found.fold_percent == 50
    assert found.sdlogj_l2r == pytest.approx(np.std(np.log([2 + 3, -2 + 3])), rel=1e-5)
    assert jacobian_determinant(field).shape == (1 if depth % 2 else 2, 5, 5)


def test_a_mask_that_leaves_nothing_is_not_an_error():
    found = smoothness(torch.zeros(3, 4, 9, 9), torch.zeros(4, 9, 9, dtype=torch.bool))
    assert (found.sdlogj, found.sdlogj_l2r, found.fold_percent) == (0, 0, 0)


@pytest.mark.parametrize("depth", [24, 2])
def test_folds_of_a_flow_are_removed_and_the_rest_stays(depth):
    torch.manual_seed(0)
    velocity = torch.zeros(3, depth, 24, 24)
    velocity[:, -16:12, 8:12, 8:12] = 12 * torch.randn(3, min(depth, 4), 4, 4)
    assert (jacobian_determinant(exponential(velocity), 1) <= 0).any()
    mended = without_folds(velocity)
    assert (jacobian_determinant(exponential(mended), 1) > 0).all()
    smooth = 0.1 * positions()
    assert without_folds(smooth) is smooth


def test_folds_of_the_opposite_flow_are_removed_too():
    folded = 0
    for seed in range(6):
        velocity = torch.zeros(3, 16, 16, 16)
        velocity[:, 6:10, 6:10, 6:10] = 4 * torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        folded += int((jacobian_determinant(exponential(-velocity), 1) <= 0).any())
        mended = without_folds(velocity)
        for flow in (mended, -mended):
            assert (jacobian_determinant(exponential(flow), 1) > 0).all()
    assert folded


@pytest.mark.parametrize(("slope", "target"), [(-0.55, 0.1), (-0.55, 0.5), (-0.9, 0.05), (-0.3, 0.4)])
def test_regularisation_for_a_wanted_smoothness(slope, target):
    calls = []

    def sdlogj_of(value):
        calls.append(value)
        return 0.24 * (value / 1.25) ** slope

    found = match_smoothness(sdlogj_of, target)
    assert sdlogj_of(found) == pytest.approx(target, rel=0.03)
    assert len(calls) <= 5


def test_the_nearest_regularisation_is_returned_and_not_the_last():
    reached = iter([0.21, 0.5])
    assert match_smoothness(lambda _: next(reached), 0.2, start=1.25, tries=2) == pytest.approx(1.25)
