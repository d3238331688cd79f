"""Label-free foreground, on phantoms with a known answer and on real scans."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnssl_ext.data.foreground import foreground_mask
from nnssl_ext.errors import NnsslError


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def ellipsoid(shape, radii, centre=None):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    centre = np.array(shape) / 2 if centre is None else np.array(centre)
    return (((grid - centre) / np.array(radii)) ** 2).sum(-1) <= 1


def ct(rng, shape=(24, 64, 64)):
    """A trunk in air at -1000 HU with lungs that leave the volume at both ends, a thin carbon table, noise of 15 HU."""
    body = ellipsoid(shape, (1e6, 22, 28))
    lung = ellipsoid(shape, (1e6, 10, 8), (12, 32, 20)) | ellipsoid(shape, (1e6, 10, 8), (12, 32, 44))
    image = np.where(body, 40.0, -1000.0)
    image[lung] = -850
    image[:, 60, 10:54] = -700
    return (image + rng.normal(0, 15, shape)).astype(np.int16), body


def mr(rng, scale, shape=(24, 64, 64)):
    """A head with tissues of 0.2 to 1, a strong coil profile, Rician noise of 3 %."""
    head = ellipsoid(shape, (14, 26, 22))
    tissue = np.where(ellipsoid(shape, (10, 20, 17)), 0.7, 0.35) * head
    tissue[ellipsoid(shape, (4, 6, 6))] = 0.2
    profile = np.linspace(0.6, 1.4, shape[1])[None, :, None]
    real, imaginary = rng.normal(0, 0.03, (2, *shape))
    return (scale * np.hypot(tissue * profile + real, imaginary)).astype(np.float32), head


def test_ct_air_and_table_are_background_and_lungs_are_not():
    image, body = ct(np.random.default_rng(0))
    mask = foreground_mask(image)
    assert_covers(mask, body)
    assert not mask[:, 60, 10:54].any()


def assert_covers(mask, truth):
    """All of it, and at most two voxels around it (a low threshold on a smoothed image is generous on purpose)."""
    assert mask[truth].mean() > 0.99
    assert not (mask & ~ndimage.binary_dilation(truth, iterations=3)).any()
    assert (mask & ~ndimage.binary_dilation(truth, iterations=2)).sum() < 0.02 * truth.sum()


@pytest.mark.parametrize("scale", [1.0, 1e3, 1.7e6])
def test_mr_head_is_found_at_any_intensity_scale(scale):
    image, head = mr(np.random.default_rng(1), scale)
    assert_covers(foreground_mask(image), head)


def test_scaling_and_shifting_intensities_changes_nothing():
    image, _ = mr(np.random.default_rng(1), 1.0)
    np.testing.assert_array_equal(foreground_mask(image), foreground_mask(image * 512 + 4096))


def test_a_few_bright_voxels_do_not_hide_the_head():
    image, head = mr(np.random.default_rng(2), 100.0)
    image[12, 30:34, 30:34] = 1.7e6
    assert_covers(foreground_mask(image), head)


def test_skull_stripped_zeros_are_background_exactly_and_dark_fluid_inside_is_not():
    rng = np.random.default_rng(3)
    brain = ellipsoid((32, 40, 40), (12, 15, 14))
    image = np.where(brain, rng.normal(500, 80, brain.shape), 0)
    image[ellipsoid(brain.shape, (3, 3, 3))] = 0
    np.testing.assert_array_equal(foreground_mask(image), brain)


def test_scanner_circle_below_air_is_background_too():
    image, body = ct(np.random.default_rng(4))
    outside = ~ellipsoid(image.shape, (1e6, 31, 31))
    image[outside] = -3024
    mask = foreground_mask(image)
    assert_covers(mask, body)
    assert not (mask & outside).any()


def test_a_crop_of_tissue_is_all_foreground():
    image, _ = mr(np.random.default_rng(5), 100.0)
    assert foreground_mask(image[6:18, 20:44, 22:42]).mean() > 0.99


def test_thin_volumes_keep_their_foreground():
    image, body = ct(np.random.default_rng(6), (2, 64, 64))
    assert_covers(foreground_mask(image), body)


def test_constant_and_not_finite_images_are_refused():
    with pytest.raises(NnsslError, match="no label-free foreground: all voxels equal 7"):
        foreground_mask(np.full((4, 5, 6), 7))
    broken = np.random.default_rng(0).normal(size=(4, 5, 6))
    broken[0, 0, 0] = np.nan
    with pytest.raises(NnsslError, match="NaN or infinite"):
        foreground_mask(broken)


def test_hippocampus_crops_are_all_foreground(test_data):
    files = sorted((test_data / "Task04_Hippocampus" / "imagesTr").glob("[!.]*.nii.gz"))[::10]
    assert files
    assert min(foreground_mask(read(path)).mean() for path in files) > 0.95


def test_real_ct_and_mr(test_data):
    folder = test_data / "ct_mr_examples"
    image, organs = read(folder / "example_ct_sm.nii.gz"), read(folder / "example_seg.nii.gz") > 0
    mask = foreground_mask(image)
    assert mask[organs].mean() > 0.999  # bowel gas and lungs included
    assert 0.55 < mask.mean() < 0.75
    assert (image[~mask] < -300).mean() > 0.9  # the table is what is not air there
    image = read(folder / "example_mr_sm.nii.gz")
    mask = foreground_mask(image)
    assert 0.75 < mask.mean() < 0.9
    assert np.median(image[~mask]) < 10
    assert np.median(image[mask]) > 100
