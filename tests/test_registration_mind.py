"""MIND-SSC against the package it reproduces, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl_ext.registration.mind import PAIRS, isotropic_dilation, mind


def image(seed: int = 0, shape=(14, 12, 10)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (2, 1), (3, 2)])
def test_it_equals_convexadam(radius, dilation):
    package = pytest.importorskip("convexAdam.convex_adam_utils", reason="needs convexAdam (pip install convexAdam)")
    expected = package.MINDSSC(image()[None, None], radius, dilation, device="cpu")[0]
    assert (mind(image(), radius, (dilation,) * 3) - expected).abs().max() < 1e-6
    flat = image(shape=(14, 12, 20))
    flat[..., :10] *= 0.01  # variances of 1e-4 of the others': below the lower bound
    expected = package.MINDSSC(flat[None, None], radius, dilation, device="cpu")[0]
    assert (mind(flat, radius, (dilation,) * 3) - expected).abs().max() < 1e-5


def test_a_voxel_by_hand():
    """Loops over offsets and patches, as the paper defines them."""
    voxels, radius, dilation, place = image().double(), 1, (1, 2, 2), (6, 5, 4)
    array = voxels.numpy()

    def at(point):  # the border is repeated
        return array[tuple(np.clip(point, 0, np.array(array.shape) - 1))]

    def distance(pair, centre):
        steps = []
        for axis, side in pair:
            step = np.zeros(3, int)
            step[axis] = side * dilation[axis]
            steps.append(step)
        patch = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
        return np.mean([(at(centre + p + steps[0]) - at(centre + p + steps[1])) ** 2 for p in patch])

    distances = np.array([distance(pair, np.array(place)) for pair in PAIRS])
    distances -= distances.min()
    expected = np.exp(-distances / distances.mean())
    assert np.allclose(mind(voxels, radius, dilation)[(slice(None), *place)].numpy(), expected, atol=1e-9)


def test_the_pairs_are_the_twelve_at_right_angles():
    assert len({frozenset(pair) for pair in PAIRS}) == 12
    assert all(one[0] != other[0] for one, other in PAIRS)


def test_contrast_and_brightness_do_not_matter():
    assert torch.allclose(mind(image()), mind(image() * 700 - 300), atol=1e-3)
    assert torch.allclose(mind(image()), mind(-image()), atol=1e-5)  # inverted, as between modalities


def test_a_constant_image_is_finite_and_featureless():
    assert (mind(torch.full((8, 8, 8), 3.0)) == 1).all()


def test_dilation_is_alike_in_mm():
    assert isotropic_dilation((1.0, 1.0, 1.0)) == (2, 2, 2)
    assert isotropic_dilation((5.0, 1.0, 0.5)) == (1, 1, 2)
