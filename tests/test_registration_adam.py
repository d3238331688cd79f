"""Instance optimisation: the data term's gradient against grid_sample's, units in mm, and what does not count."""

import math

import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.registration import adam
from nnssl_ext.registration.adam import FeatureCost, _roughness, optimise
from nnssl_ext.registration.convex import package_stretch
from nnssl_ext.registration.separable import apply_kernels, smoothing_kernels
from nnssl_ext.registration.warp import sampling_grid, warp

SHAPE = (7, 8, 6)


def features(seed, channels=5, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, *shape, generator=generator)


def displacements(seed=2):
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)).mul(1.5)


@pytest.mark.parametrize("chunk", [2**17, 50])
def test_the_package_s_gradient_is_that_of_grid_sample(chunk, monkeypatch):
    monkeypatch.setattr(adam, "CHUNK", chunk)
    fixed, moving, displacement = features(0), features(1), displacements().requires_grad_()
    warped = warp(moving, displacement * package_stretch(displacement), padding="zeros")
    ((warped - fixed).square().mean(0) * 12).mean().backward()
    gradient = FeatureCost(fixed, moving, compatible=True).gradient(displacement.detach())
    torch.testing.assert_close(gradient, displacement.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk", [2**17, 50])
def test_the_gradient_takes_the_change_of_features_from_half_a_cell_to_either_side(chunk, monkeypatch):
    """By grid_sample, place by place and axis by axis."""
    monkeypatch.setattr(adam, "CHUNK", chunk)
    fixed, moving, displacement = features(0), features(1), displacements()
    fixed_weight, moving_weight = features(3, 1)[0], features(4, 1)[0]
    residual = warp(moving, displacement) - fixed
    weight = (
        (sampling_grid(displacement).abs() <= 1).all(-1) * fixed_weight * warp(moving_weight[None], displacement)[0]
    )
    for axis in range(3):
        half = torch.zeros(3, 1, 1, 1)
        half[axis] = 0.5
        change = warp(moving, displacement + half) - warp(moving, displacement - half)
        expected = (2 * 12 * residual * change).mean(0) * weight / residual[0].numel()
        found = FeatureCost(fixed, moving, fixed_weight, moving_weight).gradient(displacement)[axis]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_gradient_does_not_jump_where_places_pass_the_centre_of_a_cell():
    """As the derivative of linear interpolation does."""
    fixed, moving = features(0), features(1)
    ours, exact = [], []
    for shift in (1 - 1e-4, 1 + 1e-4):
        displacement = torch.full((3, *SHAPE), shift, requires_grad=True)
        ((warp(moving, displacement) - fixed).square().mean(0) * 12).mean().backward()
        exact.append(displacement.grad[:, :-2, :-2, :-2])
        ours.append(FeatureCost(fixed, moving).gradient(displacement.detach())[:, :-2, :-2, :-2])
    typical = ours[0].abs().mean()
    assert (ours[0] - ours[1]).abs().max() < 0.01 * typical < typical < (exact[0] - exact[1]).abs().max()


def wave(shape, shift=0.0, cell_mm=(1.0, 1.0, 1.0), channels=6):
    """Smooth features in world space, at cell centres, seen `shift` mm further along z."""
    generator = torch.Generator().manual_seed(5)
    z, y, x = torch.meshgrid(
        *(size * (torch.arange(n) + 0.5) for n, size in zip(shape, cell_mm, strict=True)), indexing="ij"
    )
    maps = []
    for _ in range(channels):
        kz, ky, kx, phase = torch.rand(4, generator=generator) * 0.5
        maps.append(torch.sin(kz * (z - shift) + ky * y + kx * x + 6 * phase))
    return torch.stack(maps)


def test_a_shift_smaller_than_a_cell_is_found():
    shape = (16, 16, 16)
    found = optimise(wave(shape), wave(shape, 0.4), torch.zeros(3, *shape), 0.1)
    inner = found[:, 4:-4, 4:-4, 4:-4].flatten(1).mean(1)
    torch.testing.assert_close(inner, torch.tensor((0.4, 0.0, 0.0)), atol=0.03, rtol=0)


def test_regularisation_means_the_same_on_cells_of_other_sizes():
    """A warp along y whose strength varies along y and z, on cubes of 1 mm and on slices of 2 mm: the same field in mm."""
    fields = []
    for cell_mm, shape in (((1.0, 1.0, 1.0), (16, 20, 16)), ((2.0, 1.0, 1.0), (8, 20, 16))):
        fixed = wave(shape, cell_mm=cell_mm)
        down = torch.sin(cell_mm[0] * (torch.arange(shape[0]) + 0.5) / 16 * math.pi).view(-1, 1, 1)
        across = torch.sin(torch.arange(20) / 20 * math.pi).view(1, 20, 1)
        bend = torch.stack((torch.zeros(shape), 1.5 * (down * across).expand(shape), torch.zeros(shape)))
        found = optimise(fixed, warp(fixed, bend), torch.zeros(3, *shape), 10.0, cell_mm=cell_mm)
        fields.append(found * torch.tensor(cell_mm).view(3, 1, 1, 1))
    cubes = F.avg_pool3d(fields[0], (2, 1, 1))
    inner = (slice(None), slice(1, -1), slice(3, -3), slice(3, -3))
    assert cubes[inner][1].abs().mean() > 0.5
    assert (cubes - fields[1])[inner].abs().mean() < 0.01


def test_derivatives_are_per_mm():
    """A ramp of one edge per cell along an axis whose cells are two edges long: 1/2, in one of three components."""
    ramp = torch.zeros(3, 5, 4, 4)
    ramp[1] = torch.arange(5.0).view(-1, 1, 1)
    assert _roughness(ramp, [0.5, 1.0, 1.0]).item() == pytest.approx(0.25 / 3)


def test_a_step_is_as_long_in_mm_along_every_axis():
    """The field after one step of Adam, which is the learning rate long: 0.1 of the smallest edge, of 1 mm."""
    shape, mm = (12, 16, 16), (2.0, 1.0, 1.0)
    fixed, moving = wave(shape, cell_mm=mm), wave(shape, 4.0, cell_mm=mm)
    found = optimise(fixed, moving, torch.zeros(3, *shape), 0.0, iterations=2, learning_rate=0.1, cell_mm=mm)
    assert found[0].abs().max().item() == pytest.approx(0.05, rel=0.01)  # cells of 2 mm
    assert found[1].abs().max().item() <= 0.1 + 1e-6


def test_the_field_is_the_smoothed_one_that_was_evaluated_last():
    start = displacements()
    found = optimise(features(0), features(1), start, 0.1, iterations=1)
    torch.testing.assert_close(found, apply_kernels(start, smoothing_kernels(SHAPE, 3)))


def test_stronger_regularisation_is_smoother():
    fixed, moving, start = wave((12, 12, 12)), wave((12, 12, 12), 1.0).flip(2), torch.zeros(3, 12, 12, 12)
    roughness = [optimise(fixed, moving, start, value).diff(dim=2).square().mean() for value in (0.1, 1.0, 10.0)]
    assert roughness[0] > roughness[1] > roughness[2]


def test_nothing_to_optimise_returns_the_start():
    start = torch.rand(3, *SHAPE)
    assert optimise(features(0), features(1), start, 1.0, iterations=0) is start
