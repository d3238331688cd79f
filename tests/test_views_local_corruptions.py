"""Shuffled blocks, Bezier curves, noise cuboids and vox2vec's filters: what each keeps and what each changes."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl_ext.data.intensity_scale import IntensityScale
from nnssl_ext.views.augment import augment
from nnssl_ext.views.dense_recipes import LocalIntensity, WindowIntensity
from nnssl_ext.views.local_corruptions import CUBOIDS, MARGIN

SIZE = (40, 64, 45)  # blocks of 2 x 3 x 2
CT = IntensityScale(black=-6.0, white=3.4, body=-2.6, hounsfield=True)  # mean 150 HU, 250 HU per unit
MR = IntensityScale(black=-1.5, white=4.0, body=-1.0, hounsfield=False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 2, *SIZE, generator=torch.Generator().manual_seed(0)) * 3 + 1


def one(image: torch.Tensor, **draw: float) -> torch.Tensor:
    return augment(image.clone(), [draw])


def numbered(size=SIZE) -> torch.Tensor:
    """An image whose voxels hold their own number."""
    return torch.arange(float(np.prod(size))).view(1, 1, *size)


def blocks_of(moved: torch.Tensor) -> tuple[list[tuple], list[tuple]]:
    """Corners of the blocks that were shuffled, and the permutation seen in each, found by trying all origins of the grid."""
    for origin in product(range(2), range(3), range(2)):
        corners, permutations, left = [], [], (moved != numbered()[0, 0]).clone()
        for corner in product(*(range(o, n - e + 1, e) for o, n, e in zip(origin, SIZE, (2, 3, 2), strict=True))):
            place = tuple(slice(c, c + e) for c, e in zip(corner, (2, 3, 2), strict=True))
            if left[place].any():
                original = numbered()[0, 0][place].flatten().tolist()
                block = moved[place].flatten().tolist()
                if sorted(block) != original:
                    break
                corners.append(corner)
                permutations.append(tuple(original.index(value) for value in block))
                left[place] = False
        if not left.any() and corners:
            return corners, permutations
    raise AssertionError("what moved is not a set of blocks on a grid")


def test_shuffled_blocks_keep_their_values_and_share_one_permutation():
    moved = one(numbered(), shuffle=0.4, shuffle_seed=5.0)[0, 0]
    corners, permutations = blocks_of(moved)
    assert len(set(permutations)) == 1 and permutations[0] != tuple(range(12))
    whole = 20 * 21 * 22  # blocks, or one row of them fewer along an axis where the grid does not begin at the border
    assert 0.4 * 19 * 20 * 21 - 1 <= len(corners) <= 0.4 * whole + 1


def test_all_blocks_or_none_are_shuffled():
    assert torch.equal(one(numbered(), shuffle=0.0, shuffle_seed=5.0), numbered())
    corners, _ = blocks_of(one(numbered(), shuffle=1.0, shuffle_seed=5.0)[0, 0])
    assert len(corners) >= 19 * 20 * 21


def test_small_views_are_shuffled_in_blocks_of_two_voxels():
    small = numbered((20, 28, 20))  # the local crop of the Tiny presets
    moved = one(small, shuffle=1.0, shuffle_seed=1.0)
    assert torch.equal(moved.flatten().sort().values, small.flatten())
    assert (moved != small).float().mean() > 0.5
    away = torch.stack(torch.meshgrid(*map(torch.arange, small.shape[2:]), indexing="ij")).flatten(1)
    assert (away[:, moved.flatten().long()] - away).abs().max() == 1  # no voxel leaves its block
    flat = numbered((1, 30, 30))  # blocks of one plane where there is no second
    moved = one(flat, shuffle=1.0, shuffle_seed=1.0)
    assert torch.equal(moved.flatten().sort().values, flat.flatten()) and not torch.equal(moved, flat)


def test_samples_are_shuffled_differently_and_channels_alike():
    both = augment(numbered().repeat(2, 2, 1, 1, 1), [{"shuffle": 0.5, "shuffle_seed": seed} for seed in (1.0, 2.0)])
    assert torch.equal(both[0, 0], both[0, 1])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1:, :1], one(numbered(), shuffle=0.5, shuffle_seed=2.0))  # as if alone


@pytest.mark.parametrize("seed", range(5))
def test_bezier_curves_rise_and_keep_both_ends(seed):
    ramp = torch.linspace(-3, 5, 8 * 8 * 8).view(1, 1, 8, 8, 8)
    tone = one(ramp, bezier=1.0, bezier_seed=float(seed)).flatten()
    assert tone[0] == pytest.approx(-3, abs=1e-4) and tone[-1] == pytest.approx(5, abs=1e-4)
    assert (tone.diff() >= -1e-5).all()
    assert (tone - ramp.flatten()).abs().max() > 0.1


def test_a_bezier_curve_is_that_of_its_control_points():
    first, second = torch.rand(2, 2, generator=torch.Generator().manual_seed(3)).T.tolist()
    t = np.linspace(0, 1, 100_001)
    x, y = (3 * t * (1 - t) ** 2 * first[axis] + 3 * t**2 * (1 - t) * second[axis] + t**3 for axis in (0, 1))
    ramp = torch.linspace(0, 1, 10**3).view(1, 1, 10, 10, 10)
    expected = np.interp(ramp.flatten().numpy(), x, y)
    found = one(ramp, bezier=1.0, bezier_seed=3.0).flatten().numpy()
    np.testing.assert_allclose(found[5:], expected[5:], atol=2e-3)  # it begins nearly upright


def test_half_a_bezier_curve_is_the_mean_of_it_and_the_identity():
    ramp = torch.linspace(-3, 5, 8 * 8 * 8).view(1, 1, 8, 8, 8)
    whole, half = (one(ramp, bezier=extent, bezier_seed=3.0) for extent in (1.0, 0.5))
    torch.testing.assert_close(half, (whole + ramp) / 2, atol=2e-2, rtol=0)


@pytest.mark.parametrize("count", [1, 7, CUBOIDS])
def test_noise_cuboids_keep_their_limits(images, count):
    result = augment(images.clone(), [{"inpaint": float(count), "inpaint_seed": float(s)} for s in range(3)])
    for image, painted in zip(images, result, strict=True):
        changed = (painted != image).any(0)
        assert torch.equal(changed, (painted != image).all(0))  # all channels at once
        pieces, number = ndimage.label(changed.numpy())
        assert 1 <= number <= count
        inner = tuple(slice(MARGIN, -MARGIN) for _ in SIZE)
        assert changed.sum() == changed[inner].sum() > 0
        low, high = image.amin((1, 2, 3)), image.amax((1, 2, 3))
        for channel in range(2):
            noise = painted[channel][changed]
            assert low[channel] <= noise.min() and noise.max() <= high[channel]
            uniform = (noise - low[channel]) / (high[channel] - low[channel])
            assert uniform.mean() == pytest.approx(0.5, abs=0.15) and uniform.std() == pytest.approx(0.289, abs=0.06)
        if count == 1:
            (box,) = ndimage.find_objects(pieces)
            for edge, length in zip(box, SIZE, strict=True):
                assert length // 10 <= edge.stop - edge.start <= length // 5


def test_cuboids_fit_into_small_views_too():
    image = torch.randn(1, 1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    painted = one(image, inpaint=3.0, inpaint_seed=1.0)
    assert 1 <= (painted != image).sum() <= 3


@pytest.mark.parametrize("name", ["shuffle", "bezier", "inpaint"])
def test_every_local_corruption_follows_its_seed_whatever_the_batch(images, name):
    draws = [{name: 1.0, f"{name}_seed": 7.0}, {}, {name: 1.0, f"{name}_seed": 8.0}]
    together = augment(images.clone(), draws)
    assert torch.equal(together[1], images[1])
    torch.testing.assert_close(together[2], augment(images[2:].clone(), draws[2:])[0])
    assert not torch.equal(together[2], augment(images[2:].clone(), draws[:1])[0])


def test_axial_filters_equal_scipys_in_every_slice(images):
    blurred = one(images[:1], axial_blur=1.2)
    expected = ndimage.gaussian_filter(images[0].numpy(), (0, 0, 1.2, 1.2), truncate=4, radius=(0, 0, 4, 4))
    inner = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(blurred[0][inner], torch.from_numpy(expected)[inner], atol=1e-4, rtol=1e-4)
    sharp = one(images[:1], axial_blur=0.8, axial_sharpen=12.0)[0]
    once = ndimage.gaussian_filter(images[0].numpy(), (0, 0, 0.8, 0.8), truncate=4, radius=(0, 0, 3, 3))
    twice = ndimage.gaussian_filter(once, (0, 0, 0.5, 0.5), truncate=4, radius=(0, 0, 2, 2))
    expected = torch.from_numpy(once + 12 * (once - twice))  # vox2vec: blurred + alpha (blurred - blurred again)
    torch.testing.assert_close(sharp[inner], expected[inner], atol=1e-3, rtol=1e-3)


def test_a_window_is_the_papers_restated(images):
    """Clip to [lo, hi] HU, scale to [0, 1], then to where the widest window lies: computed in HU by hand."""
    plain = WindowIntensity(filter=0.0, noise=0.0, window=1.0)
    draw = plain.draw(CT, np.random.default_rng(0))
    mean, std = 150.0, 250.0
    low, high = draw["floor"] * std + mean, draw["ceiling"] * std + mean
    assert -1350 <= low <= -1000 and 300 <= high <= 1000
    assert not any("bezier" in name for name in draw)
    hu = images[:1, :1] * 300
    expected = (hu.clamp(low, high) - low) / (high - low) * 2350 - 1350
    found = one((hu - mean) / std, **draw) * std + mean
    torch.testing.assert_close(found, expected, atol=0.1, rtol=1e-4)


def test_a_window_leaves_other_channels_as_they_are(images):
    """Their scale is another: here a lesion nine standard deviations bright in the second sequence only."""
    images[:, 1, 10:20, 10:20, 10:20] += 9
    draw = WindowIntensity(filter=0.0, noise=0.0, window=1.0).draw(CT, np.random.default_rng(0))
    found = augment(images.clone(), [draw] * 3)
    assert torch.equal(found[:, 1], images[:, 1])
    assert torch.equal(found[:, :1], augment(images[:, :1].clone(), [draw] * 3))  # as if alone
    assert not torch.equal(found[:, 0], images[:, 0])


def test_without_a_random_window_only_the_ends_of_the_widest_are_cut(images):
    draw = WindowIntensity(filter=0.0, noise=0.0, window=0.0).draw(CT, np.random.default_rng(0))
    assert draw == {"floor": pytest.approx(-6.0), "ceiling": pytest.approx(3.4)}


def test_draws_have_the_papers_probabilities_and_strengths():
    rng, seen, filters = np.random.default_rng(0), [], WindowIntensity()
    for _ in range(2000):
        seen.append(filters.draw(CT, rng))
    share = {
        name: np.mean([name in draw for draw in seen])
        for name in ("axial_blur", "axial_sharpen", "noise", "window_shift")
    }
    assert share == {name: pytest.approx(p, abs=0.04) for name, p in zip(share, (0.5, 0.25, 0.5, 0.8), strict=True)}
    assert max(draw["noise"] for draw in seen if "noise" in draw) == pytest.approx(30 / 250, rel=0.02)
    assert all("bezier" in draw for draw in (filters.draw(MR, rng) for _ in range(20)) if "window_shift" in draw)
    local = [LocalIntensity().draw(MR, rng) for _ in range(2000)]
    assert np.mean(["shuffle" in draw for draw in local]) == pytest.approx(0.8, abs=0.03)
    assert np.mean(["bezier" in draw for draw in local]) == pytest.approx(0.9, abs=0.03)
    counts = np.array([draw.get("inpaint", 0) for draw in local])
    assert (counts >= 1).mean() == pytest.approx(0.95, abs=0.02) and counts.max() == 30
    assert (counts == 30).mean() == pytest.approx(0.95**30, abs=0.03)
    assert next(d["shuffle"] for d in local if "shuffle" in d) == pytest.approx(5000 * 36 / 524_288)
    assert LocalIntensity(0.0, 0.3, 0.0, 0.0).draw(MR, rng) == {}
