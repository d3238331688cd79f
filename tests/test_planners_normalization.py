"""Normalisation against hand values, and which data count as heavy-tailed."""

import nibabel
import numpy as np
import pytest

from nnssl_ext.planners.normalization import choose_normalization, nnsslPercentileNormalization, tail_reach


def scheme(masked: bool = False) -> nnsslPercentileNormalization:
    return nnsslPercentileNormalization(use_mask_for_norm=masked, intensityproperties={})


def test_outlier_is_clipped_to_the_percentile_and_the_rest_standardised():
    # 0..999 without air: percentiles 0.5 and 99.5 of 0..999 are 4.995 and 994.005, by linear interpolation
    image = np.random.default_rng(0).permutation(1000).reshape(10, 10, 10).astype(np.float32)
    image[image == 999] = 1e6
    found = scheme().run(image)
    kept = np.clip(np.arange(1000.0), 4.995, 994.005)
    np.testing.assert_allclose(found.max(), (994.005 - kept.mean()) / kept.std(), rtol=1e-4)
    np.testing.assert_allclose(found.min(), (4.995 - kept.mean()) / kept.std(), rtol=1e-4)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-4)
    assert found.dtype == np.float32 and image.max() == 1e6  # the input is left alone


def test_scale_and_offset_of_the_scanner_do_not_matter():
    image = np.random.default_rng(1).gamma(2.0, size=(12, 14, 10)).astype(np.float32)
    np.testing.assert_allclose(scheme().run(image), scheme().run(3e4 * image + 500), atol=2e-3)


def test_how_much_air_surrounds_the_body_does_not_matter():
    rng = np.random.default_rng(2)
    room = rng.normal(10, 2, (64, 64, 64)).astype(np.float32)
    room[20:44, 20:44, 20:44] = rng.normal(500, 50, (24, 24, 24))
    tight = room[16:48, 16:48, 16:48]
    found, wide = scheme().run(tight.copy()), scheme().run(room)[16:48, 16:48, 16:48]
    np.testing.assert_allclose(found, wide, atol=0.02)
    by_zscore = (room - room.mean()) / room.std()
    assert abs(by_zscore[16:48, 16:48, 16:48] - (tight - tight.mean()) / tight.std()).max() > 1  # nnU-Net's does


def test_mask_leaves_the_outside_at_zero_and_labels_do_not_count():
    rng = np.random.default_rng(3)
    image = rng.normal(100, 10, (10, 10, 10)).astype(np.float32)
    image[:3] = 0
    outside = np.where(np.arange(10)[:, None, None] < 3, -1, 0) * np.ones((10, 10, 10), int)
    found = scheme(masked=True).run(image, outside)
    assert (found[:3] == 0).all()
    np.testing.assert_allclose([found[3:].mean(), found[3:].std()], [0, 1], atol=1e-4)
    labelled = np.where(rng.random(image.shape) < 0.3, 2, outside)
    labelled[:3] = -1
    np.testing.assert_array_equal(found, scheme(masked=True).run(image, labelled))


def test_without_mask_the_segmentation_is_not_read():
    image = np.random.default_rng(4).normal(size=(8, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(scheme().run(image), scheme().run(image, np.full(image.shape, -1)))


def test_nan_and_constant_images_stay_finite():
    image = np.random.default_rng(5).normal(size=(8, 8, 8)).astype(np.float32)
    image[0, 0, :4] = [np.nan, np.inf, -np.inf, 1]
    found = scheme().run(image)
    assert np.isfinite(found).all() and abs(found.mean()) < 0.1
    assert (scheme().run(np.full((4, 4, 4), 7, np.float32)) == 0).all()
    assert (scheme().run(np.full((4, 4, 4), np.nan, np.float32)) == 0).all()


def test_tail_reach_by_hand():
    assert tail_reach(np.full(100, 3.0)) == 0
    assert tail_reach(np.r_[np.zeros(1000), 1.0]) == float("inf")
    # 0..1000: percentiles 5 and 995, extremes 5 beyond, 990 apart
    np.testing.assert_allclose(tail_reach(np.arange(1001.0)), 5 / 990)
    # one voxel at 1985 among 0..1000 (the top one moved): (1985 - 995) / 990
    np.testing.assert_allclose(tail_reach(np.r_[np.arange(1000.0), 1985.0]), 1.0)


def test_gaussian_and_rayleigh_noise_are_light():
    rng = np.random.default_rng(6)
    assert tail_reach(rng.normal(size=1_000_000)) < 0.7
    assert tail_reach(rng.rayleigh(size=1_000_000)) < 0.7


def test_choice_of_scheme():
    assert choose_normalization("CT", [9.0])[0] == "CTNormalization"
    assert choose_normalization("zscore", [9.0])[0] == "ZScoreNormalization"  # asked for by name
    assert choose_normalization("T1", [0.3] * 9)[0] == "ZScoreNormalization"
    heavy, reason = choose_normalization("T1", [0.3, 0.3, 0.3, 2.0])
    assert heavy == "nnsslPercentileNormalization" and "25%" in reason


@pytest.mark.parametrize("files", [slice(0, 40), slice(100, 140)])
def test_hippocampus_has_heavy_tails(test_data, files):
    found = sorted((test_data / "Task04_Hippocampus" / "imagesTr").glob("h*.nii.gz"))[files]
    reaches = [tail_reach(np.asarray(nibabel.load(file).dataobj).ravel()) for file in found]
    assert choose_normalization("MRI", reaches)[0] == "nnsslPercentileNormalization"
