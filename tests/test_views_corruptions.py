"""Augmentations that are not nnU-Net's, against independent computations."""

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from nnssl_ext.views.augment import AUGMENTATIONS, augment
from nnssl_ext.views.corruptions import BOX_EDGES, _draw_boxes, _random_layers
from nnssl_ext.views.policies import SEEDED, IntensitySettings, draw_intensity

SHAPE = (14, 26, 21)
NEW = ("random_convolutions", "histogram_shift", "bias_field", "sharpen", "shift", "gibbs", "cutout")


@pytest.fixture
def images() -> torch.Tensor:
    images = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 1
    images[:, :, :, :6] = -2  # a flat background, as scans have
    return images


def apply(images, name, *strengths) -> torch.Tensor:
    return augment(images.clone(), [{name: s, f"{name}_seed": 10.0 + row} for row, s in enumerate(strengths)])


@pytest.mark.parametrize("name", NEW)
def test_strength_zero_changes_nothing(images, name):
    torch.testing.assert_close(apply(images, name, 0.0, 0.0, 0.0), images, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NEW)
def test_a_sample_does_not_depend_on_its_batch(images, name):
    together = apply(images, name, 0.1, 0.2, 0.3)
    alone = augment(images[2:].clone(), [{name: 0.3, f"{name}_seed": 12.0}])
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-4)
    changed = (together - images).abs().amax((1, 2, 3, 4))
    assert (changed > 0.01).all()


@pytest.mark.parametrize("name", [name for name in NEW if name in SEEDED])
def test_seeds_make_the_difference(images, name):
    one, again, other = (augment(images[:1].clone(), [{name: 0.3, f"{name}_seed": seed}]) for seed in (1.0, 1.0, 2.0))
    assert torch.equal(one, again) and (one - other).abs().max() > 0.05


def test_random_convolutions_equal_scipy_correlations(images):
    result = apply(images, "random_convolutions", 1.0, 0.3, 0.7)
    for row, alpha in enumerate((1.0, 0.3, 0.7)):
        layers = _random_layers([2, 2, 2, 2, 2], seed=10 + row)
        assert {int((w[0, 0] != 0).sum()) for w, _ in layers} <= {1, 27}
        maps = images[row].double().numpy()
        for number, (weight, bias) in enumerate(layers):
            maps = np.stack(
                [
                    sum(ndimage.correlate(m, k, mode="constant") for m, k in zip(maps, kernels, strict=True)) + shift
                    for kernels, shift in zip(weight.double().numpy(), bias.double().numpy(), strict=True)
                ]
            )
            if number < 3:
                maps = np.where(maps > 0, maps, 0.01 * maps)
        for channel, original in zip(range(2), images[row].double().numpy(), strict=True):
            mixed = alpha * stats.zscore(maps[channel], None) + (1 - alpha) * stats.zscore(original, None)
            expected = stats.zscore(mixed, None) * original.std() + original.mean()
            np.testing.assert_allclose(result[row, channel], expected, atol=2e-3)


def test_random_networks_differ_in_contrast():
    """What it is for: the order of two tissues is turned round now and then."""
    image = torch.zeros(1, 1, 12, 12, 12)
    image[..., 6:] = 1.0
    darker = [
        bool(
            (out := augment(image.clone(), [{"random_convolutions": 1.0, "random_convolutions_seed": float(seed)}]))[
                0, 0, 6, 6, 9
            ]
            < out[0, 0, 6, 6, 2]
        )
        for seed in range(60)
    ]
    assert 0.25 < np.mean(darker) < 0.75


def test_histogram_shift_is_a_monotone_tone_curve_through_its_control_points(images):
    result = apply(images, "histogram_shift", 1.0, 0.5, 0.8)
    for row, extent in enumerate((1.0, 0.5, 0.8)):
        inner = torch.rand(8, generator=torch.Generator().manual_seed(10 + row)).sort().values.numpy()
        even = np.linspace(0, 1, 10)
        curve = (1 - extent) * even + extent * np.array([0, *inner, 1])
        for channel in range(2):
            image = images[row, channel].numpy()
            low, high = image.min(), image.max()
            expected = np.interp((image - low) / (high - low), even, curve) * (high - low) + low
            np.testing.assert_allclose(result[row, channel], expected, atol=1e-3)
            order = np.argsort(image, None)
            assert (np.diff(result[row, channel].numpy().ravel()[order]) >= -1e-4).all()


def test_bias_field_is_exp_of_a_cubic_polynomial_with_mean_1(images):
    images.clamp_(min=-3)[:, :, 0, 0, 0] = -3  # black
    ratio = (apply(images, "bias_field", 0.1, 0.3, 0.5) + 3) / (images + 3)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    terms = [z**i * y**j * x**k for i in range(4) for j in range(4) for k in range(4) if i + j + k <= 3]
    design = np.stack([term.ravel() for term in terms], axis=1)
    for row, extent in enumerate((0.1, 0.3, 0.5)):
        # where the image is well above black and the quotient is sharp
        sharp = (images[row].amin(0) > -2.5).numpy().ravel()
        logarithm = np.log(ratio[row, 0].numpy().ravel()[sharp])
        np.testing.assert_allclose(logarithm, np.log(ratio[row, 1].numpy().ravel()[sharp]), atol=1e-4)
        fitted, *_ = np.linalg.lstsq(design[sharp], logarithm, rcond=None)
        np.testing.assert_allclose(design[sharp] @ fitted, logarithm, atol=1e-4)
        assert extent / 2 < np.abs(fitted[1:]).max() <= extent + 1e-3
        assert np.exp(design @ fitted).mean() == pytest.approx(1, abs=1e-3)


def test_sharpening_adds_back_what_a_blur_takes_away(images):
    result = apply(images, "sharpen", 0.5, 1.0, 2.0)
    inner = (slice(4, -4),) * 3
    for row, amount in enumerate((0.5, 1.0, 2.0)):
        image = images[row, 0].double().numpy()
        expected = image + amount * (image - ndimage.gaussian_filter(image, 1.0, truncate=4))
        np.testing.assert_allclose(result[row, 0][inner], expected[inner], atol=1e-3)


def test_shift_adds_its_strength(images):
    torch.testing.assert_close(
        apply(images, "shift", 0.5, -0.3, 0.0) - images,
        torch.tensor([0.5, -0.3, 0.0]).view(3, 1, 1, 1, 1).expand_as(images),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("shape", [(14, 26, 21), (16, 16, 16), (9, 15, 8)])
def test_gibbs_keeps_the_frequencies_inside_a_sphere(shape):
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    result = augment(image.clone(), [{"gibbs": 0.47}])
    before, after = (np.fft.fftn(v[0, 0].double().numpy()) for v in (image, result))
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")))
    kept = radius <= 0.53 * np.sqrt(3) / 2
    assert 0.1 < kept.mean() < 0.5
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-2)
    np.testing.assert_allclose(after[~kept], 0, atol=1e-2)


def test_cutout_hides_boxes_by_the_mean_and_leaves_the_rest(images):
    result = apply(images, "cutout", 0.1, 0.2, 0.3)
    for row, share in enumerate((0.1, 0.2, 0.3)):
        hidden = np.zeros(SHAPE, bool)
        for lower, upper in _draw_boxes(torch.Size(SHAPE), share, 10 + row).tolist():
            hidden[tuple(map(slice, lower, upper))] = True
        assert 0.4 * share < hidden.mean() <= share
        for channel in range(2):
            image, cut = images[row, channel].numpy(), result[row, channel].numpy()
            np.testing.assert_array_equal(cut[~hidden], image[~hidden])
            np.testing.assert_allclose(cut[hidden], image.mean(), atol=1e-4)


def test_boxes_lie_inside_with_edges_in_their_range():
    size = (40, 80, 60)
    boxes = torch.cat([_draw_boxes(torch.Size(size), 0.3, seed) for seed in range(20)]).double().numpy()
    lower, edges = boxes[:, 0], boxes[:, 1] - boxes[:, 0]
    empty = edges.max(1) == 0
    shares = edges[~empty] / size
    assert empty.any() and shares.min() >= BOX_EDGES[0] - 0.02 and shares.max() <= BOX_EDGES[1] + 0.02
    assert (lower >= 0).all() and (boxes[:, 1] <= size).all() and (boxes[~empty, 1] == size).any(0).all()


def test_they_are_off_by_default_and_drawn_with_their_seeds_when_on():
    rng = np.random.default_rng(0)
    assert not any(set(draw_intensity(IntensitySettings(), rng)) & set(NEW) for _ in range(200))
    settable = [name for name in AUGMENTATIONS if hasattr(IntensitySettings, name)]
    drawn = draw_intensity(IntensitySettings(**dict.fromkeys(settable, 1.0)), rng)
    assert {name for name in drawn if f"{name}_seed" in drawn} == set(SEEDED)
    offsets = [draw_intensity(IntensitySettings(shift=1.0), rng)["shift"] for _ in range(300)]
    assert stats.kstest(np.array(offsets) + 0.5, "uniform").pvalue > 1e-3
