"""Warping: exact shifts, inverses, flows with a known end, and the way to coarser cells and back."""

import math

import pytest
import torch

from nnssl_ext.registration.pooling import cells_to_voxels, geometric_mean, pool, voxels_per_cell, voxels_to_cells
from nnssl_ext.registration.warp import compose, exponential, invert, logarithm, warp

SHAPE = (9, 11, 10)


def positions(shape=SHAPE):
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))


def constant(vector, shape=SHAPE):
    return torch.tensor(vector).view(3, 1, 1, 1).expand(3, *shape).clone()


def bump(height=1.5, shape=(16, 18, 20)):
    """A smooth field that vanishes at the faces."""
    wave = torch.ones(shape)
    for axis, length in enumerate(shape):
        profile = torch.sin(math.pi * torch.arange(length) / (length - 1)) ** 2
        wave = wave * profile.view([-1 if axis == other else 1 for other in range(3)])
    return torch.stack((wave, -0.5 * wave, 0.7 * wave)) * height


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_whole_shifts_are_exact_on_every_axis(mode):
    volume = torch.rand(2, *SHAPE)
    warped = warp(volume, constant((1.0, -2.0, 3.0)), mode)
    torch.testing.assert_close(warped[:, :-1, 2:, :-3], volume[:, 1:, :-2, 3:], atol=1e-5, rtol=0)


def test_linear_ramps_are_moved_by_fractions_without_shrinkage():
    places = positions()
    warped = warp(places, constant((0.25, 1.5, -0.75)))
    inner = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    expected = places + torch.tensor((0.25, 1.5, -0.75)).view(3, 1, 1, 1)
    torch.testing.assert_close(warped[inner], expected[inner], atol=1e-5, rtol=0)


def test_borders_and_other_grids():
    volume = positions()
    assert warp(volume, constant((-50.0, 0.0, 0.0)))[0].max() == 0  # the outermost plane is repeated
    assert warp(volume + 1, constant((-50.0, 0.0, 0.0)), padding="zeros").abs().max() == 0
    onto_smaller = warp(volume, torch.zeros(3, 4, 5, 6))
    torch.testing.assert_close(onto_smaller, volume[:, :4, :5, :6], atol=1e-5, rtol=0)


def test_batches_are_warped_one_by_one():
    volumes, fields = torch.rand(2, 3, *SHAPE), torch.randn(2, 3, *SHAPE)
    together = warp(volumes, fields)
    torch.testing.assert_close(together[1], warp(volumes[1], fields[1]))


def test_composition_is_one_warp_after_the_other():
    first, second = bump(1.5), bump(-0.8).flip(0)
    places = positions(first.shape[1:])
    twice = warp(warp(places, first), second)
    torch.testing.assert_close(warp(places, compose(first, second)), twice, atol=0.02, rtol=0)


def test_inverse_undoes_the_field_both_ways():
    field = bump(1.0)
    inverse = invert(field)
    assert compose(field, inverse).abs().max() < 1e-3
    assert compose(inverse, field).abs().max() < 0.05  # between voxels the inverse of a linear field is not linear


@pytest.mark.parametrize("squarings", [(), (8,)])
def test_exponential_of_a_linear_velocity_is_the_matrix_exponential(squarings):
    shape = (21, 21, 21)
    centred = positions(shape) - 10
    generator = torch.tensor([[0.1, 0.2, 0.0], [-0.15, 0.05, 0.1], [0.0, -0.1, -0.1]])
    velocity = torch.einsum("ij,j...->i...", generator, centred)
    expected = torch.einsum("ij,j...->i...", torch.matrix_exp(generator) - torch.eye(3), centred)
    inner = (slice(None),) + (slice(7, -7),) * 3
    torch.testing.assert_close(exponential(velocity, *squarings)[inner], expected[inner], atol=0.01, rtol=0)


def test_logarithm_returns_the_velocity():
    velocity = bump(2.0)
    assert (exponential(logarithm(exponential(velocity))) - exponential(velocity)).abs().max() < 0.02


def test_cells_are_near_equal_in_mm_and_never_fewer_than_two():
    assert voxels_per_cell((40, 200, 200), (5.0, 1.0, 1.0), 4.0) == (1, 4, 4)
    assert voxels_per_cell((40, 200, 200), (3.0, 0.75, 0.75), 6.0) == (2, 8, 8)
    assert voxels_per_cell((3, 10, 1), (1.0, 1.0, 1.0), 6.0) == (1, 5, 1)


def test_the_mean_edge_is_that_of_a_cube_of_the_same_volume():
    assert geometric_mean((8.0, 1.0, 1.0)) == pytest.approx(2)


def test_pooling_ignores_what_the_mask_hides_and_completes_the_last_cell():
    volume = torch.arange(5.0).view(1, 5, 1, 1)
    means, weight = pool(volume, (2, 1, 1))
    assert means.flatten().tolist() == [0.5, 2.5, 4.0]
    assert weight.flatten().tolist() == [1, 1, 0.5]
    mask = torch.tensor([True, False, False, False, True]).view(5, 1, 1)
    means, weight = pool(volume, (2, 1, 1), mask)
    assert means.flatten().tolist() == [0.0, 2.0, 4.0]  # the hidden cell takes its neighbours' mean, without weight
    assert weight.flatten().tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("shape", [(12, 12, 12), (13, 11, 12)])
def test_linear_fields_survive_the_way_to_cells_and_back(shape):
    field = positions(shape) * 0.1
    cells = voxels_to_cells(field, (3, 2, 4))
    assert cells[0, 1, 0, 0] == pytest.approx(0.4 / 3)  # the centre of the second cell of three voxels is voxel 4
    back = cells_to_voxels(cells, (3, 2, 4), shape)
    inner = (slice(None), slice(2, 8), slice(2, 8), slice(2, 8))
    torch.testing.assert_close(back[inner], field[inner], atol=1e-5, rtol=0)
