"""Intensity augmentations against independent implementations."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from scipy import ndimage

from nnssl_ext.views.augment import AUGMENTATIONS, augment
from nnssl_ext.views.filters import separable
from nnssl_ext.views.policies import IntensitySettings, draw_intensity


@pytest.fixture
def images() -> torch.Tensor:
    images = torch.randn(3, 2, 14, 40, 37, generator=torch.Generator().manual_seed(0)) * 3 + 1
    images[:, :, :, :10] = -2  # a flat background, as scans have
    return images


def test_blur_equals_scipy_away_from_borders(images):
    sigmas = [0.5, 0.8, 1.0]
    blurred = augment(images.clone(), [{"blur": sigma} for sigma in sigmas])
    for image, result, sigma in zip(images, blurred, sigmas, strict=True):
        for channel in range(2):
            expected = ndimage.gaussian_filter(image[channel].numpy(), sigma, truncate=4, radius=int(4 * sigma))
            inner = (slice(4, -4),) * 3
            torch.testing.assert_close(result[channel][inner], torch.from_numpy(expected)[inner], atol=1e-4, rtol=1e-4)


def test_blur_keeps_a_constant_image_up_to_its_borders():
    image = torch.full((1, 1, 9, 50, 33), 2.5)
    torch.testing.assert_close(augment(image.clone(), [{"blur": 1.0}]), image)


@pytest.mark.parametrize("scale", [0.5, 0.63, 0.9])
def test_low_resolution_equals_batchgenerators(images, scale):
    result = augment(images.clone(), [{"low_resolution": scale}] * 3)
    theirs = SimulateLowResolutionTransform((scale, scale), True, True, None)
    parameters = {"apply_to_channel": [0, 1], "scales": torch.full((2, 3), scale)}
    for image, ours in zip(images, result, strict=True):
        torch.testing.assert_close(ours, theirs._apply_to_image(image.clone(), **parameters), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_equals_batchgenerators(images, factor):
    result = augment(images.clone(), [{"contrast": factor}] * 3)
    theirs = ContrastTransform((factor, factor), preserve_range=True, synchronize_channels=True)
    for image, ours in zip(images, result, strict=True):
        torch.testing.assert_close(ours, theirs(image=image.clone())["image"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "inverted"), [("gamma", 0), ("gamma_inverted", 1)])
def test_gamma_equals_batchgenerators(images, name, inverted):
    for exponent in (0.7, 1.5):
        result = augment(images.clone(), [{name: exponent}] * 3)
        theirs = GammaTransform((exponent, exponent), inverted, True, 1, 1)
        for image, ours in zip(images, result, strict=True):
            torch.testing.assert_close(ours, theirs(image=image.clone())["image"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_the_power_law_equals_batchgenerators_gamma_without_retained_statistics(images, exponent):
    result = augment(images.clone(), [{"power_law": exponent}] * 3)
    theirs = GammaTransform((exponent, exponent), 0, True, 1, 0)
    for image, ours in zip(images, result, strict=True):
        torch.testing.assert_close(ours, theirs(image=image.clone())["image"], atol=1e-3, rtol=1e-3)
    assert (result.mean() - images.mean()).abs() > 0.5


def test_gamma_of_a_heavy_tailed_image_keeps_mean_and_std():
    image = torch.randn(1, 1, 64, 64, 64)
    image[0, 0, 0, 0, 0] = 5000  # nearly all voxels within 0.1 % of the range
    result = augment(image.clone(), [{"gamma": 1.4}])
    torch.testing.assert_close(result.double().mean(), image.double().mean(), atol=0.05, rtol=0)
    torch.testing.assert_close(result.double().std(), image.double().std(), atol=0, rtol=0.02)


def test_a_constant_image_stays_finite():
    for name in AUGMENTATIONS:
        result = augment(torch.zeros(1, 1, 8, 8, 8), [{name: 0.8, f"{name}_seed": 3.0}])
        assert torch.isfinite(result).all(), name


def test_noise_has_its_strength_and_its_seed(images):
    draws = [{"noise": 0.1, "noise_seed": 7.0}, {}, {"noise": 0.5, "noise_seed": 8.0}]
    added = augment(images.clone(), draws) - images
    assert added[0].std() == pytest.approx(0.1, rel=0.05) and added[2].std() == pytest.approx(0.5, rel=0.05)
    assert not added[1].any()
    alone = augment(images[2:].clone(), draws[2:]) - images[2:]
    torch.testing.assert_close(alone[0], added[2])
    assert abs(torch.corrcoef(torch.stack([added[0].flatten(), added[2].flatten()]))[0, 1]) < 0.05


def test_only_the_drawn_samples_change_and_each_as_if_alone(images):
    draws = [{"brightness": 1.2, "gamma": 0.8}, {}, {"blur": 0.7, "brightness": 0.8}]
    together = augment(images.clone(), draws)
    assert torch.equal(together[1], images[1])
    for row in (0, 2):
        torch.testing.assert_close(together[row], augment(images[row : row + 1].clone(), [draws[row]])[0])


def test_drawn_strengths_are_in_the_order_of_application():
    settable = [name for name in AUGMENTATIONS if hasattr(IntensitySettings, name)]
    every = IntensitySettings(**dict.fromkeys(settable, 1.0))
    drawn = draw_intensity(every, np.random.default_rng(0))
    assert len(settable) == 15 and [name for name in drawn if not name.endswith("_seed")] == settable


@pytest.mark.parametrize("band", [0, 3, 200])
def test_separable_equals_full_matrix_products(band):
    generator = torch.Generator().manual_seed(0)
    matrices = {n: torch.randn(2, n, n, generator=generator).tril(band).triu(-band) for n in (70, 33, 5)}
    image = torch.randn(2, 3, 70, 33, 5, generator=generator)
    expected = torch.einsum("bij,bkl,bmn,bcjln->bcikm", matrices[70], matrices[33], matrices[5], image)
    torch.testing.assert_close(separable(image.clone(), matrices.__getitem__), expected, atol=1e-3, rtol=1e-3)
