"""The coarse search against brute force, in slabs, with masks, as a layer to train through, and as in convexAdam."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from nnssl_ext.registration import convex
from nnssl_ext.registration.convex import PACKAGE_COUPLINGS, consistent, coupled_convex
from nnssl_ext.registration.separable import apply_kernels, smoothing_kernels
from nnssl_ext.registration.warp import compose

SHAPE = (6, 7, 5)


def smooth_features(channels=4, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, channels, *shape, generator=generator)
    return F.avg_pool3d(noise, 3, stride=1, padding=1, count_include_pad=False)[0] * 3


def moved(features, shift):
    """The features shifted by whole cells: registering finds +shift inside."""
    return torch.roll(features, shift, (1, 2, 3))


@pytest.fixture(scope="module")
def package():
    """`convexAdam.convex_adam_utils`; it silences all warnings on import, which is undone."""
    import warnings

    with warnings.catch_warnings():
        return pytest.importorskip("convexAdam.convex_adam_utils")


def box_mean(values, zero_border):
    return F.avg_pool3d(values[None], 3, stride=1, padding=1, count_include_pad=zero_border)[0]


@pytest.mark.parametrize("zero_border", [True, False])
def test_kernels_are_running_means(zero_border):
    volumes = torch.rand(2, 6, 7, 5)
    once = apply_kernels(volumes, smoothing_kernels(SHAPE, 1, zero_border=zero_border))
    torch.testing.assert_close(once, box_mean(volumes, zero_border))
    thrice = apply_kernels(volumes, smoothing_kernels(SHAPE, 3, zero_border=zero_border))
    expected = box_mean(box_mean(box_mean(volumes, zero_border), zero_border), zero_border)
    torch.testing.assert_close(thrice, expected)


def test_kernels_have_one_width_in_mm():
    first, _, third = smoothing_kernels((41, 41, 41), 3, (4.0, 2.0, 1.0))
    cells = torch.arange(41.0) - 20
    for kernel, size in ((first, 4.0), (third, 1.0)):
        assert (kernel[20] * (cells * size) ** 2).sum() == pytest.approx(3 * 2 / 3, rel=1e-4)


def brute_force(fixed, moving, radius, fixed_weight, moving_weight):
    """One pass by plain loops: mean costs around a cell, where what does not count or lies outside costs what that cell's
    displacements cost on average; coupled weakly to zero."""
    channels, *shape = fixed.shape
    shifts = list(itertools.product(*(range(-reach, reach + 1) for reach in radius)))
    sums, counts = torch.zeros(len(shifts), *shape), torch.zeros(len(shifts), *shape)
    for number, shift in enumerate(shifts):
        for cell in itertools.product(*map(range, shape)):
            target = tuple(a + b for a, b in zip(cell, shift, strict=True))
            if all(0 <= place < length for place, length in zip(target, shape, strict=True)):
                difference = (fixed[(slice(None), *cell)] - moving[(slice(None), *target)]).square().sum()
                counts[(number, *cell)] = fixed_weight[cell] * moving_weight[target]
                sums[(number, *cell)] = 12 / channels * difference * counts[(number, *cell)]
    whole = sums + (1 - counts) * sums.sum(0) / counts.sum(0).clamp(min=1e-6)
    cost = box_mean(box_mean(whole, False), False)
    box = torch.tensor(shifts, dtype=torch.float32)
    best = (cost + 0.001 * box.square().sum(1).view(-1, 1, 1, 1)).argmin(0)
    return box_mean(box[best].movedim(-1, 0), False)


@pytest.mark.parametrize("masked", [False, True])
def test_one_pass_equals_plain_loops(masked):
    fixed, moving = smooth_features(), smooth_features(seed=1)
    fixed_weight, moving_weight = torch.ones(SHAPE), torch.ones(SHAPE)
    if masked:
        fixed_weight[:2], moving_weight[:, :, 4:], moving_weight[3] = 0, 0, 0.5
    weights = {"fixed_weight": fixed_weight, "moving_weight": moving_weight}
    found = coupled_convex(fixed, moving, (1, 2, 1), couplings=(0.001,), **weights)
    torch.testing.assert_close(found, brute_force(fixed, moving, (1, 2, 1), **weights))


def test_every_coupling_draws_nearer_to_the_neighbours():
    fixed, moving = smooth_features(), smooth_features(seed=1)
    roughness = [
        coupled_convex(fixed, moving, (2, 2, 2), couplings=convex.COUPLINGS[:passes]).diff(dim=2).square().mean()
        for passes in (1, 4, 7)
    ]
    assert roughness[0] > roughness[1] > roughness[2]


def test_a_shift_is_found_inside():
    fixed = smooth_features(shape=(10, 10, 10))
    found = coupled_convex(fixed, moved(fixed, (2, -1, 1)), (3, 3, 3))
    inner = found[:, 4:6, 4:6, 4:6].flatten(1).mean(1)
    torch.testing.assert_close(inner, torch.tensor((2.0, -1.0, 1.0)), atol=0.1, rtol=0)


def test_displacements_are_compared_in_mm():
    """A ramp along z + x: a step of 1 mm along z matches as well as one of 3 mm along x, and is nearer to zero."""
    ramp = (torch.arange(9.0).view(-1, 1, 1) + torch.arange(9.0)).expand(9, 9, 9)[None].contiguous()
    found = coupled_convex(ramp + 1, ramp, (1, 0, 1), couplings=(0.001,), cell_mm=(1.0, 1.0, 3.0))
    torch.testing.assert_close(found[:, 4, 4, 4], torch.tensor([1.0, 0.0, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("slice_mm", "reaches"), [(100.0, False), (1.0, True)])
def test_smoothing_does_not_reach_the_next_of_thick_slices(slice_mm, reaches):
    fixed, moving = smooth_features(), smooth_features(seed=1)
    other = moving.clone()
    other[:, 0] = smooth_features(seed=2)[:, 0]
    found, again = (coupled_convex(fixed, side, (0, 1, 1), cell_mm=(slice_mm, 1.0, 1.0)) for side in (moving, other))
    changed = (found - again).abs()
    assert changed[:, 0].max() > 0.1
    assert (changed[:, 1].max() > 0.05) == reaches


def test_equal_costs_mean_no_displacement():
    assert coupled_convex(torch.ones(2, *SHAPE), torch.ones(2, *SHAPE), (2, 2, 2)).abs().max() == 0


def test_channels_repeated_change_nothing():
    fixed, moving = smooth_features(), smooth_features(seed=1)
    once = coupled_convex(fixed, moving, (2, 2, 2))
    torch.testing.assert_close(coupled_convex(fixed.repeat(3, 1, 1, 1), moving.repeat(3, 1, 1, 1), (2, 2, 2)), once)


@pytest.mark.parametrize("compatible", [True, False])
def test_slabs_equal_the_whole_volume(compatible):
    fixed, moving = smooth_features(), smooth_features(seed=1)
    whole = coupled_convex(fixed, moving, (2, 1, 2), compatible=compatible)
    slabs = coupled_convex(fixed, moving, (2, 1, 2), compatible=compatible, memory_bytes=1)
    torch.testing.assert_close(slabs, whole)


def test_what_the_masks_hide_does_not_matter():
    fixed, moving = smooth_features(), smooth_features(seed=1)
    fixed_weight, moving_weight = torch.ones(SHAPE), torch.ones(SHAPE)
    fixed_weight[:2], moving_weight[:, :, 4:] = 0, 0
    found = coupled_convex(fixed, moving, (2, 2, 2), fixed_weight=fixed_weight, moving_weight=moving_weight)
    fixed, moving = fixed.clone(), moving.clone()
    fixed[:, :2], moving[..., 4:] = 50.0, -50.0
    again = coupled_convex(fixed, moving, (2, 2, 2), fixed_weight=fixed_weight, moving_weight=moving_weight)
    torch.testing.assert_close(again, found)


def test_soft_choice_approaches_the_hard_one_and_has_true_gradients():
    fixed, moving = smooth_features(), smooth_features(seed=1)
    hard = coupled_convex(fixed, moving, (1, 1, 1))
    soft = coupled_convex(fixed, moving, (1, 1, 1), temperature=1e4)
    assert (soft - hard).abs().mean() < 0.02
    fixed, moving = fixed.requires_grad_(), moving.requires_grad_()

    def loss(direction_fixed, direction_moving, step):
        field = coupled_convex(
            fixed + step * direction_fixed, moving + step * direction_moving, (1, 1, 1), temperature=5.0
        )
        return (field * target).sum()

    target = torch.randn(3, *SHAPE)
    directions = torch.randn_like(fixed), torch.randn_like(moving)
    gradients = torch.autograd.grad(loss(*directions, 0.0), (fixed, moving))
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    with torch.no_grad():
        measured = (loss(*directions, 1e-3) - loss(*directions, -1e-3)) / 2e-3
    assert along.abs() > 1
    assert along.item() == pytest.approx(measured.item(), rel=0.02)


def test_consistent_fields_are_each_others_inverse():
    fixed, moving = smooth_features(shape=(12, 12, 12)), smooth_features(shape=(12, 12, 12), seed=1)
    forward, backward = coupled_convex(fixed, moving, (2, 2, 2)), coupled_convex(moving, fixed, (2, 2, 2))
    before = compose(forward, backward).abs().mean()
    after = compose(*consistent(forward, backward)).abs().mean()
    assert after < 0.3 * before


def test_the_packages_search_and_consistency(package):
    fixed, moving = smooth_features(12, (8, 10, 9)), smooth_features(12, (8, 10, 9), seed=1)
    mesh = F.affine_grid(2 * torch.eye(3, 4)[None], (1, 1, 5, 5, 5), align_corners=True)
    mesh = mesh.permute(0, 4, 1, 2, 3).reshape(3, -1, 1)
    theirs, ours = [], []
    for a, b in ((fixed, moving), (moving, fixed)):
        cost, best = package.correlate(a[None], b[None], 2, 1, a.shape[1:], 12)
        theirs.append(package.coupled_convex(cost, best, mesh, 1, a.shape[1:]))
        ours.append(coupled_convex(a, b, (2, 2, 2), couplings=PACKAGE_COUPLINGS, compatible=True))
    torch.testing.assert_close(ours[0], theirs[0][0], atol=1e-5, rtol=0)
    scale = (torch.tensor(fixed.shape[1:]) - 1).view(1, 3, 1, 1, 1) / 2
    expected, _ = package.inverse_consistency(*((field / scale).flip(1) for field in theirs), iter=15)
    found, _ = consistent(*ours, compatible=True)
    torch.testing.assert_close(found, (expected.flip(1) * scale)[0], atol=1e-5, rtol=0)
