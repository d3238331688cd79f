"""What is drawn: places, turns, zooms and strengths."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.transform import Rotation

from nnssl_ext.geometry.affines import bounding_box, is_integer
from nnssl_ext.records import Case
from nnssl_ext.views.masks import MaskSettings
from nnssl_ext.views.policies import IntensitySettings, SingleView, SpatialSettings, draw_intensity
from nnssl_ext.views.recipes import DINO_INTENSITY, STILL


def case(shape=(40, 50, 60), spacing=(1.0, 1.0, 1.0)) -> Case:
    return Case("x", Path(), 1, shape, spacing)


def draws(policy: SingleView, of: Case, number: int):
    return [policy.draw(of, np.random.default_rng([7, n]), 0.5)[0] for n in range(number)]


def test_places_are_uniform_over_all_that_fit():
    of, size = case((40, 16, 17)), (30, 16, 16)
    lowers = np.array([bounding_box(d.affine, size).lower for d in draws(SingleView(size, spatial=STILL), of, 2000)])
    assert stats.chisquare(np.bincount(lowers[:, 0], minlength=11)).pvalue > 1e-3
    assert (lowers[:, 0].min(), lowers[:, 0].max()) == (0, 10)
    assert set(lowers[:, 1]) == {0} and set(lowers[:, 2]) == {0, 1}


def test_flipped_crops_stay_inside_whole_voxels():
    policy = SingleView((16, 24, 32), spatial=SpatialSettings(rotation=0.0, zoom=0.0))
    for draw in draws(policy, case(), 200):
        box = bounding_box(draw.affine, draw.size)
        assert is_integer(draw.affine) and box.shape == draw.size
        assert min(box.lower) >= 0 and all(u <= n for u, n in zip(box.upper, (40, 50, 60), strict=True))


@pytest.mark.parametrize(("shape", "lower"), [((35, 50, 36), (-3, -3, -2)), ((8, 56, 100), (-16, 0, None))])
def test_a_volume_smaller_than_the_view_sits_in_its_middle(shape, lower):
    for draw in draws(SingleView((40, 56, 40), spatial=STILL), case(shape), 20):
        found = bounding_box(draw.affine, draw.size).lower
        assert all(expected is None or expected == got for expected, got in zip(lower, found, strict=True))


def test_zoomed_views_stay_inside_where_they_fit():
    policy = SingleView((16, 24, 60), spatial=SpatialSettings(rotation=0.0, zoom=1.0))
    seen = []
    for draw in draws(policy, case(), 300):
        zoom = np.abs(np.diag(draw.affine)[:3])
        assert zoom.min() == zoom.max()
        seen.append(zoom[0])
        box = bounding_box(draw.affine, draw.size)
        assert min(box.lower[:2]) >= -1 and box.upper[0] <= 41 and box.upper[1] <= 51  # one face, half a voxel
        assert (box.lower[2] < 0) == (zoom[0] > 61 / 60) or abs(zoom[0] - 1) < 0.05
    assert 0.7 <= min(seen) < 0.72 and 1.38 < max(seen) <= 1.4


def test_frequencies_are_those_of_the_settings():
    found = draws(SingleView((16, 16, 16), intensity=IntensitySettings()), case(), 3000)
    linear = np.stack([d.affine[:3, :3] for d in found])
    volume = np.linalg.det(linear)
    turned = np.array([not np.allclose(m, np.diag(np.diag(m)), atol=1e-12) for m in linear])
    assert turned.mean() == pytest.approx(0.2, abs=0.03)
    assert (np.abs(np.abs(volume) - 1) > 1e-9).mean() == pytest.approx(0.2, abs=0.03)
    assert (volume < 0).mean() == pytest.approx(0.5, abs=0.04)  # an odd number of flips
    for name, expected in {"noise": 0.1, "blur": 0.2, "brightness": 0.15, "low_resolution": 0.25, "gamma": 0.3}.items():
        assert np.mean([name in d.intensity for d in found]) == pytest.approx(expected, abs=0.03)
    gammas = np.array([d.intensity["gamma"] for d in found if "gamma" in d.intensity])
    assert (gammas < 1).mean() == pytest.approx(0.5, abs=0.06) and 0.7 <= gammas.min() < gammas.max() <= 1.5


@pytest.mark.parametrize(("recipe", "share"), list(zip(DINO_INTENSITY, (1.0, 0.1, 0.5), strict=True)))
def test_3dinos_views_are_either_smoothed_or_sharpened(recipe, share):
    found = [draw_intensity(recipe, np.random.default_rng([3, n])) for n in range(2000)]
    blurred, sharpened = (np.array([name in draw for draw in found]) for name in ("blur", "sharpen"))
    assert not (blurred & sharpened).any()
    assert (blurred | sharpened).mean() == pytest.approx(share, abs=0.025) and (
        share < 1 or (blurred | sharpened).all()
    )
    assert blurred.mean() == pytest.approx(share / 2, abs=0.035)


def test_angles_reach_their_limit_about_each_axis_and_not_beyond():
    policy = SingleView((16, 16, 16), spatial=SpatialSettings(flip=(0.0, 0.0, 0.0), rotation=1.0, zoom=0.0))
    turns = np.stack([d.affine[:3, :3] for d in draws(policy, case(), 500)])
    angles = np.abs(Rotation.from_matrix(turns).as_euler("XYZ", degrees=True))  # scipy's X, Y, Z are our z, y, x
    assert angles.max() <= 30 + 1e-6 and (angles.max(0) > 28).all() and (angles.min(0) < 2).all()


def test_thick_slices_are_neither_tilted_nor_zoomed_through():
    policy = SingleView((8, 32, 32), spatial=SpatialSettings(rotation=1.0, zoom=1.0))
    for draw in draws(policy, case((12, 90, 80), spacing=(5.0, 1.0, 1.0)), 100):
        linear = draw.affine[:3, :3]
        np.testing.assert_allclose(np.abs(linear[0]), (1, 0, 0), atol=1e-12)
        np.testing.assert_allclose(linear[1:, 0], 0, atol=1e-12)
        assert abs(linear[1, 2]) > 0
        box = bounding_box(draw.affine, draw.size)
        assert box.shape[0] == 8 and box.lower[0] >= 0 and box.upper[0] <= 12


def test_nothing_is_applied_when_nothing_is_asked_for():
    (draw,) = SingleView((8, 8, 8), spatial=STILL).draw(case(), np.random.default_rng(0), 0.5)
    assert draw.intensity == {} and draw.mask is None
    (masked,) = SingleView((8, 8, 8), MaskSettings((4, 4, 4)), STILL).draw(case(), np.random.default_rng(0), 0.5)
    assert masked.mask is not None and masked.mask.sum() == 6
