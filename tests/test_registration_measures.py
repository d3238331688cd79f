"""Overlap, surface distance and landmark error against hand values and brute force."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_ext.registration.measures import dice, hd95
from nnssl_ext.registration.outputs import _overlap


def cube(lower, upper, shape=(12, 12, 12), label=1):
    volume = np.zeros(shape, int)
    volume[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = label
    return volume


def test_dice_by_hand():
    fixed, warped = cube((0, 0, 0), (2, 2, 2)), cube((1, 0, 0), (3, 2, 2))
    assert dice(fixed, warped, (1, 2))[1] == 0.5
    assert math.isnan(dice(fixed, warped, (2,))[2])
    assert dice(fixed, cube((0, 0, 0), (2, 2, 2), label=2), (1,))[1] == 0


def brute_force_hd95(a, b, spacing):
    def surface(mask):
        points = []
        for voxel in np.argwhere(mask):
            for axis, step in itertools.product(range(3), (-1, 1)):
                neighbour = voxel.copy()
                neighbour[axis] += step
                outside = neighbour.min() < 0 or (neighbour >= mask.shape).any()
                if outside or not mask[tuple(neighbour)]:
                    points.append(voxel * spacing)
                    break
        return np.array(points)

    a, b = surface(a), surface(b)
    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return np.percentile(np.concatenate([between.min(1), between.min(0)]), 95)


def test_hd95_equals_brute_force_on_anisotropic_voxels():
    rng = np.random.default_rng(0)
    spacing = (2.5, 1.0, 0.5)
    fixed = cube((2, 3, 1), (8, 9, 12)) * (rng.random((12, 12, 12)) > 0.1)
    warped = cube((4, 1, 0), (9, 8, 10)) * (rng.random((12, 12, 12)) > 0.1)
    expected = brute_force_hd95(fixed == 1, warped == 1, np.array(spacing))
    assert hd95(fixed, warped, spacing, (1,))[1] == pytest.approx(expected)


def test_hd95_needs_the_label_on_both_sides():
    assert math.isnan(hd95(cube((0, 0, 0), (2, 2, 2)), cube((0, 0, 0), (2, 2, 2), label=2), (1.0, 1.0, 1.0), (1,))[1])


def lost_and_found(fixed: list[int], moving: list[int], push: float) -> dict:
    """Overlap of cubes of some labels in two volumes of 20 voxels of 1 x 1 x 2 mm, label 2 pushed along x."""
    images = []
    for labels in (fixed, moving):
        array = np.zeros((20, 20, 20), np.uint8)
        for label in labels:
            array[6 * label - 3 : 6 * label, 8:11, 8:11] = label
        images.append(sitk.GetImageFromArray(array))
        images[-1].SetSpacing((1.0, 1.0, 2.0))
    vectors = np.zeros((20, 20, 20, 3))
    vectors[9:12, ..., 0] = push
    field = sitk.GetImageFromArray(vectors, isVector=True)
    field.CopyInformation(images[0])
    return _overlap(*images, sitk.DisplacementFieldTransform(field))["hd95_mm"]


def test_losing_a_label_is_worse_than_any_misplacement_of_it():
    diagonal = np.sqrt(20**2 + 20**2 + 40**2)
    kept, lost = lost_and_found([1, 2], [1, 2], 5.0), lost_and_found([1, 2], [1, 2], 50.0)
    assert kept["per_label"] == {"1": 0.0, "2": 5.0}
    assert lost["per_label"] == {"1": 0.0, "2": pytest.approx(diagonal)}
    assert lost["mean"] == pytest.approx(diagonal / 2)


def test_a_label_that_a_scan_lacks_has_no_distance():
    assert lost_and_found([1], [1, 2], 0.0) == {"mean": 0.0, "per_label": {"1": 0.0, "2": None}}
    assert lost_and_found([1, 2], [1], 0.0) == {"mean": 0.0, "per_label": {"1": 0.0, "2": None}}
